"""Entries of any registered stream made readable by the image that was registered with it, sensitive fields redacted.

Nothing here was generated: a stream that a user registered a second ago is read like orki's own. What cannot be read is
told by its size and never shown, since nobody can say what of it is sensitive.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

from google.protobuf.message import DecodeError, Message

from orki.events.v1.envelope_pb2 import Envelope
from orki_contract.errors import EventUndecodable, InvalidArgument, InvalidContract, OrkiError, TooLarge, UnknownStream
from orki_contract.images import message_class
from orki_contract.read import read_image
from orki_contract.trace import Span
from orki_events import Events
from orki_events.connection import Connection
from orki_events.entries import (
    ZERO_ID,
    decode_envelope,
    envelope_span,
    format_cursor,
    parse_cursor,
    parse_id,
    stream_keys,
)
from orki_events.groups import parse_stream_state
from orki_events.registry import RegisteredStream, StreamRegistry
from orki_server._observers.redaction import Redaction, time_text


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryView:
    """One entry, readable.

    Attributes:
        event_id: Identity of the event, 32 hex digits; made from the place of the entry where its envelope is broken.
        stream: Name of the stream.
        key: Redis key of its partition.
        entry_id: Entry id there.
        time_us: When it happened, in microseconds since the Unix epoch; when it was written, where that is not known.
        producer: Who wrote it; empty where that is not known.
        sequence: Its number among those of the producer; 0 where that is not known.
        traceparent: Its span; empty outside a trace.
        span: The same, parsed, with its parent.
        message: Full name of its message.
        body: The message as JSON, redacted; None where it cannot be read.
        problem: Why it cannot be read; empty when it can.
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

    def to_json(self) -> dict[str, Any]:
        """The entry with stable keys, `event_id` first; `event` is null and `problem` there where it cannot be read."""
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


