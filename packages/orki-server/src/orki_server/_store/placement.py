"""Placements: when a task may run, as a submission asks for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from orki.control.v1.task_pb2 import Submission, TaskSnapshot
from orki_contract.errors import InvalidArgument
from orki_server._keys import DEFAULT_PRIORITY, PLACEMENT_FIELDS

MAX_PRIORITY: Final = 9
MAX_DELAY_MS: Final = 366 * 24 * 3600 * 1000
_MAX_START_US: Final = 1 << 52


@dataclass(frozen=True, slots=True)
class Placement:
    """When a task may run.

    Attributes:
        priority: From 0 to `MAX_PRIORITY`; None for the default.
        delay_ms: Earliest start after the submission, in milliseconds.
        start_at_us: Earliest start by the server's clock, in microseconds since the Unix epoch; 0 for at once.
    """

    priority: int | None = None
    delay_ms: int = 0
    start_at_us: int = 0

    @staticmethod
    def of(submission: Submission) -> Placement:
        """Return the placement that a submission asks for."""
        priority = submission.priority if submission.HasField("priority") else None
        if priority is None and submission.WhichOneof("start") is None:
            return ANYWHERE
        return Placement(priority, submission.delay_ms, submission.start_at_us)

    @property
    def arguments(self) -> tuple[str | int, ...]:
        """The arguments of the script's operation."""
        return ("" if self.priority is None else self.priority, self.delay_ms, self.start_at_us)

    def show(self, task: TaskSnapshot) -> None:
        """Set the fields of a new task's snapshot."""
        if self is not ANYWHERE:
            task.priority = DEFAULT_PRIORITY if self.priority is None else self.priority
            task.start_us = task.submitted_us + self.delay_ms * 1000 if self.delay_ms else self.start_at_us


ANYWHERE: Final = Placement()
"""The placement of most tasks."""


def check_placement(submission: Submission, now_us: int) -> None:
    """Validate the placement of a submission.

    Raises:
        InvalidArgument: A field is out of its range; the message names it.
    """
    if not submission.HasField("priority") and submission.WhichOneof("start") is None:
        return
    if submission.priority > MAX_PRIORITY:
        raise InvalidArgument(f"priority: from 0 to {MAX_PRIORITY}, not {submission.priority}")
    if submission.delay_ms > MAX_DELAY_MS:
        raise InvalidArgument(f"delay_ms: at most {MAX_DELAY_MS} (366 days), not {submission.delay_ms}")
    start = submission.start_at_us
    if start and not 0 < start <= min(now_us + MAX_DELAY_MS * 1000, _MAX_START_US):
        raise InvalidArgument(
            f"start_at_us: from 1 to 366 days ahead, in microseconds since the Unix epoch, not {start}"
        )


def show_placement(stored: bytes, task: TaskSnapshot) -> None:
    """Set the fields of a snapshot from the packed placement. Raises ValueError for a damaged one."""
    if not stored:
        return
    fields = dict(zip(PLACEMENT_FIELDS, stored.decode().split("\x1f"), strict=False))
    task.priority = int(fields["priority"])
    task.start_us = int(fields.get("start_us") or 0)
