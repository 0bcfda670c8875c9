"""The two tables of a session: the agent's end, which outlives its streams, and the orchestrator's, one for each.

A message that only *one* end's table lists under a state is one that the other end may still have on its way.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

from orki.control.v1.session_pb2 import (
    Accepted,
    AgentDrain,
    Cancel,
    CancelAcknowledged,
    Declined,
    Directive,
    Heartbeat,
    HeartbeatEcho,
    Hello,
    Offer,
    OrchestratorDrain,
    Progress,
    Refused,
    Replaced,
    Result,
    ResultAcknowledged,
    Welcome,
)
from orki_contract.transitions import Transitions

__all__ = [
    "AGENT",
    "ORCHESTRATOR",
    "AgentState",
    "Connected",
    "Disconnected",
    "OrchestratorState",
    "SessionRefused",
    "Stopped",
]


class AgentState(Enum):
    """Where the agent's end stands."""

    DISCONNECTED = "disconnected"
    """No stream. Handlers go on; results are kept."""
    GREETING = "greeting"
    """The hello is on its way."""
    OPEN = "open"
    """Work flows."""
    PEER_DRAINING = "peer_draining"
    """The orchestrator stops soon: what runs goes on, nothing new comes."""
    DRAINING = "draining"
    """We stop soon: what runs goes on, offers are declined."""
    ENDED = "ended"
    """Refused for good, replaced, or stopped: this instance must not come back."""


class OrchestratorState(Enum):
    """Where the orchestrator's end of one stream stands."""

    AWAITING_HELLO = "awaiting_hello"
    """The stream is there, the hello not yet."""
    JUDGING = "judging"
    """The hello is there; contracts and held attempts are looked at."""
    OPEN = "open"
    """Work flows."""
    AGENT_DRAINING = "agent_draining"
    """The agent stops soon: what it runs goes on, nothing new is offered."""
    DRAINING = "draining"
    """We stop soon: nothing new is offered."""
    ENDED = "ended"
    """The stream is over; what still arrives is ignored."""


@dataclass(frozen=True, slots=True)
class Connected:
    """A new stream is there."""


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The stream has ended, whoever ended it and how."""


@dataclass(frozen=True, slots=True)
class SessionRefused:
    """`Refused` without an attempt: no session on this stream, and none at all where the reason is final."""


@dataclass(frozen=True, slots=True)
class Stopped:
    """The agent's process is done with the session."""


_AGENT_WORK: Final = (Accepted, Declined, Progress, Result, CancelAcknowledged, Heartbeat)
_ORCHESTRATOR_WORK: Final = (Refused, Cancel, Directive, ResultAcknowledged, HeartbeatEcho)

AGENT: Final = Transitions(
    "agent's session",
    AgentState.DISCONNECTED,
    {
        AgentState.DISCONNECTED: {
            Connected: AgentState.GREETING,
            Disconnected: AgentState.DISCONNECTED,
            Stopped: AgentState.ENDED,
        },
        AgentState.GREETING: {
            Welcome: AgentState.OPEN,
            SessionRefused: AgentState.DISCONNECTED,
            Replaced: AgentState.ENDED,
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
            Disconnected: AgentState.DISCONNECTED,
            Stopped: AgentState.ENDED,
        },
        AgentState.ENDED: {
            Disconnected: AgentState.ENDED,
            Stopped: AgentState.ENDED,
        },
    },
)
"""The agent's end."""

ORCHESTRATOR: Final = Transitions(
    "orchestrator's session",
    OrchestratorState.AWAITING_HELLO,
    {
        OrchestratorState.AWAITING_HELLO: {
            Hello: OrchestratorState.JUDGING,
            SessionRefused: OrchestratorState.ENDED,
            Disconnected: OrchestratorState.ENDED,
        },
        OrchestratorState.JUDGING: {
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
            Disconnected: OrchestratorState.ENDED,
        },
        OrchestratorState.AGENT_DRAINING: {
            **dict.fromkeys(_AGENT_WORK, OrchestratorState.AGENT_DRAINING),
            **dict.fromkeys(_ORCHESTRATOR_WORK, OrchestratorState.AGENT_DRAINING),
            OrchestratorDrain: OrchestratorState.DRAINING,
            SessionRefused: OrchestratorState.ENDED,
            Replaced: OrchestratorState.ENDED,
            Disconnected: OrchestratorState.ENDED,
        },
        OrchestratorState.DRAINING: {
            **dict.fromkeys(_AGENT_WORK, OrchestratorState.DRAINING),
            **dict.fromkeys(_ORCHESTRATOR_WORK, OrchestratorState.DRAINING),
            AgentDrain: OrchestratorState.DRAINING,
            OrchestratorDrain: OrchestratorState.DRAINING,
            SessionRefused: OrchestratorState.ENDED,
            Replaced: OrchestratorState.ENDED,
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
"""The orchestrator's end of one stream. What the store answers late, after the stream's end, is dropped there."""
