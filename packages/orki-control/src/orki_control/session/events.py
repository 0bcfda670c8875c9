"""What a session's machine tells its shell. Events that come in numbers carry them as one batch, in their order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from orki.control.v1.attempt_pb2 import Failure
from orki.control.v1.session_pb2 import Hello, Offer, Result
from orki.errors.v1.errors_pb2 import Reason
from orki_contract.errors import OrkiError
from orki_control.attempt import AttemptKey

__all__ = [
    "AgentDraining",
    "AgentEvent",
    "ArrivedCancel",
    "ArrivedDirective",
    "ArrivedOffer",
    "ArrivedProgress",
    "ArrivedResult",
    "AttemptsRevoked",
    "CancelsAcknowledged",
    "CancelsArrived",
    "Decline",
    "DirectivesArrived",
    "DrainCompleted",
    "EventBatch",
    "HeartbeatArrived",
    "HelloArrived",
    "LeasesLost",
    "OffersAccepted",
    "OffersArrived",
    "OffersDeclined",
    "OffersExpired",
    "OrchestratorDraining",
    "OrchestratorEvent",
    "ProgressArrived",
    "ReportsRefused",
    "ResultsAcknowledged",
    "ResultsArrived",
    "Revocation",
    "SessionClosed",
    "SessionEnded",
    "SessionLost",
    "SessionOpened",
]


class Decline(NamedTuple):
    """An offer that the agent gave back, and why."""

    attempt: AttemptKey
    failure: Failure


class ArrivedProgress(NamedTuple):
    """News of an attempt: number within the attempt, from 1, and the serialised message."""

    attempt: AttemptKey
    number: int
    payload: bytes


class ArrivedResult(NamedTuple):
    """The end of an attempt as the agent reports it."""

    attempt: AttemptKey
    result: Result


class ArrivedOffer(NamedTuple):
    """An offer to answer, with the traceparent of the task's span."""

    attempt: AttemptKey
    offer: Offer
    traceparent: str


class ArrivedCancel(NamedTuple):
    """A request for an attempt's end; the grace in milliseconds. It is acknowledged already."""

    attempt: AttemptKey
    grace_ms: int
    message: str


class ArrivedDirective(NamedTuple):
    """A directive to a running attempt, serialised."""

    attempt: AttemptKey
    payload: bytes


class Revocation(NamedTuple):
    """An attempt that is no longer the agent's, and why."""

    attempt: AttemptKey
    failure: Failure


# --- what the orchestrator's end tells ---


@dataclass(frozen=True, slots=True)
class HelloArrived:
    """An agent asks for a session: judge its contracts, then call `welcome` or `refuse_session`.

    Attributes:
        hello: The well-formed hello.
        held: Attempts that the agent holds, and for each whether its result is waiting.
    """

    hello: Hello
    held: tuple[tuple[AttemptKey, bool], ...]


@dataclass(frozen=True, slots=True)
class OffersAccepted:
    """Offers that the agent took."""

    attempts: tuple[AttemptKey, ...]


@dataclass(frozen=True, slots=True)
class OffersDeclined:
    """Offers that the agent gave back; their slots are free."""

    declines: tuple[Decline, ...]


@dataclass(frozen=True, slots=True)
class OffersExpired:
    """Offers that were not answered in time; they are withdrawn and their slots are free."""

    attempts: tuple[AttemptKey, ...]


@dataclass(frozen=True, slots=True)
class ProgressArrived:
    """News of running attempts."""

    progress: tuple[ArrivedProgress, ...]


@dataclass(frozen=True, slots=True)
class ResultsArrived:
    """Results to be stored; then call `acknowledge` or `refuse` for each. Their slots are free."""

    results: tuple[ArrivedResult, ...]


@dataclass(frozen=True, slots=True)
class CancelsAcknowledged:
    """Cancels that have reached the agent."""

    attempts: tuple[AttemptKey, ...]


@dataclass(frozen=True, slots=True)
class HeartbeatArrived:
    """A sign of life: renew the leases of `running`, then call `echo(number)`.

    Attributes:
        number: Number of the heartbeat on this stream.
        running: Attempts whose leases it renews; those that are not this session's are left out, and were refused.
        free_slots: Slots without an attempt.
        loop_lag_us: How late the agent's event loop was, in microseconds.
        memory_bytes: Resident memory of the agent.
    """

    number: int
    running: tuple[AttemptKey, ...]
    free_slots: int
    loop_lag_us: int
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class ReportsRefused:
    """Reports about attempts that are not this session's; each was answered with STALE_FENCE already."""

    attempts: tuple[AttemptKey, ...]


@dataclass(frozen=True, slots=True)
class AgentDraining:
    """The agent takes no more offers."""


