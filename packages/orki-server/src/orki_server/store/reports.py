"""What agents report about the attempts that they hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from orki.control.v1.attempt_pb2 import TaskState
from orki.errors.v1.errors_pb2 import Reason
from orki_control.attempt import AttemptKey
from orki_server.store.ids import shard_of
from orki_server.store.transition import Argument, Transition

__all__ = [
    "Accept",
    "AcknowledgeCancel",
    "Advance",
    "Answer",
    "Attach",
    "Decline",
    "EndCancelled",
    "Fail",
    "Kept",
    "Renew",
    "Succeed",
    "Verdict",
]


class Verdict(StrEnum):
    """What became of a report."""

    ACCEPTED = "accepted"
    REPEATED = "repeated"
    """It was accepted before."""
    STALE = "stale"
    """It comes from somebody who does not hold the attempt (any more)."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a report.

    Attributes:
        verdict: Whether it was accepted.
        state: The task's state afterwards; unspecified with a stale one.
        retry_ms: Wait before the next attempt in milliseconds, or -1 when none follows from this report.
    """

    verdict: Verdict
    state: TaskState.ValueType
    retry_ms: int = -1

    @classmethod
    def read(cls, reply: list[bytes]) -> Answer:
        """The answer in a script's reply."""
        return cls(Verdict(reply[0].decode()), TaskState.ValueType(int(reply[1])), int(reply[2]))


@dataclass(frozen=True, slots=True)
class _Report(Transition[Answer]):
    """What an agent says about one attempt."""

    agent_id: str
    attempt: AttemptKey

    def route(self) -> int:
        return shard_of(self.attempt.task_id)

    def arguments(self) -> Sequence[Argument]:
        return (self.attempt.task_id, self.attempt.fence, self.agent_id)

    def outcome(self, reply: list[bytes]) -> Answer:
        return Answer.read(reply)


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
class Advance(_Report):
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
class EndCancelled(_Report):
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
class Renew(Transition[list[AttemptKey]]):
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
class Kept:
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
class Attach(Transition[list[Kept]]):
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

    def outcome(self, reply: list[bytes]) -> list[Kept]:
        rows = zip(self.attempts, *(reply[place::3] for place in range(3)), strict=True)
        return [
            Kept(attempt, traceparent.decode(), TaskState.ValueType(int(state)), int(grace))
            for attempt, traceparent, state, grace in rows
            if traceparent
        ]
