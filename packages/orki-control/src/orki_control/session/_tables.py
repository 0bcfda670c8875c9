"""The tables of one attempt and of a session's two ends.

Both ends of a session step through the attempt's table, each at its own time. Messages can cross on the wire, so the
table has rows for crossings: an acceptance that meets a cancel, a cancel that meets a result. Sending a message that
the table does not list is a local error; receiving one is a remote error. A message that only one end's table lists
under a state may still arrive at the other end.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

from orki.control.v1.session_pb2 import (
    Accepted,
    AgentDrain,
    BudgetUpdate,
    Cancel,
    CancelAcknowledged,
    Checkpoint,
    CheckpointAcknowledged,
    Chunk,
    ChunkAcknowledged,
    Declined,
    Directive,
    DirectiveAcknowledged,
    Heartbeat,
    HeartbeatEcho,
    Hello,
    Offer,
    OrchestratorDrain,
    Progress,
    ProgressAcknowledged,
    Refused,
    Replaced,
    Result,
    ResultAcknowledged,
    Usage,
    Welcome,
)
from orki_contract.transitions import Transitions


class AttemptState(Enum):
    """State of an attempt."""

    OFFERED = "offered"
    """Offered and not answered yet. Occupies a slot."""
    RUNNING = "running"
    """Accepted; the handler runs. Occupies a slot."""
    CANCELLING = "cancelling"
    """Offered or running, and cancelled. Occupies a slot."""
    REPORTED = "reported"
    """Ended; its result is not acknowledged yet."""
    CLOSED = "closed"
    """Finished; this session knows nothing more of it."""


@dataclass(frozen=True, slots=True)
class OfferWithdrawn:
    """Timer: the offer was not answered in time."""


@dataclass(frozen=True, slots=True)
class LeaseEnded:
    """Timer: the agent could not renew the lease and stops the attempt."""


@dataclass(frozen=True, slots=True)
class Dropped:
    """The welcome does not list the attempt among those that go on."""


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
            ProgressAcknowledged: AttemptState.RUNNING,
            Directive: AttemptState.RUNNING,
            DirectiveAcknowledged: AttemptState.RUNNING,
            Checkpoint: AttemptState.RUNNING,
            CheckpointAcknowledged: AttemptState.RUNNING,
            Usage: AttemptState.RUNNING,
            BudgetUpdate: AttemptState.RUNNING,
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
            ProgressAcknowledged: AttemptState.CANCELLING,
            Directive: AttemptState.CANCELLING,
            DirectiveAcknowledged: AttemptState.CANCELLING,
            Checkpoint: AttemptState.CANCELLING,
            CheckpointAcknowledged: AttemptState.CANCELLING,
            Usage: AttemptState.CANCELLING,
            BudgetUpdate: AttemptState.CANCELLING,
            Cancel: AttemptState.CANCELLING,
            CancelAcknowledged: AttemptState.CANCELLING,
            Result: AttemptState.REPORTED,
            Refused: AttemptState.CLOSED,
            LeaseEnded: AttemptState.CLOSED,
            Dropped: AttemptState.CLOSED,
        },
        AttemptState.REPORTED: {
            Progress: AttemptState.REPORTED,
            ProgressAcknowledged: AttemptState.REPORTED,
            Directive: AttemptState.REPORTED,
            DirectiveAcknowledged: AttemptState.REPORTED,
            CheckpointAcknowledged: AttemptState.REPORTED,
            BudgetUpdate: AttemptState.REPORTED,
            Cancel: AttemptState.REPORTED,
            CancelAcknowledged: AttemptState.REPORTED,
            ResultAcknowledged: AttemptState.CLOSED,
            Refused: AttemptState.CLOSED,
            Dropped: AttemptState.CLOSED,
        },
        AttemptState.CLOSED: {},
    },
)
"""The table of one attempt."""


class AgentState(Enum):
    """State of the agent's end."""

    DISCONNECTED = "disconnected"
    """No stream. Handlers go on, and results are kept."""
    AWAITING_WELCOME = "awaiting_welcome"
    """The hello was sent; the welcome has not arrived."""
    OPEN = "open"
    """The session is established."""
    PEER_DRAINING = "peer_draining"
    """The orchestrator stops soon: running attempts go on, and no offers arrive."""
    DRAINING = "draining"
    """The agent stops soon: running attempts go on, and offers are declined."""
    ENDED = "ended"
    """Refused for good, replaced or stopped: this instance must not connect again."""


