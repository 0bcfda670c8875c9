"""The state of a session: attempts with their slots and leases, heartbeats, and batches in both directions."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Container, Iterable
from operator import attrgetter
from typing import Any, Final, Generic, NamedTuple, TypeAlias, TypeVar

from orki.control.v1 import session_pb2 as pb
from orki.control.v1.attempt_pb2 import AttemptRef, Failure
from orki_contract.errors import RemoteProtocolError
from orki_control.session._options import SILENT_INTERVALS, BatchBounds
from orki_control.session._tables import AttemptState

M = TypeVar("M")
T = TypeVar("T", bound=float | None)

OVERHEAD_BYTES: Final = 256
"""Upper estimate of a session message's size without its payload."""
LEASE_SHARE: Final = 0.9
"""Share of a lease after which the agent stops the attempt, so that it has stopped when the lease ends (law 8)."""
OCCUPYING: Final = frozenset({AttemptState.OFFERED, AttemptState.RUNNING, AttemptState.CANCELLING})
"""States in which an attempt occupies a slot."""
Outcome: TypeAlias = bytes | Failure | pb.CancelledOutcome
"""The end of an attempt: the serialised response, a failure, or a cancellation."""
_REMEMBERED_CANCELS: Final = 1024
_REMEMBERED_FENCES: Final = 8192
_REMEMBERED_HEARTBEATS: Final = 2 * SILENT_INTERVALS


class AttemptKey(NamedTuple):
    """Identifies one attempt at one task.

    Attributes:
        task_id: The task.
        attempt: Number of the attempt, from 1.
        fence: Number that rises with every attempt of the task and never repeats.
    """

    task_id: str
    attempt: int
    fence: int

    @classmethod
    def of(cls, ref: AttemptRef) -> AttemptKey:
        """Return the key of a reference from the wire."""
        return cls(*identity(ref))

    def ref(self) -> AttemptRef:
        """Return the reference for the wire."""
        return AttemptRef(task_id=self.task_id, attempt=self.attempt, fence=self.fence)

    def __str__(self) -> str:
        return f"attempt {self.attempt} of task {self.task_id} (fence {self.fence})"


identity = attrgetter("task_id", "attempt", "fence")
"""Returns the fields of an AttemptKey from a reference. It is compiled code, as every message needs it."""


def _nothing() -> None:
    pass


class SessionMachine:
    """The common part of both ends.

    Attributes:
        on_change: Called when there may be messages to send or an earlier timer. It must not call the machine.
        state: State of the session.
    """

    state: Any

    def __init__(self) -> None:
        self.on_change: Callable[[], None] = _nothing

    def _changed(self) -> None:
        self.on_change()

    def _enter(self, state: Any) -> None:
        # Messages that wait may be sent in the new state, and other timers count.
        if state is not self.state:
            self.state = state
            self.on_change()


