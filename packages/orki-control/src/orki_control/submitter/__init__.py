"""The submitters' session as two state machines without I/O.

`submitter.proto` states the laws of the session. `ClientSession` is the client's end and `ServingSession` the
orchestrator's. Both take messages and the time, and return events and messages to send.
"""

from orki_control.submitter._client_end import ClientSession
from orki_control.submitter._options import ClientSessionOptions, ServingOptions
from orki_control.submitter._requests import (
    Answered,
    ClientEvent,
    Failed,
    OrchestratorDraining,
    Request,
    SessionLost,
    SessionOpened,
    Updated,
)
from orki_control.submitter._serving_end import (
    CancelArrived,
    CreditArrived,
    DirectiveArrived,
    ServingEvent,
    ServingSession,
    SessionEnded,
    SubmissionsArrived,
    WatchArrived,
    WatchClosed,
)
from orki_control.submitter._tables import CLIENT, REQUEST, SERVING, ClientState, RequestState, ServingState

__all__ = [
    "CLIENT",
    "REQUEST",
    "SERVING",
    "Answered",
    "CancelArrived",
    "ClientEvent",
    "ClientSession",
    "ClientSessionOptions",
    "ClientState",
    "CreditArrived",
    "DirectiveArrived",
    "Failed",
    "OrchestratorDraining",
    "Request",
    "RequestState",
    "ServingEvent",
    "ServingOptions",
    "ServingSession",
    "ServingState",
    "SessionEnded",
    "SessionLost",
    "SessionOpened",
    "SubmissionsArrived",
    "Updated",
    "WatchArrived",
    "WatchClosed",
]
