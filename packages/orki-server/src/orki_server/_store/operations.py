"""Task ids, and the operations of agents and of the orchestrator: arguments for the script and decoded replies."""

from __future__ import annotations

import os
import re
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, Final, TypeVar

from orki.control.v1.attempt_pb2 import TaskState
from orki.errors.v1.errors_pb2 import Reason
from orki_contract.errors import UnknownTask
from orki_control.session import AttemptKey
from orki_server._store.script import Argument, Call, Operation

R = TypeVar("R")

# Crockford's base 32 in lower case: no letter can be taken for a digit.
_DIGITS: Final = "0123456789abcdefghjkmnpqrstvwxyz"
_TASK_ID: Final = re.compile(rf"t(0|[1-9][0-9]{{0,3}})-[{_DIGITS}]{{26}}")

_FAILURE_TEXT: Final = 4_000
"""Maximum length of a stored failure text, in characters."""


def new_task_id(shard: int) -> str:
    """Return a new id for a task of a shard.

    The id is `t<shard>-` and 26 characters that sort by time: 48 bits of milliseconds, then 80 random bits.
    """
    number = int(time.time() * 1000) << 80 | int.from_bytes(os.urandom(10))
    return f"t{shard}-" + "".join(_DIGITS[number >> shift & 31] for shift in range(125, -1, -5))


def shard_of(task_id: str) -> int:
    """Return the shard that a task id names.

    Raises:
        UnknownTask: The text is not a task id.
    """
    matched = _TASK_ID.fullmatch(task_id)
    if not matched:
        raise UnknownTask(f"there is no task {task_id[:64]!r}")
    return int(matched[1])


def shard_of_key(idempotency_key: str, shards: int) -> int:
    """Return the shard of an idempotency key, which is also the shard of its task."""
    return zlib.crc32(idempotency_key.encode()) % shards


def failure_text(text: str) -> str:
    """Return a failure's text as it is stored: bounded, without the characters that separate failures."""
    return text[:_FAILURE_TEXT].replace("\x1e", " ").replace("\x1f", " ")


class ReportStatus(StrEnum):
    """The outcome of a report."""

    ACCEPTED = "accepted"
    REPEATED = "repeated"
    """It was accepted before."""
    STALE = "stale"
    """The agent does not hold the attempt, or no longer."""


@dataclass(frozen=True, slots=True)
class ReportReply:
    """The reply to a report.

    Attributes:
        status: Whether it was accepted.
        state: The task's state afterwards; unspecified for a stale report.
        retry_after: Wait before the next attempt; None if no attempt follows from this report.
    """

    status: ReportStatus
    state: TaskState.ValueType
    retry_after: float | None = None


@dataclass(frozen=True, slots=True)
class _Report(Operation[ReportReply]):
    agent_id: str
    attempt: AttemptKey

    def call(self) -> Call:
        return shard_of(self.attempt.task_id), (
            self.attempt.task_id,
            self.attempt.fence,
            self.agent_id,
            *self.details(),
        )

    def details(self) -> Sequence[Argument]:
        """Return the arguments after task, fence and agent."""
        return ()

    def outcome(self, reply: list[bytes]) -> ReportReply:
        status, state, retry_ms = reply
        retry_after = int(retry_ms) / 1000 if int(retry_ms) >= 0 else None
        return ReportReply(ReportStatus(status.decode()), TaskState.ValueType(int(state)), retry_after)


@dataclass(frozen=True, slots=True)
class Accept(_Report):
    """The agent accepts the offer. Lease and attempt timeout begin."""

    op: ClassVar[str] = "accept"


@dataclass(frozen=True, slots=True)
class Decline(_Report):
    """The agent returns the offer."""

    op: ClassVar[str] = "decline"
    reason: Reason.ValueType
    message: str
    at_once: bool

    def details(self) -> Sequence[Argument]:
        return (self.reason, self.message, int(self.at_once))


@dataclass(frozen=True, slots=True)
class ReportProgress(_Report):
    """The attempt made progress. An index that was reported before changes nothing."""

    op: ClassVar[str] = "progress"
    kept: int
    index: int
    payload: bytes

    def details(self) -> Sequence[Argument]:
        return (self.kept, self.index, self.payload)


@dataclass(frozen=True, slots=True)
class Succeed(_Report):
    """The attempt has a response."""

    op: ClassVar[str] = "succeed"
    response: bytes

    def details(self) -> Sequence[Argument]:
        return (self.response,)


@dataclass(frozen=True, slots=True)
class Fail(_Report):
    """The attempt failed."""

    op: ClassVar[str] = "fail"
    reason: Reason.ValueType
    message: str
    error_type: str
    retryable: bool

    def details(self) -> Sequence[Argument]:
        return (self.reason, self.message, self.error_type, int(self.retryable))


@dataclass(frozen=True, slots=True)
class ConfirmCancelled(_Report):
    """The attempt ended as cancelled."""

    op: ClassVar[str] = "cancelled"
    reason: Reason.ValueType

    def details(self) -> Sequence[Argument]:
        return (self.reason,)


@dataclass(frozen=True, slots=True)
class AcknowledgeCancel(_Report):
    """The agent received the cancel."""

    op: ClassVar[str] = "acknowledge_cancel"


@dataclass(frozen=True, slots=True)
class _ShardOperation(Operation[R]):
    shard: int


@dataclass(frozen=True, slots=True)
class _HeldAttempts(_ShardOperation[R]):
    agent_id: str
    attempts: tuple[AttemptKey, ...]

    def call(self) -> Call:
        flat: list[Argument] = [self.agent_id]
        for each in self.attempts:
            flat += (each.task_id, each.fence)
        return self.shard, flat


