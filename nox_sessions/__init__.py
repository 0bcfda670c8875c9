"""The implementation of the sessions of noxfile.py."""
