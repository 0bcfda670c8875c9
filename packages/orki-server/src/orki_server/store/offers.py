"""What the orchestrator does of its own accord: hand out tasks, obey timers, raise the epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from orki.errors.v1.errors_pb2 import Reason
from orki_control.attempt import AttemptKey
from orki_server.store.transition import Argument, Transition

__all__ = ["Asker", "Expired", "Offer", "Offered", "RaiseEpoch", "Sweep", "Swept"]


@dataclass(frozen=True, slots=True)
class Asker:
    """Somebody with free slots.

    Attributes:
        agent_id: The agent.
        instance_id: Its process.
        wants: How many tasks it takes.
        methods: What it serves, as `package.Service/Method`.
    """

    agent_id: str
    instance_id: str
    wants: int
    methods: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Offered:
    """A task that was handed out.

    Attributes:
        asker: Place of the asker among those of the transition.
        attempt: The attempt.
        method: As `package.Service/Method`.
        request: The request message, serialised.
        traceparent: Of the attempt's span.
        lease_ms: Time that the attempt survives without a heartbeat.
        attempt_timeout_ms: Time that it may take.
    """

    asker: int
    attempt: AttemptKey
    method: str
    request: bytes
    traceparent: str
    lease_ms: int
    attempt_timeout_ms: int


@dataclass(frozen=True, slots=True)
class Offer(Transition[list[Offered]]):
    """Hands queued tasks of one shard to those who ask, one to each in turn.

    Sent again it hands out *more*: an answer that was lost costs an accept timeout, and no attempt.
    """

    op: ClassVar[str] = "offer"
    patient: ClassVar[bool] = False
    shard: int
    accept_timeout_ms: int
    askers: tuple[Asker, ...]

    def route(self) -> int:
        return self.shard

    def arguments(self) -> Sequence[Argument]:
        flat: list[Argument] = [self.accept_timeout_ms]
        for each in self.askers:
            flat += (each.agent_id, each.instance_id, each.wants, len(each.methods), *each.methods)
        return flat

    def outcome(self, reply: list[bytes]) -> list[Offered]:
        rows = (reply[at : at + 9] for at in range(0, len(reply), 9))
        return [
            Offered(
                int(row[0]),
                AttemptKey(row[1].decode(), int(row[2]), int(row[3])),
                row[4].decode(),
                row[5],
                row[6].decode(),
                int(row[7]),
                int(row[8]),
            )
            for row in rows
        ]


@dataclass(frozen=True, slots=True)
class Expired:
    """What a timer did.

    Attributes:
        what: `offer` (withdrawn), `attempt` (ended), `task` (ended), `retry` (a wait is over).
        agent_id: Who held the attempt.
        attempt: The attempt.
        reason: Why; unspecified for `retry`.
    """

    what: str
    agent_id: str
    attempt: AttemptKey
    reason: Reason.ValueType


@dataclass(frozen=True, slots=True)
class Swept:
    """What a sweep did.

    Attributes:
        next_ms: Time until the shard's next timer in milliseconds; -1 for none.
        expired: Tasks that changed.
    """

    next_ms: int
    expired: tuple[Expired, ...]


@dataclass(frozen=True, slots=True)
class Sweep(Transition[Swept]):
    """Does what the timers of one shard say, for `limit` tasks at the most."""

    op: ClassVar[str] = "sweep"
    patient: ClassVar[bool] = False
    shard: int
    limit: int

    def route(self) -> int:
        return self.shard

    def arguments(self) -> Sequence[Argument]:
        return (self.limit,)

    def outcome(self, reply: list[bytes]) -> Swept:
        rows = (reply[at : at + 6] for at in range(1, len(reply), 6))
        expired = (
            Expired(
                what.decode(),
                agent.decode(),
                AttemptKey(task.decode(), int(attempt), int(fence)),
                Reason.ValueType(int(reason)),
            )
            for what, task, agent, attempt, fence, reason in rows
        )
        return Swept(int(reply[0]), tuple(expired))


@dataclass(frozen=True, slots=True)
class RaiseEpoch(Transition[bool]):
    """Raises the shard's store epoch if it does not know the fence `seen`; the outcome says whether it did not.

    Attributes:
        shard: The shard.
        seen: A fence that somebody holds.
        first: The fence after which the new epoch begins.
    """

    op: ClassVar[str] = "epoch"
    shard: int
    seen: int
    first: int

    def route(self) -> int:
        return self.shard

    def arguments(self) -> Sequence[Argument]:
        return (self.seen, self.first)

    def outcome(self, reply: list[bytes]) -> bool:
        return reply[0] == b"raised"
