"""Push and pull consumers: deliveries, subscriptions, and handlers declared with `@consumer`."""

from __future__ import annotations

import inspect
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Generic, ParamSpec, Self, overload

from google.protobuf.message import DecodeError, Message

from orki.events.v1.envelope_pb2 import Envelope
from orki_contract import EventStream
from orki_contract.errors import EventUndecodable, HandlerRejected, InvalidSetting, OrkiError
from orki_contract.trace import Span
from orki_events._delivery_table import Dispatch, Entry
from orki_events._group_reader import GroupReader
from orki_events._options import ConsumeOptions
from orki_events.entries import decode_entries, decode_envelope, envelope_span, event_id_of, split_entry

if TYPE_CHECKING:
    # PEP 696: a handler can write `Delivery` without the event's class. Type checkers provide this module.
    from typing_extensions import TypeVar

    T = TypeVar("T", default=Any)
else:
    from typing import TypeVar

    T = TypeVar("T")
D = TypeVar("D")
E = TypeVar("E", bound=Message)
G = TypeVar("G", bound=str)
P = ParamSpec("P")

Decode = Callable[[bytes], T]
_PERMANENT: Final = (HandlerRejected, EventUndecodable)
_log = logging.getLogger("orki.events")


class _Settleable(ABC):
    """Entries of one partition, settled by `async with` or by the first call of a settling method."""

    __slots__ = ("_entries", "_key", "_open", "_reader")

    def __init__(self, reader: GroupReader, key: str, entries: Sequence[Entry]) -> None:
        self._reader = reader
        self._key = key
        self._entries = entries
        self._open = True

    @property
    def key(self) -> str:
        """Redis key of the partition."""
        return self._key

    def acknowledge(self) -> None:
        """Acknowledge the entries. Only the first settlement counts, including the one at the end of `async with`."""
        if self._close():
            self._succeed()

    def retry(self, error: Exception) -> None:
        """Report a failure. The event is delivered again, or dead-lettered at once for a HandlerRejected."""
        if self._close():
            self._fail(self._entries, error)

    def give_back(self) -> None:
        """Return unfinished events to the group. They are delivered again; this delivery does not count."""
        if self._close():
            self._reader.seen.discard(map(_event_id, self._entries))
            self._reader.give_back(self._key, list(self._entries))

    @abstractmethod
    def _succeed(self) -> None: ...

    @property
    @abstractmethod
    def _handled(self) -> Sequence[object]:
        """The events, whose sensitive values no error may show."""

    def _fail(self, entries: Sequence[Entry], error: Exception) -> None:
        self._reader.seen.discard(map(_event_id, entries))
        self._reader.failed(self._key, entries, error, isinstance(error, _PERMANENT), self._handled)

    def _close(self) -> bool:
        was_open, self._open = self._open, False
        return was_open

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.acknowledge()
        elif isinstance(error, Exception):
            self.retry(error)
        else:
            self.give_back()


