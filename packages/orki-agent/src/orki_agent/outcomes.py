"""How a handler's end becomes the outcome of its attempt."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from google.protobuf.message import DecodeError, EncodeError, Message

from orki.control.v1.attempt_pb2 import Failure
from orki.control.v1.session_pb2 import CancelledOutcome
from orki_contract import Task
from orki_contract.errors import Cancelled, HandlerRejected, InvalidArgument, OrkiError, Reason
from orki_control.session import Outcome

__all__ = [
    "MESSAGE_CHARACTERS",
    "Undecodable",
    "cancelled_outcome",
    "decode",
    "outcome_of_error",
    "outcome_of_response",
]

MESSAGE_CHARACTERS: Final = 2000
"""Longest message of a failure."""


class Undecodable(InvalidArgument):
    """What came is not the contract's message: no further attempt can help."""


def decode(message: type[Any], payload: bytes, what: str) -> Any:
    """What came over the wire, parsed.

    Raises:
        Undecodable: It is not what the contract says.
    """
    try:
        return message.FromString(payload)
    except DecodeError as error:
        raise Undecodable(f"{what}: what came is no {message.__name__} ({error})") from None


def outcome_of_response(task: Task[Any, Any, Any, Any], response: object) -> Outcome:
    """The outcome of a handler that returned."""
    expected = task.response
    if not isinstance(response, expected):
        text = f"{task.contract.full_name} returned {_name(type(response))}; its contract says {_name(expected)}"
        return Failure(reason=Reason.REASON_INVALID_RESPONSE, message=text)
    assert isinstance(response, Message)
    try:
        return response.SerializeToString()
    except EncodeError as error:
        text = f"{task.contract.full_name} returned a response that cannot be serialised: {error}"
        return Failure(reason=Reason.REASON_INVALID_RESPONSE, message=_bounded(text))


def outcome_of_error(error: BaseException, *, cancelled: bool) -> Outcome:
    """The outcome of a handler that raised.

    Args:
        error: What it raised.
        cancelled: Whether somebody had asked for the attempt's end: then a cancellation is its answer.
    """
    if cancelled and isinstance(error, asyncio.CancelledError | Cancelled):
        return cancelled_outcome(Reason.REASON_CANCELLED)
    reason = Reason.REASON_HANDLER_FAILED
    if isinstance(error, HandlerRejected):
        reason = Reason.REASON_HANDLER_REJECTED
    elif isinstance(error, Undecodable):
        reason = Reason.REASON_INVALID_ARGUMENT
    text = error.message if isinstance(error, OrkiError) else _text(error)
    return Failure(reason=reason, message=_bounded(text), error_type=_name(type(error))[:200])


def cancelled_outcome(reason: Reason.ValueType) -> CancelledOutcome:
    """The outcome of an attempt that ended because it was cancelled."""
    return CancelledOutcome(reason=reason)


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:
        return "an error whose text cannot be had"


def _name(kind: type) -> str:
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _bounded(text: str) -> str:
    return text if len(text) <= MESSAGE_CHARACTERS else text[: MESSAGE_CHARACTERS - 1] + "…"
