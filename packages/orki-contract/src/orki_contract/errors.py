"""Typed errors of all planes: one exception class for each reason, one table to gRPC status codes.

The reasons come from `orki/errors/v1/errors.proto`. Shells turn foreign exceptions (grpc, redis, OS) into these and
nothing else leaves a shell.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from orki.errors.v1.errors_pb2 import Reason
from orki_contract.exceptions import (
    AttemptTimeout,
    Cancelled,
    CancelUnresponsive,
    ContractMismatch,
    DeliveriesExhausted,
    Draining,
    EventsBufferFull,
    EventsLoading,
    EventsNotPersisting,
    EventsOutOfMemory,
    EventsReadOnly,
    EventsRefused,
    EventsUnavailable,
    EventUndecodable,
    FrameMalformed,
    FrameTooLarge,
    FrameVersion,
    HandlerFailed,
    HandlerRejected,
    HelloTimeout,
    IdempotencyConflict,
    InvalidArgument,
    InvalidContract,
    InvalidResponse,
    InvalidSetting,
    LeaseExpired,
    LocalProtocolError,
    NotDirectable,
    OfferTimeout,
    OrchestratorUnavailable,
    OrkiError,
    Overloaded,
    PeerLost,
    PeerRefused,
    ProtocolVersion,
    RemoteProtocolError,
    Replaced,
    SocketUnsafe,
    StaleFence,
    Stalled,
    StoreUnavailable,
    TaskAbandoned,
    TaskEnded,
    TooLarge,
    ToolCancelled,
    ToolDeadline,
    ToolFailed,
    TooManyCalls,
    TotalTimeout,
    UnknownGroup,
    UnknownMethod,
    UnknownOpcode,
    UnknownStream,
    UnknownTask,
    WaitTimeout,
)

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


class Status(IntEnum):
    """The gRPC status codes that orki uses, by their wire numbers (gRPC `statuscodes.md`)."""

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
    CANCELLED = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    error: type[OrkiError]
    status: Status


_TABLE: Final[dict[Reason.ValueType, _Row]] = {
    row.error.reason: row
    for row in (
        _Row(error=InvalidArgument, status=Status.INVALID_ARGUMENT),
        _Row(error=UnknownTask, status=Status.NOT_FOUND),
        _Row(error=UnknownMethod, status=Status.NOT_FOUND),
        _Row(error=StaleFence, status=Status.FAILED_PRECONDITION),
        _Row(error=IdempotencyConflict, status=Status.ALREADY_EXISTS),
        _Row(error=ContractMismatch, status=Status.FAILED_PRECONDITION),
        _Row(error=RemoteProtocolError, status=Status.INVALID_ARGUMENT),
        _Row(error=ProtocolVersion, status=Status.FAILED_PRECONDITION),
        _Row(error=Replaced, status=Status.ABORTED),
        _Row(error=HelloTimeout, status=Status.DEADLINE_EXCEEDED),
        _Row(error=TooLarge, status=Status.RESOURCE_EXHAUSTED),
        _Row(error=StoreUnavailable, status=Status.UNAVAILABLE),
        _Row(error=OrchestratorUnavailable, status=Status.UNAVAILABLE),
        _Row(error=Draining, status=Status.UNAVAILABLE),
        _Row(error=WaitTimeout, status=Status.DEADLINE_EXCEEDED),
        _Row(error=TaskEnded, status=Status.FAILED_PRECONDITION),
        _Row(error=NotDirectable, status=Status.FAILED_PRECONDITION),
        _Row(error=Overloaded, status=Status.RESOURCE_EXHAUSTED),
        _Row(error=HandlerFailed, status=Status.UNKNOWN),
        _Row(error=HandlerRejected, status=Status.FAILED_PRECONDITION),
        _Row(error=LeaseExpired, status=Status.ABORTED),
        _Row(error=Stalled, status=Status.DEADLINE_EXCEEDED),
        _Row(error=AttemptTimeout, status=Status.DEADLINE_EXCEEDED),
        _Row(error=TotalTimeout, status=Status.DEADLINE_EXCEEDED),
        _Row(error=Cancelled, status=Status.CANCELLED),
        _Row(error=CancelUnresponsive, status=Status.CANCELLED),
        _Row(error=TaskAbandoned, status=Status.UNAVAILABLE),
        _Row(error=OfferTimeout, status=Status.UNAVAILABLE),
        _Row(error=InvalidResponse, status=Status.INTERNAL),
        _Row(error=UnknownStream, status=Status.NOT_FOUND),
        _Row(error=UnknownGroup, status=Status.NOT_FOUND),
        _Row(error=EventsUnavailable, status=Status.UNAVAILABLE),
        _Row(error=EventsOutOfMemory, status=Status.RESOURCE_EXHAUSTED),
        _Row(error=EventsReadOnly, status=Status.UNAVAILABLE),
        _Row(error=EventsNotPersisting, status=Status.UNAVAILABLE),
        _Row(error=EventsLoading, status=Status.UNAVAILABLE),
        _Row(error=EventsRefused, status=Status.FAILED_PRECONDITION),
        _Row(error=EventsBufferFull, status=Status.RESOURCE_EXHAUSTED),
        _Row(error=EventUndecodable, status=Status.INVALID_ARGUMENT),
        _Row(error=DeliveriesExhausted, status=Status.ABORTED),
        _Row(error=FrameMalformed, status=Status.INVALID_ARGUMENT),
        _Row(error=FrameTooLarge, status=Status.RESOURCE_EXHAUSTED),
        _Row(error=FrameVersion, status=Status.FAILED_PRECONDITION),
        _Row(error=UnknownOpcode, status=Status.NOT_FOUND),
        _Row(error=ToolDeadline, status=Status.DEADLINE_EXCEEDED),
        _Row(error=PeerLost, status=Status.UNAVAILABLE),
        _Row(error=PeerRefused, status=Status.PERMISSION_DENIED),
        _Row(error=ToolFailed, status=Status.UNKNOWN),
        _Row(error=TooManyCalls, status=Status.RESOURCE_EXHAUSTED),
        _Row(error=SocketUnsafe, status=Status.PERMISSION_DENIED),
        _Row(error=ToolCancelled, status=Status.CANCELLED),
        _Row(error=InvalidSetting, status=Status.INVALID_ARGUMENT),
        _Row(error=InvalidContract, status=Status.INVALID_ARGUMENT),
        _Row(error=LocalProtocolError, status=Status.INTERNAL),
    )
}


def error_for(reason: Reason.ValueType, message: str) -> OrkiError:
    """The typed error that a reason off the wire stands for; a reason of a newer peer gives a plain `OrkiError`."""
    row = _TABLE.get(reason)
    return row.error(message) if row else OrkiError(f"{message} (reason {reason}, unknown here)")


def status_of(reason: Reason.ValueType) -> Status:
    """The gRPC status code under which a reason travels."""
    row = _TABLE.get(reason)
    return row.status if row else Status.UNKNOWN