class OrchestratorState(Enum):
    """State of the orchestrator's end of one stream."""

    AWAITING_HELLO = "awaiting_hello"
    """The stream is open; the hello has not arrived."""
    CHECKING_HELLO = "checking_hello"
    """The hello has arrived; contracts and held attempts are checked."""
    OPEN = "open"
    """The session is established."""
    AGENT_DRAINING = "agent_draining"
    """The agent stops soon: running attempts go on, and nothing is offered."""
    DRAINING = "draining"
    """The orchestrator stops soon: nothing is offered."""
    ENDED = "ended"
    """The stream has ended; messages that still arrive are ignored."""


@dataclass(frozen=True, slots=True)
class Connected:
    """A stream was opened."""


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The stream has ended, for any cause."""


@dataclass(frozen=True, slots=True)
class HelloTimeout:
    """Timer: the hello, or the welcome that answers it, did not arrive in time."""


@dataclass(frozen=True, slots=True)
class PeerSilent:
    """Timer: the peer of an established session was not heard for too long."""


@dataclass(frozen=True, slots=True)
class SessionRefused:
    """`Refused` without an attempt: the session is refused."""


@dataclass(frozen=True, slots=True)
class Stopped:
    """The agent's process ends the session."""


_CHUNKS: Final = (Chunk, ChunkAcknowledged)
_AGENT_WORK: Final = (
    *_CHUNKS,
    Accepted,
    Declined,
    Progress,
    Result,
    CancelAcknowledged,
    DirectiveAcknowledged,
    Checkpoint,
    Usage,
    Heartbeat,
)
_ORCHESTRATOR_WORK: Final = (
    *_CHUNKS,
    Refused,
    Cancel,
    Directive,
    ProgressAcknowledged,
    CheckpointAcknowledged,
    BudgetUpdate,
    ResultAcknowledged,
    HeartbeatEcho,
)

AGENT: Final = Transitions(
    "agent's session",
    AgentState.DISCONNECTED,
    {
        AgentState.DISCONNECTED: {
            Connected: AgentState.AWAITING_WELCOME,
            Disconnected: AgentState.DISCONNECTED,
            Stopped: AgentState.ENDED,
        },
        AgentState.AWAITING_WELCOME: {
            Welcome: AgentState.OPEN,
            SessionRefused: AgentState.DISCONNECTED,
            Replaced: AgentState.ENDED,
            HelloTimeout: AgentState.DISCONNECTED,
            Disconnected: AgentState.DISCONNECTED,
            Stopped: AgentState.ENDED,
        },
        AgentState.OPEN: {
            **dict.fromkeys(_AGENT_WORK, AgentState.OPEN),
            **dict.fromkeys(_ORCHESTRATOR_WORK, AgentState.OPEN),
            Offer: AgentState.OPEN,
            AgentDrain: AgentState.DRAINING,
            OrchestratorDrain: AgentState.PEER_DRAINING,
            SessionRefused: AgentState.DISCONNECTED,
            Replaced: AgentState.ENDED,
            PeerSilent: AgentState.DISCONNECTED,
            Disconnected: AgentState.DISCONNECTED,
            Stopped: AgentState.ENDED,
        },
        AgentState.PEER_DRAINING: {
            **dict.fromkeys(_AGENT_WORK, AgentState.PEER_DRAINING),
            **dict.fromkeys(_ORCHESTRATOR_WORK, AgentState.PEER_DRAINING),
            OrchestratorDrain: AgentState.PEER_DRAINING,
            AgentDrain: AgentState.DRAINING,
            SessionRefused: AgentState.DISCONNECTED,
            Replaced: AgentState.ENDED,
            PeerSilent: AgentState.DISCONNECTED,
            Disconnected: AgentState.DISCONNECTED,
            Stopped: AgentState.ENDED,
        },
        AgentState.DRAINING: {
            **dict.fromkeys(_AGENT_WORK, AgentState.DRAINING),
            **dict.fromkeys(_ORCHESTRATOR_WORK, AgentState.DRAINING),
            Offer: AgentState.DRAINING,
            OrchestratorDrain: AgentState.DRAINING,
            SessionRefused: AgentState.DISCONNECTED,
            Replaced: AgentState.ENDED,
            PeerSilent: AgentState.DISCONNECTED,
            Disconnected: AgentState.DISCONNECTED,
            Stopped: AgentState.ENDED,
        },
        AgentState.ENDED: {
            Disconnected: AgentState.ENDED,
            Stopped: AgentState.ENDED,
        },
    },
)
"""The table of the agent's end. It outlives the streams."""

