"""The state of a session: attempts with their slots and leases, and heartbeats."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any, Final, Generic, NamedTuple, TypeAlias, TypeVar

from orki.control.v1 import session_pb2 as pb
from orki.control.v1.attempt_pb2 import AttemptRef, Budget, Failure
from orki_contract.errors import RemoteProtocolError
from orki_control.session._options import SILENT_INTERVALS
from orki_control.session._progress import ProgressWindow
from orki_control.session._tables import AttemptState

T = TypeVar("T", bound=float | None)

LEASE_SHARE: Final = 0.9
"""Share of a lease after which the agent stops the attempt, so that it has stopped when the lease ends (law 8)."""
OCCUPYING: Final = frozenset({AttemptState.OFFERED, AttemptState.RUNNING, AttemptState.CANCELLING})
"""States in which an attempt occupies a slot."""
Outcome: TypeAlias = bytes | Failure | pb.CancelledOutcome | pb.SuspendedOutcome
"""The end of an attempt: the serialised response, a failure, a cancellation, or a suspension of its task."""
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
        on_later: Called instead for a message that may wait a moment for others, so that they leave together; None to
            call `on_change` for it.
        state: State of the session.
    """

    state: Any

    def __init__(self) -> None:
        self.on_change: Callable[[], None] = _nothing
        self.on_later: Callable[[], None] | None = None

    def _changed(self) -> None:
        self.on_change()

    def _changed_later(self) -> None:
        (self.on_later or self.on_change)()

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


class UsageTotal:
    """The usage of an attempt in all; a place in the queue sends the newest total.

    Attributes:
        total: The usage; None before the first.
    """

    __slots__ = ("_ref", "_traceparent", "_waiting", "total")

    next_size = 256

    def __init__(self, ref: AttemptRef, traceparent: str) -> None:
        self.total: Budget | None = None
        self._ref = ref
        self._traceparent = traceparent
        self._waiting = False

    def wait(self) -> bool:
        """Take a place in the queue; return False if there is nothing to send or it has a place already."""
        waited, self._waiting = self._waiting, self.total is not None
        return self._waiting and not waited

    def rewind(self) -> None:
        """Note that the queue was cleared."""
        self._waiting = False

    def take(self) -> pb.AgentMessage | None:
        """Return the report."""
        self._waiting = False
        return pb.AgentMessage(traceparent=self._traceparent, usage=pb.Usage(attempt=self._ref, total=self.total))


class HeldAttempt:
    """One attempt at the agent.

    Attributes:
        ref: Reference to the attempt for messages.
        state: Its state.
        accepted_at: Time at which it was accepted.
        traceparent: Of its task's span.
        lease: Seconds that it survives without a renewal.
        renewed_at: Earliest time at which the orchestrator can have renewed the lease last.
        progress: Its progress that is not acknowledged.
        proof: Of its offer; it goes back unread in the next hello.
        result: Its result, once it has ended.
        checkpoint: Its newest checkpoint, until it is stored.
        checkpoints: Number of its last checkpoint.
        usage: Its usage, if its offer named budgets.
    """

    __slots__ = (
        *("accepted_at", "checkpoint", "checkpoints", "lease", "progress", "proof", "ref", "renewed_at", "result"),
        *("state", "traceparent", "usage"),
    )

    def __init__(
        self,
        ref: AttemptRef,
        traceparent: str,
        lease: float,
        renewed_at: float,
        progress: ProgressWindow,
        proof: bytes = b"",
    ) -> None:
        self.ref = ref
        self.state = AttemptState.OFFERED
        self.accepted_at = 0.0
        self.traceparent = traceparent
        self.lease = lease
        self.renewed_at = renewed_at
        self.progress = progress
        self.proof = proof
        self.result: pb.Result | None = None
        self.checkpoint: pb.Checkpoint | None = None
        self.checkpoints = 0
        self.usage: UsageTotal | None = None

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
        """Return the held attempts for a hello, each with whether its result waits and its proof."""
        return [
            pb.HeldAttempt(attempt=held.ref, has_result=held.state is AttemptState.REPORTED, proof=held.proof)
            for held in self.values()
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
        idle_interval: Seconds between heartbeats while no attempt is held; 0 for those of the peer's welcome.
        load: Lag of the event loop in microseconds and resident memory in bytes, for the next heartbeats.
    """

    due_at = _Deadline[float]()
    silent_at = _Deadline[float]()

    def __init__(self, on_change: Callable[[], None] = _nothing) -> None:
        self.on_change = on_change
        self.due_at = 0.0
        self.silent_at = 0.0
        self.idle_interval = 0.0
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
        self.idle_interval = 0.0
        self.due_at = now

    def patience(self, attempts: AttemptTable) -> float:
        """Return the seconds of silence after which the peer counts as lost."""
        return SILENT_INTERVALS * (self._interval if attempts else max(self._interval, self.idle_interval))

    def hasten(self, now: float, attempts: AttemptTable) -> None:
        """An attempt was accepted: the next heartbeat may be due earlier."""
        self.due_at = min(self.due_at, now + self._wanted(attempts))

    def _wanted(self, attempts: AttemptTable) -> float:
        if not attempts:
            return max(self._interval, self.idle_interval)
        lease = attempts.shortest_lease
        return min(self._interval, lease / SILENT_INTERVALS) if lease else self._interval

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
        self.due_at = now + self._wanted(attempts)
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
