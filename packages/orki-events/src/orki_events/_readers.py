"""Access to streams without a consumer: tails, pages and searches."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any, Final, Generic, TypeVar

from google.protobuf.message import DecodeError

from orki.events.v1.envelope_pb2 import Envelope
from orki_contract.errors import EventUndecodable, OrkiError
from orki_contract.model import Stream
from orki_contract.trace import Span
from orki_events import entries as layout
from orki_events.connection import Connection
from orki_events.groups import checked

T = TypeVar("T")
_BATCH: Final = 500
_PAGE: Final = 1_000
_MAX_SEARCHED: Final = 200_000
_RETRY_WAIT: Final = 0.5
_log = logging.getLogger("orki.events")


class TailEntry(Generic[T]):
    """An entry of a stream, read without a group.

    Attributes:
        cursor: Position after this entry, for `tail(after=…)`.
        key: Redis key of its partition.
        entry_id: Its id in the partition.
    """

    __slots__ = ("_decode", "_fields", "cursor", "entry_id", "key")

    def __init__(self, key: str, entry: list[Any], cursor: str, decode: Callable[[bytes], T]) -> None:
        self.key = key
        self.entry_id = str(entry[0], "ascii")
        self.cursor = cursor
        self._fields: list[bytes] = entry[1]
        self._decode = decode

    @property
    def envelope(self) -> Envelope:
        """The envelope: producer, time and trace of the event.

        Raises:
            EventUndecodable: The entry has no envelope.
        """
        return layout.decode_envelope(layout.split_entry(self._fields)[0])

    @property
    def event_id(self) -> bytes:
        """Identity of the event (16 bytes). Raises the same errors as `envelope`."""
        return layout.event_id_of(layout.split_entry(self._fields)[0])

    @property
    def span(self) -> Span | None:
        """Span in which the event happened; None outside a trace. Raises the same errors as `envelope`."""
        return layout.envelope_span(self.envelope)

    @property
    def event(self) -> T:
        """The event; undecoded bytes for a reader of raw entries.

        Raises:
            EventUndecodable: The entry does not contain the message of the stream's contract.
        """
        raw = layout.split_entry(self._fields)[1]
        try:
            return self._decode(raw)
        except DecodeError as error:
            raise EventUndecodable(f"entry {self.entry_id} of {self.key} does not fit the contract") from error


async def follow_stream(
    connection: Connection,
    stream: Stream,
    decode: Callable[[bytes], T],
    after: str,
    follow: bool,
    block_timeout: float,
) -> AsyncIterator[TailEntry[T]]:
    """Yield the entries after a cursor; see `Events.tail`. The connection must not be shared."""
    keys = layout.stream_keys(stream)
    named = after in ("earliest", "latest")
    positions = [layout.ZERO_ID] * len(keys) if named else layout.parse_cursor(after, len(keys))
    resolved = after != "latest"
    while True:
        try:
            if not resolved:
                positions = await _newest(connection, keys)
                resolved = True
            found = await _read(connection, keys, positions, block_timeout if follow else 0.0)
        except OrkiError as error:
            if not (follow and error.retryable):
                raise
            _log.warning('following stream "%s": %s', stream.name, error.message)
            await asyncio.sleep(_RETRY_WAIT)
            continue
        for key, entries in found:
            partition = keys.index(key.decode())
            for entry in entries:
                positions[partition] = entry[0].decode()
                yield TailEntry(keys[partition], entry, layout.format_cursor(positions), decode)
        if not follow and not found:
            return


async def _newest(connection: Connection, keys: tuple[str, ...]) -> list[str]:
    positions = []
    for reply in await connection.pipeline(*((b"XREVRANGE", key, b"+", b"-", b"COUNT", 1) for key in keys)):
        positions.append(reply[0][0].decode() if checked(reply) else layout.ZERO_ID)
    return positions


async def _read(connection: Connection, keys: tuple[str, ...], positions: list[str], block: float) -> list[Any]:
    waiting = (b"BLOCK", round(block * 1_000)) if block else ()
    command = (b"XREAD", b"COUNT", _BATCH, *waiting, b"STREAMS", *keys, *positions)
    return await connection.execute(command, timeout=connection.answer_timeout + block) or []


async def read_entries(
    connection: Connection, key: str, after: str | None = None
) -> AsyncGenerator[tuple[bytes, Any], None]:
    """Yield the ids and fields of a partition's entries, oldest first."""
    start: str | bytes = b"-" if after is None else f"({after}"
    while True:
        page = await connection.execute((b"XRANGE", key, start, b"+", b"COUNT", _PAGE))
        for entry_id, fields in page:
            yield entry_id, fields
        if len(page) < _PAGE:
            return
        start = b"(" + page[-1][0]


async def find_published(connection: Connection, key: str, after: str, wanted: set[bytes]) -> set[bytes]:
    """Return the event ids among `wanted` that are in a partition after the entry `after`.

    The search ends after 200,000 entries. A publisher then repeats the event, and readers drop it by its id.
    """
    found: set[bytes] = set()
    searched = 0
    async with contextlib.aclosing(read_entries(connection, key, after)) as entries:
        async for _, fields in entries:
            searched += 1
            raw = dict(zip(fields[::2], fields[1::2], strict=True)).get(layout.ENVELOPE_FIELD, b"")
            with contextlib.suppress(EventUndecodable):
                if (event_id := layout.event_id_of(raw)) in wanted:
                    found.add(event_id)
            if found == wanted or searched >= _MAX_SEARCHED:
                break
    return found