@dataclass(frozen=True, slots=True)
class Renew(_HeldAttempts[list[AttemptKey]]):
    """Renews the leases of an agent's attempts on one shard. The outcome lists those that it no longer holds."""

    op: ClassVar[str] = "renew"

    def outcome(self, reply: list[bytes]) -> list[AttemptKey]:
        return [self.attempts[int(position)] for position in reply]


@dataclass(frozen=True, slots=True)
class ResumedAttempt:
    """An attempt that an agent brings to a new session and keeps.

    Attributes:
        attempt: The attempt.
        traceparent: Its span.
        state: The task's state.
        cancel_grace: Cancel grace of its method.
    """

    attempt: AttemptKey
    traceparent: str
    state: TaskState.ValueType
    cancel_grace: float


@dataclass(frozen=True, slots=True)
class Resume(_HeldAttempts[list[ResumedAttempt]]):
    """Renews the attempts of a returning agent on one shard. The outcome lists those that it still holds."""

    op: ClassVar[str] = "resume"
    patient: ClassVar[bool] = False

    def outcome(self, reply: list[bytes]) -> list[ResumedAttempt]:
        rows = zip(self.attempts, reply[::3], reply[1::3], reply[2::3], strict=True)
        return [
            ResumedAttempt(attempt, traceparent.decode(), TaskState.ValueType(int(state)), int(grace) / 1000)
            for attempt, traceparent, state, grace in rows
            if traceparent
        ]


@dataclass(frozen=True, slots=True)
class Recipient:
    """An agent with free slots.

    Attributes:
        agent_id: The agent.
        instance_id: Its process.
        slots: Number of tasks that it takes.
        methods: Methods that it serves, as `package.Service/Method`.
    """

    agent_id: str
    instance_id: str
    slots: int
    methods: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class OfferedAttempt:
    """A task that was assigned to an agent.

    Attributes:
        recipient: Position of the recipient in the operation.
        attempt: The attempt.
        method: Its method, as `package.Service/Method`.
        request: The request message, serialized.
        traceparent: Span of the attempt.
        lease: Time for which the attempt survives without a heartbeat.
        attempt_timeout: Maximum time of the attempt.
    """

    recipient: int
    attempt: AttemptKey
    method: str
    request: bytes
    traceparent: str
    lease: float
    attempt_timeout: float


@dataclass(frozen=True, slots=True)
class Offer(_ShardOperation[list[OfferedAttempt]]):
    """Assigns queued tasks of one shard to recipients, one to each in turn.

    When it is sent again, it assigns *more* tasks: a lost reply costs an accept timeout, but no attempt.
    """

    op: ClassVar[str] = "offer"
    patient: ClassVar[bool] = False
    accept_timeout: float
    recipients: tuple[Recipient, ...]

    def call(self) -> Call:
        flat: list[Argument] = [round(self.accept_timeout * 1000)]
        for each in self.recipients:
            flat += (each.agent_id, each.instance_id, each.slots, len(each.methods), *each.methods)
        return self.shard, flat

    def outcome(self, reply: list[bytes]) -> list[OfferedAttempt]:
        rows = (reply[at : at + 9] for at in range(0, len(reply), 9))
        return [
            OfferedAttempt(
                int(recipient),
                AttemptKey(task.decode(), int(attempt), int(fence)),
                method.decode(),
                request,
                traceparent.decode(),
                int(lease) / 1000,
                int(timeout) / 1000,
            )
            for recipient, task, attempt, fence, method, request, traceparent, lease, timeout in rows
        ]


@dataclass(frozen=True, slots=True)
class Expired:
    """The effect of a timer.

    Attributes:
        kind: `offer` (withdrawn), `attempt` (ended), `task` (ended) or `retry` (a wait is over).
        agent_id: Holder of the attempt.
        attempt: The attempt.
        reason: The cause; unspecified for `retry`.
    """

    kind: str
    agent_id: str
    attempt: AttemptKey
    reason: Reason.ValueType


@dataclass(frozen=True, slots=True)
class Swept:
    """The outcome of a sweep.

    Attributes:
        next_timer: Time until the shard's next timer; None if it has none.
        expired: Tasks that changed.
    """

    next_timer: float | None
    expired: tuple[Expired, ...]


@dataclass(frozen=True, slots=True)
class Sweep(_ShardOperation[Swept]):
    """Executes the due timers of one shard, for at most `limit` tasks."""

    op: ClassVar[str] = "sweep"
    patient: ClassVar[bool] = False
    limit: int

    def call(self) -> Call:
        return self.shard, (self.limit,)

    def outcome(self, reply: list[bytes]) -> Swept:
        rows = (reply[at : at + 6] for at in range(1, len(reply), 6))
        expired = (
            Expired(
                kind.decode(),
                agent.decode(),
                AttemptKey(task.decode(), int(attempt), int(fence)),
                Reason.ValueType(int(reason)),
            )
            for kind, task, agent, attempt, fence, reason in rows
        )
        return Swept(int(reply[0]) / 1000 if int(reply[0]) >= 0 else None, tuple(expired))


@dataclass(frozen=True, slots=True)
class RaiseEpoch(_ShardOperation[bool]):
    """Raises the shard's epoch if the store has not given the fence `seen`. The outcome is whether it was raised.

    Attributes:
        shard: The shard.
        seen: A fence that an agent or an orchestrator holds.
        first: The fence after which the new epoch begins.
    """

    op: ClassVar[str] = "raise_epoch"
    seen: int
    first: int

    def call(self) -> Call:
        return self.shard, (self.seen, self.first)

    def outcome(self, reply: list[bytes]) -> bool:
        return reply[0] == b"raised"
