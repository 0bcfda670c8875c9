"""The layout of stream entries: keys, partitions, ids, and the fields `e` and `d`. No I/O and no clock.

`orki/events/v1/envelope.proto` specifies the layout. Code that writes entries by other means, such as a store inside
its own transaction, takes keys and envelopes from here.
"""

from __future__ import annotations

__all__ = [
    "DATA_FIELD",
    "ENVELOPE_FIELD",
    "EVENT_ID_BYTES",
    "ONLY_GROUP_FIELD",
    "ORIGIN_FIELD",
    "REASON_FIELD",
    "ZERO_ID",
    "EntryId",
    "decode_entries",
    "decode_envelope",
    "encode_envelope",
    "envelope_span",
    "event_id_of",
    "format_cursor",
    "new_event_id",
    "only_group",
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
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, NamedTuple, TypeVar

from google.protobuf.message import DecodeError, Message

from orki.events.v1.envelope_pb2 import Envelope
from orki_contract.errors import EventUndecodable, InvalidArgument
from orki_contract.model import Stream
from orki_contract.trace import Span, parse_traceparent

T = TypeVar("T")
ENVELOPE_FIELD: Final = b"e"
"""Field of an entry that holds the Envelope."""
DATA_FIELD: Final = b"d"
"""Field of an entry that holds the stream's message."""
REASON_FIELD: Final = b"x"
"""Field of a dead letter that holds the DeadLetter."""
ORIGIN_FIELD: Final = b"o"
"""Field of a dead letter that holds its group and the key of its partition, joined by a space."""
ONLY_GROUP_FIELD: Final = b"g"
"""Field of a replayed event that names the only group that processes it."""
EVENT_ID_BYTES: Final = 16
ZERO_ID: Final = "0-0"
"""The id before every entry."""

# The first bytes of an encoded envelope: field 1, length-delimited, 16 bytes.
_EVENT_ID_PREFIX: Final = b"\x0a\x10"
_PREFIX_END: Final = EVENT_ID_BYTES + 2
_USUAL: Final = {(ENVELOPE_FIELD, DATA_FIELD, _EVENT_ID_PREFIX, True)}
_MAX_PART: Final = 2**64 - 1
_ID: Final = re.compile(r"([0-9]{1,20})-([0-9]{1,20})")


def new_event_id() -> bytes:
    """Return a new identity for an event: 16 random bytes."""
    return os.urandom(EVENT_ID_BYTES)


def tagged_key(kind: str, name: str, partition: int | None = None) -> str:
    """Return a Redis key whose hash tag is the partition, so that a partition's keys share a cluster slot."""
    return f"orki:{kind}:{{{name}}}" if partition is None else f"orki:{kind}:{{{name}:{partition}}}"


def stream_keys(stream: Stream, kind: str = "ev") -> tuple[str, ...]:
    """Return the Redis keys of a stream's partitions, by partition number."""
    if stream.partitions == 1:
        return (tagged_key(kind, stream.name),)
    return tuple(tagged_key(kind, stream.name, partition) for partition in range(stream.partitions))


def partition_of(value: str | int | bytes, partitions: int) -> int:
    """Return the partition of a key value: CRC-32 (IEEE) of its bytes modulo the number of partitions.

    Strings are encoded as UTF-8, integers and enum values as decimal digits, booleans as 0 or 1.
    """
    if isinstance(value, str):
        raw = value.encode()
    elif isinstance(value, int):
        raw = b"%d" % value
    else:
        raw = value
    return zlib.crc32(raw) % partitions


def stream_key(stream: Stream, message: Message) -> str:
    """Return the Redis key for a message."""
    if stream.partitions == 1:
        return tagged_key("ev", stream.name)
    value = getattr(message, stream.partition_key)
    return tagged_key("ev", stream.name, partition_of(value, stream.partitions))


def encode_envelope(*, event_id: bytes, producer: str, sequence: int, time_us: int, span: Span | None) -> bytes:
    """Encode the field `e`.

    Args:
        event_id: 16 bytes.
        producer: Name of the publishing process, unique to its run.
        sequence: Number of the event among its producer's events on this stream, from 1.
        time_us: Time of the event in microseconds since the Unix epoch.
        span: Span in which it happened.

    Raises:
        InvalidArgument: The event id has another length.
    """
    if len(event_id) != EVENT_ID_BYTES:
        raise InvalidArgument(f"an event id has {EVENT_ID_BYTES} bytes, not {len(event_id)}")
    envelope = Envelope(event_id=event_id, producer=producer, sequence=sequence, time_us=time_us)
    if span is not None:
        envelope.traceparent = span.traceparent
        envelope.parent_span_id = span.parent_id
    return envelope.SerializeToString()


def decode_envelope(raw: bytes) -> Envelope:
    """Decode the field `e`.

    Raises:
        EventUndecodable: The bytes are not an envelope with an event id.
    """
    try:
        envelope = Envelope.FromString(raw)
    except DecodeError as error:
        raise EventUndecodable(f"field e ({len(raw)} bytes) is not an envelope: {error}") from error
    if len(envelope.event_id) != EVENT_ID_BYTES:
        raise EventUndecodable(f"the envelope's event id has {len(envelope.event_id)} bytes, not {EVENT_ID_BYTES}")
    return envelope


def event_id_of(raw: bytes) -> bytes:
    """Return the event id in the field `e`. An id that comes first, as orki writes it, is read without decoding.

    Raises:
        EventUndecodable: The bytes are not an envelope with an event id.
    """
    if raw[:2] == _EVENT_ID_PREFIX and len(raw) >= EVENT_ID_BYTES + 2:
        return raw[2 : EVENT_ID_BYTES + 2]
    return decode_envelope(raw).event_id


def split_entry(fields: list[bytes]) -> tuple[bytes, bytes]:
    """Return the fields `e` and `d` of an entry; other fields are ignored.

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


def only_group(fields: list[bytes]) -> str:
    """Return the only group that processes an entry; empty if all do."""
    found = dict(zip(fields[::2], fields[1::2], strict=False))
    return found.get(ONLY_GROUP_FIELD, b"").decode(errors="replace")


def decode_entries(entries: Sequence[list[Any]], decode: Callable[[bytes], T]) -> tuple[list[bytes], list[T]]:
    """Return the event ids and the decoded messages of entries.

    Raises:
        EventUndecodable: An entry lacks a field, or its envelope has no event id.
        DecodeError: A message cannot be decoded.
    """
    # Each step is one comprehension: calls for each entry would cost more than the work.
    if {len(fields) for _, fields in entries} == {4}:
        heads = {(fields[0], fields[2], fields[1][:2], len(fields[1]) >= _PREFIX_END) for _, fields in entries}
        if heads == _USUAL:
            return [fields[1][2:_PREFIX_END] for _, fields in entries], [decode(fields[3]) for _, fields in entries]
    found = [split_entry(fields) for _, fields in entries]
    return [event_id_of(raw) for raw, _ in found], [decode(message) for _, message in found]


def envelope_span(envelope: Envelope) -> Span | None:
    """Return the span in which the event happened; None outside a trace."""
    span = parse_traceparent(envelope.traceparent)
    if span is None or not envelope.parent_span_id:
        return span
    return Span(span.trace_id, span.span_id, envelope.parent_span_id, span.flags)


class EntryId(NamedTuple):
    """An entry id (`MILLISECONDS-SEQUENCE`), ordered as the server orders it."""

    milliseconds: int
    sequence: int

    def __str__(self) -> str:
        return f"{self.milliseconds}-{self.sequence}"


def parse_id(value: str | bytes) -> EntryId:
    """Parse an entry id.

    Raises:
        InvalidArgument: The value is not an entry id.
    """
    text = value.decode("ascii", "replace") if isinstance(value, bytes) else value
    match = _ID.fullmatch(text)
    if match is None:
        raise InvalidArgument(f'"{text}" is not an entry id (expected MILLISECONDS-SEQUENCE)')
    found = EntryId(int(match[1]), int(match[2]))
    if max(found) > _MAX_PART:
        raise InvalidArgument(f'"{text}" is not an entry id: each part has 64 bits')
    return found


def predecessor(value: EntryId) -> EntryId:
    """Return the largest smaller id; for 0-0, the id itself."""
    if value.sequence > 0:
        return EntryId(value.milliseconds, value.sequence - 1)
    if value.milliseconds > 0:
        return EntryId(value.milliseconds - 1, _MAX_PART)
    return value


def format_cursor(positions: Iterable[str]) -> str:
    """Return a reader's position as one string: the last id read of each partition, by partition number."""
    return "_".join(positions)


def parse_cursor(cursor: str, partitions: int) -> list[str]:
    """Return the last id read of each partition.

    Raises:
        InvalidArgument: The text is not a cursor of a stream with this number of partitions.
    """
    positions = cursor.split("_")
    if len(positions) != partitions:
        raise InvalidArgument(f'"{cursor}" is a cursor over {len(positions)} partitions; the stream has {partitions}')
    return [str(parse_id(position)) for position in positions]
