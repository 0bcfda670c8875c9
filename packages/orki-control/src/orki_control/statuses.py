"""Typed errors over gRPC: how they leave a servicer, and how they come back out of a call.

An orki error travels as the gRPC status of its reason (`orki_contract.errors.status_of`), with the message in the
status and the name of the reason in the trailing metadata under `orki-reason`. Where a status comes without a reason,
gRPC itself or something in between made it, and its code decides.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, NoReturn

import grpc

from orki.errors.v1.errors_pb2 import Reason
from orki_contract.errors import (
    InvalidArgument,
    OrchestratorUnavailable,
    OrkiError,
    Overloaded,
    PeerRefused,
    ProtocolVersion,
    TooLarge,
    error_for,
    status_of,
)

__all__ = ["MESSAGE_CHARACTERS", "REASON_KEY", "abort", "error_from", "typed_errors"]

REASON_KEY: Final = "orki-reason"
"""Trailing metadata with the name of the reason, such as `REASON_UNKNOWN_TASK`."""
MESSAGE_CHARACTERS: Final = 1000
"""Longest message of a status: it is a header, percent-encoded, of which HTTP/2 peers take some kilobytes."""

_REASONS: Final = frozenset(Reason.keys())
_CODES: Final = {code.value[0]: code for code in grpc.StatusCode}

_WITHOUT_REASON: Final[dict[grpc.StatusCode, type[OrkiError]]] = {
    grpc.StatusCode.UNAVAILABLE: OrchestratorUnavailable,
    # A peer's or a proxy's cancellation is a lost connection; our own is `asyncio.CancelledError` and never comes here.
    grpc.StatusCode.CANCELLED: OrchestratorUnavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: OrchestratorUnavailable,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
    grpc.StatusCode.PERMISSION_DENIED: PeerRefused,
    grpc.StatusCode.UNAUTHENTICATED: PeerRefused,
}


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: OrkiError) -> NoReturn:
    """Ends a call of ours with a typed error."""
    await context.abort(
        _CODES[status_of(error.reason)],
        _bounded(error.message),
        ((REASON_KEY, Reason.Name(error.reason)),),
    )
    raise AssertionError("abort always raises")


def error_from(failed: grpc.aio.AioRpcError, target: str) -> OrkiError:
    """The typed error that a failed call of ours stands for.

    Args:
        failed: What the call raised.
        target: Where it went, for the message.
    """
    details = failed.details() or failed.code().name
    for key, value in failed.trailing_metadata() or ():
        if key == REASON_KEY:
            name = value if isinstance(value, str) else value.decode("ascii", "replace")
            if name in _REASONS:
                return error_for(Reason.Value(name), details)
            return OrkiError(f"{details} ({name}, unknown here: the orchestrator is newer)")
    if failed.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
        too_large = "larger than max" in details
        return TooLarge(f"{target}: {details}") if too_large else Overloaded(f"{target}: {details}")
    if failed.code() is grpc.StatusCode.UNIMPLEMENTED:
        return ProtocolVersion(
            f"{target} does not know this call: is it an orki orchestrator of this version? ({details})"
        )
    known = _WITHOUT_REASON.get(failed.code())
    return known(f"{target}: {details}") if known else OrkiError(f"{target}: {failed.code().name}: {details}")


@contextmanager
def typed_errors(target: str) -> Iterator[None]:
    """Turns what gRPC raises inside the block into typed errors; nothing of gRPC's leaves it."""
    try:
        yield
    except grpc.aio.AioRpcError as failed:
        raise error_from(failed, target) from None
    except grpc.aio.UsageError as failed:
        # The channel was closed under the call.
        raise OrchestratorUnavailable(f"{target}: {failed}") from None


def _bounded(message: str) -> str:
    return message if len(message) <= MESSAGE_CHARACTERS else message[: MESSAGE_CHARACTERS - 1] + "…"
