"""The life of a task as a transition table. The scripts' legal moves and the diagram in the docs are generated from it.

An event is what one operation or one timer of the store does to a task. Where an operation has two outcomes, it is two
events: an attempt that failed moves by the event of its cause, or by `AttemptsExhausted` if no attempt is left. A task
that waits for its next attempt is queued by `RetryDue`; with a wait of 0, both moves happen at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from orki.control.v1.attempt_pb2 import TaskState
from orki_contract.transitions import Transitions


class Life(Enum):
    """States of a task in the store. `VISIBLE` maps them to `TaskState`."""

    ABSENT = auto()
    """The store has no such task: it was never submitted, or its retention is over."""
    QUEUED = auto()
    WAITING = auto()
    """The wait before the next attempt, or the delay of the first one, has not passed. Submitters see QUEUED."""
    OFFERED = auto()
    RUNNING = auto()
    SUSPENDED = auto()
    """The task waits for an answer or a budget, and has no attempt."""
    CANCELLING_OFFER = auto()
    """A cancel was requested before the agent answered the offer. Submitters see CANCELLING."""
    CANCELLING = auto()
    SUCCEEDED = auto()
    FAILED = auto()
    CANCELLED = auto()


VISIBLE: Final = {
    Life.ABSENT: TaskState.TASK_STATE_UNSPECIFIED,
    Life.QUEUED: TaskState.TASK_STATE_QUEUED,
    Life.WAITING: TaskState.TASK_STATE_QUEUED,
    Life.SUSPENDED: TaskState.TASK_STATE_SUSPENDED,
    Life.OFFERED: TaskState.TASK_STATE_OFFERED,
    Life.RUNNING: TaskState.TASK_STATE_RUNNING,
    Life.CANCELLING_OFFER: TaskState.TASK_STATE_CANCELLING,
    Life.CANCELLING: TaskState.TASK_STATE_CANCELLING,
    Life.SUCCEEDED: TaskState.TASK_STATE_SUCCEEDED,
    Life.FAILED: TaskState.TASK_STATE_FAILED,
    Life.CANCELLED: TaskState.TASK_STATE_CANCELLED,
}
"""The state that submitters see."""

TERMINAL: Final = frozenset(VISIBLE[state] for state in (Life.SUCCEEDED, Life.FAILED, Life.CANCELLED))
"""The states that never change."""


@dataclass(frozen=True, slots=True)
class Submitted:
    """`submit` created the task."""


@dataclass(frozen=True, slots=True)
class Delayed:
    """`submit` created the task, whose start is later."""


@dataclass(frozen=True, slots=True)
class Offered:
    """`offer` chose an agent. Attempt and fence increase here and nowhere else."""


@dataclass(frozen=True, slots=True)
class Started:
    """The agent accepted the offer, or came back with it: lease and attempt timeout begin."""


@dataclass(frozen=True, slots=True)
class OfferDeclined:
    """The agent returned the offer."""


@dataclass(frozen=True, slots=True)
class OfferTimedOut:
    """The agent did not answer the offer in time."""


@dataclass(frozen=True, slots=True)
class OfferSuspected:
    """The session of a delivered offer ended without an answer. The agent has the time of a lease to come back."""


@dataclass(frozen=True, slots=True)
class OfferLost:
    """The process that got the offer is gone, so the attempt may have run. It counts, and another one is allowed."""


@dataclass(frozen=True, slots=True)
class Progressed:
    """The attempt reported progress."""


@dataclass(frozen=True, slots=True)
class Checkpointed:
    """The attempt saved a checkpoint."""


@dataclass(frozen=True, slots=True)
class AttemptSuspended:
    """The attempt ended, and the task waits for an answer or a budget. The attempt does not count."""


@dataclass(frozen=True, slots=True)
class Answered:
    """A submitter answered the suspended task."""


@dataclass(frozen=True, slots=True)
class BudgetRaised:
    """The budget for which the suspended task waits was raised."""


@dataclass(frozen=True, slots=True)
class Renewed:
    """A heartbeat renewed the lease."""


@dataclass(frozen=True, slots=True)
class Directed:
    """A submitter sent a directive."""


@dataclass(frozen=True, slots=True)
class AttemptSucceeded:
    """The attempt has a response."""


@dataclass(frozen=True, slots=True)
class AttemptFailed:
    """The attempt reported a failure, and another attempt is allowed."""


@dataclass(frozen=True, slots=True)
class AttemptAbandoned:
    """The attempt ended without a failure: its agent returned it, or no orchestrator could hear the agent."""


@dataclass(frozen=True, slots=True)
class LeaseExpired:
    """The agent sent no heartbeat in time, and another attempt is allowed."""


@dataclass(frozen=True, slots=True)
class AttemptTimedOut:
    """The attempt took too long, and another attempt is allowed."""


@dataclass(frozen=True, slots=True)
class Stalled:
    """The attempt made no progress in time, and another attempt is allowed."""


@dataclass(frozen=True, slots=True)
class AttemptsExhausted:
    """The attempt failed for any of these causes, and no other attempt is allowed."""


@dataclass(frozen=True, slots=True)
class CancelRequested:
    """A submitter asked for the task's end."""


@dataclass(frozen=True, slots=True)
class CancelAcknowledged:
    """The agent received the cancel."""


@dataclass(frozen=True, slots=True)
class AttemptCancelled:
    """The attempt ended as cancelled."""


@dataclass(frozen=True, slots=True)
class TotalTimedOut:
    """The task did not end within its total timeout."""


