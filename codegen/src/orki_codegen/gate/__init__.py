"""The version gate: holds every distribution against what users have, and refuses versions that promise too little."""

from orki_codegen.gate.command import register, run

__all__ = ["register", "run"]
