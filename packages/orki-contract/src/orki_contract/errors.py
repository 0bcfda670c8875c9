"""Errors of all planes: one class per reason of `orki/errors/v1/errors.proto`, with its gRPC status code.

Adapters translate foreign exceptions (grpc, redis, OS) into these errors.
"""

from __future__ import annotations

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
    "Reason",
    "RemoteProtocolError",
    "Replaced",
    "SocketUnsafe",
    "StaleFence",
    "Stalled",
    "Status",
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
    "error_for",
    "status_of",
]

from collections.abc import Callable
from enum import IntEnum
from typing import ClassVar, Final, TypeVar

from orki.errors.v1.errors_pb2 import Reason


class Status(IntEnum):
    """The gRPC status codes that orki uses, with their wire numbers (gRPC `statuscodes.md`)."""

    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    INTERNAL = 13
    UNAVAILABLE = 14


class OrkiError(Exception):
    """Base class of all orki errors.

    Attributes:
        reason: The reason code sent to peers.
        message: A description for people: the cause, the subject and the next step.
        retryable: Whether the same call may succeed later.
    """

    reason: ClassVar[Reason.ValueType] = Reason.REASON_UNSPECIFIED
    retryable: ClassVar[bool] = False

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


_TABLE: Final[dict[Reason.ValueType, tuple[type[OrkiError], Status]]] = {}

E = TypeVar("E", bound=OrkiError)


def error_for(reason: Reason.ValueType, message: str) -> OrkiError:
    """Return the error for a received reason. Unknown reasons, sent by newer peers, give a plain `OrkiError`."""
    if reason not in _TABLE:
        return OrkiError(f"{message} (unknown reason {reason})")
    error, _ = _TABLE[reason]
    return error(message)


def status_of(reason: Reason.ValueType) -> Status:
    """Return the gRPC status code for a reason; `UNKNOWN` for an unknown reason."""
    return _TABLE[reason][1] if reason in _TABLE else Status.UNKNOWN


def _error(reason: Reason.ValueType, status: Status, *, retryable: bool = False) -> Callable[[type[E]], type[E]]:
    def register(error: type[E]) -> type[E]:
        error.reason, error.retryable = reason, retryable
        _TABLE[reason] = error, status
        return error

    return register


@_error(Reason.REASON_INVALID_ARGUMENT, Status.INVALID_ARGUMENT)
class InvalidArgument(OrkiError):
    """A request field is missing, malformed or out of range."""


@_error(Reason.REASON_UNKNOWN_TASK, Status.NOT_FOUND)
class UnknownTask(OrkiError):
    """The task does not exist or belongs to another caller."""


@_error(Reason.REASON_UNKNOWN_METHOD, Status.NOT_FOUND)
class UnknownMethod(OrkiError):
    """No registered contract has this service and method."""


@_error(Reason.REASON_STALE_FENCE, Status.FAILED_PRECONDITION)
class StaleFence(OrkiError):
    """The attempt's fence is older than the task's current fence."""


@_error(Reason.REASON_IDEMPOTENCY_CONFLICT, Status.ALREADY_EXISTS)
class IdempotencyConflict(OrkiError):
    """The idempotency key was already used with a different request."""


@_error(Reason.REASON_CONTRACT_MISMATCH, Status.FAILED_PRECONDITION)
class ContractMismatch(OrkiError):
    """The service is already registered with an incompatible contract."""


@_error(Reason.REASON_PROTOCOL_VIOLATION, Status.INVALID_ARGUMENT)
class RemoteProtocolError(OrkiError):
    """The peer violated the protocol."""


@_error(Reason.REASON_PROTOCOL_VERSION, Status.FAILED_PRECONDITION)
class ProtocolVersion(OrkiError):
    """The two sides share no protocol version."""


@_error(Reason.REASON_REPLACED, Status.ABORTED)
class Replaced(OrkiError):
    """A newer instance has taken over the session."""


@_error(Reason.REASON_HELLO_TIMEOUT, Status.DEADLINE_EXCEEDED, retryable=True)
class HelloTimeout(OrkiError):
    """The hello message did not arrive in time."""


@_error(Reason.REASON_TOO_LARGE, Status.RESOURCE_EXHAUSTED)
class TooLarge(OrkiError):
    """A message exceeds its receiver's size limit."""