@dataclass(frozen=True, slots=True)
class SessionEnded:
    """The stream is over, or must be ended now. Leases go on.

    Attributes:
        cause: Why, in words.
        reason: Why; `REASON_PEER_LOST` where the stream broke or fell silent.
        unanswered: Offers without an answer.
        running: Attempts that were accepted and have no result.
    """

    cause: str
    reason: Reason.ValueType
    unanswered: tuple[AttemptKey, ...]
    running: tuple[AttemptKey, ...]


# --- what the agent's end tells ---


@dataclass(frozen=True, slots=True)
class SessionOpened:
    """The orchestrator welcomed us.

    Attributes:
        orchestrator_id: Its name.
        session_epoch: Number of the session among ours.
        resumed: Held attempts that remain ours.
        events_url: Where the event plane is; empty when we must know by ourselves.
    """

    orchestrator_id: str
    session_epoch: int
    resumed: tuple[AttemptKey, ...]
    events_url: str


@dataclass(frozen=True, slots=True)
class OffersArrived:
    """Offers to answer with `accept` or `decline`."""

    offers: tuple[ArrivedOffer, ...]


@dataclass(frozen=True, slots=True)
class CancelsArrived:
    """Attempts to end; the acknowledgements are on their way."""

    cancels: tuple[ArrivedCancel, ...]


@dataclass(frozen=True, slots=True)
class DirectivesArrived:
    """Directives to hand to their handlers."""

    directives: tuple[ArrivedDirective, ...]


@dataclass(frozen=True, slots=True)
class ResultsAcknowledged:
    """Results that may be forgotten."""

    attempts: tuple[AttemptKey, ...]


@dataclass(frozen=True, slots=True)
class AttemptsRevoked:
    """Attempts that are no longer ours: stop their handlers, report nothing, then call `release` for each."""

    revocations: tuple[Revocation, ...]


@dataclass(frozen=True, slots=True)
class LeasesLost:
    """Attempts whose leases could not be renewed: as `AttemptsRevoked`."""

    attempts: tuple[AttemptKey, ...]


@dataclass(frozen=True, slots=True)
class OrchestratorDraining:
    """The orchestrator stops within `grace_ms` milliseconds; what runs goes on."""

    grace_ms: int


@dataclass(frozen=True, slots=True)
class SessionLost:
    """There is no session any more; end the stream, and come back after a while.

    Attributes:
        cause: Why, in words.
        silent: Whether the peer fell silent, so that the channel should be built anew.
    """

    cause: str
    silent: bool


@dataclass(frozen=True, slots=True)
class SessionClosed:
    """There will be no session for this instance again.

    Attributes:
        error: Why: `Replaced`, `ContractMismatch`, `ProtocolVersion`, …
        successor: Instance that has the session now, where we were replaced.
    """

    error: OrkiError
    successor: str


@dataclass(frozen=True, slots=True)
class DrainCompleted:
    """We drain, and hold neither an attempt nor a result any more."""


OrchestratorEvent: TypeAlias = (
    HelloArrived
    | OffersAccepted
    | OffersDeclined
    | OffersExpired
    | ProgressArrived
    | ResultsArrived
    | CancelsAcknowledged
    | HeartbeatArrived
    | ReportsRefused
    | AgentDraining
    | SessionEnded
)
"""What `OrchestratorSession` returns."""

AgentEvent: TypeAlias = (
    SessionOpened
    | OffersArrived
    | CancelsArrived
    | DirectivesArrived
    | ResultsAcknowledged
    | AttemptsRevoked
    | LeasesLost
    | OrchestratorDraining
    | SessionLost
    | SessionClosed
    | DrainCompleted
)
"""What `AgentSession` returns."""


class EventBatch:
    """Collects events in their order and joins neighbours of one kind into one."""

    __slots__ = ("_events", "_items", "_kind")

    def __init__(self) -> None:
        self._events: list[Any] = []
        self._kind: Callable[[tuple[Any, ...]], Any] | None = None
        self._items: list[Any] = []

    def join(self, kind: Callable[[tuple[Any, ...]], Any], item: object) -> None:
        """Adds one item to an event whose only field is a tuple of such items."""
        if kind is not self._kind:
            self._close()
            self._kind = kind
        self._items.append(item)

    def add(self, event: object) -> None:
        """Adds an event that stands alone."""
        self._close()
        self._events.append(event)

    def finish(self) -> list[Any]:
        """The events, and an empty batch again."""
        self._close()
        events, self._events = self._events, []
        return events

    def _close(self) -> None:
        if self._kind is not None:
            self._events.append(self._kind(tuple(self._items)))
            self._kind = None
            self._items = []
