"""The `orki` command."""

from orki_server.cli.root import main

__all__ = ["main"]
