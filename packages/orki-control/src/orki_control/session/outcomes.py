"""How an attempt's end is put into messages."""

from __future__ import annotations

from typing import TypeAlias

from orki.control.v1.attempt_pb2 import Failure
from orki.control.v1.session_pb2 import CancelledOutcome, Result
from orki.errors.v1.errors_pb2 import Reason
from orki_control.attempt import AttemptKey

__all__ = ["Outcome", "failure", "result"]

Outcome: TypeAlias = bytes | Failure | CancelledOutcome
"""The serialised response, why the attempt failed, or that it was cancelled."""


def failure(reason: Reason.ValueType, message: str) -> Failure:
    """A failure without an exception behind it."""
    return Failure(reason=reason, message=message)


def result(attempt: AttemptKey, outcome: Outcome) -> Result:
    """The result that travels."""
    if isinstance(outcome, bytes):
        return Result(attempt=attempt.ref(), response=outcome)
    if isinstance(outcome, Failure):
        return Result(attempt=attempt.ref(), failure=outcome)
    return Result(attempt=attempt.ref(), cancelled=outcome)
