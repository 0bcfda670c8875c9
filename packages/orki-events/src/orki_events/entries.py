"""How an entry lies in a stream: its key, its partition, and the fields `e` and `d`. No I/O and no clock.

The layout is the contract's (`orki/events/v1/envelope.proto`): whoever writes entries by other means, such as a store
inside its own transaction, takes the keys and the envelope from here.
"""

from __future__ import annotations

__all__ = [
    "DATA_FIELD",
    "ENVELOPE_FIELD",
    "EVENT_ID_BYTES",
    "REASON_FIELD",
    "ZERO_ID",
    "EntryId",
    "decode_envelope",
    "decode_event",
    "encode_envelope",
    "envelope_span",
    "event_id_of",
    "format_cursor",
    "new_event_id",
    "parse_cursor",
    "parse_id",
    "partition_of",
    "predecessor",
    "split_entry",
    "stream_key",
    "stream_keys",
    "tagged_key",
]

import os
import re
import zlib
from collections.abc import Iterable
from typing import Final, NamedTuple, TypeVar

from google.protobuf.message import DecodeError, Message

from orki.events.v1.envelope_pb2 import Envelope
from orki_contract.errors import EventUndecodable, InvalidArgument
from orki_contract.model import Stream
from orki_contract.trace import Span, parse_traceparent

ENVELOPE_FIELD: Final = b"e"
"""Field of an entry that holds the Envelope."""
DATA_FIELD: Final = b"d"
"""Field of an entry that holds the stream's message."""
REASON_FIELD: Final = b"x"
"""Field of a dead letter that holds the DeadLetter."""
EVENT_ID_BYTES: Final = 16

# The first bytes of an encoded envelope: field 1, length-delimited, 16 bytes.
_EVENT_ID_PREFIX: Final = b"\x0a\x10"

E = TypeVar("E", bound=Message)


def new_event_id() -> bytes:
    """An identity for an event: 16 random bytes."""
    return os.urandom(EVENT_ID_BYTES)


def tagged_key(kind: str, name: str, partition: int | None = None) -> str:
    """A Redis key whose hash tag is the stream's partition, so that all keys of a partition share a cluster slot."""
    return f"orki:{kind}:{{{name}}}" if partition is None else f"orki:{kind}:{{{name}:{partition}}}"


def stream_keys(stream: Stream, kind: str = "ev") -> tuple[str, ...]:
    """The Redis keys of a stream's partitions, in the order of their numbers."""
    if stream.partitions == 1:
        return (tagged_key(kind, stream.name),)
    return tuple(tagged_key(kind, stream.name, partition) for partition in range(stream.partitions))


def partition_of(value: str | int | bytes, partitions: int) -> int:
    """The partition that a key value belongs to: CRC-32 (IEEE) of its bytes modulo the number of partitions.

    Strings count as UTF-8, integers and enum values as decimal digits, booleans as 0 or 1.
    """
    if isinstance(value, str):
        raw = value.encode()
    elif isinstance(value, int):
        raw = b"%d" % value
    else:
        raw = value
    return zlib.crc32(raw) % partitions


def stream_key(stream: Stream, message: Message) -> str:
    """The Redis key that takes this message."""
    if stream.partitions == 1:
        return tagged_key("ev", stream.name)
    value = getattr(message, stream.partition_key)
    return tagged_key("ev", stream.name, partition_of(value, stream.partitions))


def encode_envelope(*, event_id: bytes, producer: str, sequence: int, time_us: int, span: Span | None) -> bytes:
    """The bytes of the field `e`.

    Args:
        event_id: 16 bytes.
        producer: Name of the writing process and its run.
        sequence: Number of the event among those of its producer on this stream, from 1.
        time_us: When it happened, in microseconds since the Unix epoch.
        span: Span in which it happened.

    Raises:
        InvalidArgument: The event id has another length.
    """
    if len(event_id) != EVENT_ID_BYTES:
        raise InvalidArgument(f"an event id has {EVENT_ID_BYTES} bytes, not {len(event_id)}")
    if span is None:
        envelope = Envelope(event_id=event_id, producer=producer, sequence=sequence, time_us=time_us)
    else:
        envelope = Envelope(
            event_id=event_id,
            producer=producer,
            sequence=sequence,
            time_us=time_us,
            traceparent=span.traceparent,
            parent_span_id=span.parent_id,
        )
    return envelope.SerializeToString()


