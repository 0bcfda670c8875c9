"""Generator of orki contracts."""
