"""Which events of unknown fate are in their stream."""

from __future__ import annotations

__all__ = ["find_landed"]

from typing import Final

from orki_contract.errors import EventUndecodable
from orki_events.connection import Connection
from orki_events.envelope import ENVELOPE_FIELD, event_id_of

_PAGE: Final = 1_000
_PAGES: Final = 200


async def find_landed(link: Connection, key: str, behind: str, wanted: set[bytes]) -> set[bytes]:
    """Searches the entries behind one for event ids.

    Args:
        link: To the server.
        key: The stream's key.
        behind: Entry id that the publisher knows to be older than what it searches.
        wanted: Event ids.

    Returns:
        Those that are there. At most 200,000 entries are looked at: what other writers put behind those is too much to
        wait for, and readers drop a repeated event by its id.

    Raises:
        OrkiError: The server does not answer or refuses.
    """
    found: set[bytes] = set()
    start = behind
    for _ in range(_PAGES):
        entries = await link.execute((b"XRANGE", key, f"({start}", b"+", b"COUNT", _PAGE))
        for _, values in entries:
            raw = dict(zip(values[::2], values[1::2], strict=True)).get(ENVELOPE_FIELD, b"")
            try:
                event_id = event_id_of(raw)
            except EventUndecodable:
                continue
            if event_id in wanted:
                found.add(event_id)
        if len(entries) < _PAGE or found == wanted:
            break
        start = entries[-1][0].decode()
    return found
