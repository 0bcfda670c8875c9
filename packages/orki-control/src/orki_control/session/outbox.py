"""What waits to be sent: control messages go first, work follows in its order, and both in bounded batches."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

from orki_control.attempt import AttemptKey
from orki_control.session.options import BatchBounds

__all__ = ["OVERHEAD_BYTES", "Outbox"]

M = TypeVar("M")

OVERHEAD_BYTES = 256
"""What a session message weighs without its payload, generously."""


class _Waiting(NamedTuple, Generic[M]):
    attempt: AttemptKey
    kind: type
    message: M
    size: int


class Outbox(Generic[M]):
    """Two lanes towards the peer.

    What an attempt had to say is dropped when it has lost its meaning by the time it could leave; the machine judges
    that at the last moment, so nothing is searched for in the lane.
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
        """Queues a message that overtakes all work."""
        self._control.append(message)

    def put_work(self, attempt: AttemptKey, kind: type, message: M, payload_bytes: int = 0) -> None:
        """Queues a message about an attempt behind earlier ones."""
        self._work.append(_Waiting(attempt, kind, message, OVERHEAD_BYTES + payload_bytes))
        self._waiting[attempt] += 1

    def limit(self, message_bytes: int) -> None:
        """Keeps batches below the longest message that the peer takes."""
        self._size = min(self._bounds.size, message_bytes)

    def backlog(self, attempt: AttemptKey) -> int:
        """Messages about the attempt that wait behind others."""
        return self._waiting.get(attempt, 0)

    def take_control(self) -> list[M]:
        """Removes the next batch of control messages alone."""
        control = self._control
        return [control.popleft() for _ in range(min(len(control), self._bounds.count))]

    def take(self, wanted: Callable[[AttemptKey, type], bool]) -> list[M]:
        """Removes the next batch; of the work only what is still `wanted`. Empty when nothing is left to send."""
        work, count = self._work, self._bounds.count
        batch = self.take_control()
        size = len(batch) * OVERHEAD_BYTES
        while work and len(batch) < count:
            waiting = work[0]
            useful = wanted(waiting.attempt, waiting.kind)
            if useful and batch and size + waiting.size > self._size:
                break
            work.popleft()
            self._count_down(waiting.attempt)
            if useful:
                batch.append(waiting.message)
                size += waiting.size
        return batch

    def clear_control(self) -> None:
        """Forgets the control lane: it belonged to a stream that is gone."""
        self._control.clear()

    def keep_work(self, keep: Callable[[AttemptKey, type], bool]) -> None:
        """Forgets all work but what is to be kept."""
        self._work = deque(waiting for waiting in self._work if keep(waiting.attempt, waiting.kind))
        self._waiting = Counter(waiting.attempt for waiting in self._work)

    def waiting(self, kind: type) -> list[AttemptKey]:
        """Attempts that have a message of this kind in the lane."""
        return [waiting.attempt for waiting in self._work if waiting.kind is kind]

    def _count_down(self, attempt: AttemptKey) -> None:
        left = self._waiting[attempt] - 1
        if left:
            self._waiting[attempt] = left
        else:
            del self._waiting[attempt]