class _Deadline(Generic[T]):
    """A time at which the machine's timer is due. Assigning an earlier time calls the owner's `on_change`."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type) -> T:
        found: T = instance.__dict__[self._name]
        return found

    def __set__(self, instance: Any, value: T) -> None:
        before = instance.__dict__.get(self._name)
        instance.__dict__[self._name] = value
        if value is not None and (before is None or value < before):
            instance.on_change()


class HeldAttempt:
    """One attempt at the agent.

    Attributes:
        ref: Reference to the attempt for messages.
        state: Its state.
        traceparent: Of its task's span.
        lease: Seconds that it survives without a renewal.
        renewed_at: Earliest time at which the orchestrator can have renewed the lease last.
        index: Number of its last progress.
        result: Its result, once it has ended.
    """

    __slots__ = ("index", "lease", "ref", "renewed_at", "result", "state", "traceparent")

    def __init__(self, ref: AttemptRef, traceparent: str, lease: float, renewed_at: float) -> None:
        self.ref = ref
        self.state = AttemptState.OFFERED
        self.traceparent = traceparent
        self.lease = lease
        self.renewed_at = renewed_at
        self.index = 0
        self.result: pb.Result | None = None

    @property
    def stops_at(self) -> float:
        """Time at which the agent stops the attempt unless the lease is renewed."""
        return self.renewed_at + self.lease * LEASE_SHARE


class AttemptTable(dict[AttemptKey, HeldAttempt]):
    """All attempts of an agent, bounded by its slots.

    Attributes:
        leases_end_at: Time at which the next lease may end, or None. It may be too early and is never too late.
        shortest_lease: Shortest lease of the held attempts in seconds; 0 for none.
    """

    leases_end_at = _Deadline[float | None]()

    def __init__(self, slots: int, on_change: Callable[[], None] = _nothing) -> None:
        super().__init__()
        self.on_change = on_change
        self.leases_end_at = None
        self.shortest_lease = 0.0
        self._slots = slots
        self._fences: dict[str, int] = {}
        self._occupied = 0
        self._blocked: set[AttemptKey] = set()
        self._cancelled: dict[AttemptKey, None] = {}

    @property
    def free_slots(self) -> int:
        """Number of slots that nothing occupies."""
        return max(0, self._slots - self._occupied - len(self._blocked))

    def add(self, key: AttemptKey, held: HeldAttempt) -> bool:
        """Add an offered attempt; return False when blocked handlers leave it no slot.

        Raises:
            RemoteProtocolError: The attempt is held already, its fence is not higher than one held recently for the
                task, or the orchestrator offers more than the slots.
        """
        if key in self:
            raise RemoteProtocolError(f"offer: {key} is held already")
        if self._fences.get(key.task_id, 0) >= key.fence:
            raise RemoteProtocolError(f"offer: {key} came after fence {self._fences[key.task_id]} of the task")
        if self._occupied >= self._slots:
            raise RemoteProtocolError(f"offer: {key} exceeds the {self._slots} slots of the hello")
        if not self.free_slots:
            return False
        self[key] = held
        self._fences.pop(key.task_id, None)
        self._fences[key.task_id] = key.fence
        if len(self._fences) > _REMEMBERED_FENCES:
            del self._fences[next(iter(self._fences))]
        self._occupied += 1
        self.lease_changed(held)
        return True

    def change(self, key: AttemptKey, held: HeldAttempt, state: AttemptState) -> None:
        """Set the state of an attempt; a closed one is removed."""
        if held.state in OCCUPYING and state not in OCCUPYING:
            self._occupied -= 1
        held.state = state
        if state is AttemptState.CLOSED:
            del self[key]

    def block(self, key: AttemptKey) -> None:
        """Occupy a slot for a handler that still runs although its attempt has ended."""
        self._blocked.add(key)

    def release(self, key: AttemptKey) -> bool:
        """Free the slot of a blocked handler; return whether it occupied one."""
        if key not in self._blocked:
            return False
        self._blocked.discard(key)
        return True

    def remember_cancel(self, key: AttemptKey) -> None:
        """Remember a cancel for an attempt that is not held: its offer may still arrive."""
        self._cancelled[key] = None
        if len(self._cancelled) > _REMEMBERED_CANCELS:
            del self._cancelled[next(iter(self._cancelled))]

    def was_cancelled(self, key: AttemptKey) -> bool:
        """Return whether such a cancel arrived, and forget it."""
        return self._cancelled.pop(key, key) is None

    def renewable(self) -> list[AttemptKey]:
        """Return the attempts whose leases a heartbeat renews."""
        return [key for key, held in self.items() if held.state in OCCUPYING]

    def resumable(self) -> list[pb.HeldAttempt]:
        """Return the held attempts for a hello, each with whether its result waits."""
        return [
            pb.HeldAttempt(attempt=held.ref, has_result=held.state is AttemptState.REPORTED)
            for key, held in self.items()
        ]

    def lease_changed(self, held: HeldAttempt) -> None:
        """Take account of one new lease."""
        end = held.stops_at
        if self.leases_end_at is None or end < self.leases_end_at:
            self.leases_end_at = end
        if not self.shortest_lease or held.lease < self.shortest_lease:
            self.shortest_lease = held.lease

    def leases_changed(self) -> None:
        """Take account of many new leases."""
        running = [held for held in self.values() if held.state in OCCUPYING]
        self.leases_end_at = min((held.stops_at for held in running), default=None)
        self.shortest_lease = min((held.lease for held in running), default=0.0)

    def leases_over(self, now: float) -> list[tuple[AttemptKey, HeldAttempt]]:
        """Return the attempts that must stop because their leases may end; call it at `leases_end_at`."""
        if self.leases_end_at is None or now < self.leases_end_at:
            return []
        running = [(key, held) for key, held in self.items() if held.state in OCCUPYING]
        self.leases_end_at = min((held.stops_at for _, held in running if now < held.stops_at), default=None)
        return [(key, held) for key, held in running if now >= held.stops_at]


class Heartbeats:
    """The heartbeats of one stream: when the next is due, what each one renewed, and when the peer was heard last.

    Attributes:
        due_at: Time of the next heartbeat.
        silent_at: Time at which the peer counts as lost unless it is heard before.
        patience: Seconds of silence after which the peer counts as lost.
        load: Lag of the event loop in microseconds and resident memory in bytes, for the next heartbeats.
    """

    due_at = _Deadline[float]()
    silent_at = _Deadline[float]()

    def __init__(self, on_change: Callable[[], None] = _nothing) -> None:
        self.on_change = on_change
        self.due_at = 0.0
        self.silent_at = 0.0
        self.patience = float(SILENT_INTERVALS)
        self.load = (0, 0)
        self._interval = 1.0
        self._number = 0
        self._unanswered: dict[int, tuple[float, list[AttemptKey]]] = {}

    def begin(self, silent_at: float) -> None:
        """Start a new stream: numbers start at 1, and the peer must be heard before `silent_at`."""
        self.silent_at = silent_at
        self._number = 0
        self._unanswered.clear()

    def set_interval(self, interval: float, now: float) -> None:
        """Set the interval that the peer asks for; the first heartbeat is due at once."""
        self._interval = interval
        self.patience = SILENT_INTERVALS * interval
        self.due_at = now

    def hurry(self) -> None:
        """Make the next heartbeat due at once."""
        self.due_at = 0.0

    def send(self, now: float, attempts: AttemptTable) -> pb.Heartbeat:
        """Return the next heartbeat, which renews the leases. A short lease shortens the interval."""
        renewed = attempts.renewable()
        self._number += 1
        self._unanswered[self._number] = (now, renewed)
        if len(self._unanswered) > _REMEMBERED_HEARTBEATS:
            del self._unanswered[min(self._unanswered)]
        wanted = attempts.shortest_lease / SILENT_INTERVALS if attempts.shortest_lease else self._interval
        self.due_at = now + min(self._interval, wanted)
        loop_lag_us, memory_bytes = self.load
        return pb.Heartbeat(
            number=self._number,
            running=[key.ref() for key in renewed],
            free_slots=attempts.free_slots,
            loop_lag_us=loop_lag_us,
            memory_bytes=memory_bytes,
        )

    def answered(self, number: int) -> tuple[float, list[AttemptKey]]:
        """Return when an echoed heartbeat was sent and which attempts it renewed.

        Raises:
            RemoteProtocolError: No such heartbeat was sent.
        """
        if not 1 <= number <= self._number:
            raise RemoteProtocolError(f"echo of heartbeat {number}; the last was {self._number}")
        sent_at, renewed = self._unanswered.get(number, (0.0, []))
        for older in [each for each in self._unanswered if each <= number]:
            del self._unanswered[older]
        return sent_at, renewed


class _Waiting(NamedTuple, Generic[M]):
    attempt: AttemptKey
    kind: type
    message: M
    size: int


class SendQueue(Generic[M]):
    """Messages to the peer. Control messages go first; work follows in its order. Batches are bounded.

    Work about an attempt that is no longer held is dropped when a batch is taken, so the queue is never searched.
    Each message that is added calls `on_change`.
    """

    __slots__ = ("_bounds", "_control", "_on_change", "_size", "_waiting", "_work")

    def __init__(self, bounds: BatchBounds, on_change: Callable[[], None] = _nothing) -> None:
        self._on_change = on_change
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
        self._on_change()

    def put_work(self, attempt: AttemptKey, kind: type, message: M, payload_bytes: int = 0) -> None:
        """Add a message about an attempt behind earlier work."""
        self._work.append(_Waiting(attempt, kind, message, OVERHEAD_BYTES + payload_bytes))
        self._waiting[attempt] += 1
        self._on_change()

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

    def keep_work(self, kind: type, held: Container[AttemptKey] | None = None) -> None:
        """Drop all work except that of one kind, and of some attempts if `held` is given."""
        kept = (waiting for waiting in self._work if waiting.kind is kind and (held is None or waiting.attempt in held))
        self._work = deque(kept)
        self._waiting = Counter(waiting.attempt for waiting in self._work)

    def waiting(self, kind: type) -> list[AttemptKey]:
        """Return the attempts with a waiting message of a kind."""
        return [waiting.attempt for waiting in self._work if waiting.kind is kind]


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