class Delivery(_Settleable, Generic[T]):
    """One event, delivered to one group. `async with delivery as event:` settles it.

    If the block ends without an error, the event is acknowledged. If it raises one, the event is delivered again, and
    dead-lettered in the end; the error propagates.

    Attributes:
        event: The event; undecoded bytes for an observer of raw entries.
        event_id: Identity of the event (16 bytes); the same for every delivery.
        deliveries: Number of deliveries to this group, this one included.
    """

    __slots__ = ("_child", "_envelope", "deliveries", "event", "event_id")

    def __init__(
        self, reader: GroupReader, dispatch: Dispatch, event: T, entry: Entry | None = None, event_id: bytes = b""
    ) -> None:
        if entry is None:
            (entry,) = dispatch.entries
        self._reader = reader
        self._key = dispatch.key
        self._entries = (entry,)
        self._open = True
        self._envelope: Envelope | None = None
        self._child: Span | None = None
        self.event = event
        self.event_id = event_id or _event_id(entry)
        self.deliveries = dispatch.deliveries.get(entry[0], 1) if dispatch.deliveries else 1

    @property
    def entry_id(self) -> str:
        """Id of the entry in its partition."""
        return str(self._entries[0][0], "ascii")

    @property
    def envelope(self) -> Envelope:
        """The envelope: producer, time and trace of the event.

        Raises:
            EventUndecodable: The entry has no envelope.
        """
        if self._envelope is None:
            self._envelope = decode_envelope(split_entry(self._entries[0][1])[0])
        return self._envelope

    @property
    def span(self) -> Span | None:
        """Span in which the event happened; None outside a trace."""
        return envelope_span(self.envelope)

    def resolve_span(self) -> Span | None:
        """Return the span in which a handler runs: a child of `span`."""
        if self._child is None and (span := self.span) is not None:
            self._child = span.child()
        return self._child

    def acknowledge(self) -> None:
        """Acknowledge the event. Only the first settlement counts, including the one at the end of `async with`."""
        if self._open:
            self._open = False
            self._reader.succeeded(self._key, self._entries[0][0])

    def _succeed(self) -> None:
        self._reader.succeeded(self._key, self._entries[0][0])

    @property
    def _handled(self) -> Sequence[object]:
        return (self.event,)

    async def __aenter__(self) -> T:
        """Return the event."""
        return self.event


class DeliveryBatch(_Settleable, Generic[T]):
    """Events of one partition, settled together with `async with batch as events:`, like a `Delivery`.

    Attributes:
        events: The events, in the order of the partition.
    """

    __slots__ = ("_counts", "_rejected", "events")

    def __init__(self, reader: GroupReader, dispatch: Dispatch, entries: Sequence[Entry], events: list[T]) -> None:
        super().__init__(reader, dispatch.key, entries)
        self._rejected: dict[int, Exception] = {}
        self.events = events
        self._counts = dispatch.deliveries

    def __len__(self) -> int:
        return len(self.events)

    @property
    def entry_ids(self) -> list[str]:
        """Ids of the entries."""
        return [str(entry[0], "ascii") for entry in self._entries]

    @property
    def event_ids(self) -> list[bytes]:
        """Identities of the events."""
        return list(map(_event_id, self._entries))

    @property
    def envelopes(self) -> list[Envelope]:
        """Envelopes of the events: producer, time and trace."""
        return [decode_envelope(split_entry(entry[1])[0]) for entry in self._entries]

    @property
    def deliveries(self) -> list[int]:
        """Number of deliveries of each event to this group, this one included."""
        return [self._counts.get(entry[0], 1) for entry in self._entries]

    def reject(self, index: int, error: Exception) -> None:
        """Mark one event as failed; the end of the block still acknowledges the others.

        If the stream has a partition key, later events of the same key are delivered again too, after this one.
        """
        self._rejected[range(len(self._entries))[index]] = error

    def _succeed(self) -> None:
        if not self._rejected:
            self._reader.succeeded_all(self._key, [entry[0] for entry in self._entries])
            return
        good = {index: entry for index, entry in enumerate(self._entries) if index not in self._rejected}
        later = self._later(good)
        self._reader.succeeded_all(self._key, [entry[0] for entry in good.values()])
        for index, error in self._rejected.items():
            self._fail((self._entries[index],), error)
        if later:
            self._reader.seen.discard(map(_event_id, later))
            self._reader.give_back(self._key, later)

    def _later(self, good: dict[int, Entry]) -> list[Entry]:
        """Remove and return the events after a rejected one of their key, which must be handled after it."""
        key_of = self._reader.key_of
        if key_of is None:
            return []
        first: dict[Hashable, int] = {}
        for index in sorted(self._rejected):
            first.setdefault(key_of(self._entries[index]), index)
        chosen = [index for index, entry in good.items() if index > first.get(key_of(entry), index)]
        return [good.pop(index) for index in chosen]

    @property
    def _handled(self) -> Sequence[object]:
        return self.events

    def _fail(self, entries: Sequence[Entry], error: Exception) -> None:
        """Fail entries. If envelopes cannot be decoded, only their entries fail; the others are handled again."""
        broken = []
        if isinstance(error, EventUndecodable) and len(entries) > 1:
            for entry in entries:
                try:
                    decode_envelope(split_entry(entry[1])[0])
                except EventUndecodable as cause:
                    broken.append(entry)
                    super()._fail((entry,), cause)
        if not broken:
            super()._fail(entries, error)
        elif good := [entry for entry in entries if entry not in broken]:
            self._reader.seen.discard(map(_event_id, good))
            self._reader.give_back(self._key, good)

    async def __aenter__(self) -> list[T]:
        """Return the events."""
        return self.events


