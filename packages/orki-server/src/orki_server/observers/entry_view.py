"""Entries of any registered stream made readable by the image that was registered with it, sensitive fields redacted.

Nothing here was generated: a stream that a user registered a second ago is read like orki's own. What cannot be read is
told by its size and never shown, since nobody can say what of it is sensitive.
"""

from __future__ import annotations

__all__ = ["EntryReader", "EntryView", "Readers"]

import hashlib
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import DecodeError, Message

from orki.events.v1.envelope_pb2 import Envelope
from orki_contract.errors import EventUndecodable, InvalidContract
from orki_contract.images import message_class
from orki_contract.read import read_image
from orki_contract.trace import Span
from orki_events.entries import decode_envelope, envelope_span
from orki_events.registry import RegisteredStream
from orki_server.observers.redaction import Redaction
from orki_server.observers.timestamps import time_text


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
