"""The exception classes: one for each reason of `orki/errors/v1/errors.proto`."""

from __future__ import annotations

from typing import ClassVar

from orki.errors.v1.errors_pb2 import Reason

__all__ = [
    "AttemptTimeout",
    "CancelUnresponsive",
    "Cancelled",
    "ContractMismatch",
    "DeliveriesExhausted",
    "Draining",
    "EventUndecodable",
    "EventsBufferFull",
    "EventsLoading",
    "EventsNotPersisting",
    "EventsOutOfMemory",
    "EventsReadOnly",
    "EventsRefused",
    "EventsUnavailable",
    "FrameMalformed",
    "FrameTooLarge",
    "FrameVersion",
    "HandlerFailed",
    "HandlerRejected",
    "HelloTimeout",
    "IdempotencyConflict",
    "InvalidArgument",
    "InvalidContract",
    "InvalidResponse",
    "InvalidSetting",
    "LeaseExpired",
    "LocalProtocolError",
    "NotDirectable",
    "OfferTimeout",
    "OrchestratorUnavailable",
    "OrkiError",
    "Overloaded",
    "PeerLost",
    "PeerRefused",
    "ProtocolVersion",
    "RemoteProtocolError",
    "Replaced",
    "SocketUnsafe",
    "StaleFence",
    "Stalled",
    "StoreUnavailable",
    "TaskAbandoned",
    "TaskEnded",
    "TooLarge",
    "TooManyCalls",
    "ToolCancelled",
    "ToolDeadline",
    "ToolFailed",
    "TotalTimeout",
    "UnknownGroup",
    "UnknownMethod",
    "UnknownOpcode",
    "UnknownStream",
    "UnknownTask",
    "WaitTimeout",
]


class OrkiError(Exception):
    """Base of all orki errors.

    Attributes:
        reason: What it is, as it travels.
        message: What, where and what to do, for people.
        retryable: Whether the same call may succeed later.
    """

    reason: ClassVar[Reason.ValueType] = Reason.REASON_UNSPECIFIED
    retryable: ClassVar[bool] = False

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class InvalidArgument(OrkiError):
    """A field of a request is missing, malformed or out of its range."""

    reason = Reason.REASON_INVALID_ARGUMENT


class UnknownTask(OrkiError):
    """The task does not exist, or is not the caller's."""

    reason = Reason.REASON_UNKNOWN_TASK


class UnknownMethod(OrkiError):
    """No contract with this service and method is registered."""

    reason = Reason.REASON_UNKNOWN_METHOD


class StaleFence(OrkiError):
    """The attempt's fence is no longer the task's."""

    reason = Reason.REASON_STALE_FENCE


class IdempotencyConflict(OrkiError):
    """The idempotency key was used with another request."""

    reason = Reason.REASON_IDEMPOTENCY_CONFLICT


class ContractMismatch(OrkiError):
    """A service is live with another contract."""

    reason = Reason.REASON_CONTRACT_MISMATCH


class RemoteProtocolError(OrkiError):
    """The peer broke a law of the protocol."""

    reason = Reason.REASON_PROTOCOL_VIOLATION


class ProtocolVersion(OrkiError):
    """No protocol version suits both sides."""

    reason = Reason.REASON_PROTOCOL_VERSION


class Replaced(OrkiError):
    """A newer instance has taken the session."""

    reason = Reason.REASON_REPLACED


class HelloTimeout(OrkiError):
    """The hello did not come in time."""

    reason = Reason.REASON_HELLO_TIMEOUT
    retryable = True


class TooLarge(OrkiError):
    """A message is larger than its receiver takes."""

    reason = Reason.REASON_TOO_LARGE


class StoreUnavailable(OrkiError):
    """The orchestrator's store does not answer."""

    reason = Reason.REASON_STORE_UNAVAILABLE
    retryable = True


class OrchestratorUnavailable(OrkiError):
    """The orchestrator cannot be reached."""

    reason = Reason.REASON_ORCHESTRATOR_UNAVAILABLE
    retryable = True


class Draining(OrkiError):
    """The peer takes no more new work."""

    reason = Reason.REASON_DRAINING
    retryable = True


class WaitTimeout(OrkiError):
    """The caller waited as long as it said it would."""

    reason = Reason.REASON_WAIT_TIMEOUT
    retryable = True


class TaskEnded(OrkiError):
    """The task has already ended."""

    reason = Reason.REASON_TASK_ENDED


class NotDirectable(OrkiError):
    """The task takes no directive, or is not running."""

    reason = Reason.REASON_NOT_DIRECTABLE


class Overloaded(OrkiError):
    """A bounded queue is full."""

    reason = Reason.REASON_OVERLOADED
    retryable = True


class HandlerFailed(OrkiError):
    """The handler raised an error."""

    reason = Reason.REASON_HANDLER_FAILED
    retryable = True


class HandlerRejected(OrkiError):
    """The handler raised an error that no further attempt can mend; raise it in a handler to say so."""

    reason = Reason.REASON_HANDLER_REJECTED


class LeaseExpired(OrkiError):
    """The agent was not heard of for the heartbeat timeout."""

    reason = Reason.REASON_LEASE_EXPIRED
    retryable = True


class Stalled(OrkiError):
    """The attempt made no progress for the stall timeout."""

    reason = Reason.REASON_STALLED
    retryable = True


