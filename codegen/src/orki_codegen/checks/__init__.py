"""`orki-checks`: orki's rules of contracts as a plugin of `buf lint` and `buf breaking`."""

from orki_codegen.checks.plugin import main

__all__ = ["main"]