class Subscription(AsyncIterator[D], Generic[D]):
    """An asynchronous iterator over deliveries, made by `Events.deliveries` and its variants.

    The consumer ends when the `async with` block ends, when `aclose` is called, when an iteration is cancelled or
    fails, or when the object is garbage-collected; at the latest, `Events.close` ends it and waits for that. This class
    is not a generator, because Python may finalize a generator that was left by `break` after its event loop closed.
    """

    __slots__ = ("_ended", "_reader", "_start", "_take")

    def __init__(self, start: Callable[[], GroupReader], take: Callable[[GroupReader], Awaitable[D | None]]) -> None:
        self._reader: GroupReader | None = None
        self._ended = False
        self._start = start
        self._take = take

    async def __aenter__(self) -> Self:
        """Start the consumer. Without `async with`, the first iteration starts it."""
        self._started()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> D:
        """Return the next delivery; several tasks may wait at once.

        Raises:
            StopAsyncIteration: The consumer has ended.
            OrkiError: The server refuses the consumer, and a retry cannot succeed.
        """
        if self._ended:
            raise StopAsyncIteration
        try:
            taken = await self._take(self._started())
        except BaseException:
            await self.aclose()
            raise
        if taken is None:
            await self.aclose()
            raise StopAsyncIteration
        return taken

    async def aclose(self) -> None:
        """End the consumer: wait until taken deliveries are settled, at most `EventOptions.drain_timeout`."""
        self._ended = True
        if self._reader is not None:
            await self._reader.close()

    def _started(self) -> GroupReader:
        if self._reader is None:
            self._reader = self._start()
        return self._reader

    def __del__(self) -> None:
        if not self._ended and self._reader is not None:
            self._reader.abandon()


def next_delivery(reader: GroupReader, decode: Decode[T]) -> Delivery[T] | None:
    """Return the next delivery; None if there is none now. Undecodable entries go to the dead letters."""
    while (taken := reader.next_entry()) is not None:
        dispatch, entry = taken
        try:
            raw, message = split_entry(entry[1])
            event_id = event_id_of(raw)
            event = decode(message)
        except (DecodeError, EventUndecodable):
            _decodable(reader, decode, dispatch.key, (entry,))
            continue
        if reader.seen.add_one(event_id):
            return Delivery(reader, dispatch, event, entry, event_id)
        reader.succeeded(dispatch.key, entry[0])
    return None


async def take_one(reader: GroupReader, decode: Decode[T]) -> Delivery[T] | None:
    """Return the next delivery; None once the consumer ends. See `next_delivery`."""
    while (delivery := next_delivery(reader, decode)) is None:
        if not await reader.wait():
            return None
    return delivery


async def take_batch(reader: GroupReader, decode: Decode[T], size: int) -> DeliveryBatch[T] | None:
    """Return the next deliveries, at least one and at most `size`; None once the consumer ends. See `take_one`."""
    while (dispatch := await reader.take(size)) is not None:
        entries = dispatch.entries
        try:
            identities, events = decode_entries(entries, decode)
        except (DecodeError, EventUndecodable):
            entries, identities, events = _decodable(reader, decode, dispatch.key, entries)
        if repeated := set(reader.seen.add(identities)):
            reader.succeeded_all(dispatch.key, [entries[index][0] for index in repeated])
            entries = [entry for index, entry in enumerate(entries) if index not in repeated]
            events = [event for index, event in enumerate(events) if index not in repeated]
        if entries:
            return DeliveryBatch(reader, dispatch, entries, events)
    return None


