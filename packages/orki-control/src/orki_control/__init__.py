"""orki-control."""
