"""Builds submissions from requests and settings, and refuses values that are out of range."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from typing import Any, Final

from google.protobuf.message import Message

from orki.control.v1 import task_pb2 as pb
from orki.control.v1.attempt_pb2 import Budget as BudgetMessage
from orki_contract import Budget, SubmitSettings, Task
from orki_contract.errors import InvalidArgument, OrkiError
from orki_contract.trace import current_span, new_span
from orki_control.session import KEY, AttemptKey, bad_labels

CURRENT_ATTEMPT: Final[ContextVar[AttemptKey | None]] = ContextVar("orki_attempt", default=None)
"""The attempt of the current handler. Records of tool calls carry it, and submitted tasks may have it as parent."""
_KEY_BYTES: Final = 256
_MAX_PRIORITY: Final = 9
_MAX_LABELS: Final = 16
_MAX_LIMITS: Final = 8
_MAX_AMOUNT: Final = 1 << 53
_DURABILITY: Final = re.compile(r"|memory|fsync|replicas:[1-9]")
_MAX_DELAY: Final = 366 * 24 * 3600


def submission_of(
    task: Task[Any, Any, Any, Any], request: Message, key: str, settings: SubmitSettings
) -> pb.Submission:
    """Return the submission of a request, in the caller's trace or, outside of one, in a new trace.

    Raises:
        InvalidArgument: The request has another class, or a value is out of its range.
    """
    method = task.contract.full_name
    if not isinstance(request, task.request):
        raise InvalidArgument(f"{method} takes {task.request.__name__}, not {type(request).__name__}")
    if len(key.encode()) > _KEY_BYTES:
        raise InvalidArgument(f"{method}: the idempotency key {key[:40]!r}… exceeds {_KEY_BYTES} bytes")
    submission = pb.Submission(
        method=method,
        request=request.SerializeToString(),
        idempotency_key=key,
        traceparent=(current_span() or new_span()).traceparent,
    )
    if (submitter := CURRENT_ATTEMPT.get()) is not None:
        submission.submitter.CopyFrom(submitter.ref())
    if settings:
        place(submission, settings)
    return submission


def place(submission: pb.Submission, settings: Mapping[str, Any]) -> None:
    """Set when and where the task may run.

    Raises:
        InvalidArgument: A setting is unknown or out of its range.
    """
    method = submission.method
    if unknown := sorted(set(settings) - SubmitSettings.__annotations__.keys()):
        raise InvalidArgument(f"{method}: unknown setting {unknown[0]!r}")
    priority, delay, start_at = settings.get("priority"), settings.get("delay"), settings.get("start_at")
    if priority is not None:
        if type(priority) is not int or not 0 <= priority <= _MAX_PRIORITY:
            raise InvalidArgument(f"{method}: priority {priority!r}: use a whole number from 0 to {_MAX_PRIORITY}")
        submission.priority = priority
    if delay is not None and start_at is not None:
        raise InvalidArgument(f"{method}: give delay or start_at, not both")
    if delay is not None:
        if not isinstance(delay, int | float) or not math.isfinite(delay) or not 0 <= delay <= _MAX_DELAY:
            raise InvalidArgument(f"{method}: delay {delay!r}: use 0 to {_MAX_DELAY} seconds (366 days)")
        submission.delay_ms = math.ceil(delay * 1000)
    if start_at is not None:
        if not isinstance(start_at, datetime) or start_at.tzinfo is None:
            raise InvalidArgument(f"{method}: start_at {start_at!r}: use a datetime with a time zone")
        submission.start_at_us = max(1, round(start_at.timestamp() * 1_000_000))
    labels = settings.get("labels", {})
    if not isinstance(labels, Mapping):
        raise InvalidArgument(f"{method}: labels {labels!r}: use a mapping such as {{'gpu': 'a100'}}")
    if problem := bad_labels(labels, _MAX_LABELS):
        raise InvalidArgument(f"{method}: {problem}")
    submission.labels.update(labels)
    limits, fairness_key = settings.get("limits", ()), settings.get("fairness_key", "")
    if isinstance(limits, str) or len(limits) > _MAX_LIMITS:
        raise InvalidArgument(f"{method}: limits {limits!r}: use a list of at most {_MAX_LIMITS} keys")
    for key in (*limits, *([fairness_key] if fairness_key != "" else ())):
        if not isinstance(key, str) or not KEY.match(key):
            raise InvalidArgument(f"{method}: key {key!r}: use 1 to 128 letters, digits or `_./:@-`")
    submission.limits.extend(limits)
    submission.fairness_key = fairness_key
    durability = settings.get("durability", "")
    if not isinstance(durability, str) or not _DURABILITY.fullmatch(durability):
        raise InvalidArgument(
            f"{method}: durability {durability!r}: use memory, fsync, or replicas:N with N from 1 to 9"
        )
    submission.durability = durability
    if (budget := settings.get("budget")) is not None:
        submission.budget.CopyFrom(budget_message(budget))
    policy = settings.get("on_parent_end", "leave")
    if policy not in ("leave", "cancel"):
        raise InvalidArgument(f"{method}: on_parent_end {policy!r}: use leave or cancel")
    if policy == "cancel":
        parent = CURRENT_ATTEMPT.get()
        if parent is None:
            raise InvalidArgument(f"{method}: on_parent_end: only a handler submits tasks that have a parent")
        submission.parent.CopyFrom(parent.ref())


def budget_message(budget: Budget) -> BudgetMessage:
    """Return a budget as a message.

    Raises:
        InvalidArgument: It has no amounts, or one is out of its range.
    """
    if not isinstance(budget, Budget):
        raise InvalidArgument(f"budget {budget!r}: use a Budget, such as Budget(tokens=100_000)")
    amounts = (budget.tokens, budget.cost_micros, budget.calls)
    if not any(amounts) or not all(type(each) is int and 0 <= each <= _MAX_AMOUNT for each in amounts):
        raise InvalidArgument(f"{budget!r}: use whole numbers from 0 to 2^53, and at least one above 0")
    return BudgetMessage(tokens=budget.tokens, cost_micros=budget.cost_micros, calls=budget.calls)


def tasks_of(outcomes: Sequence[pb.TaskSnapshot | OrkiError]) -> list[pb.TaskSnapshot]:
    """Return the tasks; raise the error of the first refused submission."""
    tasks: list[pb.TaskSnapshot] = []
    for number, outcome in enumerate(outcomes, 1):
        if isinstance(outcome, OrkiError):
            where = f"submission {number} of {len(outcomes)}: " if len(outcomes) > 1 else ""
            raise type(outcome)(where + outcome.message)
        tasks.append(outcome)
    return tasks