@_error(Reason.REASON_STORE_UNAVAILABLE, Status.UNAVAILABLE, retryable=True)
class StoreUnavailable(OrkiError):
    """The orchestrator's store does not respond."""


@_error(Reason.REASON_ORCHESTRATOR_UNAVAILABLE, Status.UNAVAILABLE, retryable=True)
class OrchestratorUnavailable(OrkiError):
    """The orchestrator cannot be reached."""


@_error(Reason.REASON_DRAINING, Status.UNAVAILABLE, retryable=True)
class Draining(OrkiError):
    """The peer is draining and accepts no new work."""


@_error(Reason.REASON_WAIT_TIMEOUT, Status.DEADLINE_EXCEEDED, retryable=True)
class WaitTimeout(OrkiError):
    """The caller's own wait limit has elapsed."""


@_error(Reason.REASON_TASK_ENDED, Status.FAILED_PRECONDITION)
class TaskEnded(OrkiError):
    """The task has already ended."""


@_error(Reason.REASON_NOT_DIRECTABLE, Status.FAILED_PRECONDITION)
class NotDirectable(OrkiError):
    """The task accepts no directives or is not running."""


@_error(Reason.REASON_OVERLOADED, Status.RESOURCE_EXHAUSTED, retryable=True)
class Overloaded(OrkiError):
    """A bounded queue is full."""


@_error(Reason.REASON_HANDLER_FAILED, Status.UNKNOWN, retryable=True)
class HandlerFailed(OrkiError):
    """The handler raised an error."""


@_error(Reason.REASON_HANDLER_REJECTED, Status.FAILED_PRECONDITION)
class HandlerRejected(OrkiError):
    """The handler rejected the task permanently. Raise it in a handler to prevent further attempts."""


@_error(Reason.REASON_LEASE_EXPIRED, Status.ABORTED, retryable=True)
class LeaseExpired(OrkiError):
    """The agent sent no heartbeat within the heartbeat timeout."""


@_error(Reason.REASON_STALLED, Status.DEADLINE_EXCEEDED, retryable=True)
class Stalled(OrkiError):
    """The attempt made no progress within the stall timeout."""


@_error(Reason.REASON_ATTEMPT_TIMEOUT, Status.DEADLINE_EXCEEDED, retryable=True)
class AttemptTimeout(OrkiError):
    """The attempt ran longer than the attempt timeout."""


@_error(Reason.REASON_TOTAL_TIMEOUT, Status.DEADLINE_EXCEEDED)
class TotalTimeout(OrkiError):
    """The task ran longer than the total timeout."""


@_error(Reason.REASON_CANCELLED, Status.CANCELLED)
class Cancelled(OrkiError):
    """The task was cancelled."""


@_error(Reason.REASON_CANCEL_UNRESPONSIVE, Status.CANCELLED)
class CancelUnresponsive(OrkiError):
    """The handler did not end within the cancel grace."""


@_error(Reason.REASON_ABANDONED, Status.UNAVAILABLE, retryable=True)
class TaskAbandoned(OrkiError):
    """The agent returned the attempt without finishing it."""


@_error(Reason.REASON_OFFER_TIMEOUT, Status.UNAVAILABLE, retryable=True)
class OfferTimeout(OrkiError):
    """The agent did not answer an offer in time."""


@_error(Reason.REASON_INVALID_RESPONSE, Status.INTERNAL)
class InvalidResponse(OrkiError):
    """The handler returned a value that is not the method's response message."""


@_error(Reason.REASON_UNKNOWN_STREAM, Status.NOT_FOUND)
class UnknownStream(OrkiError):
    """No known contract declares the stream."""


@_error(Reason.REASON_UNKNOWN_GROUP, Status.NOT_FOUND)
class UnknownGroup(OrkiError):
    """The stream declares no such group."""


@_error(Reason.REASON_EVENTS_UNAVAILABLE, Status.UNAVAILABLE, retryable=True)
class EventsUnavailable(OrkiError):
    """The event server does not respond."""


@_error(Reason.REASON_EVENTS_OUT_OF_MEMORY, Status.RESOURCE_EXHAUSTED, retryable=True)
class EventsOutOfMemory(OrkiError):
    """The event server is out of memory."""


@_error(Reason.REASON_EVENTS_READ_ONLY, Status.UNAVAILABLE, retryable=True)
class EventsReadOnly(OrkiError):
    """The event server rejects writes."""