class AttemptTimeout(OrkiError):
    """The attempt ran longer than the attempt timeout."""

    reason = Reason.REASON_ATTEMPT_TIMEOUT
    retryable = True


class TotalTimeout(OrkiError):
    """The task ran longer than the total timeout."""

    reason = Reason.REASON_TOTAL_TIMEOUT


class Cancelled(OrkiError):
    """The task was cancelled."""

    reason = Reason.REASON_CANCELLED


class CancelUnresponsive(OrkiError):
    """The handler did not end within the cancel grace."""

    reason = Reason.REASON_CANCEL_UNRESPONSIVE


class TaskAbandoned(OrkiError):
    """The agent gave the attempt back."""

    reason = Reason.REASON_ABANDONED
    retryable = True


class OfferTimeout(OrkiError):
    """The agent did not answer an offer in time."""

    reason = Reason.REASON_OFFER_TIMEOUT
    retryable = True


class InvalidResponse(OrkiError):
    """The handler returned something else than its response message."""

    reason = Reason.REASON_INVALID_RESPONSE


class UnknownStream(OrkiError):
    """No contract at hand declares the stream."""

    reason = Reason.REASON_UNKNOWN_STREAM


class UnknownGroup(OrkiError):
    """The stream declares no such group."""

    reason = Reason.REASON_UNKNOWN_GROUP


class EventsUnavailable(OrkiError):
    """The event server does not answer."""

    reason = Reason.REASON_EVENTS_UNAVAILABLE
    retryable = True


class EventsOutOfMemory(OrkiError):
    """The event server is out of memory."""

    reason = Reason.REASON_EVENTS_OUT_OF_MEMORY
    retryable = True


class EventsReadOnly(OrkiError):
    """The event server takes no writes."""

    reason = Reason.REASON_EVENTS_READ_ONLY
    retryable = True


class EventsNotPersisting(OrkiError):
    """The event server cannot write to its disk."""

    reason = Reason.REASON_EVENTS_NOT_PERSISTING
    retryable = True


class EventsLoading(OrkiError):
    """The event server still loads its data."""

    reason = Reason.REASON_EVENTS_LOADING
    retryable = True


class EventsRefused(OrkiError):
    """The event server refused the command."""

    reason = Reason.REASON_EVENTS_REFUSED


class EventsBufferFull(OrkiError):
    """The publisher's bounded buffer is full."""

    reason = Reason.REASON_EVENTS_BUFFER_FULL
    retryable = True


class EventUndecodable(OrkiError):
    """The entry does not hold what the stream's contract says."""

    reason = Reason.REASON_EVENT_UNDECODABLE


class DeliveriesExhausted(OrkiError):
    """The entry was delivered as often as the group allows."""

    reason = Reason.REASON_DELIVERIES_EXHAUSTED


class FrameMalformed(OrkiError):
    """The bytes are not a frame of this protocol."""

    reason = Reason.REASON_FRAME_MALFORMED


class FrameTooLarge(OrkiError):
    """The frame is longer than its receiver takes."""

    reason = Reason.REASON_FRAME_TOO_LARGE


class FrameVersion(OrkiError):
    """The frame's protocol version is not spoken here."""

    reason = Reason.REASON_FRAME_VERSION


class UnknownOpcode(OrkiError):
    """Nobody serves the opcode here."""

    reason = Reason.REASON_UNKNOWN_OPCODE


class ToolDeadline(OrkiError):
    """The tool call did not end in time."""

    reason = Reason.REASON_TOOL_DEADLINE
    retryable = True


class PeerLost(OrkiError):
    """The connection broke before the reply.

    Attributes:
        fully_written: Whether the request had left completely, so that the peer may have acted on it.
    """

    reason = Reason.REASON_PEER_LOST
    retryable = True

    def __init__(self, message: str, *, fully_written: bool = True) -> None:
        super().__init__(message)
        self.fully_written = fully_written


class PeerRefused(OrkiError):
    """The peer is not allowed to connect."""

    reason = Reason.REASON_PEER_REFUSED


class ToolFailed(OrkiError):
    """The tool's handler raised an error.

    Raise it in a tool's handler to give the caller a code.

    Attributes:
        code: The tool's own code; 0 for none.
    """

    reason = Reason.REASON_TOOL_FAILED

    def __init__(self, message: str, *, code: int = 0) -> None:
        super().__init__(message)
        self.code = code


class TooManyCalls(OrkiError):
    """The connection carries as many calls as it may."""

    reason = Reason.REASON_TOO_MANY_CALLS
    retryable = True


class SocketUnsafe(OrkiError):
    """The socket's path or folder is not safe to use."""

    reason = Reason.REASON_SOCKET_UNSAFE


class ToolCancelled(OrkiError):
    """The caller cancelled the tool call."""

    reason = Reason.REASON_TOOL_CANCELLED


class InvalidSetting(OrkiError):
    """A setting is unknown, malformed or out of its range."""

    reason = Reason.REASON_INVALID_SETTING


class InvalidContract(OrkiError):
    """A contract cannot be read or is not valid."""

    reason = Reason.REASON_INVALID_CONTRACT


class LocalProtocolError(OrkiError):
    """We broke a law of the protocol ourselves: a defect."""

    reason = Reason.REASON_LOCAL_PROTOCOL
