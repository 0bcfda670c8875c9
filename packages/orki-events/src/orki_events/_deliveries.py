"""What a consumer's code gets to see: one delivery, or a batch of them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Generic, Self

from google.protobuf.message import DecodeError

from orki.events.v1.envelope_pb2 import Envelope
from orki_contract.errors import EventUndecodable, HandlerRejected, OrkiError
from orki_contract.trace import Span
from orki_events._delivery_table import Dispatch, Entry
from orki_events._group_reader import GroupReader
from orki_events.entries import decode_envelope, envelope_span, event_id_of, split_entry

if TYPE_CHECKING:
    # PEP 696: a handler writes `Delivery` and need not repeat the event's class. Type checkers bring this module along.
    from typing_extensions import TypeVar

    T = TypeVar("T", default=Any)
else:
    from typing import TypeVar

    T = TypeVar("T")
Decode = Callable[[bytes], T]
_UNMENDABLE: Final = (HandlerRejected, EventUndecodable)


class Delivery(Generic[T]):
    """One event on its way to one group. `async with delivery as event:` settles it: acknowledged when the block ends
    without an error, delivered again (and at last dead-lettered) when it raises; the error goes on to the caller.

    Attributes:
        event: The event; its undecoded bytes for an observer of raw entries.
        event_id: Identity of the event, 16 bytes: the same however often it is delivered.
        deliveries: How often it was delivered to this group, this time included.
    """

    __slots__ = ("_entry", "_envelope", "_key", "_open", "_raw", "_subscription", "deliveries", "event", "event_id")

    def __init__(self, subscription: GroupReader, key: str, entry: Entry, event: T, deliveries: int) -> None:
        """Made by the runtime."""
        self._subscription = subscription
        self._key = key
        self._entry = entry
        self._raw = split_entry(entry[1])[0]
        self._envelope: Envelope | None = None
        self._open = True
        self.event = event
        self.event_id = event_id_of(self._raw)
        self.deliveries = deliveries

    @property
    def entry_id(self) -> str:
        """Id of the entry in its partition."""
        return str(self._entry[0], "ascii")

    @property
    def key(self) -> str:
        """Redis key of the entry's partition."""
        return self._key

    @property
    def envelope(self) -> Envelope:
        """Who published it, when, in which trace.

        Raises:
            EventUndecodable: The entry holds no envelope.
        """
        if self._envelope is None:
            self._envelope = decode_envelope(self._raw)
        return self._envelope

    @property
    def span(self) -> Span | None:
        """Span in which the event happened; None outside a trace."""
        return envelope_span(self.envelope)

    def acknowledge(self) -> None:
        """It is done. Of several settlements the first counts, the one at the end of `async with` included."""
        if self._close():
            self._subscription.succeeded(self._key, self._entry[0])

    def retry(self, error: Exception) -> None:
        """It failed: delivered again, or dead-lettered, at once for a HandlerRejected."""
        if self._close():
            self._subscription.seen.discard((self.event_id,))
            self._subscription.failed(self._key, (self._entry,), error, isinstance(error, _UNMENDABLE))

    def give_back(self) -> None:
        """It was not begun, or was interrupted: delivered again, and this time does not count."""
        if self._close():
            self._subscription.seen.discard((self.event_id,))
            self._subscription.give_back(self._key, [self._entry])

    def _close(self) -> bool:
        was_open, self._open = self._open, False
        return was_open

    async def __aenter__(self) -> T:
        """The event."""
        return self.event

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Settles it."""
        if error is None:
            self.acknowledge()
        elif isinstance(error, Exception):
            self.retry(error)
        else:
            self.give_back()


class DeliveryBatch(Generic[T]):
    """Events of one partition, settled together: `async with batch as events:`, as for a single one.

    Attributes:
        events: In the order of the partition.
    """

    __slots__ = ("_dispatch", "_entries", "_failed", "_open", "_subscription", "events")

    def __init__(self, subscription: GroupReader, dispatch: Dispatch, entries: list[Entry], events: list[T]) -> None:
        """Made by the runtime."""
        self._subscription = subscription
        self._dispatch = dispatch
        self._entries = entries
        self._failed: dict[int, Exception] = {}
        self._open = True
        self.events = events

    def __len__(self) -> int:
        """How many events."""
        return len(self.events)

    @property
    def key(self) -> str:
        """Redis key of the partition."""
        return self._dispatch.key

    @property
    def entry_ids(self) -> list[str]:
        """Ids of the entries."""
        return [str(entry[0], "ascii") for entry in self._entries]

    @property
    def event_ids(self) -> list[bytes]:
        """Identities of the events."""
        return [event_id_of(split_entry(entry[1])[0]) for entry in self._entries]

    @property
    def envelopes(self) -> list[Envelope]:
        """Who published them, when, in which trace."""
        return [decode_envelope(split_entry(entry[1])[0]) for entry in self._entries]

    @property
    def deliveries(self) -> list[int]:
        """How often each was delivered to this group, this time included."""
        return [self._dispatch.deliveries.get(entry[0], 1) for entry in self._entries]

    def reject(self, place: int, error: Exception) -> None:
        """Says that the event at this place failed; the end of the block acknowledges the others all the same."""
        self._failed[range(len(self._entries))[place]] = error

    def acknowledge(self) -> None:
        """They are done, but for those that were rejected. Of several settlements the first counts."""
        if not self._close():
            return
        key = self._dispatch.key
        if not self._failed:
            self._subscription.succeeded_all(key, [entry[0] for entry in self._entries])
            return
        good = [entry[0] for place, entry in enumerate(self._entries) if place not in self._failed]
        self._subscription.succeeded_all(key, good)
        identities = self.event_ids
        for place, error in self._failed.items():
            self._subscription.seen.discard((identities[place],))
            self._subscription.failed(key, (self._entries[place],), error, isinstance(error, _UNMENDABLE))

    def retry(self, error: Exception) -> None:
        """They failed, all of them."""
        if self._close():
            self._subscription.seen.discard(self.event_ids)
            self._subscription.failed(self._dispatch.key, self._entries, error, isinstance(error, _UNMENDABLE))

    def give_back(self) -> None:
        """They were not begun, or were interrupted."""
        if self._close():
            self._subscription.seen.discard(self.event_ids)
            self._subscription.give_back(self._dispatch.key, self._entries)

    def _close(self) -> bool:
        was_open, self._open = self._open, False
        return was_open

    async def __aenter__(self) -> list[T]:
        """The events."""
        return self.events

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Settles them."""
        if error is None:
            self.acknowledge()
        elif isinstance(error, Exception):
            self.retry(error)
        else:
            self.give_back()


