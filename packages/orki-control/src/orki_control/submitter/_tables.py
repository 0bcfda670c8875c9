"""The tables of one request and of the two ends of a submitters' session."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

from orki.control.v1.submitter_pb2 import (
    ProgressCredit,
    SubmitterDrain,
    SubmitterHello,
    SubmitterPing,
    SubmitterPong,
    SubmitterWelcome,
    TaskSubmit,
    TaskUnwatch,
    TaskWatch,
)
from orki.control.v1.task_pb2 import CancelRequest, DirectRequest
from orki_contract.transitions import Transitions


class RequestState(Enum):
    """State of a request at the client."""

    WAITING = "waiting"
    """Not sent on this stream: there is none, or its bounds are reached."""
    SENT = "sent"
    """Sent and not answered yet."""
    WATCHING = "watching"
    """The orchestrator sends updates of the task."""
    CLOSED = "closed"
    """Answered, failed or given up."""


@dataclass(frozen=True, slots=True)
class RequestSent:
    """The request leaves with a batch."""


@dataclass(frozen=True, slots=True)
class WatchOpened:
    """A watch leaves with a batch. It has no acceptance of its own."""


@dataclass(frozen=True, slots=True)
class RequestAnswered:
    """The outcome arrived, and nothing follows."""


@dataclass(frozen=True, slots=True)
class SubmissionAccepted:
    """The submission was accepted, and its watch begins."""


@dataclass(frozen=True, slots=True)
class WatchUpdated:
    """A snapshot or progress arrived."""


@dataclass(frozen=True, slots=True)
class WatchEnded:
    """The terminal snapshot arrived."""


@dataclass(frozen=True, slots=True)
class CreditGranted:
    """The client permits further progress."""


@dataclass(frozen=True, slots=True)
class RequestRefused:
    """The orchestrator answered with a failure."""


@dataclass(frozen=True, slots=True)
class ConnectionLost:
    """The stream ended; the request is sent again on the next one."""


@dataclass(frozen=True, slots=True)
class RequestAbandoned:
    """The client gives up: its time is over, nobody waits for it, or it must not be repeated."""


REQUEST: Final = Transitions(
    "request",
    RequestState.WAITING,
    {
        RequestState.WAITING: {
            RequestSent: RequestState.SENT,
            WatchOpened: RequestState.WATCHING,
            CreditGranted: RequestState.WAITING,
            ConnectionLost: RequestState.WAITING,
            RequestAbandoned: RequestState.CLOSED,
        },
        RequestState.SENT: {
            RequestAnswered: RequestState.CLOSED,
            SubmissionAccepted: RequestState.WATCHING,
            CreditGranted: RequestState.SENT,
            RequestRefused: RequestState.CLOSED,
            ConnectionLost: RequestState.WAITING,
            RequestAbandoned: RequestState.CLOSED,
        },
        RequestState.WATCHING: {
            WatchUpdated: RequestState.WATCHING,
            WatchEnded: RequestState.CLOSED,
            CreditGranted: RequestState.WATCHING,
            RequestRefused: RequestState.CLOSED,
            ConnectionLost: RequestState.WAITING,
            RequestAbandoned: RequestState.CLOSED,
        },
        RequestState.CLOSED: {},
    },
)
"""The table of one request at the client."""


class ClientState(Enum):
    """State of the client's end."""

    DISCONNECTED = "disconnected"
    """No stream. Requests wait."""
    AWAITING_WELCOME = "awaiting_welcome"
    """The hello was sent; the welcome has not arrived."""
    OPEN = "open"
    """The session is established."""
    PEER_DRAINING = "peer_draining"
    """The orchestrator stops soon: submissions fail, watches go on."""
    ENDED = "ended"
    """The client was closed."""


class ServingState(Enum):
    """State of the orchestrator's end of one stream."""

    AWAITING_HELLO = "awaiting_hello"
    """The stream is open; the hello has not arrived."""
    OPEN = "open"
    """The session is established."""
    DRAINING = "draining"
    """The orchestrator stops soon: submissions fail, watches go on."""
    ENDED = "ended"
    """The stream has ended. Answers are dropped."""


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
    """Timer: the orchestrator answered no ping."""


@dataclass(frozen=True, slots=True)
class ReplyReceived:
    """The answer to a request, or an update of a watch."""


@dataclass(frozen=True, slots=True)
class Stopped:
    """The client is closed."""


_REQUESTS: Final = (TaskSubmit, TaskWatch, TaskUnwatch, CancelRequest, DirectRequest, ProgressCredit, SubmitterPing)
_REPLIES: Final = (ReplyReceived, SubmitterPong)

CLIENT: Final = Transitions(
    "submitters' session, client's end",
    ClientState.DISCONNECTED,
    {
        ClientState.DISCONNECTED: {
            Connected: ClientState.AWAITING_WELCOME,
            Disconnected: ClientState.DISCONNECTED,
            Stopped: ClientState.ENDED,
        },
        ClientState.AWAITING_WELCOME: {
            SubmitterWelcome: ClientState.OPEN,
            HelloTimeout: ClientState.DISCONNECTED,
            Disconnected: ClientState.DISCONNECTED,
            Stopped: ClientState.ENDED,
        },
        ClientState.OPEN: {
            **dict.fromkeys(_REPLIES, ClientState.OPEN),
            SubmitterDrain: ClientState.PEER_DRAINING,
            PeerSilent: ClientState.DISCONNECTED,
            Disconnected: ClientState.DISCONNECTED,
            Stopped: ClientState.ENDED,
        },
        ClientState.PEER_DRAINING: {
            **dict.fromkeys(_REPLIES, ClientState.PEER_DRAINING),
            SubmitterDrain: ClientState.PEER_DRAINING,
            PeerSilent: ClientState.DISCONNECTED,
            Disconnected: ClientState.DISCONNECTED,
            Stopped: ClientState.ENDED,
        },
        ClientState.ENDED: {
            Disconnected: ClientState.ENDED,
            Stopped: ClientState.ENDED,
        },
    },
)
"""The table of the client's end. It outlives the streams."""

SERVING: Final = Transitions(
    "submitters' session, orchestrator's end",
    ServingState.AWAITING_HELLO,
    {
        ServingState.AWAITING_HELLO: {
            SubmitterHello: ServingState.OPEN,
            SubmitterDrain: ServingState.AWAITING_HELLO,
            HelloTimeout: ServingState.ENDED,
            Disconnected: ServingState.ENDED,
        },
        ServingState.OPEN: {
            **dict.fromkeys(_REQUESTS, ServingState.OPEN),
            SubmitterDrain: ServingState.DRAINING,
            Disconnected: ServingState.ENDED,
        },
        ServingState.DRAINING: {
            **dict.fromkeys(_REQUESTS, ServingState.DRAINING),
            SubmitterDrain: ServingState.DRAINING,
            Disconnected: ServingState.ENDED,
        },
        ServingState.ENDED: {
            SubmitterDrain: ServingState.ENDED,
            Disconnected: ServingState.ENDED,
        },
    },
)
"""The table of the orchestrator's end of one stream."""
