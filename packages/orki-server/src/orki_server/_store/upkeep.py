"""Operations on a shard as a whole: timers, pauses, the outbox and the epoch."""

from __future__ import annotations

from dataclasses import dataclass

from orki.errors.v1.errors_pb2 import Reason
from orki_control.session import AttemptKey
from orki_server._keys import EPOCH_STEP
from orki_server._store.operations import Operation, damaged_of


@dataclass(frozen=True, slots=True)
class Expired:
    """The effect of a timer.

    Attributes:
        kind: `offer` (withdrawn), `attempt` (ended), `task` (ended) or `retry` (a wait is over).
        agent_id: Holder of the attempt.
        attempt: The attempt.
        reason: The cause; unspecified for `retry`.
        method: The task's method.
    """

    kind: str
    agent_id: str
    attempt: AttemptKey
    reason: Reason.ValueType
    method: str


@dataclass(frozen=True, slots=True)
class Swept:
    """The outcome of a sweep.

    Attributes:
        next_timer: Time until the shard's next timer; None if it has none.
        expired: Tasks that changed.
        damaged: Tasks that cannot be read and were left out.
        has_mail: Whether there is mail for this orchestrator.
        has_orphans: Whether children of ended parents are to be cancelled.
        has_raised: Whether budgets were raised.
    """

    next_timer: float | None
    expired: tuple[Expired, ...]
    damaged: tuple[str, ...] = ()
    has_mail: bool = False
    has_orphans: bool = False
    has_raised: bool = False


def sweep(shard: int, limit: int) -> Operation[Swept]:
    """Execute the due timers of one shard, for at most `limit` tasks. It also advances the shard's clock."""
    return Operation("sweep", shard, (limit,), _swept, patient=False)


def _swept(reply: list[bytes]) -> Swept:
    damaged = damaged_of(reply, 2)
    rows = (reply[at : at + 7] for at in range(3 + len(damaged), len(reply), 7))
    expired = (
        Expired(
            kind.decode(),
            agent.decode(),
            AttemptKey(task.decode(), int(attempt), int(fence)),
            Reason.ValueType(int(reason)),
            method.decode(),
        )
        for kind, task, agent, attempt, fence, reason, method in rows
    )
    next_timer = int(reply[0]) / 1000 if int(reply[0]) >= 0 else None
    flags = int(reply[1])
    return Swept(next_timer, tuple(expired), damaged, bool(flags & 1), bool(flags & 2), bool(flags & 4))


def pause(shard: int, target: str, paused: bool) -> Operation[bool]:
    """Pause or resume a service or a method on one shard. The outcome is whether that changed anything."""
    return Operation("pause", shard, (target, int(paused)), lambda reply: reply[0] == b"changed", patient=False)


def drain(shard: int, *, release: bool = False) -> Operation[str]:
    """Claim a shard's outbox for publishing, or release it.

    The outcome is `kept`, `taken` (another orchestrator had it, or nobody) or `other` (another one has it). The claim
    of an orchestrator that is not heard of for 3 s ends.
    """
    return Operation("drain", shard, (int(release),), lambda reply: reply[0].decode(), patient=False)


def empty_outbox(shard: int) -> Operation[tuple[str, int]]:
    """Write the oldest entries of a shard's outbox as events, and remove them.

    The outcome is the number of damaged records, which are left out, and one of `moved`, `empty`, `stuck` (a stream
    refuses them) and `other` (the caller has not claimed the outbox, or the scripts write no events).
    """
    return Operation("empty_outbox", shard, (), lambda reply: (reply[0].decode(), int(reply[1])), patient=False)


def raise_epoch(shard: int, seen: int) -> Operation[bool]:
    """Raise the shard's epoch if the store has not given the fence `seen`. The outcome is whether it was raised."""
    first = (seen // EPOCH_STEP + 1) * EPOCH_STEP
    return Operation("raise_epoch", shard, (seen, first), lambda reply: reply[0] == b"raised")
