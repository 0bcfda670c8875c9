"""What stands behind `publish`, `notes` and `rehearsal`."""
