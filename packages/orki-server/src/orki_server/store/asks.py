"""What submitters ask: a task, its end, a directive for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from orki.control.v1.attempt_pb2 import TaskState
from orki_contract.model import TaskMethod
from orki_contract.trace import Span
from orki_control.attempt import AttemptKey
from orki_server.keys import idempotency_digest
from orki_server.store.ids import shard_of
from orki_server.store.transition import Argument, Transition

__all__ = ["Asked", "Cancel", "Direct", "Submit", "Submitted"]


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
class Submit(Transition[Submitted]):
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
        method.heartbeat_timeout_ms,
        method.attempt_timeout_ms,
        method.stall_timeout_ms,
        method.total_timeout_ms,
        method.max_attempts,
        backoff.initial_ms,
        backoff.maximum_ms,
        f"{backoff.multiplier:f}",
        method.cancel_grace_ms,
    )
    return ",".join(map(str, numbers))


@dataclass(frozen=True, slots=True)
class Asked:
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
    def read(cls, task_id: str, reply: list[bytes]) -> Asked:
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
class Cancel(Transition[Asked]):
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

    def outcome(self, reply: list[bytes]) -> Asked:
        return Asked.read(self.task_id, reply)


@dataclass(frozen=True, slots=True)
class Direct(Transition[Asked]):
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

    def outcome(self, reply: list[bytes]) -> Asked:
        return Asked.read(self.attempt.task_id, reply)
