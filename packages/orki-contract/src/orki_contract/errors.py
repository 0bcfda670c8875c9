"""Errors of all planes: one class per reason of `orki/errors/v1/errors.proto`, with its gRPC status code.

Adapters translate foreign exceptions (grpc, redis, OS) into these errors.
"""

from __future__ import annotations

__all__ = [
    "AlreadyAnswered",
    "AttemptTimeout",
    "CancelUnresponsive",
    "Cancelled",
    "ChildFailed",
    "ContractMismatch",
    "DamagedRecord",
    "DeliveriesExhausted",
    "Draining",
    "EventUndecodable",
    "EventsBufferFull",
    "EventsLoading",
    "EventsNotPersisting",
    "EventsOutOfMemory",
    "EventsReadOnly",
    "EventsRefused",
    "EventsStreamFull",
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
    "NotDurable",
    "NotSuspended",
    "OfferTimeout",
    "OrchestratorUnavailable",
    "OrkiError",
    "OverBudget",
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
    "StoreFull",
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

from enum import IntEnum
from typing import ClassVar, Final

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
    DATA_LOSS = 15


class OrkiError(Exception):
    """Base class of all orki errors.

    Attributes:
        reason: The reason code sent to peers.
        message: A description for people: the cause, the subject and the next step.
        retryable: Whether the same call may succeed later.
    """

    reason: ClassVar[Reason.ValueType] = Reason.REASON_UNSPECIFIED
    retryable: ClassVar[bool] = False

    def __init_subclass__(
        cls, *, reason: Reason.ValueType | None = None, status: Status = Status.UNKNOWN, retryable: bool = False
    ) -> None:
        super().__init_subclass__()
        # A subclass without a reason has the reason of its base class.
        if reason is not None:
            cls.reason, cls.retryable = reason, retryable
            _TABLE[reason] = cls, status

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


_TABLE: Final[dict[Reason.ValueType, tuple[type[OrkiError], Status]]] = {}


def error_for(reason: Reason.ValueType, message: str) -> OrkiError:
    """Return the error for a received reason. Unknown reasons, sent by newer peers, give a plain `OrkiError`."""
    if reason not in _TABLE:
        return OrkiError(f"{message} (unknown reason {reason})")
    error, _ = _TABLE[reason]
    return error(message)


def status_of(reason: Reason.ValueType) -> Status:
    """Return the gRPC status code for a reason; `UNKNOWN` for an unknown reason."""
    return _TABLE[reason][1] if reason in _TABLE else Status.UNKNOWN


class InvalidArgument(OrkiError, reason=Reason.REASON_INVALID_ARGUMENT, status=Status.INVALID_ARGUMENT):
    """A request field is missing, malformed or out of range."""


class UnknownTask(OrkiError, reason=Reason.REASON_UNKNOWN_TASK, status=Status.NOT_FOUND):
    """The task does not exist or belongs to another caller."""


class UnknownMethod(OrkiError, reason=Reason.REASON_UNKNOWN_METHOD, status=Status.NOT_FOUND):
    """No registered contract has this service and method."""


class StaleFence(OrkiError, reason=Reason.REASON_STALE_FENCE, status=Status.FAILED_PRECONDITION):
    """The attempt's fence is older than the task's current fence."""


class IdempotencyConflict(OrkiError, reason=Reason.REASON_IDEMPOTENCY_CONFLICT, status=Status.ALREADY_EXISTS):
    """The idempotency key was already used with a different request."""


class ContractMismatch(OrkiError, reason=Reason.REASON_CONTRACT_MISMATCH, status=Status.FAILED_PRECONDITION):
    """The service is already registered with an incompatible contract."""


class RemoteProtocolError(OrkiError, reason=Reason.REASON_PROTOCOL_VIOLATION, status=Status.INVALID_ARGUMENT):
    """The peer violated the protocol."""


class ProtocolVersion(OrkiError, reason=Reason.REASON_PROTOCOL_VERSION, status=Status.FAILED_PRECONDITION):
    """The two sides share no protocol version."""


class Replaced(OrkiError, reason=Reason.REASON_REPLACED, status=Status.ABORTED):
    """A newer instance has taken over the session."""


class HelloTimeout(OrkiError, reason=Reason.REASON_HELLO_TIMEOUT, status=Status.DEADLINE_EXCEEDED, retryable=True):
    """The hello message did not arrive in time."""


class TooLarge(OrkiError, reason=Reason.REASON_TOO_LARGE, status=Status.RESOURCE_EXHAUSTED):
    """A message exceeds its receiver's size limit."""


class StoreUnavailable(OrkiError, reason=Reason.REASON_STORE_UNAVAILABLE, status=Status.UNAVAILABLE, retryable=True):
    """The orchestrator's store does not respond."""


class StoreFull(OrkiError, reason=Reason.REASON_STORE_FULL, status=Status.RESOURCE_EXHAUSTED, retryable=True):
    """The orchestrator's store is out of memory. Running tasks still end, which frees memory."""


class DamagedRecord(OrkiError, reason=Reason.REASON_DAMAGED_RECORD, status=Status.DATA_LOSS):
    """A record in the orchestrator's store cannot be read."""


class OrchestratorUnavailable(
    OrkiError, reason=Reason.REASON_ORCHESTRATOR_UNAVAILABLE, status=Status.UNAVAILABLE, retryable=True
):
    """The orchestrator cannot be reached."""


class Draining(OrkiError, reason=Reason.REASON_DRAINING, status=Status.UNAVAILABLE, retryable=True):
    """The peer is draining and accepts no new work."""


class WaitTimeout(OrkiError, reason=Reason.REASON_WAIT_TIMEOUT, status=Status.DEADLINE_EXCEEDED, retryable=True):
    """The caller's own wait limit has elapsed."""


class TaskEnded(OrkiError, reason=Reason.REASON_TASK_ENDED, status=Status.FAILED_PRECONDITION):
    """The task has already ended."""


class NotDirectable(OrkiError, reason=Reason.REASON_NOT_DIRECTABLE, status=Status.FAILED_PRECONDITION):
    """The task accepts no directives or is not running."""


class Overloaded(OrkiError, reason=Reason.REASON_OVERLOADED, status=Status.RESOURCE_EXHAUSTED, retryable=True):
    """A bounded queue is full."""


class NotSuspended(OrkiError, reason=Reason.REASON_NOT_SUSPENDED, status=Status.FAILED_PRECONDITION):
    """The task is not suspended, so it takes no answer."""


class AlreadyAnswered(OrkiError, reason=Reason.REASON_ALREADY_ANSWERED, status=Status.FAILED_PRECONDITION):
    """The suspended task was answered before, with another answer."""


class HandlerFailed(OrkiError, reason=Reason.REASON_HANDLER_FAILED, status=Status.UNKNOWN, retryable=True):
    """The handler raised an error."""


class HandlerRejected(OrkiError, reason=Reason.REASON_HANDLER_REJECTED, status=Status.FAILED_PRECONDITION):
    """The handler rejected the task permanently. Raise it in a handler to prevent further attempts."""


class LeaseExpired(OrkiError, reason=Reason.REASON_LEASE_EXPIRED, status=Status.ABORTED, retryable=True):
    """The agent sent no heartbeat within the heartbeat timeout."""


class Stalled(OrkiError, reason=Reason.REASON_STALLED, status=Status.DEADLINE_EXCEEDED, retryable=True):
    """The attempt made no progress within the stall timeout."""


class AttemptTimeout(OrkiError, reason=Reason.REASON_ATTEMPT_TIMEOUT, status=Status.DEADLINE_EXCEEDED, retryable=True):
    """The attempt ran longer than the attempt timeout."""


class TotalTimeout(OrkiError, reason=Reason.REASON_TOTAL_TIMEOUT, status=Status.DEADLINE_EXCEEDED):
    """The task ran longer than the total timeout."""


class Cancelled(OrkiError, reason=Reason.REASON_CANCELLED, status=Status.CANCELLED):
    """The task was cancelled."""


class CancelUnresponsive(OrkiError, reason=Reason.REASON_CANCEL_UNRESPONSIVE, status=Status.CANCELLED):
    """The handler did not end within the cancel grace."""


class TaskAbandoned(OrkiError, reason=Reason.REASON_ABANDONED, status=Status.UNAVAILABLE, retryable=True):
    """The agent returned the attempt without finishing it."""


class OfferTimeout(OrkiError, reason=Reason.REASON_OFFER_TIMEOUT, status=Status.UNAVAILABLE, retryable=True):
    """The agent did not answer an offer in time."""


class InvalidResponse(OrkiError, reason=Reason.REASON_INVALID_RESPONSE, status=Status.INTERNAL):
    """The handler returned a value that is not the method's response message."""


class NotDurable(OrkiError, reason=Reason.REASON_NOT_DURABLE, status=Status.FAILED_PRECONDITION):
    """The store cannot keep the durability that the submission asks for."""


class OverBudget(OrkiError, reason=Reason.REASON_OVER_BUDGET, status=Status.RESOURCE_EXHAUSTED):
    """A budget that the task is charged to is used up. The task waits until the budget is raised."""


class ChildFailed(OrkiError, reason=Reason.REASON_CHILD_FAILED, status=Status.FAILED_PRECONDITION):
    """A task that a handler submitted failed or was cancelled. If the handler lets it pass, its own task fails at once.

    The child had its own attempts, so the handler's task gets no further ones. A handler that wants another attempt
    raises an error of its own instead.

    Attributes:
        task_id: The child; empty if the error was received from a peer.
        failure: The child's own error, such as `HandlerFailed` or `Cancelled`; None if it was received from a peer.
    """

    def __init__(self, message: str, task_id: str = "", failure: OrkiError | None = None) -> None:
        super().__init__(message)
        self.task_id = task_id
        self.failure = failure


class UnknownStream(OrkiError, reason=Reason.REASON_UNKNOWN_STREAM, status=Status.NOT_FOUND):
    """No known contract declares the stream."""


class UnknownGroup(OrkiError, reason=Reason.REASON_UNKNOWN_GROUP, status=Status.NOT_FOUND):
    """The stream declares no such group."""


class EventsUnavailable(OrkiError, reason=Reason.REASON_EVENTS_UNAVAILABLE, status=Status.UNAVAILABLE, retryable=True):
    """The event server does not respond."""


class EventsOutOfMemory(
    OrkiError, reason=Reason.REASON_EVENTS_OUT_OF_MEMORY, status=Status.RESOURCE_EXHAUSTED, retryable=True
):
    """The event server is out of memory."""


class EventsReadOnly(OrkiError, reason=Reason.REASON_EVENTS_READ_ONLY, status=Status.UNAVAILABLE, retryable=True):
    """The event server rejects writes."""


class EventsNotPersisting(
    OrkiError, reason=Reason.REASON_EVENTS_NOT_PERSISTING, status=Status.UNAVAILABLE, retryable=True
):
    """The event server cannot write to its disk."""


class EventsLoading(OrkiError, reason=Reason.REASON_EVENTS_LOADING, status=Status.UNAVAILABLE, retryable=True):
    """The event server is still loading its data."""


class EventsRefused(OrkiError, reason=Reason.REASON_EVENTS_REFUSED, status=Status.FAILED_PRECONDITION):
    """The event server refused the command."""


class EventsStreamFull(
    OrkiError, reason=Reason.REASON_EVENTS_STREAM_FULL, status=Status.RESOURCE_EXHAUSTED, retryable=True
):
    """A stream keeps as many entries for its groups as its contract allows."""


class EventsBufferFull(
    OrkiError, reason=Reason.REASON_EVENTS_BUFFER_FULL, status=Status.RESOURCE_EXHAUSTED, retryable=True
):
    """The publisher's buffer is full."""


class EventUndecodable(OrkiError, reason=Reason.REASON_EVENT_UNDECODABLE, status=Status.INVALID_ARGUMENT):
    """The entry does not contain the message that the stream's contract declares."""


class DeliveriesExhausted(OrkiError, reason=Reason.REASON_DELIVERIES_EXHAUSTED, status=Status.ABORTED):
    """The entry has reached its group's maximum number of deliveries."""


class FrameMalformed(OrkiError, reason=Reason.REASON_FRAME_MALFORMED, status=Status.INVALID_ARGUMENT):
    """The bytes are not a frame of this protocol."""


class FrameTooLarge(OrkiError, reason=Reason.REASON_FRAME_TOO_LARGE, status=Status.RESOURCE_EXHAUSTED):
    """The frame exceeds its receiver's size limit."""


class FrameVersion(OrkiError, reason=Reason.REASON_FRAME_VERSION, status=Status.FAILED_PRECONDITION):
    """The frame's protocol version is not supported."""


class UnknownOpcode(OrkiError, reason=Reason.REASON_UNKNOWN_OPCODE, status=Status.NOT_FOUND):
    """No handler serves the opcode."""


class ToolDeadline(OrkiError, reason=Reason.REASON_TOOL_DEADLINE, status=Status.DEADLINE_EXCEEDED, retryable=True):
    """The tool call did not end in time."""


class PeerLost(OrkiError, reason=Reason.REASON_PEER_LOST, status=Status.UNAVAILABLE, retryable=True):
    """The connection broke before the reply arrived.

    Attributes:
        fully_written: Whether the whole request was sent, so that the peer may have executed it.
    """

    def __init__(self, message: str, *, fully_written: bool = True) -> None:
        super().__init__(message)
        self.fully_written = fully_written


class PeerRefused(OrkiError, reason=Reason.REASON_PEER_REFUSED, status=Status.PERMISSION_DENIED):
    """The peer is not allowed to connect."""


class ToolFailed(OrkiError, reason=Reason.REASON_TOOL_FAILED, status=Status.UNKNOWN):
    """The tool's handler raised an error. Raise it in a handler to return an error code to the caller.

    Attributes:
        code: Application-defined code; 0 for none.
    """

    def __init__(self, message: str, *, code: int = 0) -> None:
        super().__init__(message)
        self.code = code


class TooManyCalls(OrkiError, reason=Reason.REASON_TOO_MANY_CALLS, status=Status.RESOURCE_EXHAUSTED, retryable=True):
    """The connection has reached its limit of concurrent calls."""


class SocketUnsafe(OrkiError, reason=Reason.REASON_SOCKET_UNSAFE, status=Status.PERMISSION_DENIED):
    """The permissions or ownership of the socket's path are unsafe."""


class ToolCancelled(OrkiError, reason=Reason.REASON_TOOL_CANCELLED, status=Status.CANCELLED):
    """The caller cancelled the tool call."""


class InvalidSetting(OrkiError, reason=Reason.REASON_INVALID_SETTING, status=Status.INVALID_ARGUMENT):
    """A setting is unknown, malformed or out of range."""


class InvalidContract(OrkiError, reason=Reason.REASON_INVALID_CONTRACT, status=Status.INVALID_ARGUMENT):
    """A contract cannot be read or is not valid."""


class LocalProtocolError(OrkiError, reason=Reason.REASON_LOCAL_PROTOCOL, status=Status.INTERNAL):
    """This side violated the protocol. It indicates a bug."""
