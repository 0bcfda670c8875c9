"""The events that a session's machines return. Events that occur in numbers carry a batch in its order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from orki.control.v1.attempt_pb2 import Budget, Failure
from orki.control.v1.session_pb2 import BudgetUpdate, Hello, Offer, Result
from orki.errors.v1.errors_pb2 import Reason
from orki_contract.errors import OrkiError
from orki_control.session._state import AttemptKey


class Decline(NamedTuple):
    """An offer that the agent declined, and why."""

    attempt: AttemptKey
    failure: Failure


class ArrivedProgress(NamedTuple):
    """A progress message.

    Attributes:
        attempt: The attempt.
        number: Its number within the attempt, from 1.
        payload: Its serialised payload.
        missing: Maximum number of deltas directly before it that may be missing.
    """

    attempt: AttemptKey
    number: int
    payload: bytes
    missing: int = 0


class ArrivedCheckpoint(NamedTuple):
    """A checkpoint: its number within the attempt, from 1, and its serialised payload."""

    attempt: AttemptKey
    number: int
    payload: bytes


class StoredCheckpoint(NamedTuple):
    """The checkpoints of an attempt up to a number are stored, or were refused with a failure."""

    attempt: AttemptKey
    number: int
    failure: Failure | None


class ArrivedUsage(NamedTuple):
    """The usage of an attempt in all."""

    attempt: AttemptKey
    total: Budget


class ArrivedBudgets(NamedTuple):
    """The state of the budgets that an attempt is charged to."""

    attempt: AttemptKey
    update: BudgetUpdate


class ArrivedResult(NamedTuple):
    """A result that the agent reports."""

    attempt: AttemptKey
    result: Result


class ArrivedOffer(NamedTuple):
    """An offer to answer, with the traceparent of the task's span."""

    attempt: AttemptKey
    offer: Offer
    traceparent: str


class ArrivedCancel(NamedTuple):
    """A cancel with its grace in milliseconds. The machine has acknowledged it."""

    attempt: AttemptKey
    grace_ms: int
    message: str


class ArrivedDirective(NamedTuple):
    """A serialised directive to a running attempt."""

    attempt: AttemptKey
    payload: bytes


class Revocation(NamedTuple):
    """An attempt that the agent no longer holds, and why."""

    attempt: AttemptKey
    failure: Failure


# --- Events of the orchestrator's end. ---


@dataclass(frozen=True, slots=True)
class HelloArrived:
    """An agent asks for a session: check its contracts, then call `welcome` or `refuse_session`.

    Attributes:
        hello: The well-formed hello.
        held: Attempts that the agent holds, each with whether its result waits.
    """

    hello: Hello
    held: tuple[tuple[AttemptKey, bool], ...]


@dataclass(frozen=True, slots=True)
class OffersAccepted:
    """Offers that the agent accepted."""

    attempts: tuple[AttemptKey, ...]


@dataclass(frozen=True, slots=True)
class OffersDeclined:
    """Offers that the agent declined; their slots are free."""

    declines: tuple[Decline, ...]


@dataclass(frozen=True, slots=True)
class OffersExpired:
    """Offers that were not answered in time; they are withdrawn, and their slots are free."""

    attempts: tuple[AttemptKey, ...]


@dataclass(frozen=True, slots=True)
class ProgressArrived:
    """Progress to store; then call `acknowledge_progress`, or `replay_progress` when earlier progress is missing."""

    progress: tuple[ArrivedProgress, ...]


@dataclass(frozen=True, slots=True)
class UsageArrived:
    """Usage to charge; then call `update_budgets` for each."""

    usages: tuple[ArrivedUsage, ...]


@dataclass(frozen=True, slots=True)
class CheckpointsArrived:
    """Checkpoints to store; then call `acknowledge_checkpoint` for each."""

    checkpoints: tuple[ArrivedCheckpoint, ...]


@dataclass(frozen=True, slots=True)
class ResultsArrived:
    """Results to store; then call `acknowledge` or `refuse` for each. Their slots are free."""

    results: tuple[ArrivedResult, ...]


@dataclass(frozen=True, slots=True)
class CancelsAcknowledged:
    """Cancels that the agent acknowledged."""

    attempts: tuple[AttemptKey, ...]


class DirectiveAnswer(NamedTuple):
    """The agent's answer to a directive: its number, and whether the handler receives it."""

    attempt: AttemptKey
    number: int
    delivered: bool


@dataclass(frozen=True, slots=True)
class DirectivesAcknowledged:
    """Directives that the agent answered."""

    answers: tuple[DirectiveAnswer, ...]


