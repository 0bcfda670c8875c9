"""What every transition is: one atomic operation of a shard's script, and what its answer means."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, Generic, TypeAlias, TypeVar

from orki.control.v1.attempt_pb2 import TaskState
from orki.errors.v1.errors_pb2 import Reason
from orki_contract.model import TaskMethod, milliseconds
from orki_contract.trace import Span
from orki_control.session import AttemptKey
from orki_server._keys import idempotency_digest
from orki_server._store.ids import shard_of

R = TypeVar("R")
Argument: TypeAlias = bytes | str | int


class Operation(ABC, Generic[R]):
    """One operation of the script. Each may be sent again after an answer was lost.

    Attributes:
        op: Its name there.
        patient: Whether it waits in memory while the store is away. What agents report does, as they have done their
            part; what people ask does not, as they want to know.
    """

    op: ClassVar[str]
    patient: ClassVar[bool] = True
    __slots__ = ()

    @abstractmethod
    def route(self) -> int:
        """The shard that it belongs to."""

    @abstractmethod
    def arguments(self) -> Sequence[Argument]:
        """What the script gets."""

    @abstractmethod
    def outcome(self, reply: list[bytes]) -> R:
        """What the script's answer means."""


@dataclass(frozen=True, slots=True)
class Submitted:
    """What became of a submission.

    Attributes:
        word: `new`, `same` (found by its key) or `conflict` (its key belongs to another request).
        task_id: The task, new or found.
        submitted_us: When a new one was submitted, in microseconds since the Unix epoch.
    """

    word: str
    task_id: str
    submitted_us: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Submit(Operation[Submitted]):
    """A task comes into being, or is found by its idempotency key.

    Attributes:
        task_id: Its id, whose shard is that of the key, if there is one.
        method: Its contract, which it keeps for life.
        request: The request message, serialised.
        digest: Of method and request, 64 hex digits.
        idempotency_key: Or empty.
        span: The task's span; its parent is the submitter's.
        actor: Who submits.
        contract: Digest of the contract under which its service was known; empty where none is.
    """

    op: ClassVar[str] = "submit"
    patient: ClassVar[bool] = False
    task_id: str
    method: TaskMethod
    request: bytes
    digest: str
    idempotency_key: str
    span: Span
    actor: str
    contract: str = ""

    def route(self) -> int:
        return shard_of(self.task_id)

    def arguments(self) -> Sequence[Argument]:
        key = self.idempotency_key
        return (
            self.task_id,
            self.method.full_name,
            self.request,
            _options(self.method),
            self.digest,
            idempotency_digest(key) if key else "",
            key,
            self.span.traceparent,
            self.span.parent_id,
            self.actor,
            self.contract,
        )

    def outcome(self, reply: list[bytes]) -> Submitted:
        return Submitted(reply[0].decode(), reply[1].decode(), int(reply[2]))


def _options(method: TaskMethod) -> str:
    backoff = method.backoff
    numbers = (
        milliseconds(method.heartbeat_timeout),
        milliseconds(method.attempt_timeout),
        milliseconds(method.stall_timeout),
        milliseconds(method.total_timeout),
        method.max_attempts,
        milliseconds(backoff.initial),
        milliseconds(backoff.maximum),
        f"{backoff.multiplier:f}",
        milliseconds(method.cancel_grace),
    )
    return ",".join(map(str, numbers))


@dataclass(frozen=True, slots=True)
class TaskReply:
    """What became of a submitter's request about a task.

    Attributes:
        word: `unknown`, `ended`, and for cancels `done` (it had not been started), `asked`, `again`; for directives
            `idle` and `running`.
        state: The task's state.
        agent_id: Who holds the attempt.
        attempt: The current or last attempt.
        traceparent: Of that attempt's span.
        grace_ms: Cancel grace of its method.
    """

    word: str
    state: TaskState.ValueType
    agent_id: str
    attempt: AttemptKey
    traceparent: str
    grace_ms: int

    @classmethod
    def read(cls, task_id: str, reply: list[bytes]) -> TaskReply:
        """The answer in a script's reply."""
        word, state, agent, attempt, fence, traceparent, grace = reply
        return cls(
            word.decode(),
            TaskState.ValueType(int(state)),
            agent.decode(),
            AttemptKey(task_id, int(attempt), int(fence)),
            traceparent.decode(),
            int(grace),
        )


