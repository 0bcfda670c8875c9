"""Placements: when and where a task may run, as a submission asks for it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from orki.control.v1.task_pb2 import Submission, TaskSnapshot
from orki_contract.errors import InvalidArgument
from orki_control.session import KEY, bad_labels
from orki_server._fields import DEFAULT_PRIORITY, PLACEMENT_FIELDS

COUNTING_SHARD: Final = 0
"""The shard of tasks with limits or a fairness key, and of the limits."""
MAX_PRIORITY: Final = 9
MAX_DELAY_MS: Final = 366 * 24 * 3600 * 1000
_MAX_START_US: Final = 1 << 52
_MAX_LABELS: Final = 16
_MAX_LIMITS: Final = 8


@dataclass(frozen=True, slots=True)
class Placement:
    """When and where a task may run.

    Attributes:
        priority: From 0 to `MAX_PRIORITY`; None for the default.
        delay_ms: Earliest start after the submission, in milliseconds.
        start_at_us: Earliest start by the server's clock, in microseconds since the Unix epoch; 0 for at once.
        labels: Labels that the agent must have, as `name=value`, sorted.
        limits: Keys of limits, sorted.
        fairness_key: Key by which it takes turns with others; empty for none.
    """

    priority: int | None = None
    delay_ms: int = 0
    start_at_us: int = 0
    labels: tuple[str, ...] = ()
    limits: tuple[str, ...] = ()
    fairness_key: str = ""

    @staticmethod
    def of(submission: Submission) -> Placement:
        """Return the placement that a submission asks for."""
        if not _asks(submission):
            return ANYWHERE
        return Placement(
            submission.priority if submission.HasField("priority") else None,
            submission.delay_ms,
            submission.start_at_us,
            tuple(sorted(f"{name}={value}" for name, value in submission.labels.items())),
            tuple(sorted(set(submission.limits))),
            submission.fairness_key,
        )

    @property
    def is_counted(self) -> bool:
        """Whether the task is counted together with others. Such tasks share a shard, so that the counts are exact."""
        return bool(self.limits or self.fairness_key)

    @property
    def arguments(self) -> tuple[str | int, ...]:
        """The arguments of the script's operation."""
        priority = "" if self.priority is None else self.priority
        lane = (",".join(self.labels), ",".join(self.limits), self.fairness_key)
        return (priority, self.delay_ms, self.start_at_us, *lane)

    def show(self, task: TaskSnapshot) -> None:
        """Set the fields of a new task's snapshot."""
        if self is not ANYWHERE:
            task.priority = DEFAULT_PRIORITY if self.priority is None else self.priority
            task.start_us = task.submitted_us + self.delay_ms * 1000 if self.delay_ms else self.start_at_us
            _show_lane(task, self.labels, self.limits, self.fairness_key)


ANYWHERE: Final = Placement()
"""The placement of most tasks."""


def check_placement(submission: Submission, now_us: int) -> None:
    """Validate the placement of a submission.

    Raises:
        InvalidArgument: A field is out of its range; the message names it.
    """
    if not _asks(submission):
        return
    if problem := bad_labels(submission.labels, _MAX_LABELS):
        raise InvalidArgument(problem)
    if len(submission.limits) > _MAX_LIMITS:
        raise InvalidArgument(f"limits: at most {_MAX_LIMITS}, not {len(submission.limits)}")
    for field, keys in (("limits", submission.limits), ("fairness_key", [submission.fairness_key or "none"])):
        for key in keys:
            check_key(field, key)
    if submission.priority > MAX_PRIORITY:
        raise InvalidArgument(f"priority: from 0 to {MAX_PRIORITY}, not {submission.priority}")
    if submission.delay_ms > MAX_DELAY_MS:
        raise InvalidArgument(f"delay_ms: at most {MAX_DELAY_MS} (366 days), not {submission.delay_ms}")
    start = submission.start_at_us
    if start and not 0 < start <= min(now_us + MAX_DELAY_MS * 1000, _MAX_START_US):
        raise InvalidArgument(
            f"start_at_us: from 1 to 366 days ahead, in microseconds since the Unix epoch, not {start}"
        )


def check_key(field: str, key: str) -> None:
    """Raise InvalidArgument for a malformed key of a limit or of fairness."""
    if not KEY.match(key):
        raise InvalidArgument(f"{field}: {key[:80]!r} is not 1 to 128 letters, digits or `_./:@-`")


def _asks(submission: Submission) -> bool:
    return bool(
        submission.HasField("priority")
        or submission.WhichOneof("start")
        or submission.labels
        or submission.limits
        or submission.fairness_key
    )


def _show_lane(task: TaskSnapshot, labels: Iterable[str], limits: Iterable[str], fairness_key: str) -> None:
    for name, _, value in (label.partition("=") for label in labels):
        task.labels[name] = value
    task.limits.extend(limits)
    task.fairness_key = fairness_key


def show_placement(stored: bytes, task: TaskSnapshot) -> None:
    """Set the fields of a snapshot from the packed placement. Raises ValueError for a damaged one."""
    if not stored:
        return
    fields = dict(zip(PLACEMENT_FIELDS, stored.decode().split("\x1f"), strict=False))
    task.priority = int(fields["priority"])
    task.start_us = int(fields.get("start_us") or 0)
    labels, limits = (tuple(filter(None, fields.get(name, "").split(","))) for name in ("labels", "limits"))
    _show_lane(task, labels, limits, fields.get("fairness_key", ""))
