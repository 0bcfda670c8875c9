"""Batches in both directions: messages that wait to be sent, and events that are returned together."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

from orki_control.session._options import BatchBounds
from orki_control.session._tables import AttemptKey

M = TypeVar("M")

OVERHEAD_BYTES = 256
"""Upper estimate of a session message's size without its payload."""


class _Waiting(NamedTuple, Generic[M]):
    attempt: AttemptKey
    kind: type
    message: M
    size: int


class SendQueue(Generic[M]):
    """Messages to the peer. Control messages go first; work follows in its order. Batches are bounded.

    Work may become pointless before it is sent. The machine decides that when a batch is taken, so the queue is never
    searched.
    """

    __slots__ = ("_bounds", "_control", "_size", "_waiting", "_work")

    def __init__(self, bounds: BatchBounds) -> None:
        self._bounds = bounds
        self._size = bounds.size
        self._control: deque[M] = deque()
        self._work: deque[_Waiting[M]] = deque()
        self._waiting: Counter[AttemptKey] = Counter()

    def __len__(self) -> int:
        return len(self._control) + len(self._work)

    def put_control(self, message: M) -> None:
        """Add a message that overtakes all work."""
        self._control.append(message)

    def put_work(self, attempt: AttemptKey, kind: type, message: M, payload_bytes: int = 0) -> None:
        """Add a message about an attempt behind earlier work."""
        self._work.append(_Waiting(attempt, kind, message, OVERHEAD_BYTES + payload_bytes))
        self._waiting[attempt] += 1

    def limit(self, message_bytes: int) -> None:
        """Keep batches below the longest message that the peer accepts."""
        self._size = min(self._bounds.size, message_bytes)

    def backlog(self, attempt: AttemptKey) -> int:
        """Return the number of waiting messages about an attempt."""
        return self._waiting.get(attempt, 0)

    def take_control(self) -> list[M]:
        """Remove and return the next batch of control messages."""
        control = self._control
        return [control.popleft() for _ in range(min(len(control), self._bounds.count))]

    def take(self, wanted: Callable[[AttemptKey, type], bool]) -> list[M]:
        """Remove and return the next batch; work that is not `wanted` is dropped. Empty when nothing waits."""
        work, count = self._work, self._bounds.count
        batch = self.take_control()
        size = len(batch) * OVERHEAD_BYTES
        while work and len(batch) < count:
            waiting = work[0]
            useful = wanted(waiting.attempt, waiting.kind)
            if useful and batch and size + waiting.size > self._size:
                break
            work.popleft()
            left = self._waiting[waiting.attempt] - 1
            if left:
                self._waiting[waiting.attempt] = left
            else:
                del self._waiting[waiting.attempt]
            if useful:
                batch.append(waiting.message)
                size += waiting.size
        return batch

    def clear_control(self) -> None:
        """Drop all control messages: they belonged to a stream that has ended."""
        self._control.clear()

    def keep_work(self, keep: Callable[[AttemptKey, type], bool]) -> None:
        """Drop all work except what `keep` accepts."""
        self._work = deque(waiting for waiting in self._work if keep(waiting.attempt, waiting.kind))
        self._waiting = Counter(waiting.attempt for waiting in self._work)

    def waiting(self, kind: type) -> list[AttemptKey]:
        """Return the attempts with a waiting message of a kind."""
        return [waiting.attempt for waiting in self._work if waiting.kind is kind]


class EventBatch:
    """Collects events in their order and joins neighbours of one kind into one event."""

    __slots__ = ("_events", "_items", "_kind")

    def __init__(self) -> None:
        self._events: list[Any] = []
        self._kind: Callable[[tuple[Any, ...]], Any] | None = None
        self._items: list[Any] = []

    def join(self, kind: Callable[[tuple[Any, ...]], Any], item: object) -> None:
        """Add one item to an event whose only field is a tuple of such items."""
        if kind is not self._kind:
            self._close()
            self._kind = kind
        self._items.append(item)

    def add(self, event: object) -> None:
        """Add an event that is never joined."""
        self._close()
        self._events.append(event)

    def finish(self) -> list[Any]:
        """Return the events and start an empty batch."""
        self._close()
        events, self._events = self._events, []
        return events

    def _close(self) -> None:
        if self._kind is not None:
            self._events.append(self._kind(tuple(self._items)))
            self._kind = None
            self._items = []
