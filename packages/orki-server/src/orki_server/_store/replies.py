"""The replies of the script: tasks as they are read, and the answers to reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from orki.control.v1.attempt_pb2 import AttemptRef, Failure, TaskState
from orki.control.v1.task_pb2 import Suspension, TaskSnapshot
from orki.errors.v1.errors_pb2 import Reason
from orki_control.session import AttemptKey
from orki_server._fields import SNAPSHOT, SPEC_FIELDS, STATE_FIELDS, unpack, unpack_more
from orki_server._store.lifecycle import VISIBLE, Life
from orki_server._store.placement import show_placement

_HOST: Final = list(STATE_FIELDS).index("host")

BULK_BYTES: Final = 256 << 10
"""Size from which operations and responses are sent apart from others."""


@dataclass(frozen=True, slots=True)
class StoredProgress:
    """One entry of a task's progress.

    Attributes:
        cursor: Position in the task's stream.
        attempt: The attempt.
        index: Number of the delta within the attempt, from 1.
        payload: The progress message, serialized.
        number: Number of the delta over all attempts, from 1. A jump is a gap. 0 if an older version stored it.
        dropped: Whether the delta itself is missing.
    """

    cursor: str
    attempt: int
    index: int
    payload: bytes
    number: int
    dropped: bool


@dataclass(frozen=True, slots=True)
class TaskView:
    """A task at one moment.

    Attributes:
        task: Its snapshot.
        progress: Progress after the cursor.
        host: Orchestrator that heard the agent last; empty before the first attempt.
    """

    task: TaskSnapshot
    progress: tuple[StoredProgress, ...]
    host: str = ""


def task_view(task_id: str, reply: list[bytes]) -> TaskView | None:
    """Decode the reply of `read`. Raises ValueError or KeyError for a damaged record."""
    if not reply:
        return None
    width = len(SNAPSHOT)
    rows = (reply[at : at + 6] for at in range(width, len(reply), 6))
    progress = (
        StoredProgress(cursor.decode(), int(attempt), int(index), payload, int(number), dropped == b"1")
        for cursor, attempt, index, payload, number, dropped in rows
    )
    fields = dict(zip(SNAPSHOT, reply[:width], strict=True))
    snapshot = task_snapshot(task_id, fields)
    return TaskView(snapshot, tuple(progress), fields["state"].split(b"\x1f")[_HOST].decode())


def task_snapshot(task_id: str, field: Mapping[str, bytes]) -> TaskSnapshot:
    """Return the snapshot of a task from the fields of its hash. Raises ValueError or KeyError for a damaged record."""
    now, spec = unpack(STATE_FIELDS, field["state"]), unpack(SPEC_FIELDS, field["spec"])
    state = VISIBLE[Life[now["state"]]]
    snapshot = TaskSnapshot(
        task_id=task_id,
        method=spec["method"],
        state=state,
        agent_id=now["agent_id"],
        submitted_us=int(spec["submitted_us"]),
        ended_us=int(now["ended_us"]),
        traceparent=spec["traceparent"],
        revision=int(now["revision"]),
    )
    show_placement(field.get("placement", b""), snapshot)
    if attempt := int(now["attempt"]):
        snapshot.attempt.CopyFrom(AttemptRef(task_id=task_id, attempt=attempt, fence=int(now["fence"])))
    if state == TaskState.TASK_STATE_SUCCEEDED:
        snapshot.response = field.get("response", b"")
    elif field["failure"]:
        snapshot.failure.CopyFrom(_failure(*field["failure"].split(b"\x1f", 2)))
    for entry in field["failures"].split(b"\x1e")[:-1]:
        snapshot.earlier_failures.append(_failure(*entry.split(b"\x1f", 2)))
    if field.get("more"):
        _add_more(snapshot, unpack_more(field["more"]))
    return snapshot


def _add_more(snapshot: TaskSnapshot, more: Mapping[str, str]) -> None:
    if "suspension" in more:
        suspension = Suspension(
            number=int(more["suspension"]),
            question=more.get("question", ""),
            suspended_us=int(more["suspended_us"]),
            deadline_ms=int(more["deadline"]),
        )
        snapshot.suspension.CopyFrom(suspension)
    snapshot.parent_task_id, snapshot.root_task_id = more.get("parent", ""), more.get("root", "")
    snapshot.over_budget = "over_budget" in more


def _failure(reason: bytes, error_type: bytes, message: bytes) -> Failure:
    return Failure(
        reason=Reason.ValueType(int(reason)),
        message=message.decode(errors="replace"),
        error_type=error_type.decode(errors="replace"),
    )


class ReportStatus(StrEnum):
    """The outcome of a report."""

    ACCEPTED = "accepted"
    REPEATED = "repeated"
    """It was accepted before."""
    STALE = "stale"
    """The agent does not hold the attempt, or no longer."""
    GAP = "gap"
    """Earlier progress of the attempt is missing."""


@dataclass(frozen=True, slots=True)
class ReportReply:
    """The reply to a report.

    Attributes:
        status: Whether it was accepted.
        state: The task's state afterwards; unspecified for a stale report.
        retry_after: Wait before the next attempt; None if no attempt follows from this report.
        revision: Revision of the task afterwards; 0 for a stale report.
        time_us: Time of the transition, in microseconds since the Unix epoch.
        method: The task's method, if an attempt follows.
    """

    status: ReportStatus
    state: TaskState.ValueType
    retry_after: float | None = None
    revision: int = 0
    time_us: int = 0
    method: str = ""


def report_reply(reply: list[bytes]) -> ReportReply:
    """Decode the reply to a report."""
    status, state, retry_ms, revision, time_us, method = reply
    return ReportReply(
        ReportStatus(status.decode()),
        TaskState.ValueType(int(state)),
        int(retry_ms) / 1000 if int(retry_ms) >= 0 else None,
        int(revision),
        int(time_us),
        method.decode(),
    )


@dataclass(frozen=True, slots=True)
class ProgressReply:
    """The reply to progress.

    Attributes:
        status: Whether it was stored.
        state: The task's state afterwards; unspecified for a stale report.
        index: Index of the attempt's last stored delta.
    """

    status: ReportStatus
    state: TaskState.ValueType
    index: int


def progress_reply(reply: list[bytes]) -> ProgressReply:
    """Decode the reply to progress."""
    status, state, index = reply
    return ProgressReply(ReportStatus(status.decode()), TaskState.ValueType(int(state)), int(index))


@dataclass(frozen=True, slots=True)
class Renewed:
    """The outcome of a renewal.

    Attributes:
        stale: Attempts that the agent no longer holds.
        cancelling: Attempts whose cancel the agent has not acknowledged, with the cancel grace.
    """

    stale: tuple[AttemptKey, ...] = ()
    cancelling: tuple[tuple[AttemptKey, float], ...] = ()


@dataclass(frozen=True, slots=True)
class TaskReply:
    """The outcome of a cancel or a directive.

    Attributes:
        status: `unknown`, `ended`; for cancels `done` (the task was not started), `requested`, `repeated`; for
            directives `idle` and `running`; for answers `done`, `repeated`, `answered` (otherwise) and `idle`.
        state: The task's state.
        agent_id: Holder of the attempt.
        attempt: The current or last attempt.
        cancel_grace: Cancel grace of the method.
    """

    status: str
    state: TaskState.ValueType
    agent_id: str
    attempt: AttemptKey
    cancel_grace: float


def task_reply(task_id: str, reply: list[bytes]) -> TaskReply:
    """Decode the reply to a request about one task."""
    status, state, agent, attempt, fence, grace = reply
    return TaskReply(
        status.decode(),
        TaskState.ValueType(int(state)),
        agent.decode(),
        AttemptKey(task_id, int(attempt), int(fence)),
        int(grace) / 1000,
    )