@_error(Reason.REASON_EVENTS_NOT_PERSISTING, Status.UNAVAILABLE, retryable=True)
class EventsNotPersisting(OrkiError):
    """The event server cannot write to its disk."""


@_error(Reason.REASON_EVENTS_LOADING, Status.UNAVAILABLE, retryable=True)
class EventsLoading(OrkiError):
    """The event server is still loading its data."""


@_error(Reason.REASON_EVENTS_REFUSED, Status.FAILED_PRECONDITION)
class EventsRefused(OrkiError):
    """The event server refused the command."""


@_error(Reason.REASON_EVENTS_BUFFER_FULL, Status.RESOURCE_EXHAUSTED, retryable=True)
class EventsBufferFull(OrkiError):
    """The publisher's buffer is full."""


@_error(Reason.REASON_EVENT_UNDECODABLE, Status.INVALID_ARGUMENT)
class EventUndecodable(OrkiError):
    """The entry does not contain the message that the stream's contract declares."""


@_error(Reason.REASON_DELIVERIES_EXHAUSTED, Status.ABORTED)
class DeliveriesExhausted(OrkiError):
    """The entry has reached its group's maximum number of deliveries."""


@_error(Reason.REASON_FRAME_MALFORMED, Status.INVALID_ARGUMENT)
class FrameMalformed(OrkiError):
    """The bytes are not a frame of this protocol."""


@_error(Reason.REASON_FRAME_TOO_LARGE, Status.RESOURCE_EXHAUSTED)
class FrameTooLarge(OrkiError):
    """The frame exceeds its receiver's size limit."""


@_error(Reason.REASON_FRAME_VERSION, Status.FAILED_PRECONDITION)
class FrameVersion(OrkiError):
    """The frame's protocol version is not supported."""


@_error(Reason.REASON_UNKNOWN_OPCODE, Status.NOT_FOUND)
class UnknownOpcode(OrkiError):
    """No handler serves the opcode."""


@_error(Reason.REASON_TOOL_DEADLINE, Status.DEADLINE_EXCEEDED, retryable=True)
class ToolDeadline(OrkiError):
    """The tool call did not end in time."""


@_error(Reason.REASON_PEER_LOST, Status.UNAVAILABLE, retryable=True)
class PeerLost(OrkiError):
    """The connection broke before the reply arrived.

    Attributes:
        fully_written: Whether the whole request was sent, so that the peer may have executed it.
    """

    def __init__(self, message: str, *, fully_written: bool = True) -> None:
        super().__init__(message)
        self.fully_written = fully_written


@_error(Reason.REASON_PEER_REFUSED, Status.PERMISSION_DENIED)
class PeerRefused(OrkiError):
    """The peer is not allowed to connect."""


@_error(Reason.REASON_TOOL_FAILED, Status.UNKNOWN)
class ToolFailed(OrkiError):
    """The tool's handler raised an error. Raise it in a handler to return an error code to the caller.

    Attributes:
        code: Application-defined code; 0 for none.
    """

    def __init__(self, message: str, *, code: int = 0) -> None:
        super().__init__(message)
        self.code = code


@_error(Reason.REASON_TOO_MANY_CALLS, Status.RESOURCE_EXHAUSTED, retryable=True)
class TooManyCalls(OrkiError):
    """The connection has reached its limit of concurrent calls."""


@_error(Reason.REASON_SOCKET_UNSAFE, Status.PERMISSION_DENIED)
class SocketUnsafe(OrkiError):
    """The permissions or ownership of the socket's path are unsafe."""


@_error(Reason.REASON_TOOL_CANCELLED, Status.CANCELLED)
class ToolCancelled(OrkiError):
    """The caller cancelled the tool call."""


@_error(Reason.REASON_INVALID_SETTING, Status.INVALID_ARGUMENT)
class InvalidSetting(OrkiError):
    """A setting is unknown, malformed or out of range."""


@_error(Reason.REASON_INVALID_CONTRACT, Status.INVALID_ARGUMENT)
class InvalidContract(OrkiError):
    """A contract cannot be read or is not valid."""


@_error(Reason.REASON_LOCAL_PROTOCOL, Status.INTERNAL)
class LocalProtocolError(OrkiError):
    """This side violated the protocol. It indicates a bug."""
