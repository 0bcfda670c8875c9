"""The states of one task attempt, as both ends of a session see it.

Both ends walk the same table, each a little apart in time. Messages that cross on the wire therefore have rows of their
own: an acceptance that meets a cancel, a cancel that meets a result. Whoever *sends* what the table does not list has
broken the protocol himself; whoever *receives* it has been wronged.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final, NamedTuple

from orki.control.v1.attempt_pb2 import AttemptRef
from orki.control.v1.session_pb2 import (
    Accepted,
    Cancel,
    CancelAcknowledged,
    Declined,
    Directive,
    Progress,
    Refused,
    Result,
    ResultAcknowledged,
)
from orki_contract.transitions import Transitions

__all__ = [
    "ATTEMPT",
    "AttemptKey",
    "AttemptState",
    "Dropped",
    "LeaseEnded",
    "OfferWithdrawn",
]


class AttemptKey(NamedTuple):
    """One attempt at one task, as a key.

    Attributes:
        task_id: The task.
        attempt: Number of the attempt, from 1.
        fence: Rises with every attempt of the task and never repeats.
    """

    task_id: str
    attempt: int
    fence: int

    @classmethod
    def of(cls, ref: AttemptRef) -> AttemptKey:
        """The key of a reference off the wire."""
        return cls(ref.task_id, ref.attempt, ref.fence)

    def ref(self) -> AttemptRef:
        """The reference that travels."""
        return AttemptRef(task_id=self.task_id, attempt=self.attempt, fence=self.fence)

    def __str__(self) -> str:
        return f"attempt {self.attempt} of task {self.task_id} (fence {self.fence})"


class AttemptState(Enum):
    """Where an attempt stands."""

    OFFERED = "offered"
    """Handed out, not answered yet. Takes a slot."""
    RUNNING = "running"
    """Accepted; the handler runs. Takes a slot."""
    CANCELLING = "cancelling"
    """As OFFERED or RUNNING, and its end was asked for. Takes a slot."""
    REPORTED = "reported"
    """It has a result, which is not acknowledged yet."""
    CLOSED = "closed"
    """This session has nothing more to say about it."""


@dataclass(frozen=True, slots=True)
class OfferWithdrawn:
    """The orchestrator takes back an offer that was not answered in time."""


@dataclass(frozen=True, slots=True)
class LeaseEnded:
    """The agent stops by itself, as it could not renew the lease."""


@dataclass(frozen=True, slots=True)
class Dropped:
    """The welcome does not keep the attempt."""


ATTEMPT: Final = Transitions(
    "attempt",
    AttemptState.OFFERED,
    {
        AttemptState.OFFERED: {
            Accepted: AttemptState.RUNNING,
            Declined: AttemptState.CLOSED,
            Cancel: AttemptState.CANCELLING,
            Refused: AttemptState.CLOSED,
            OfferWithdrawn: AttemptState.CLOSED,
            LeaseEnded: AttemptState.CLOSED,
            Dropped: AttemptState.CLOSED,
        },
        AttemptState.RUNNING: {
            Progress: AttemptState.RUNNING,
            Directive: AttemptState.RUNNING,
            Cancel: AttemptState.CANCELLING,
            Result: AttemptState.REPORTED,
            Refused: AttemptState.CLOSED,
            LeaseEnded: AttemptState.CLOSED,
            Dropped: AttemptState.CLOSED,
        },
        AttemptState.CANCELLING: {
            Accepted: AttemptState.CANCELLING,
            Declined: AttemptState.CLOSED,
            Progress: AttemptState.CANCELLING,
            Directive: AttemptState.CANCELLING,
            Cancel: AttemptState.CANCELLING,
            CancelAcknowledged: AttemptState.CANCELLING,
            Result: AttemptState.REPORTED,
            Refused: AttemptState.CLOSED,
            LeaseEnded: AttemptState.CLOSED,
            Dropped: AttemptState.CLOSED,
        },
        AttemptState.REPORTED: {
            Directive: AttemptState.REPORTED,
            Cancel: AttemptState.REPORTED,
            CancelAcknowledged: AttemptState.REPORTED,
            ResultAcknowledged: AttemptState.CLOSED,
            Refused: AttemptState.CLOSED,
            Dropped: AttemptState.CLOSED,
        },
        AttemptState.CLOSED: {},
    },
)
"""Who may say what about an attempt, and what follows."""
