"""Access to streams without a consumer: tails, pages, searches, and dead letters with their replay."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final, Generic, TypeVar

from google.protobuf.message import DecodeError

from orki.events.v1.envelope_pb2 import DeadLetter, Envelope
from orki_contract.errors import EventUndecodable, OrkiError
from orki_contract.model import Group, Stream, milliseconds
from orki_contract.trace import Span
from orki_events import entries as layout
from orki_events._commands import HANDED_BACK
from orki_events.connection import Connection
from orki_events.groups import checked, groups_key

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


@dataclass(frozen=True, slots=True)
class DeadLetterEntry(Generic[T]):
    """One dead letter.

    Attributes:
        letter_id: Id of its entry in the dead letter stream.
        reason: The origin of the event and the reason for the dead letter.
        event: The event; None if it cannot be decoded.
        envelope_bytes: The field `e`; empty if the entry had none.
        event_bytes: The field `d`; empty if the entry had none.
    """

    letter_id: str
    reason: DeadLetter
    event: T | None
    envelope_bytes: bytes = field(repr=False)
    event_bytes: bytes = field(repr=False)


async def list_dead_letters(
    connection: Connection, stream: Stream, group: Group, decode: Callable[[bytes], T], count: int, after: str
) -> list[DeadLetterEntry[T]]:
    found = []
    command = (b"XRANGE", _dead_letter_key(stream, group), f"({after}", b"+", b"COUNT", count)
    for letter_id, fields in await connection.execute(command):
        values = dict(zip(fields[::2], fields[1::2], strict=True))
        reason = _reason(values.get(layout.REASON_FIELD, b""))
        if reason.group != group.name or reason.stream != stream.name:
            # Several groups may share one dead letter stream.
            continue
        raw = values.get(layout.DATA_FIELD)
        event: T | None = None
        if raw is not None:
            try:
                event = decode(raw)
            except DecodeError:
                event = None
        envelope = values.get(layout.ENVELOPE_FIELD, b"")
        found.append(DeadLetterEntry(letter_id.decode(), reason, event, envelope, raw or b""))
    return found


async def replay_dead_letters(
    connection: Connection, stream: Stream, group: Group, letters: Iterable[DeadLetterEntry[Any]]
) -> list[str]:
    """Make the group process entries again, and return the ids of the replayed letters.

    The entry becomes pending and claimable at once, with its deliveries reset; then its letter is deleted. A crash
    between these steps replays the entry and keeps the letter. If the entry was trimmed, the letter is kept too.
    """
    replayed = []
    for letter in letters:
        key = letter.reason.key
        claimed = await connection.execute(
            (
                *(b"XCLAIM", key, group.name, HANDED_BACK, 0, letter.reason.entry_id),
                *(b"IDLE", milliseconds(group.ack_deadline), b"RETRYCOUNT", 0, b"FORCE", b"JUSTID"),
            )
        )
        if claimed:
            for reply in await connection.pipeline(
                (b"HINCRBY", groups_key(key), f"dead_lettered:{group.name}", -1),
                (b"XDEL", _dead_letter_key(stream, group), letter.letter_id),
            ):
                checked(reply)
            replayed.append(letter.letter_id)
    return replayed


def _dead_letter_key(stream: Stream, group: Group) -> str:
    return layout.tagged_key("ev", stream.dead_letter(group))


def _reason(raw: bytes) -> DeadLetter:
    try:
        return DeadLetter.FromString(raw)
    except DecodeError:
        return DeadLetter()