ORCHESTRATOR: Final = Transitions(
    "orchestrator's session",
    OrchestratorState.AWAITING_HELLO,
    {
        OrchestratorState.AWAITING_HELLO: {
            Hello: OrchestratorState.CHECKING_HELLO,
            SessionRefused: OrchestratorState.ENDED,
            HelloTimeout: OrchestratorState.ENDED,
            Disconnected: OrchestratorState.ENDED,
        },
        OrchestratorState.CHECKING_HELLO: {
            Welcome: OrchestratorState.OPEN,
            SessionRefused: OrchestratorState.ENDED,
            Replaced: OrchestratorState.ENDED,
            Disconnected: OrchestratorState.ENDED,
        },
        OrchestratorState.OPEN: {
            **dict.fromkeys(_AGENT_WORK, OrchestratorState.OPEN),
            **dict.fromkeys(_ORCHESTRATOR_WORK, OrchestratorState.OPEN),
            Offer: OrchestratorState.OPEN,
            AgentDrain: OrchestratorState.AGENT_DRAINING,
            OrchestratorDrain: OrchestratorState.DRAINING,
            SessionRefused: OrchestratorState.ENDED,
            Replaced: OrchestratorState.ENDED,
            PeerSilent: OrchestratorState.ENDED,
            Disconnected: OrchestratorState.ENDED,
        },
        OrchestratorState.AGENT_DRAINING: {
            **dict.fromkeys(_AGENT_WORK, OrchestratorState.AGENT_DRAINING),
            **dict.fromkeys(_ORCHESTRATOR_WORK, OrchestratorState.AGENT_DRAINING),
            OrchestratorDrain: OrchestratorState.DRAINING,
            SessionRefused: OrchestratorState.ENDED,
            Replaced: OrchestratorState.ENDED,
            PeerSilent: OrchestratorState.ENDED,
            Disconnected: OrchestratorState.ENDED,
        },
        OrchestratorState.DRAINING: {
            **dict.fromkeys(_AGENT_WORK, OrchestratorState.DRAINING),
            **dict.fromkeys(_ORCHESTRATOR_WORK, OrchestratorState.DRAINING),
            AgentDrain: OrchestratorState.DRAINING,
            OrchestratorDrain: OrchestratorState.DRAINING,
            SessionRefused: OrchestratorState.ENDED,
            Replaced: OrchestratorState.ENDED,
            PeerSilent: OrchestratorState.ENDED,
            Disconnected: OrchestratorState.ENDED,
        },
        OrchestratorState.ENDED: {
            **dict.fromkeys(_ORCHESTRATOR_WORK, OrchestratorState.ENDED),
            OrchestratorDrain: OrchestratorState.ENDED,
            SessionRefused: OrchestratorState.ENDED,
            Replaced: OrchestratorState.ENDED,
            Disconnected: OrchestratorState.ENDED,
        },
    },
)
"""The table of the orchestrator's end of one stream. Answers of the store after the stream's end are dropped."""
