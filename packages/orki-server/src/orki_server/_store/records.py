"""Stored tasks as snapshots."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from orki.control.v1.attempt_pb2 import AttemptRef, Failure, TaskState
from orki.control.v1.task_pb2 import TaskSnapshot, WatchedProgress
from orki.errors.v1.errors_pb2 import Reason
from orki_server._keys import SNAPSHOT, SPEC_FIELDS, STATE_FIELDS, unpack
from orki_server._store.lifecycle import VISIBLE, Life


@dataclass(frozen=True, slots=True)
class TaskView:
    """A task at one moment.

    Attributes:
        task: Its snapshot.
        progress: Progress after the cursor.
    """

    task: TaskSnapshot
    progress: tuple[WatchedProgress, ...]


def task_view(task_id: str, reply: list[bytes]) -> TaskView | None:
    """Return the outcome of `read`. Raises ValueError or KeyError for a damaged record."""
    if not reply:
        return None
    width = len(SNAPSHOT)
    rows = (reply[at : at + 4] for at in range(width, len(reply), 4))
    progress = (
        WatchedProgress(cursor=cursor.decode(), attempt=int(attempt), index=int(index), payload=payload)
        for cursor, attempt, index, payload in rows
    )
    return TaskView(task_snapshot(task_id, dict(zip(SNAPSHOT, reply[:width], strict=True))), tuple(progress))


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
    if attempt := int(now["attempt"]):
        snapshot.attempt.CopyFrom(AttemptRef(task_id=task_id, attempt=attempt, fence=int(now["fence"])))
    if state == TaskState.TASK_STATE_SUCCEEDED:
        snapshot.response = field.get("response", b"")
    elif field["failure"]:
        snapshot.failure.CopyFrom(_failure(*field["failure"].split(b"\x1f", 2)))
    for entry in field["failures"].split(b"\x1e")[:-1]:
        snapshot.earlier_failures.append(_failure(*entry.split(b"\x1f", 2)))
    return snapshot


def _failure(reason: bytes, error_type: bytes, message: bytes) -> Failure:
    return Failure(
        reason=Reason.ValueType(int(reason)),
        message=message.decode(errors="replace"),
        error_type=error_type.decode(errors="replace"),
    )
