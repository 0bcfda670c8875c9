"""The `orki` command."""