async def take_one(subscription: GroupReader, decode: Decode[T]) -> Delivery[T] | None:
    """The next delivery; None once the consumer ends. What cannot be decoded goes to the dead letters.

    Raises:
        OrkiError: The server refuses the consumer for good.
    """
    while (dispatch := await subscription.take(1)) is not None:
        (entry,) = dispatch.entries
        try:
            event = _decoded(decode, entry)
            delivery = Delivery(subscription, dispatch.key, entry, event, dispatch.deliveries.get(entry[0], 1))
        except EventUndecodable as error:
            subscription.failed(dispatch.key, (entry,), error, final=True)
            continue
        if subscription.seen.add((delivery.event_id,)):
            subscription.counts.repeated += 1
            delivery.acknowledge()
            continue
        return delivery
    return None


async def take_batch(subscription: GroupReader, decode: Decode[T], size: int) -> DeliveryBatch[T] | None:
    """The next deliveries, at least one and at most so many; otherwise as `take_one`."""
    while (dispatch := await subscription.take(size)) is not None:
        entries = dispatch.entries
        try:
            pairs = [split_entry(entry[1]) for entry in entries]
            identities = [event_id_of(raw) for raw, _ in pairs]
            events = [decode(raw) for _, raw in pairs]
        except (DecodeError, EventUndecodable):
            entries, identities, events = _sorted_out(subscription, decode, dispatch)
        if repeated := set(subscription.seen.add(identities)):
            subscription.counts.repeated += len(repeated)
            subscription.succeeded_all(dispatch.key, [entries[place][0] for place in repeated])
            entries = [entry for place, entry in enumerate(entries) if place not in repeated]
            events = [event for place, event in enumerate(events) if place not in repeated]
        if entries:
            return DeliveryBatch(subscription, dispatch, entries, events)
    return None


def _decoded(decode: Decode[T], entry: Entry) -> T:
    raw = split_entry(entry[1])[1]
    try:
        return decode(raw)
    except DecodeError as error:
        raise EventUndecodable(f"field d ({len(raw)} bytes) is not what the contract says: {error}") from error


def _sorted_out(
    subscription: GroupReader, decode: Decode[T], dispatch: Dispatch
) -> tuple[list[Any], list[bytes], list[T]]:
    """The entries that can be decoded; the others go to the dead letters."""
    entries, identities, events = [], [], []
    for entry in dispatch.entries:
        try:
            event = _decoded(decode, entry)
            identity = event_id_of(split_entry(entry[1])[0])
        except OrkiError as error:
            subscription.failed(dispatch.key, (entry,), error, final=True)
        else:
            entries.append(entry)
            identities.append(identity)
            events.append(event)
    return entries, identities, events


D = TypeVar("D")


class Subscription(AsyncIterator[D], Generic[D]):
    """Deliveries as they come, until the `Events` they came from closes. Made by `Events.deliveries` and its kin.

    No generator: one that is left by `break` ends whenever Python gets round to it, which is after its event loop as
    often as before. This ends with its `async with` block or by `aclose`; when an iteration is cancelled or fails;
    when nobody holds it any more; and at the latest with its `Events`, whose end waits for it in any case.
    """

    __slots__ = ("_ended", "_subscribe", "_subscription", "_take")

    def __init__(
        self, subscribe: Callable[[], GroupReader], take: Callable[[GroupReader], Awaitable[D | None]]
    ) -> None:
        """Args: subscribe: starts the consumer; take: the next delivery, None once the consumer ends."""
        self._subscription: GroupReader | None = None
        self._ended = False
        self._subscribe = subscribe
        self._take = take

    async def __aenter__(self) -> Self:
        """Starts the consumer; without it, the first iteration does."""
        self._started()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """As `aclose`."""
        await self.aclose()

    def __aiter__(self) -> Self:
        """Itself."""
        return self

    async def __anext__(self) -> D:
        """The next delivery; the wait for it may be shared by several tasks.

        Raises:
            StopAsyncIteration: The consumer has ended.
            OrkiError: The server refuses the consumer for good.
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
        """Ends the consumer in good order: waits for what was taken to be settled, for the drain timeout at most."""
        self._ended = True
        if self._subscription is not None:
            await self._subscription.close()

    def _started(self) -> GroupReader:
        if self._subscription is None:
            self._subscription = self._subscribe()
        return self._subscription

    def __del__(self) -> None:
        """Nobody can iterate any more."""
        if not self._ended and self._subscription is not None:
            self._subscription.abandon()