def decode_envelope(raw: bytes) -> Envelope:
    """The envelope in the field `e`.

    Raises:
        EventUndecodable: The bytes are no envelope, or one without an event id.
    """
    try:
        envelope = Envelope.FromString(raw)
    except DecodeError as error:
        raise EventUndecodable(f"field e ({len(raw)} bytes) holds no envelope: {error}") from error
    if len(envelope.event_id) != EVENT_ID_BYTES:
        raise EventUndecodable(f"the envelope's event id has {len(envelope.event_id)} bytes, not {EVENT_ID_BYTES}")
    return envelope


def decode_event(message: type[E], raw: bytes) -> E:
    """The event in the field `d`.

    Raises:
        EventUndecodable: The bytes are no such message.
    """
    try:
        return message.FromString(raw)
    except DecodeError as error:
        name = message.DESCRIPTOR.full_name
        raise EventUndecodable(f"field d ({len(raw)} bytes) holds no {name}: {error}") from error


def event_id_of(raw: bytes) -> bytes:
    """The event id in the field `e`, without decoding the rest where the id comes first, as our own writers put it.

    Raises:
        EventUndecodable: The bytes are no envelope, or one without an event id.
    """
    if raw[:2] == _EVENT_ID_PREFIX and len(raw) >= EVENT_ID_BYTES + 2:
        return raw[2 : EVENT_ID_BYTES + 2]
    return decode_envelope(raw).event_id


def split_entry(fields: list[bytes]) -> tuple[bytes, bytes]:
    """The fields `e` and `d` of an entry, whatever stands beside them.

    Raises:
        EventUndecodable: One of them is missing.
    """
    if len(fields) >= 4 and fields[0] == ENVELOPE_FIELD and fields[2] == DATA_FIELD:
        return fields[1], fields[3]
    found = dict(zip(fields[::2], fields[1::2], strict=False))
    if ENVELOPE_FIELD not in found or DATA_FIELD not in found:
        names = ", ".join(sorted(name.decode("ascii", "replace")[:20] for name in found)) or "none"
        raise EventUndecodable(f"the entry lacks the field e or d (fields: {names})")
    return found[ENVELOPE_FIELD], found[DATA_FIELD]


def envelope_span(envelope: Envelope) -> Span | None:
    """The span in which the event happened; None outside a trace."""
    span = parse_traceparent(envelope.traceparent)
    if span is None or not envelope.parent_span_id:
        return span
    return Span(span.trace_id, span.span_id, envelope.parent_span_id, span.flags)


ZERO_ID: Final = "0-0"
"""Before every entry."""

_LARGEST: Final = 2**64 - 1
_ID: Final = re.compile(r"([0-9]{1,20})-([0-9]{1,20})")


class EntryId(NamedTuple):
    """An entry id, ordered as the server orders it."""

    milliseconds: int
    sequence: int

    def __str__(self) -> str:
        return f"{self.milliseconds}-{self.sequence}"


def parse_id(value: str | bytes) -> EntryId:
    """The id in its parts.

    Raises:
        InvalidArgument: It is no entry id.
    """
    text = value.decode("ascii", "replace") if isinstance(value, bytes) else value
    match = _ID.fullmatch(text)
    if match is None:
        raise InvalidArgument(f'"{text}" is no entry id (expected MILLISECONDS-SEQUENCE)')
    found = EntryId(int(match[1]), int(match[2]))
    if max(found) > _LARGEST:
        raise InvalidArgument(f'"{text}" is no entry id: its parts have 64 bits')
    return found


def predecessor(value: EntryId) -> EntryId:
    """The largest id below this one; that of 0-0 is itself."""
    if value.sequence > 0:
        return EntryId(value.milliseconds, value.sequence - 1)
    if value.milliseconds > 0:
        return EntryId(value.milliseconds - 1, _LARGEST)
    return value


def format_cursor(positions: Iterable[str]) -> str:
    """A reader's place in a stream as one word: the last id read of each partition, in their order."""
    return "_".join(positions)


def parse_cursor(cursor: str, partitions: int) -> list[str]:
    """The last id read of each partition.

    Raises:
        InvalidArgument: It is no cursor, or one of a stream with another number of partitions.
    """
    positions = cursor.split("_")
    if len(positions) != partitions:
        raise InvalidArgument(f'"{cursor}" is a cursor over {len(positions)} partitions; the stream has {partitions}')
    return [str(parse_id(position)) for position in positions]