@dataclass(frozen=True, slots=True)
class RetryDue:
    """The wait before the next attempt is over, or the deadline of a suspension has passed."""


@dataclass(frozen=True, slots=True)
class Forgotten:
    """The retention of the finished task is over."""


TASK_LIFE: Final = Transitions(
    "task",
    Life.ABSENT,
    {
        Life.ABSENT: {
            Submitted: Life.QUEUED,
            Delayed: Life.WAITING,
        },
        Life.QUEUED: {
            Offered: Life.OFFERED,
            CancelRequested: Life.CANCELLED,
            TotalTimedOut: Life.FAILED,
        },
        Life.WAITING: {
            RetryDue: Life.QUEUED,
            CancelRequested: Life.CANCELLED,
            TotalTimedOut: Life.FAILED,
        },
        Life.SUSPENDED: {
            Answered: Life.QUEUED,
            BudgetRaised: Life.QUEUED,
            RetryDue: Life.QUEUED,
            CancelRequested: Life.CANCELLED,
        },
        # A report about an attempt implies that the agent has accepted it.
        Life.OFFERED: {
            Started: Life.RUNNING,
            Progressed: Life.RUNNING,
            Checkpointed: Life.RUNNING,
            AttemptSuspended: Life.SUSPENDED,
            OfferDeclined: Life.WAITING,
            OfferTimedOut: Life.WAITING,
            OfferSuspected: Life.OFFERED,
            OfferLost: Life.WAITING,
            AttemptFailed: Life.WAITING,
            AttemptAbandoned: Life.WAITING,
            AttemptSucceeded: Life.SUCCEEDED,
            AttemptsExhausted: Life.FAILED,
            CancelRequested: Life.CANCELLING_OFFER,
            AttemptCancelled: Life.CANCELLED,
            TotalTimedOut: Life.FAILED,
        },
        Life.RUNNING: {
            Progressed: Life.RUNNING,
            Checkpointed: Life.RUNNING,
            AttemptSuspended: Life.SUSPENDED,
            Renewed: Life.RUNNING,
            Directed: Life.RUNNING,
            AttemptFailed: Life.WAITING,
            AttemptAbandoned: Life.WAITING,
            LeaseExpired: Life.WAITING,
            AttemptTimedOut: Life.WAITING,
            Stalled: Life.WAITING,
            AttemptSucceeded: Life.SUCCEEDED,
            AttemptsExhausted: Life.FAILED,
            CancelRequested: Life.CANCELLING,
            AttemptCancelled: Life.CANCELLED,
            TotalTimedOut: Life.FAILED,
        },
        Life.CANCELLING_OFFER: {
            CancelAcknowledged: Life.CANCELLING_OFFER,
            Started: Life.CANCELLING,
            Progressed: Life.CANCELLING,
            Checkpointed: Life.CANCELLING,
            AttemptSuspended: Life.CANCELLED,
            AttemptSucceeded: Life.SUCCEEDED,
            OfferDeclined: Life.CANCELLED,
            OfferTimedOut: Life.CANCELLED,
            OfferSuspected: Life.CANCELLING_OFFER,
            OfferLost: Life.CANCELLED,
            AttemptFailed: Life.CANCELLED,
            AttemptAbandoned: Life.CANCELLED,
            AttemptsExhausted: Life.CANCELLED,
            AttemptCancelled: Life.CANCELLED,
            TotalTimedOut: Life.CANCELLED,
        },
        Life.CANCELLING: {
            Progressed: Life.CANCELLING,
            Checkpointed: Life.CANCELLING,
            AttemptSuspended: Life.CANCELLED,
            Renewed: Life.CANCELLING,
            CancelAcknowledged: Life.CANCELLING,
            AttemptSucceeded: Life.SUCCEEDED,
            AttemptFailed: Life.CANCELLED,
            AttemptAbandoned: Life.CANCELLED,
            LeaseExpired: Life.CANCELLED,
            AttemptTimedOut: Life.CANCELLED,
            Stalled: Life.CANCELLED,
            AttemptsExhausted: Life.CANCELLED,
            AttemptCancelled: Life.CANCELLED,
            TotalTimedOut: Life.CANCELLED,
        },
        Life.SUCCEEDED: {Forgotten: Life.ABSENT},
        Life.FAILED: {Forgotten: Life.ABSENT},
        Life.CANCELLED: {Forgotten: Life.ABSENT},
    },
)

TIMERS: Final = {
    "forget_due": Forgotten,
    "total_due": TotalTimedOut,
    "retry_due": RetryDue,
    "offer_due": OfferTimedOut,
    "attempt_due": AttemptTimedOut,
    "lease_due": LeaseExpired,
    "stall_due": Stalled,
}
"""The event of each timer field of a task. If several timers are due, the first one here counts."""


def lua_moves() -> str:
    """Return the table and the timers as Lua source."""
    lines = ["local MOVES = {"]
    for state, row in TASK_LIFE.rows.items():
        moves = ", ".join(f"{event.__name__} = '{following.name}'" for event, following in row.items())
        lines.append(f"  {state.name} = {{ {moves} }},")
    lines += ["}", "local VISIBLE = {"]
    lines += [f"  {state.name} = '{visible}'," for state, visible in VISIBLE.items()]
    lines += ["}", "local TIMERS = {"]
    lines += [f"  {{ '{field}', '{event.__name__}' }}," for field, event in TIMERS.items()]
    return "\n".join([*lines, "}", ""])