class EntryReader:
    """Reads the entries of one stream."""

    def __init__(self, stream: RegisteredStream) -> None:
        self._name = stream.contract.name
        self._message = stream.contract.message
        self._class: type[Message] | None = None
        self._redaction = Redaction(())
        self._problem = "no contract was registered with the stream"
        if stream.image is not None:
            try:
                self._learn(stream.image)
            except InvalidContract as error:
                self._problem = f"the contract that was registered with the stream is not valid: {error.message}"

    def _learn(self, image: bytes) -> None:
        classes: dict[str, type[Message] | None] = {}

        def known(full_name: str) -> type[Message] | None:
            if full_name not in classes:
                try:
                    classes[full_name] = message_class(image, full_name)
                except InvalidContract:
                    classes[full_name] = None
            return classes[full_name]

        self._redaction = Redaction(read_image(image).contract.sensitive, known)
        self._class = message_class(image, self._message)

    def view(self, key: str, entry_id: str, raw_envelope: bytes | None, raw_event: bytes | None) -> EntryView:
        """The entry with these fields, `e` and `d`; None for a field that it lacks."""
        envelope, problem = _envelope(raw_envelope)
        body, why = self._body(raw_event)
        place = hashlib.sha256(f"{key}/{entry_id}".encode()).hexdigest()[:32]
        return EntryView(
            event_id=envelope.event_id.hex() if envelope else place,
            stream=self._name,
            key=key,
            entry_id=entry_id,
            time_us=envelope.time_us if envelope else int(entry_id.partition("-")[0]) * 1000,
            producer=envelope.producer if envelope else "",
            sequence=envelope.sequence if envelope else 0,
            traceparent=envelope.traceparent if envelope else "",
            span=envelope_span(envelope) if envelope else None,
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
            return None, f"{len(raw)} bytes that hold no {self._message}, not shown"


class Readers:
    """A reader for each registered stream, made when first needed and anew when the stream's contract changes."""

    def __init__(self) -> None:
        self._readers: dict[str, tuple[tuple[str, str], EntryReader]] = {}

    def of(self, stream: RegisteredStream) -> EntryReader:
        """The reader of a stream."""
        name, version = stream.contract.name, (stream.digest, stream.contract.message)
        kept = self._readers.get(name)
        if kept is None or kept[0] != version:
            kept = self._readers[name] = (version, EntryReader(stream))
        return kept[1]


def _envelope(raw: bytes | None) -> tuple[Envelope | None, str]:
    if raw is None:
        return None, "the entry has no envelope"
    try:
        return decode_envelope(raw), ""
    except EventUndecodable:
        return None, f"an envelope of {len(raw)} bytes that cannot be read"


_LOOK_AGAIN_S: Final = 1.0
_COUNT: Final = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class PossibleGap:
    """Entries behind a cursor were trimmed; whether unread ones were among them cannot be told.

    Attributes:
        stream: Name of the stream.
        key: Redis key of the partition.
        after: The cursor: entry id there.
        first: Id of the oldest entry that is left.
    """

    stream: str
    key: str
    after: str
    first: str


class MergedReader:
    """Reads all streams, or some, from where a reader stands. One reader for each client."""

    def __init__(
        self,
        link: Connection,
        *,
        names: Collection[str] = (),
        cursors: Mapping[str, str] | None = None,
        block_ms: int = 1000,
    ) -> None:
        """Reads nothing yet.

        Args:
            link: A connection of this reader's own, since reads block.
            names: Only these streams; empty: all.
            cursors: Where the reader stands in each stream, as `parse_feed_cursor` reads it from `place`; a stream that
                is not among them is read from its beginning. None: every stream from its end.
            block_ms: Longest wait of a `read`.
        """
        self._link = link
        self._names = frozenset(names)
        self._given = None if cursors is None else dict(cursors)
        self._block_ms = block_ms
        self._registry = StreamRegistry()
        self._readers = Readers()
        self._streams: dict[str, RegisteredStream] = {}
        self._owner: dict[str, str] = {}
        self._places: dict[str, str] = {}
        self._cursors: dict[str, str] = {}
        self._looked = 0.0

    @property
    def streams(self) -> tuple[str, ...]:
        """Names of the streams that are read."""
        return tuple(self._streams)

    @property
    def place(self) -> str:
        """Where the reader stands in all streams after what `read` returned, as `format_feed_cursor` writes it.

        Raises:
            TooLarge: There are too many streams for one word.
        """
        return format_feed_cursor(self._cursors)

    async def start(self) -> list[PossibleGap]:
        """Takes up its place.

        Returns:
            What may have been lost since the cursors were made.

        Raises:
            UnknownStream: A name is not registered; the message lists those that are.
            InvalidArgument: A cursor belongs to a stream with another number of partitions.
            TooLarge: There are too many streams for one word.
            OrkiError: The server does not answer or refuses.
        """
        registered = await self._registry.streams(self._link)
        known = {each.contract.name for each in registered}
        if unknown := sorted(self._names - known):
            raise UnknownStream(
                f'no stream "{unknown[0]}" is registered (registered: {", ".join(sorted(known)) or "none yet"})'
            )
        newest = await self._newest(registered) if self._given is None else {}
        self._follow(registered, newest)
        self._looked = time.monotonic()
        _ = self.place
        return await self._gaps() if self._given else []

    async def read(self) -> list[tuple[str, EntryView]]:
        """The next entries, oldest first, each with the reader's place after it; none when nothing came for a while.

        Raises:
            TooLarge: There are too many streams for one word.
            OrkiError: The server does not answer or refuses; reading may be tried again.
        """
        if time.monotonic() - self._looked > _LOOK_AGAIN_S:
            self._follow(await self._registry.streams(self._link), {})
            self._looked = time.monotonic()
        places = list(self._places.items())
        if not places:
            return await self._wait()
        command = (b"XREAD", b"COUNT", _COUNT, b"BLOCK", self._block_ms, b"STREAMS")
        keys, ids = zip(*places, strict=True)
        timeout = self._link.answer_timeout + self._block_ms / 1000
        reply = await self._link.execute((*command, *keys, *ids), timeout=timeout)
        views = [self._view(key.decode(), entry) for key, entries in reply or () for entry in entries]
        return [(self._pass(view), view) for view in sorted(views, key=lambda each: parse_id(each.entry_id))]

    def _pass(self, view: EntryView) -> str:
        self._places[view.key] = view.entry_id
        self._cursors[view.stream] = self._cursor(view.stream)
        return self.place

    def _cursor(self, name: str) -> str:
        return format_cursor(self._places[key] for key in stream_keys(self._streams[name].contract))

    async def _wait(self) -> list[tuple[str, EntryView]]:
        # Blocks in the server, so that a server that went away is noticed.
        await self._link.execute(
            (b"BLPOP", b"orki:nothing-is-here", b"%.3f" % (self._block_ms / 1000)),
            timeout=self._link.answer_timeout + 1.0,
        )
        return []

    def _view(self, key: str, entry: Any) -> EntryView:
        entry_id, flat = entry
        fields = dict(zip(flat[::2], flat[1::2], strict=True))
        reader = self._readers.of(self._streams[self._owner[key]])
        return reader.view(key, entry_id.decode(), fields.get(b"e"), fields.get(b"d"))

    def _follow(self, registered: list[RegisteredStream], newest: Mapping[str, str]) -> None:
        for each in registered:
            name = each.contract.name
            if self._names and name not in self._names:
                continue
            keys = stream_keys(each.contract)
            if name not in self._streams and self._given and name in self._given:
                newest = {**newest, **dict(zip(keys, parse_cursor(self._given[name], len(keys)), strict=True))}
            self._streams[name] = each
            for key in keys:
                self._owner[key] = name
                self._places.setdefault(key, newest.get(key, ZERO_ID))
            self._cursors[name] = self._cursor(name)

    async def _newest(self, registered: list[RegisteredStream]) -> dict[str, str]:
        keys = [key for each in registered for key in stream_keys(each.contract)]
        replies = await self._link.pipeline(*((b"XREVRANGE", key, b"+", b"-", b"COUNT", 1) for key in keys))
        return {
            key: _checked(reply)[0][0].decode() for key, reply in zip(keys, replies, strict=True) if _checked(reply)
        }

    async def _gaps(self) -> list[PossibleGap]:
        keys = [key for key, place in self._places.items() if place != ZERO_ID]
        if not keys:
            return []
        types = await self._link.pipeline(*((b"TYPE", key) for key in keys))
        there = [key for key, reply in zip(keys, types, strict=True) if _checked(reply) == b"stream"]
        states = await self._link.pipeline(*((b"XINFO", b"STREAM", key) for key in there)) if there else []
        gaps = []
        for key, reply in zip(there, states, strict=True):
            state = parse_stream_state(_checked(reply))
            if state.added > state.length and state.first_id and parse_id(state.first_id) > parse_id(self._places[key]):
                gap = PossibleGap(stream=self._owner[key], key=key, after=self._places[key], first=state.first_id)
                gaps.append(gap)
        return gaps


def _checked(reply: Any) -> Any:
    if isinstance(reply, OrkiError):
        raise reply
    return reply


Use = Callable[[list[RegisteredStream]], Awaitable[None]]

_REGISTRY_INTERVAL: Final = 1.0


async def follow_registered(
    events: Events,
    stopped: asyncio.Event,
    use: Callable[[list[RegisteredStream]], Awaitable[None]],
    log: logging.Logger,
) -> None:
    """Calls `use` with all registered streams, about every second, until `stopped` is set.

    An event server that does not answer is waited for; one that refuses for good ends it.

    Raises:
        OrkiError: The server refuses, for a reason that time does not mend.
    """
    silent = False
    while not stopped.is_set():
        try:
            await use(await events.registered_streams())
            if silent:
                log.info("the event server answers again")
            silent = False
        except OrkiError as error:
            if not error.retryable:
                raise
            if not silent:
                log.warning("%s; trying again until it does", error.message)
            silent = True
        try:
            await asyncio.wait_for(stopped.wait(), _REGISTRY_INTERVAL)
        except TimeoutError:
            continue


LONGEST_CURSOR: Final = 7_000
"""Bytes; browsers send it back in a header, and servers bound those at 8 KiB."""

_NOWHERE: Final = "nowhere"
_PART: Final = re.compile(r"([a-z][a-z0-9_.-]{0,63})=([0-9]+-[0-9]+(?:_[0-9]+-[0-9]+)*)")


def format_feed_cursor(cursors: Mapping[str, str]) -> str:
    """The word for these streams' cursors.

    Raises:
        TooLarge: There are more streams and partitions than fit into a header.
    """
    word = ";".join(f"{stream}={cursors[stream]}" for stream in sorted(cursors)) or _NOWHERE
    if len(word) > LONGEST_CURSOR:
        raise TooLarge(
            f"the places in {len(cursors)} streams take {len(word)} bytes, more than the {LONGEST_CURSOR} that a "
            "browser sends back: follow fewer streams, with ?stream=NAME"
        )
    return word


def parse_feed_cursor(word: str) -> dict[str, str]:
    """The cursors that a word names; an empty word names none.

    Raises:
        InvalidArgument: It was not made by `format_feed_cursor`.
    """
    cursors: dict[str, str] = {}
    for part in word.split(";") if word not in ("", _NOWHERE) else ():
        match = _PART.fullmatch(part)
        if match is None or match[1] in cursors or len(word) > LONGEST_CURSOR:
            raise InvalidArgument("Last-Event-ID is no id of this feed: leave it out to begin with the newest events")
        cursors[match[1]] = match[2]
    return cursors
