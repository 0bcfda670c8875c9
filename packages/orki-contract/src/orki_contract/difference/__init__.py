"""`orki-contract diff`: two contracts, wherever they come from, and what lies between them."""

from orki_contract.difference.command import register, run

__all__ = ["register", "run"]
