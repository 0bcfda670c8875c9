"""An example of orki: a fleet that reads and measures Python files."""
