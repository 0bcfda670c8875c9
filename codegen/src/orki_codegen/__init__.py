"""The generator of orki contracts."""
