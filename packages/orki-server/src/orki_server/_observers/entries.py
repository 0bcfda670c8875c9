"""Reads and decodes the entries of any registered stream, with sensitive fields redacted.

Entries are decoded with the image that was registered with their stream, without generated code, so that new streams
need no restart. Of an entry that cannot be decoded only the size is shown, since any part of it may be sensitive.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import logging
import re
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, Final

from google.protobuf.message import DecodeError, Message

from orki.events.v1.envelope_pb2 import Envelope
from orki_contract.errors import EventUndecodable, InvalidArgument, InvalidContract, OrkiError, TooLarge, UnknownStream
from orki_contract.images import message_class
from orki_contract.read import read_image
from orki_contract.trace import Span
from orki_events import Events
from orki_events import entries as stream_entries
from orki_events.connection import Connection
from orki_events.entries import ZERO_ID, parse_id, stream_keys
from orki_events.groups import checked, parse_stream_state
from orki_events.registry import StreamRegistry, StreamVersion
from orki_server._observers.redaction import Redaction, time_text

_PAGE: Final = 200
_REGISTRY_INTERVAL: Final = 1.0
_STOP_GRACE: Final = 1.0
DRAIN_TIMEOUT: Final = 2.0
"""Maximum time in which an observer acknowledges what it holds, also if the server does not answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodedEntry:
    """A decoded entry.

    Attributes:
        event_id: Id of the event, 32 hex digits; if the envelope is invalid, a hash of key and entry id.
        stream: Name of the stream.
        key: Redis key of its partition.
        entry_id: Entry id in the partition.
        time_us: Time of the event, in microseconds since the Unix epoch; if unknown, the time it was written.
        producer: Id of its producer; empty if unknown.
        sequence: Its sequence number from that producer; 0 if unknown.
        traceparent: Its span; empty outside a trace.
        span: The span parsed, with its parent.
        message: Full name of the message type.
        body: The message as redacted JSON; None if it cannot be decoded.
        problem: Why the entry cannot be decoded; empty if it can.
    """

    event_id: str
    stream: str
    key: str
    entry_id: str
    time_us: int
    producer: str
    sequence: int
    traceparent: str
    span: Span | None
    message: str
    body: dict[str, Any] | None
    problem: str

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of the message, or the problem if the message cannot be decoded."""
        return {"problem": self.problem} if self.body is None else self.body

    def to_json(self) -> dict[str, Any]:
        """Return JSON with stable keys, `event_id` first; `event` is null and `problem` set if decoding failed."""
        shown: dict[str, Any] = {
            "event_id": self.event_id,
            "stream": self.stream,
            "key": self.key,
            "entry_id": self.entry_id,
            "time": time_text(self.time_us),
            "producer": self.producer,
            "sequence": self.sequence,
            "traceparent": self.traceparent,
            "parent_span_id": self.span.parent_id if self.span else "",
            "message": self.message,
            "event": self.body,
        }
        if self.problem:
            shown["problem"] = self.problem
        return shown


class EntryDecoder:
    """Decodes the entries of one stream."""

    def __init__(self, stream: StreamVersion) -> None:
        self._name = stream.contract.name
        self._message = stream.contract.message
        self._class: type[Message] | None = None
        self._redaction = Redaction(())
        self._problem = "the stream was registered without a contract"
        if stream.image is not None:
            try:
                self._load(stream.image)
            except InvalidContract as error:
                self._problem = f"the contract registered with the stream is invalid: {error.message}"

    def _load(self, image: bytes) -> None:
        @functools.cache
        def known(full_name: str) -> type[Message] | None:
            try:
                return message_class(image, full_name)
            except InvalidContract:
                return None

        self._redaction = Redaction(read_image(image).contract.sensitive, known)
        self._class = message_class(image, self._message)

    def decode(self, key: str, entry_id: str, raw_envelope: bytes | None, raw_event: bytes | None) -> DecodedEntry:
        """Decode an entry from its fields `e` (envelope) and `d` (event); None for a missing field."""
        envelope, problem = _envelope(raw_envelope)
        body, why = self._body(raw_event)
        position = hashlib.sha256(f"{key}/{entry_id}".encode()).hexdigest()[:32]
        return DecodedEntry(
            event_id=envelope.event_id.hex() if envelope else position,
            stream=self._name,
            key=key,
            entry_id=entry_id,
            time_us=envelope.time_us if envelope else int(entry_id.partition("-")[0]) * 1000,
            producer=envelope.producer if envelope else "",
            sequence=envelope.sequence if envelope else 0,
            traceparent=envelope.traceparent if envelope else "",
            span=stream_entries.envelope_span(envelope) if envelope else None,
            message=self._message,
            body=body,
            problem="; ".join(each for each in (problem, why) if each),
        )

    def _body(self, raw: bytes | None) -> tuple[dict[str, Any] | None, str]:
        if raw is None:
            return None, "the entry has no event"
        if self._class is None:
            return None, f"{self._problem}; {len(raw)} bytes not shown"
        try:
            return self._redaction.redacted(self._class.FromString(raw)), ""
        except DecodeError:
            return None, f"{len(raw)} bytes that are not a valid {self._message}, not shown"


class EntryDecoders:
    """A cache of decoders by stream; a decoder is replaced when the contract of its stream changes."""

    def __init__(self) -> None:
        self._decoders: dict[str, tuple[tuple[str, str], EntryDecoder]] = {}

    def of(self, stream: StreamVersion) -> EntryDecoder:
        """Return the decoder of a stream."""
        name, version = stream.contract.name, (stream.digest, stream.contract.message)
        cached = self._decoders.get(name)
        if cached is None or cached[0] != version:
            cached = self._decoders[name] = (version, EntryDecoder(stream))
        return cached[1]


def _envelope(raw: bytes | None) -> tuple[Envelope | None, str]:
    if raw is None:
        return None, "the entry has no envelope"
    try:
        return stream_entries.decode_envelope(raw), ""
    except EventUndecodable:
        return None, f"an invalid envelope of {len(raw)} bytes"


class MultiStreamReader:
    """Reads all streams, or some, in the order of their entries. Each client needs its own reader."""

    def __init__(
        self,
        link: Connection,
        *,
        names: Collection[str] = (),
        cursors: Mapping[str, str] | None = None,
        max_wait: float = 1.0,
    ) -> None:
        """Create a reader; `start` must be called before `read`.

        Args:
            link: A connection for this reader alone, since reads block.
            names: Names of the streams to read; empty for all.
            cursors: The cursor of each stream, as returned by `parse_feed_cursor`. A stream without one is read from
                its beginning. None reads every stream from its end.
            max_wait: Maximum wait of `read`, in seconds.
        """
        self._link = link
        self._names = frozenset(names)
        self._given = None if cursors is None else dict(cursors)
        self._max_wait = max_wait
        self._registry = StreamRegistry()
        self._decoders = EntryDecoders()
        self._streams: dict[str, StreamVersion] = {}
        self._owner: dict[str, str] = {}
        self._positions: dict[str, str] = {}
        self._cursors: dict[str, str] = {}
        self._registry_read_at = 0.0

    @property
    def streams(self) -> tuple[str, ...]:
        """Names of the streams that are read."""
        return tuple(self._streams)

    @property
    def cursor(self) -> str:
        """The cursor after the entries that `read` returned, as formatted by `format_feed_cursor`."""
        return format_feed_cursor(self._cursors)

    async def start(self) -> list[dict[str, str]]:
        """Read the registry and set the start positions.

        Returns:
            Partitions whose entries after the cursor may have been trimmed: `stream`, `key`, `after` (entry id of the
            cursor) and `first` (id of the oldest remaining entry).

        Raises:
            UnknownStream: A name is not registered; the error lists the registered names.
            InvalidArgument: A cursor has another number of partitions than its stream.
            TooLarge: There are too many streams for one cursor.
        """
        registered = await self._registry.streams(self._link)
        known = {each.contract.name for each in registered}
        if unknown := sorted(self._names - known):
            raise UnknownStream(
                f'no stream "{unknown[0]}" is registered (registered: {", ".join(sorted(known)) or "none yet"})'
            )
        newest = await self._newest(registered) if self._given is None else {}
        self._follow(registered, newest)
        self._registry_read_at = time.monotonic()
        _ = self.cursor
        return await self._gaps() if self._given else []

    async def read(self) -> list[tuple[str, DecodedEntry]]:
        """Return the next entries, oldest first, each with the cursor after it; none if `max_wait` ends first.

        Raises:
            TooLarge: There are too many streams for one cursor.
            OrkiError: The server does not answer or refuses the command; `read` may be called again.
        """
        if time.monotonic() - self._registry_read_at > _REGISTRY_INTERVAL:
            self._follow(await self._registry.streams(self._link), {})
            self._registry_read_at = time.monotonic()
        if not self._positions:
            return await self._wait()
        command = (b"XREAD", b"COUNT", _PAGE, b"BLOCK", round(self._max_wait * 1000), b"STREAMS")
        keys, ids = zip(*self._positions.items(), strict=True)
        timeout = self._link.answer_timeout + self._max_wait
        reply = await self._link.execute((*command, *keys, *ids), timeout=timeout)
        decoded = [self._decode(key.decode(), entry) for key, entries in reply or () for entry in entries]
        decoded.sort(key=lambda each: parse_id(each.entry_id))
        return [(self._advance(each), each) for each in decoded]

    def _advance(self, entry: DecodedEntry) -> str:
        self._positions[entry.key] = entry.entry_id
        self._cursors[entry.stream] = self._stream_cursor(entry.stream)
        return self.cursor

    def _stream_cursor(self, name: str) -> str:
        return stream_entries.format_cursor(self._positions[key] for key in stream_keys(self._streams[name].contract))

    async def _wait(self) -> list[tuple[str, DecodedEntry]]:
        # Blocks in the server, so that a lost connection is noticed.
        command = (b"BLPOP", b"orki:nothing-is-here", b"%.3f" % self._max_wait)
        await self._link.execute(command, timeout=self._link.answer_timeout + 1.0)
        return []

    def _decode(self, key: str, entry: Any) -> DecodedEntry:
        entry_id, flat = entry
        fields = dict(zip(flat[::2], flat[1::2], strict=True))
        decoder = self._decoders.of(self._streams[self._owner[key]])
        return decoder.decode(key, entry_id.decode(), fields.get(b"e"), fields.get(b"d"))

    def _follow(self, registered: list[StreamVersion], newest: Mapping[str, str]) -> None:
        for each in registered:
            name = each.contract.name
            if self._names and name not in self._names:
                continue
            keys = stream_keys(each.contract)
            if name not in self._streams and self._given and name in self._given:
                newest = {
                    **newest,
                    **dict(zip(keys, stream_entries.parse_cursor(self._given[name], len(keys)), strict=True)),
                }
            self._streams[name] = each
            for key in keys:
                self._owner[key] = name
                self._positions.setdefault(key, newest.get(key, ZERO_ID))
            self._cursors[name] = self._stream_cursor(name)

    async def _newest(self, registered: list[StreamVersion]) -> dict[str, str]:
        keys = [key for each in registered for key in stream_keys(each.contract)]
        replies = await self._link.pipeline(*((b"XREVRANGE", key, b"+", b"-", b"COUNT", 1) for key in keys))
        return {key: reply[0][0].decode() for key, reply in zip(keys, map(checked, replies), strict=True) if reply}

    async def _gaps(self) -> list[dict[str, str]]:
        keys = [key for key, position in self._positions.items() if position != ZERO_ID]
        if not keys:
            return []
        types = await self._link.pipeline(*((b"TYPE", key) for key in keys))
        existing = [key for key, reply in zip(keys, types, strict=True) if checked(reply) == b"stream"]
        states = await self._link.pipeline(*((b"XINFO", b"STREAM", key) for key in existing)) if existing else []
        gaps = []
        for key, reply in zip(existing, states, strict=True):
            state, after = parse_stream_state(checked(reply)), self._positions[key]
            if state.added > state.length and state.first_id and parse_id(state.first_id) > parse_id(after):
                gaps.append({"stream": self._owner[key], "key": key, "after": after, "first": state.first_id})
        return gaps


async def poll_registry(
    events: Events,
    stopped: asyncio.Event,
    callback: Callable[[list[StreamVersion]], Awaitable[None]],
    log: logging.Logger,
) -> None:
    """Call `callback` with all registered streams, about every second, until `stopped` is set.

    Retryable errors are logged and retried.

    Raises:
        OrkiError: Redis refuses the connection or a command, and a retry would not help.
    """
    failing = False
    while not stopped.is_set():
        try:
            await _unless_stopped(_poll(events, callback), stopped)
            if failing:
                log.info("the event server answers again")
            failing = False
        except OrkiError as error:
            if not error.retryable:
                raise
            if not failing:
                log.warning("%s; retrying", error.message)
            failing = True
        try:
            await asyncio.wait_for(stopped.wait(), _REGISTRY_INTERVAL)
        except TimeoutError:
            continue


async def _poll(events: Events, callback: Callable[[list[StreamVersion]], Awaitable[None]]) -> None:
    await callback(await events.registered_streams())


async def _unless_stopped(work: Coroutine[Any, Any, None], stopped: asyncio.Event) -> None:
    """Run `work`. Once `stopped` is set, it has a moment to end: the server may not answer."""
    working, stopping = asyncio.ensure_future(work), asyncio.ensure_future(stopped.wait())
    try:
        await asyncio.wait((working, stopping), return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait((working,), timeout=_STOP_GRACE)
        if working.done():
            working.result()
    finally:
        for task in (working, stopping):
            task.cancel()
        await asyncio.gather(working, stopping, return_exceptions=True)


MAX_CURSOR: Final = 7_000
"""Maximum cursor in bytes. Browsers send it back in a header, and servers limit headers to 8 KiB."""

_EMPTY_CURSOR: Final = "nowhere"
_PART: Final = re.compile(r"([a-z][a-z0-9_.-]{0,63})=([0-9]+-[0-9]+(?:_[0-9]+-[0-9]+)*)")


def format_feed_cursor(cursors: Mapping[str, str]) -> str:
    """Join the cursors of streams into one feed cursor; raises TooLarge if it does not fit into a header."""
    cursor = ";".join(f"{stream}={cursors[stream]}" for stream in sorted(cursors)) or _EMPTY_CURSOR
    if len(cursor) > MAX_CURSOR:
        raise TooLarge(
            f"the cursor of {len(cursors)} streams has {len(cursor)} bytes; browsers send back at most {MAX_CURSOR}: "
            "follow fewer streams with ?stream=NAME"
        )
    return cursor


def parse_feed_cursor(cursor: str) -> dict[str, str]:
    """Return the cursors of the streams in a feed cursor, none for an empty one; raises InvalidArgument if invalid."""
    cursors: dict[str, str] = {}
    for part in cursor.split(";") if cursor not in ("", _EMPTY_CURSOR) else ():
        match = _PART.fullmatch(part)
        if match is None or match[1] in cursors or len(cursor) > MAX_CURSOR:
            raise InvalidArgument("Last-Event-ID is not an id of this feed; omit it to start with the newest events")
        cursors[match[1]] = match[2]
    return cursors
