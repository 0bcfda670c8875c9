"""What stands behind the sessions of noxfile.py."""
