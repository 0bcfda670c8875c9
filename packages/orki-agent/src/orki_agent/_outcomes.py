"""Outcomes of attempts: whatever a handler returns or raises gives one.

User code can override every method that is called on its objects. So nothing here trusts an exception's text or a
type's name, and no function raises.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import traceback
from collections.abc import Iterable
from typing import Any, Final

from google.protobuf.message import DecodeError, Message

from orki.control.v1.attempt_pb2 import Failure
from orki.control.v1.session_pb2 import CancelledOutcome
from orki_agent._checkpoints import Suspending
from orki_agent._services import Handler
from orki_contract.errors import Cancelled, ChildFailed, HandlerRejected, InvalidArgument, OrkiError, Reason
from orki_contract.masking import mask
from orki_control.session import Outcome

MESSAGE_CHARACTERS: Final = 2000
"""Maximum length of a failure's message."""
_TYPE_CHARACTERS: Final = 200
_TRACE_BYTES: Final = 64 * 1024
_UNREADABLE: Final = "an error whose text cannot be read"


class Undecodable(InvalidArgument):
    """A payload is not the contract's message, so another attempt cannot help."""


def decode(message: type[Any], payload: bytes, method: str) -> Any:
    """Parse a payload.

    Raises:
        Undecodable: The payload is not a `message`.
    """
    try:
        return message.FromString(payload)
    except DecodeError as error:
        raise Undecodable(f"{method}: the payload is not a {message.__name__} ({error})") from None


def outcome_of_response(handler: Handler, response: object) -> Outcome:
    """Return the outcome of a handler that returned."""
    expected, method = handler.task.response, handler.name
    try:
        # `isinstance` would ask the object for its `__class__`.
        if not issubclass(type(response), expected):
            if inspect.iscoroutine(response):
                response.close()
            text = f"{method} returned {name_of(type(response))}; its contract declares {name_of(expected)}"
            return Failure(reason=Reason.REASON_INVALID_RESPONSE, message=bounded(text))
        assert isinstance(response, Message)
        return response.SerializeToString()
    except BaseException as error:
        text = f"{method} returned a response that cannot be serialised: {text_of(error)}"
        return Failure(reason=Reason.REASON_INVALID_RESPONSE, message=bounded(text))


def outcome_of_error(error: BaseException, *, cancelled: bool, handled: Iterable[object] = ()) -> Outcome:
    """Return the outcome of a handler that raised.

    Args:
        error: The exception.
        cancelled: Whether the attempt was cancelled before; then a cancellation error confirms the cancel.
        handled: Messages whose sensitive values the outcome must not show.
    """
    kind = type(error)
    if (suspending := _suspending(error)) is not None:
        return suspending.outcome
    if cancelled and issubclass(kind, asyncio.CancelledError | Cancelled):
        return CancelledOutcome(reason=Reason.REASON_CANCELLED)
    reason = Reason.REASON_HANDLER_FAILED
    if issubclass(kind, HandlerRejected):
        reason = Reason.REASON_HANDLER_REJECTED
    elif _is_child_failed(error):
        reason = Reason.REASON_CHILD_FAILED
    elif issubclass(kind, Undecodable):
        reason = Reason.REASON_INVALID_ARGUMENT
    return Failure(reason=reason, message=text_of(error, handled), error_type=bounded(name_of(kind), _TYPE_CHARACTERS))


def _suspending(error: BaseException) -> Suspending | None:
    """Return the suspension that a handler raised, also inside a task group."""
    if issubclass(type(error), Suspending):
        assert isinstance(error, Suspending)
        return error
    if type(error) is BaseExceptionGroup and (found := error.subgroup(Suspending)) is not None:
        return _suspending(found.exceptions[0])
    return None


def _is_child_failed(error: BaseException) -> bool:
    """Whether a child task failed, or several in a task group and nothing else."""
    if issubclass(type(error), ChildFailed):
        return True
    return type(error) is ExceptionGroup and error.split(ChildFailed)[1] is None


def text_of(error: BaseException, handled: Iterable[object] = ()) -> str:
    """Return the bounded text of an exception, of characters that UTF-8 can encode, without sensitive values."""
    try:
        text = str(error.message if issubclass(type(error), OrkiError) else error)  # type: ignore[attr-defined]
        # Masked before it is cut, since a part of a value is not recognised.
        return bounded(mask(bounded(text, _TRACE_BYTES), handled))
    except BaseException:
        return _UNREADABLE


def log_error(log: logging.Logger, level: int, what: str, error: BaseException, handled: Iterable[object] = ()) -> None:
    """Log an exception with its traceback, without the sensitive values of what was handled.

    The chain of causes is left out where it cannot be formatted, encoded or is too long.
    """
    text = text_of(error, handled)
    try:
        trace = "".join(traceback.format_exception(error)) if not text.endswith("…") else ""
        complete = 0 < len(trace.encode()) <= _TRACE_BYTES
        masked = mask(trace, handled)
    except BaseException:
        complete, trace, masked = False, "", ""
    if complete and masked != trace:
        log.log(level, "%s\n%s", what, masked.rstrip())
    elif complete:
        log.log(level, "%s", what, exc_info=(type(error), error, error.__traceback__))
    else:
        stack = bounded("".join(traceback.format_tb(error.__traceback__)), _TRACE_BYTES)
        log.log(level, "%s\n%s%s: %s", what, stack, name_of(type(error)), text)


def name_of(kind: type) -> str:
    """Return the qualified name of a type."""
    try:
        module, name = f"{kind.__module__}", f"{kind.__qualname__}"
    except BaseException:
        return "a type whose name cannot be read"
    return name if module == "builtins" else f"{module}.{name}"


def bounded(text: str, characters: int = MESSAGE_CHARACTERS) -> str:
    """Return a text of at most `characters` characters, with escapes for what UTF-8 cannot encode."""
    # The methods of `str` itself: a subclass may override them.
    start = str.encode(str.__getitem__(text, slice(characters + 1)), "utf-8", "backslashreplace").decode()
    return start if len(start) <= characters else start[: characters - 1] + "…"