@dataclass(frozen=True, slots=True)
class HeartbeatArrived:
    """A heartbeat: renew the leases of `running`, then call `echo(number)`.

    Attributes:
        number: Number of the heartbeat on this stream.
        running: Attempts whose leases it renews. Attempts of other sessions were refused and are left out.
        free_slots: Number of free slots.
        loop_lag_us: Lag of the agent's event loop in microseconds.
        memory_bytes: Resident memory of the agent in bytes.
    """

    number: int
    running: tuple[AttemptKey, ...]
    free_slots: int
    loop_lag_us: int
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class ReportsRefused:
    """Reports about attempts of other sessions; the machine has refused each with STALE_FENCE."""

    attempts: tuple[AttemptKey, ...]


@dataclass(frozen=True, slots=True)
class AgentDraining:
    """The agent accepts no more offers."""


@dataclass(frozen=True, slots=True)
class SessionEnded:
    """The stream has ended or must be ended now. Leases continue.

    Attributes:
        cause: Why, as a sentence.
        reason: Why; `REASON_PEER_LOST` when the stream broke or fell silent.
        unanswered: Offers that were sent and have no answer.
        unsent: Offers that were not sent.
        running: Accepted attempts without a result.
    """

    cause: str
    reason: Reason.ValueType
    unanswered: tuple[AttemptKey, ...]
    running: tuple[AttemptKey, ...]
    unsent: tuple[AttemptKey, ...] = ()


# --- Events of the agent's end. ---


@dataclass(frozen=True, slots=True)
class SessionOpened:
    """The orchestrator accepted the session.

    Attributes:
        orchestrator_id: Its name.
        session_epoch: Number of the session among those of this agent.
        resumed: Held attempts that the agent keeps.
        events_url: URL of the event plane; empty when the agent must have its own setting.
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
    """Attempts to cancel; the machine has queued the acknowledgements."""

    cancels: tuple[ArrivedCancel, ...]


@dataclass(frozen=True, slots=True)
class DirectivesArrived:
    """Directives for handlers."""

    directives: tuple[ArrivedDirective, ...]


@dataclass(frozen=True, slots=True)
class ResultsAcknowledged:
    """Results that are stored and may be forgotten."""

    attempts: tuple[AttemptKey, ...]


@dataclass(frozen=True, slots=True)
class ProgressAcknowledged:
    """Attempts whose progress was stored; see `AgentSession.unstored`."""

    attempts: tuple[AttemptKey, ...]


@dataclass(frozen=True, slots=True)
class BudgetsChanged:
    """Budgets of running attempts have changed."""

    updates: tuple[ArrivedBudgets, ...]


@dataclass(frozen=True, slots=True)
class CheckpointsStored:
    """Checkpoints that were stored or refused."""

    checkpoints: tuple[StoredCheckpoint, ...]


@dataclass(frozen=True, slots=True)
class AttemptsRevoked:
    """Attempts that the agent no longer holds: stop each handler, report nothing, then call `release`."""

    revocations: tuple[Revocation, ...]


@dataclass(frozen=True, slots=True)
class LeasesLost:
    """Attempts whose leases could not be renewed; handle them as `AttemptsRevoked`."""

    attempts: tuple[AttemptKey, ...]


@dataclass(frozen=True, slots=True)
class OrchestratorDraining:
    """The orchestrator stops within `grace_ms` milliseconds; running attempts go on."""

    grace_ms: int


@dataclass(frozen=True, slots=True)
class SessionLost:
    """The session is lost: end the stream and connect again after a while.

    Attributes:
        cause: Why, as a sentence.
        silent: Whether the peer fell silent, so that a new channel is needed.
    """

    cause: str
    silent: bool


@dataclass(frozen=True, slots=True)
class SessionClosed:
    """The session is closed for good; this instance must not connect again.

    Attributes:
        error: Why: `Replaced`, `ContractMismatch`, `ProtocolVersion`, …
        successor: Instance that replaced this one; empty otherwise.
    """

    error: OrkiError
    successor: str


@dataclass(frozen=True, slots=True)
class DrainCompleted:
    """The agent drains and holds neither an attempt nor a result."""


OrchestratorEvent: TypeAlias = (
    HelloArrived
    | OffersAccepted
    | OffersDeclined
    | OffersExpired
    | ProgressArrived
    | CheckpointsArrived
    | UsageArrived
    | ResultsArrived
    | CancelsAcknowledged
    | DirectivesAcknowledged
    | HeartbeatArrived
    | ReportsRefused
    | AgentDraining
    | SessionEnded
)
"""Events of `OrchestratorSession`."""

AgentEvent: TypeAlias = (
    SessionOpened
    | OffersArrived
    | CancelsArrived
    | DirectivesArrived
    | ResultsAcknowledged
    | ProgressAcknowledged
    | CheckpointsStored
    | BudgetsChanged
    | AttemptsRevoked
    | LeasesLost
    | OrchestratorDraining
    | SessionLost
    | SessionClosed
    | DrainCompleted
)
"""Events of `AgentSession`."""
