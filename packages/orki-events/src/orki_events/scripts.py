"""The scripts of this package, for an operator that loads them: roles of least privilege may only call them."""

from __future__ import annotations

__all__ = ["load_scripts", "package_scripts"]

from orki_contract.errors import OrkiError
from orki_events import _commands, _lanes, _lease_keeper, _letters, _position_store, _trimming, groups, registry
from orki_events.connection import Connection, Script

_MODULES = (_commands, _lanes, _lease_keeper, _letters, _position_store, _trimming, groups, registry)


def package_scripts() -> tuple[Script, ...]:
    """Return all scripts that publishers and consumers call."""
    found = {each.digest: each for module in _MODULES for each in vars(module).values() if isinstance(each, Script)}
    return tuple(found.values())


async def load_scripts(connection: Connection) -> int:
    """Load the scripts that the server does not have, and return their number.

    Raises:
        OrkiError: The server does not answer, or the user may not load scripts.
    """
    scripts = package_scripts()
    present = await connection.execute((b"SCRIPT", b"EXISTS", *(each.digest for each in scripts)))
    missing = [each for each, known in zip(scripts, present, strict=True) if not known]
    replies = await connection.pipeline(*((b"SCRIPT", b"LOAD", each.text) for each in missing)) if missing else []
    for reply in replies:
        if isinstance(reply, OrkiError):
            raise reply
    return len(missing)
