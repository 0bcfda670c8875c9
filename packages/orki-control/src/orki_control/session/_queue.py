"""Messages to the peer in batches, and the events of a batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Iterable
from typing import Any, Final, Generic, NamedTuple, Protocol, TypeVar

from orki.control.v1 import session_pb2 as pb
from orki_control.session._chunks import CHUNK_BYTES, CHUNKED_ABOVE, Transfers
from orki_control.session._options import BatchBounds
from orki_control.session._progress import OVERHEAD_BYTES
from orki_control.session._state import AttemptKey

_CHUNKED: Final = (pb.Result, pb.Offer)

M = TypeVar("M")
M_co = TypeVar("M_co", covariant=True)


class Source(Protocol[M_co]):
    """A place in the queue whose message is made when the place is taken."""

    @property
    def next_size(self) -> int:
        """Estimated size of the message."""

    def take(self) -> M_co | None:
        """Return the message; None if there is none any more."""


class _Waiting(NamedTuple, Generic[M]):
    attempt: AttemptKey
    kind: type
    message: M | None
    size: int
    source: Source[M] | None = None


class SendQueue(Generic[M]):
    """Messages to the peer. Control messages go first; work follows in its order, and one chunk of a large message.

    Batches are bounded.

    Work about an attempt that is no longer held is dropped when a batch is taken, so the queue is never searched.
    Each message that is added calls `on_change`, or `on_later` if it may wait a moment for others.
    """

    __slots__ = ("_bounds", "_control", "_most", "_on_change", "_on_later", "_size", "_work", "_wrap", "transfers")

    def __init__(
        self,
        bounds: BatchBounds,
        on_change: Callable[[], None],
        on_later: Callable[[], None],
        wrap: Callable[[pb.Chunk], M],
    ) -> None:
        self._on_change = on_change
        self._on_later = on_later
        self._wrap = wrap
        self.transfers = Transfers()
        self._bounds = bounds
        self._size = self._most = bounds.size
        self._control: deque[M] = deque()
        self._work: deque[_Waiting[M]] = deque()

    def __len__(self) -> int:
        return len(self._control) + len(self._work) + len(self.transfers)

    def put_control(self, message: M, *, later: bool = False) -> None:
        """Add a message that overtakes all work."""
        self._control.append(message)
        (self._on_later if later else self._on_change)()

    def put_work(self, attempt: AttemptKey, kind: type, message: M, payload_bytes: int = 0) -> None:
        """Add a message about an attempt behind earlier work."""
        self._work.append(_Waiting(attempt, kind, message, OVERHEAD_BYTES + payload_bytes))
        self._on_change()

    def put_source(self, attempt: AttemptKey, kind: type, source: Source[M], places: int = 1) -> None:
        """Add places for messages that a source makes when they are taken."""
        for _ in range(places):
            self._work.append(_Waiting(attempt, kind, None, 0, source))
        self._on_change()

    def limit(self, message_bytes: int) -> None:
        """Keep batches below the longest message that the peer accepts."""
        self._size = min(self._bounds.size, message_bytes)
        self._most = message_bytes

    def take_control(self) -> list[M]:
        """Remove and return the next batch of control messages."""
        control = self._control
        return [control.popleft() for _ in range(min(len(control), self._bounds.count))]

    def take(self, held: Container[AttemptKey], always: type | None = None) -> list[M]:
        """Remove and return the next batch; empty when nothing waits.

        Args:
            held: Attempts whose work is sent; work about others is dropped.
            always: Kind of work that is sent in any case.
        """
        work, count = self._work, self._bounds.count
        batch = self.take_control()
        size = len(batch) * OVERHEAD_BYTES
        while work and len(batch) < count:
            waiting = work[0]
            useful = waiting.kind is always or waiting.attempt in held
            source = waiting.source
            weight = waiting.size if source is None else source.next_size
            if useful and weight > CHUNKED_ABOVE and waiting.kind in _CHUNKED and self.transfers.limit:
                work.popleft()
                whole: Any = waiting.message
                self.transfers.add(waiting.attempt, waiting.kind, whole.SerializeToString())
                continue
            if useful and batch and size + weight > self._size:
                break
            work.popleft()
            message = waiting.message if source is None else source.take() if useful else None
            if useful and message is not None:
                batch.append(message)
                size += weight
        if not batch or size + OVERHEAD_BYTES + CHUNK_BYTES <= self._most:
            chunk = self.transfers.take(held)
            if chunk is not None:
                batch.append(self._wrap(chunk))
        return batch

    def clear(self) -> None:
        """Drop all messages: they belonged to a stream that has ended."""
        self._control.clear()
        self._work.clear()
        self.transfers.clear()

    def chunks_arrived(self, acknowledged: pb.ChunkAcknowledged) -> None:
        """Send further chunks, as some have arrived.

        Raises:
            RemoteProtocolError: They were not sent.
        """
        self.transfers.acknowledge(acknowledged.transfer, acknowledged.received)
        self._on_change()

    def waiting(self, kind: type) -> list[AttemptKey]:
        """Return the attempts with a waiting message of a kind."""
        queued = [waiting.attempt for waiting in self._work if waiting.kind is kind]
        return queued + self.transfers.unfinished(kind)


def joined(events: Iterable[Any]) -> list[Any]:
    """Return events with neighbours of one kind joined.

    Args:
        events: Events, and pairs of an event class and one item. The class has a tuple of such items as its only field.
    """
    found: list[Any] = []
    kind: Any = None
    items: list[Any] = []
    for event in [*events, None]:
        pair = type(event) is tuple
        if kind is not None and not (pair and event[0] is kind):
            found.append(kind(tuple(items)))
            kind, items = None, []
        if pair:
            kind = event[0]
            items.append(event[1])
        elif event is not None:
            found.append(event)
    return found