def _event_id(entry: Entry) -> bytes:
    return event_id_of(split_entry(entry[1])[0])


def _decoded(decode: Decode[T], entry: Entry) -> T:
    raw = split_entry(entry[1])[1]
    try:
        return decode(raw)
    except DecodeError as error:
        raise EventUndecodable(f"field d ({len(raw)} bytes) is not the message of the contract: {error}") from error


def _decodable(
    reader: GroupReader, decode: Decode[T], key: str, found: Sequence[Entry]
) -> tuple[list[Any], list[bytes], list[T]]:
    """Return the entries that can be decoded; the others go to the dead letters."""
    entries, identities, events = [], [], []
    for entry in found:
        try:
            event = _decoded(decode, entry)
            identity = _event_id(entry)
        except OrkiError as error:
            reader.failed(key, (entry,), error, final=True)
        else:
            entries.append(entry)
            identities.append(identity)
            events.append(event)
    return entries, identities, events


Single = Callable[[E, Delivery[E]], Awaitable[None]]
Batched = Callable[[list[E], DeliveryBatch[E]], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Consumer(Generic[P]):
    """A handler with its stream and group, made by `@consumer`. Call it like the function that it decorates.

    Attributes:
        group: One of the groups that the stream declares.
        handler: Called with the event, or a list of events, and the delivery.
        concurrency: Number of concurrent calls.
        batch: Maximum number of events in one call; 0 for calls with single events.

    Raises:
        UnknownGroup: The stream declares no such group.
        InvalidSetting: The handler is not a coroutine function, or a number is out of its range.
    """

    stream: EventStream[Any, Any]
    group: str
    handler: Callable[P, Awaitable[None]]
    concurrency: int
    batch: int
    options: ConsumeOptions = field(default_factory=ConsumeOptions)

    def __post_init__(self) -> None:
        self.stream.contract.group(self.group)
        if not inspect.iscoroutinefunction(self.handler):
            raise InvalidSetting(f"the consumer {self.handler!r} must be an `async def`")
        if not 1 <= self.concurrency <= 10_000:
            raise InvalidSetting(f"concurrency is {self.concurrency}; it must be from 1 to 10000")
        if not 0 <= self.batch <= 10_000:
            raise InvalidSetting(f"batch is {self.batch}; it must be from 1 to 10000")

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Awaitable[None]:
        """Call the handler directly, as a test does."""
        return self.handler(*args, **kwargs)


@overload
def consumer(
    stream: EventStream[E, G], *, group: G, concurrency: int = 16, options: ConsumeOptions | None = None
) -> Callable[[Single[E]], Consumer[[E, Delivery[E]]]]: ...


@overload
def consumer(
    stream: EventStream[E, G], *, group: G, batch: int, concurrency: int = 1, options: ConsumeOptions | None = None
) -> Callable[[Batched[E]], Consumer[[list[E], DeliveryBatch[E]]]]: ...


def consumer(
    stream: EventStream[Any, Any],
    *,
    group: str,
    batch: int | None = None,
    concurrency: int | None = None,
    options: ConsumeOptions | None = None,
) -> Callable[[Callable[..., Awaitable[None]]], Consumer[Any]]:
    """Declare an `async def` as a consumer: an event is acknowledged if it returns and retried if it raises.

    Args:
        stream: The stream.
        group: One of the groups that the stream declares.
        batch: Pass up to this many events of one partition at once, as a list; the default is single events.
        concurrency: Number of concurrent calls; the default is 16, or 1 with `batch`.
        options: Further settings.

    Raises:
        UnknownGroup: The stream declares no such group; the message lists the declared ones.
        InvalidSetting: A number is out of its range.
    """
    if batch is not None and batch < 1:
        raise InvalidSetting(f"batch is {batch}; it must be from 1 to 10000")

    def declare(handler: Callable[..., Awaitable[None]]) -> Consumer[Any]:
        return Consumer(
            stream=stream,
            group=group,
            handler=handler,
            concurrency=concurrency if concurrency is not None else (1 if batch else 16),
            batch=batch or 0,
            options=options or ConsumeOptions(),
        )

    return declare
