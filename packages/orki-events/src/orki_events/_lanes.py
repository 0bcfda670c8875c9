"""What a publisher sends: encoded events, in one lane for each Redis key. No I/O and no clock.

A lane sends its events in chunks. A chunk of several events is a transaction, which the server accepts or refuses as a
whole: a server that is out of memory for a moment cannot refuse an event and accept a later one of the same key. A
chunk that was refused is sent again before anything else of its lane.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import astuple, dataclass, field
from itertools import islice
from typing import Any, Final, NamedTuple

from google.protobuf.message import Message

from orki_contract import EventStream, errors
from orki_contract.backoff import Jitter, JitterOptions
from orki_contract.model import Durability, Retention
from orki_contract.trace import Span
from orki_events.connection import Command, Script, pack
from orki_events.entries import EVENT_ID_BYTES

RETRY: Final = JitterOptions(initial=0.05, maximum=0.5, spread=0.5)
_COMMAND_OVERHEAD: Final = 100
_MULTI: Final = pack((b"MULTI",))
_EXEC: Final = pack((b"EXEC",))
ADD_BELOW_CEILING: Final = Script("""\
-- KEYS: partition.  ARGV: maximum number of entries, then the four words of each entry.
-- Adds the first entries for which there is room, and returns their ids.
local room, ids = tonumber(ARGV[1]) - redis.call('XLEN', KEYS[1]), {}
for at = 2, math.min(#ARGV, 4 * room + 1), 4 do
  ids[#ids + 1] = redis.call('XADD', KEYS[1], '*', ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 3])
end
return ids
""")
_LOW_BITS: Final = 21
_LOW: Final = (1 << _LOW_BITS) - 1


def _longer(command: Command, words: int) -> bytes:
    """Encode the beginning of a command that `words` more words follow."""
    packed = pack(command)
    return b"*%d%b" % (len(command) + words, packed[packed.index(b"\r\n") :])


@dataclass(slots=True)
class PublishCounts:
    """Counters of a publisher since its start.

    Attributes:
        published: Events that the server has.
        refused: Events whose caller got an error.
        abandoned: Events of `collect` that could not be sent in time.
        repeated: Events that were sent again after a broken connection.
        found: Events that were found in the stream after a broken connection, and therefore not sent again.
        pipelines: Pipelines sent.
    """

    published: int = 0
    refused: int = 0
    abandoned: int = 0
    repeated: int = 0
    found: int = 0
    pipelines: int = 0

    def __add__(self, other: PublishCounts) -> PublishCounts:
        return PublishCounts(*map(sum, zip(astuple(self), astuple(other), strict=True)))


class Outgoing(NamedTuple):
    """An event to publish.

    Attributes:
        message: The event.
        span: Span in which it happened.
        event_id: Its identity (16 bytes); the default is a new one.
        time_us: Time of the event in microseconds since the Unix epoch; the default is now.
    """

    message: Message
    span: Span | None = None
    event_id: bytes | None = None
    time_us: int | None = None


@dataclass(slots=True)
class Ticket:
    """The outcome of one or more events, for which a caller waits."""

    future: asyncio.Future[None]
    open: int = 0
    error: errors.OrkiError | None = None

    def settle(self, count: int, error: errors.OrkiError | None) -> None:
        self.open -= count
        self.error = self.error or error
        if self.open == 0 and not self.future.done():
            if self.error is None:
                self.future.set_result(None)
            else:
                self.future.set_exception(self.error)


class Item(NamedTuple):
    """An event that waits to be sent or answered.

    Attributes:
        number: Its position among all events of the publisher.
        event_id: Its identity.
        packed: The fields of its entry, encoded.
        deadline: Time at which publishing fails.
        ticket: The outcome for which a caller waits; None for a collected event.
    """

    number: int
    event_id: bytes
    packed: bytes
    deadline: float
    ticket: Ticket | None

    @property
    def size(self) -> int:
        return len(self.packed) + _COMMAND_OVERHEAD


class EnvelopeEncoder:
    """Encodes the entries' fields of one producer, byte for byte as protobuf and hiredis do."""

    def __init__(self, producer: str) -> None:
        raw = producer.encode()
        self._producer = b"\x12%b%b\x18" % (_varint(len(raw)), raw)
        # Parts of the last envelope that the next one probably shares.
        self._high = -1
        self._high_encoded = b""
        self._span: Span | None = None
        self._span_encoded = b""

    def fields(self, event_id: bytes, sequence: int, time_us: int, span: Span | None, message: bytes) -> bytes:
        """Return the fields `e` and `d` of an entry as words of a Redis command.

        Raises:
            InvalidArgument: The event id has not 16 bytes.
        """
        if len(event_id) != EVENT_ID_BYTES:
            raise errors.InvalidArgument(f"an event id has {EVENT_ID_BYTES} bytes, not {len(event_id)}")
        if span is not self._span:
            self._span, self._span_encoded = span, _encoded_span(span)
        high = time_us >> _LOW_BITS
        if high <= 0:
            time = b"\x20" + _varint(time_us & (1 << 64) - 1) if time_us else b""
        else:
            if high != self._high:
                self._high, self._high_encoded = high, _varint(high)
            low = time_us & _LOW
            time = b"\x20%c%c%c%b" % (low & 127 | 128, low >> 7 & 127 | 128, low >> 14 | 128, self._high_encoded)
        number = _varint(sequence)
        envelope = b"\x0a\x10%b%b%b%b%b" % (event_id, self._producer, number, time, self._span_encoded)
        return b"$1\r\ne\r\n$%d\r\n%b\r\n$1\r\nd\r\n$%d\r\n%b\r\n" % (len(envelope), envelope, len(message), message)


def _varint(value: int) -> bytes:
    if value < 1 << 7:
        return b"%c" % value
    if value < 1 << 14:
        return b"%c%c" % (value & 127 | 128, value >> 7)
    return b"%c%c%b" % (value & 127 | 128, value >> 7 & 127 | 128, _varint(value >> 14))


def _encoded_span(span: Span | None) -> bytes:
    if span is None:
        return b""
    values = ((b"\x2a", span.traceparent.encode()), (b"\x32", span.parent_id.encode()))
    return b"".join(tag + _varint(len(value)) + value for tag, value in values if value)


@dataclass(slots=True, eq=False)
class Lane:
    """The events of one Redis key, in their order.

    Attributes:
        key: The key.
        handle: The stream.
        queue: Events that were not sent yet.
        sending: The chunk that is being sent, or will be sent again.
        doubtful: Whether the server may have the chunk.
        due: Earliest time of the next attempt.
        last_id: Id of the newest known entry of the key; empty before the stream is prepared.
        backoff: Delays of the next attempts.
    """

    key: str
    handle: EventStream[Any, Any]
    queue: deque[Item] = field(default_factory=deque)
    sending: list[Item] = field(default_factory=list)
    doubtful: bool = False
    due: float = 0.0
    last_id: str = ""
    backoff: Jitter = field(default_factory=lambda: Jitter(RETRY))

    @property
    def level(self) -> tuple[Durability, int]:
        """The durability of the stream, with the number of replicas."""
        return self.handle.contract.durability, self.handle.contract.replicas

    @property
    def first(self) -> int | None:
        """Number of the oldest event that is not settled."""
        item = self.sending[0] if self.sending else self.queue[0] if self.queue else None
        return item.number if item else None

    def take(self, entries: int, size: int) -> int:
        """Begin a chunk of at most `entries` events and `size` bytes, but at least one event; return its bytes."""
        if not self.sending:
            taken = 0
            for item in islice(self.queue, entries):
                taken += item.size
                if taken > size and self.sending:
                    break
                self.sending.append(item)
            for _ in self.sending:
                self.queue.popleft()
        return sum(item.size for item in self.sending)

    def packed(self, retention: Retention) -> tuple[bytes, int]:
        """Encode the chunk, and return it with the number of its replies.

        Args:
            retention: What the key keeps. It is encoded late: a deployment may change it meanwhile.
        """
        items = [item.packed for item in self.sending]
        if retention.ceiling:
            script = (b"EVALSHA", ADD_BELOW_CEILING.digest, 1, self.key, retention.ceiling)
            return _longer(script, 4 * len(items)) + b"".join(items), 1
        begin = _longer((b"XADD", self.key, b"MAXLEN", b"~", retention.max_entries, b"*"), 4)
        body = begin + begin.join(items)
        if len(items) == 1:
            return body, 1
        return b"%b%b%b" % (_MULTI, body, _EXEC), len(items) + 2

    def late(self, now: float) -> list[Item]:
        """Remove and return the events whose time is over: the oldest ones."""
        late = [item for item in self.sending if item.deadline <= now]
        self.sending = self.sending[len(late) :]
        while not self.sending and self.queue and self.queue[0].deadline <= now:
            late.append(self.queue.popleft())
        return late

    def full(self) -> errors.EventsStreamFull:
        """Return the error for an entry that would exceed the ceiling."""
        contract = self.handle.contract
        return errors.EventsStreamFull(
            f'stream "{contract.name}" keeps {contract.retention.ceiling} entries that its groups have not settled '
            f"({self.key}); see `orki streams` for the group that lags"
        )

    def failed(self, now: float) -> None:
        """Wait before the next attempt."""
        self.due = now + self.backoff.failed()

    def done(self) -> list[Item]:
        """End the chunk, and return its events."""
        self.doubtful = False
        done, self.sending = self.sending, []
        return done


@dataclass(slots=True)
class StreamLanes:
    """A stream that this process publishes.

    Attributes:
        handle: The stream.
        lanes: Its lanes by key.
        sequence: Number of its newest event.
        ready: Whether it is registered and has its groups.
    """

    handle: EventStream[Any, Any]
    lanes: dict[str, Lane] = field(default_factory=dict)
    sequence: int = 0
    ready: bool = False


def misfit(handle: EventStream[Any, Any], message: Message) -> errors.InvalidArgument:
    wanted = handle.message.DESCRIPTOR.full_name
    return errors.InvalidArgument(f'stream "{handle.contract.name}" takes {wanted}, not {type(message).__name__}')


def oversize(handle: EventStream[Any, Any], raw: bytes, limit: int) -> errors.TooLarge:
    return errors.TooLarge(f'an event for stream "{handle.contract.name}" has {len(raw)} bytes, more than {limit}')
