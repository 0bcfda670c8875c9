"""Following a stream without a group: a plain cursor in the hands of a reader, who holds nothing when he goes away."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any, Final, Generic, TypeVar

from google.protobuf.message import DecodeError

from orki.events.v1.envelope_pb2 import Envelope
from orki_contract.errors import EventUndecodable, OrkiError
from orki_contract.model import Stream
from orki_contract.trace import Span
from orki_events._deliveries import Decode
from orki_events.connection import Connection
from orki_events.entries import (
    ENVELOPE_FIELD,
    ZERO_ID,
    decode_envelope,
    envelope_span,
    event_id_of,
    format_cursor,
    parse_cursor,
    split_entry,
    stream_keys,
)

T = TypeVar("T")
_PAGE: Final = 500
_WAIT_S: Final = 0.5
_log = logging.getLogger("orki.events")


class TailEntry(Generic[T]):
    """An entry that a reader came by.

    Attributes:
        cursor: Where to go on behind this entry: hand it to `tail(after=…)`.
        key: Redis key of its partition.
        entry_id: Its id there.
    """

    __slots__ = ("_decode", "_fields", "cursor", "entry_id", "key")

    def __init__(self, key: str, entry: list[Any], cursor: str, decode: Decode[T]) -> None:
        """Made by the runtime."""
        self.key = key
        self.entry_id = str(entry[0], "ascii")
        self.cursor = cursor
        self._fields: list[bytes] = entry[1]
        self._decode = decode

    @property
    def envelope(self) -> Envelope:
        """Who published it, when, in which trace.

        Raises:
            EventUndecodable: The entry holds no envelope.
        """
        return decode_envelope(split_entry(self._fields)[0])

    @property
    def event_id(self) -> bytes:
        """Identity of the event, 16 bytes. Errors as those of `envelope`."""
        return event_id_of(split_entry(self._fields)[0])

    @property
    def span(self) -> Span | None:
        """Span in which the event happened; None outside a trace. Errors as those of `envelope`."""
        return envelope_span(self.envelope)

    @property
    def event(self) -> T:
        """The event; its undecoded bytes for a reader of raw entries.

        Raises:
            EventUndecodable: The entry does not hold what the stream's contract says.
        """
        raw = split_entry(self._fields)[1]
        try:
            return self._decode(raw)
        except DecodeError as error:
            raise EventUndecodable(f"entry {self.entry_id} of {self.key} is not what the contract says") from error


async def follow_stream(
    link: Connection, stream: Stream, decode: Decode[T], after: str, follow: bool, block_ms: int
) -> AsyncIterator[TailEntry[T]]:
    """The entries behind a cursor.

    Args:
        link: A connection of the reader's own.
        stream: The stream.
        decode: For the field `d`.
        after: A cursor, `earliest` or `latest`.
        follow: Whether to wait for more at the end.
        block_ms: Longest wait in the server.

    Raises:
        InvalidArgument: `after` is no cursor of this stream.
        OrkiError: The server refuses; where it does not answer, following goes on, and reading to the end fails.
    """
    keys = stream_keys(stream)
    named = after in ("earliest", "latest")
    places = [ZERO_ID] * len(keys) if named else parse_cursor(after, len(keys))
    resolved = after != "latest"
    while True:
        try:
            if not resolved:
                places = await _newest(link, keys)
                resolved = True
            found = await _read(link, keys, places, block_ms if follow else 0)
        except OrkiError as error:
            if not (follow and error.retryable):
                raise
            _log.warning('following stream "%s": %s', stream.name, error.message)
            await asyncio.sleep(_WAIT_S)
            continue
        for key, entries in found:
            partition = keys.index(key.decode())
            for entry in entries:
                places[partition] = entry[0].decode()
                yield TailEntry(keys[partition], entry, format_cursor(places), decode)
        if not follow and not found:
            return


async def _newest(link: Connection, keys: tuple[str, ...]) -> list[str]:
    places = []
    for reply in await link.pipeline(*((b"XREVRANGE", key, b"+", b"-", b"COUNT", 1) for key in keys)):
        if isinstance(reply, OrkiError):
            raise reply
        places.append(reply[0][0].decode() if reply else ZERO_ID)
    return places


async def _read(link: Connection, keys: tuple[str, ...], places: list[str], block_ms: int) -> list[Any]:
    waiting = (b"BLOCK", block_ms) if block_ms else ()
    command = (b"XREAD", b"COUNT", _PAGE, *waiting, b"STREAMS", *keys, *places)
    reply = await link.execute(command, timeout=link.answer_timeout + block_ms / 1_000)
    return reply or []


_SEARCH_PAGE: Final = 1_000
_SEARCH_PAGES: Final = 200


async def find_published(link: Connection, key: str, behind: str, wanted: set[bytes]) -> set[bytes]:
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
    for _ in range(_SEARCH_PAGES):
        entries = await link.execute((b"XRANGE", key, f"({start}", b"+", b"COUNT", _SEARCH_PAGE))
        for _, values in entries:
            raw = dict(zip(values[::2], values[1::2], strict=True)).get(ENVELOPE_FIELD, b"")
            try:
                event_id = event_id_of(raw)
            except EventUndecodable:
                continue
            if event_id in wanted:
                found.add(event_id)
        if len(entries) < _SEARCH_PAGE or found == wanted:
            break
        start = entries[-1][0].decode()
    return found