@dataclass(frozen=True, slots=True)
class Cancel(Operation[TaskReply]):
    """Somebody asks for a task's end."""

    op: ClassVar[str] = "cancel"
    patient: ClassVar[bool] = False
    task_id: str
    message: str
    actor: str

    def route(self) -> int:
        return shard_of(self.task_id)

    def arguments(self) -> Sequence[Argument]:
        return (self.task_id, self.message, self.actor)

    def outcome(self, reply: list[bytes]) -> TaskReply:
        return TaskReply.read(self.task_id, reply)


@dataclass(frozen=True, slots=True)
class Direct(Operation[TaskReply]):
    """Somebody sends a directive to a running attempt. Sent again, it is noted again."""

    op: ClassVar[str] = "direct"
    patient: ClassVar[bool] = False
    attempt: AttemptKey
    size: int
    actor: str

    def route(self) -> int:
        return shard_of(self.attempt.task_id)

    def arguments(self) -> Sequence[Argument]:
        return (self.attempt.task_id, self.size, self.actor, self.attempt.fence)

    def outcome(self, reply: list[bytes]) -> TaskReply:
        return TaskReply.read(self.attempt.task_id, reply)


@dataclass(frozen=True, slots=True)
class Recipient:
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
class OfferedAttempt:
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
class Offer(Operation[list[OfferedAttempt]]):
    """Hands queued tasks of one shard to those who ask, one to each in turn.

    Sent again it hands out *more*: an answer that was lost costs an accept timeout, and no attempt.
    """

    op: ClassVar[str] = "offer"
    patient: ClassVar[bool] = False
    shard: int
    accept_timeout_ms: int
    askers: tuple[Recipient, ...]

    def route(self) -> int:
        return self.shard

    def arguments(self) -> Sequence[Argument]:
        flat: list[Argument] = [self.accept_timeout_ms]
        for each in self.askers:
            flat += (each.agent_id, each.instance_id, each.wants, len(each.methods), *each.methods)
        return flat

    def outcome(self, reply: list[bytes]) -> list[OfferedAttempt]:
        rows = (reply[at : at + 9] for at in range(0, len(reply), 9))
        return [
            OfferedAttempt(
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
class Sweep(Operation[Swept]):
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
class RaiseEpoch(Operation[bool]):
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


class ReportStatus(StrEnum):
    """What became of a report."""

    ACCEPTED = "accepted"
    REPEATED = "repeated"
    """It was accepted before."""
    STALE = "stale"
    """It comes from somebody who does not hold the attempt (any more)."""


@dataclass(frozen=True, slots=True)
class ReportReply:
    """The answer to a report.

    Attributes:
        verdict: Whether it was accepted.
        state: The task's state afterwards; unspecified with a stale one.
        retry_ms: Wait before the next attempt in milliseconds, or -1 when none follows from this report.
    """

    verdict: ReportStatus
    state: TaskState.ValueType
    retry_ms: int = -1

    @classmethod
    def read(cls, reply: list[bytes]) -> ReportReply:
        """The answer in a script's reply."""
        return cls(ReportStatus(reply[0].decode()), TaskState.ValueType(int(reply[1])), int(reply[2]))


@dataclass(frozen=True, slots=True)
class _Report(Operation[ReportReply]):
    """What an agent says about one attempt."""

    agent_id: str
    attempt: AttemptKey

    def route(self) -> int:
        return shard_of(self.attempt.task_id)

    def arguments(self) -> Sequence[Argument]:
        return (self.attempt.task_id, self.attempt.fence, self.agent_id)

    def outcome(self, reply: list[bytes]) -> ReportReply:
        return ReportReply.read(reply)


@dataclass(frozen=True, slots=True)
class Accept(_Report):
    """The agent takes the offer; lease and attempt timeout begin."""

    op: ClassVar[str] = "accept"


@dataclass(frozen=True, slots=True)
class Decline(_Report):
    """The agent gives the offer back."""

    op: ClassVar[str] = "decline"
    reason: Reason.ValueType
    message: str
    at_once: bool

    def arguments(self) -> Sequence[Argument]:
        return (self.attempt.task_id, self.attempt.fence, self.agent_id, self.reason, self.message, int(self.at_once))


@dataclass(frozen=True, slots=True)
class ReportProgress(_Report):
    """News of the attempt; news that were told before, by their index, are not told again."""

    op: ClassVar[str] = "progress"
    kept: int
    index: int
    payload: bytes

    def arguments(self) -> Sequence[Argument]:
        return (self.attempt.task_id, self.attempt.fence, self.agent_id, self.kept, self.index, self.payload)


@dataclass(frozen=True, slots=True)
class Succeed(_Report):
    """The attempt has a response."""

    op: ClassVar[str] = "succeed"
    response: bytes

    def arguments(self) -> Sequence[Argument]:
        return (self.attempt.task_id, self.attempt.fence, self.agent_id, self.response)


@dataclass(frozen=True, slots=True)
class Fail(_Report):
    """The attempt failed."""

    op: ClassVar[str] = "fail"
    reason: Reason.ValueType
    message: str
    error_type: str
    retryable: bool

    def arguments(self) -> Sequence[Argument]:
        key = self.attempt
        return (
            key.task_id,
            key.fence,
            self.agent_id,
            self.reason,
            self.message,
            self.error_type,
            int(self.retryable),
        )


@dataclass(frozen=True, slots=True)
class ConfirmCancelled(_Report):
    """The attempt ended as cancelled."""

    op: ClassVar[str] = "cancelled"
    reason: Reason.ValueType

    def arguments(self) -> Sequence[Argument]:
        return (self.attempt.task_id, self.attempt.fence, self.agent_id, self.reason)


@dataclass(frozen=True, slots=True)
class AcknowledgeCancel(_Report):
    """The agent has the request for the attempt's end."""

    op: ClassVar[str] = "cancel_acknowledged"


@dataclass(frozen=True, slots=True)
class Renew(Operation[list[AttemptKey]]):
    """Renews the leases of one agent's attempts on one shard; the outcome lists those that are no longer its own."""

    op: ClassVar[str] = "renew"
    shard: int
    agent_id: str
    attempts: tuple[AttemptKey, ...]

    def route(self) -> int:
        return self.shard

    def arguments(self) -> Sequence[Argument]:
        flat: list[Argument] = [self.agent_id]
        for each in self.attempts:
            flat += (each.task_id, each.fence)
        return flat

    def outcome(self, reply: list[bytes]) -> list[AttemptKey]:
        return [self.attempts[int(place)] for place in reply]


@dataclass(frozen=True, slots=True)
class ResumedAttempt:
    """An attempt that an agent brought along and keeps.

    Attributes:
        attempt: The attempt.
        traceparent: Of its span.
        state: The task's state.
        grace_ms: Cancel grace of its method.
    """

    attempt: AttemptKey
    traceparent: str
    state: TaskState.ValueType
    grace_ms: int


@dataclass(frozen=True, slots=True)
class Resume(Operation[list[ResumedAttempt]]):
    """An agent that comes back holds attempts of one shard: those that are still its own are renewed and listed."""

    op: ClassVar[str] = "attach"
    patient: ClassVar[bool] = False
    shard: int
    agent_id: str
    attempts: tuple[AttemptKey, ...]

    def route(self) -> int:
        return self.shard

    def arguments(self) -> Sequence[Argument]:
        flat: list[Argument] = [self.agent_id]
        for each in self.attempts:
            flat += (each.task_id, each.fence)
        return flat

    def outcome(self, reply: list[bytes]) -> list[ResumedAttempt]:
        rows = zip(self.attempts, *(reply[place::3] for place in range(3)), strict=True)
        return [
            ResumedAttempt(attempt, traceparent.decode(), TaskState.ValueType(int(state)), int(grace))
            for attempt, traceparent, state, grace in rows
            if traceparent
        ]
