"""Watches for results: each receives the terminal snapshot of its task.

The orchestrator that applied a task's end knows the response, so the end is passed on without a read. The store is read
for watches of tasks that were not submitted here, for later attempts, whose snapshot lists earlier failures, and for
ends that another orchestrator applied and announced. A poll finds ends that were not announced.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, TypeAlias

from orki.control.v1.attempt_pb2 import AttemptRef, Failure, TaskState
from orki.control.v1.session_pb2 import Result
from orki.control.v1.task_pb2 import TaskSnapshot
from orki.errors.v1.errors_pb2 import Reason
from orki_contract.errors import OrkiError, StoreUnavailable, UnknownTask, error_for
from orki_control.session import AttemptKey
from orki_server._store import operations
from orki_server._store.lifecycle import TERMINAL
from orki_server._store.operations import Operation, failure_text
from orki_server._store.replies import ReportReply, TaskView
from orki_server._store.store import Store
from orki_server._store.suspension import suspend

_READS: Final = 64
"""Maximum number of reads under way: bounds the responses in memory."""
_RECENT: Final = 8_192
"""Number of tasks without a watch that are remembered, so that a watch soon after the submission needs no read."""
_RECENT_BYTES: Final = 4_096
"""Maximum size of a remembered response."""
_log = logging.getLogger("orki.server.requests")


@dataclass(slots=True)
class ReportCounts:
    """Numbers of reports since the start.

    Attributes:
        accepted: Accepted results.
        repeated: Results that had been accepted before.
        stale: Reports from agents that did not hold the attempt.
        progress_dropped: Progress of agents with session protocol 1 that was dropped while the store was down or full.
    """

    accepted: int = 0
    repeated: int = 0
    stale: int = 0
    progress_dropped: int = 0


@dataclass(frozen=True, slots=True)
class TaskEnd:
    """The end of a task by the result of an attempt.

    Attributes:
        state: SUCCEEDED or FAILED.
        attempt: The attempt.
        agent_id: The agent.
        revision: Revision of the task.
        ended_us: Time of the end, in microseconds since the Unix epoch.
        response: The response; empty if the task failed.
        failure: The failure; None if the task succeeded.
    """

    state: TaskState.ValueType
    attempt: AttemptKey
    agent_id: str
    revision: int
    ended_us: int
    response: bytes
    failure: Failure | None


def stored_failure(failure: Failure) -> Failure:
    """Return an agent's failure as the store keeps it."""
    return Failure(
        reason=failure.reason or Reason.REASON_HANDLER_FAILED,
        message=failure_text(failure.message),
        error_type=failure_text(failure.error_type)[:200],
    )


def end_of(agent_id: str, key: AttemptKey, result: Result, reply: ReportReply) -> TaskEnd | None:
    """Return the end of a task by a result; None if the task goes on, or the store alone knows its end."""
    outcome = result.WhichOneof("outcome")
    if reply.state == TaskState.TASK_STATE_SUCCEEDED and outcome == "response":
        response, failure = result.response, None
    elif reply.state == TaskState.TASK_STATE_FAILED and outcome == "failure":
        response, failure = b"", stored_failure(result.failure)
    else:
        return None
    return TaskEnd(reply.state, key, agent_id, reply.revision, reply.time_us, response, failure)


def result_report(agent_id: str, key: AttemptKey, result: Result) -> Operation[ReportReply]:
    """Return the operation that applies an agent's result."""
    if result.WhichOneof("outcome") == "response":
        return operations.succeed(agent_id, key, result.response)
    if result.WhichOneof("outcome") == "cancelled":
        return operations.confirm_cancelled(agent_id, key, result.cancelled.reason or Reason.REASON_CANCELLED)
    if result.WhichOneof("outcome") == "suspended":
        suspended = result.suspended
        return suspend(agent_id, key, failure_text(suspended.question), suspended.deadline_ms)
    failure = stored_failure(result.failure)
    retryable = error_for(failure.reason, "").retryable
    return operations.fail(agent_id, key, failure.reason, failure.message, failure.error_type, retryable)


def starts_attempt(result: Result) -> bool:
    """Whether the operation of a result starts the attempt, if that was not accepted before."""
    charged = result.HasField("usage") or result.suspended.over_budget
    return result.WhichOneof("outcome") != "cancelled" and not charged


Sink: TypeAlias = Callable[[TaskSnapshot | OrkiError], None]
"""Receives the terminal snapshot, or the error that ends the watch."""


@dataclass(slots=True, eq=False)
class _Entry:
    task: TaskSnapshot | None
    fresh: bool = True
    sinks: list[Sink] = field(default_factory=list)
    reading: bool = False


class ResultWatches:
    """The watches for results, by task.

    `poll` returns the time between two polls; each reads the watched tasks that have not changed since the one before.
    """

    def __init__(self, store: Store, poll: Callable[[], float]) -> None:
        self._store = store
        self._poll = poll
        self._entries: dict[str, _Entry] = {}
        self._recent: OrderedDict[str, None] = OrderedDict()
        self._to_read: deque[str] = deque()
        self._reads = 0
        store.connection.on_change(self._store_changed)

    def submitted(self, task: TaskSnapshot) -> None:
        """Remember a new task."""
        entry = self._entries.get(task.task_id)
        if entry is None:
            self._entries[task.task_id] = _Entry(task)
            self._remember(task.task_id)

    def add(self, task_id: str, sink: Sink) -> None:
        """Watch a task. The sink is called once, perhaps at once."""
        entry = self._entries.get(task_id)
        if entry is None:
            entry = self._entries[task_id] = _Entry(None, sinks=[sink])
            self._read(task_id, entry)
            return
        self._recent.pop(task_id, None)
        entry.sinks.append(sink)
        if entry.task is None:
            self._read(task_id, entry)
        elif entry.task.state in TERMINAL:
            self._deliver(task_id, entry, entry.task)

    def remove(self, task_id: str, sink: Sink) -> None:
        """End a watch; does nothing if it has ended."""
        entry = self._entries.get(task_id)
        if entry is None or sink not in entry.sinks:
            return
        entry.sinks.remove(sink)
        if not entry.sinks:
            self._remember(task_id)

    def changed(self, task_id: str, ended: bool, end: TaskEnd | None) -> None:
        """A task has changed; `end` is given if this orchestrator has its whole end."""
        entry = self._entries.get(task_id)
        if entry is None:
            return
        if not ended:
            entry.fresh = True
            return
        task = entry.task
        if end is None or task is None or end.attempt.attempt > 1 or not end.ended_us:
            if entry.sinks:
                self._read(task_id, entry)
            else:
                self._forget(task_id)
            return
        task.state, task.agent_id, task.revision, task.ended_us = end.state, end.agent_id, end.revision, end.ended_us
        task.attempt.CopyFrom(AttemptRef(task_id=task_id, attempt=end.attempt.attempt, fence=end.attempt.fence))
        if end.failure is not None:
            task.failure.CopyFrom(end.failure)
        else:
            task.response = end.response
        if entry.sinks:
            self._deliver(task_id, entry, task)
        elif len(end.response) > _RECENT_BYTES:
            self._forget(task_id)

    async def run(self) -> None:
        """Read watched tasks without news, until cancelled."""
        while True:
            await asyncio.sleep(self._poll())
            if not self._store.up:
                continue
            for task_id, entry in list(self._entries.items()):
                if entry.sinks and not entry.fresh:
                    self._read(task_id, entry)
                entry.fresh = False

    def read_all(self) -> None:
        """Read all watched tasks: changes may have been missed."""
        for task_id in list(self._recent):
            self._forget(task_id)
        for task_id, entry in list(self._entries.items()):
            self._read(task_id, entry)

    # --- Parts. ---

    def _deliver(self, task_id: str, entry: _Entry, outcome: TaskSnapshot | OrkiError) -> None:
        self._forget(task_id)
        for sink in entry.sinks:
            sink(outcome)

    def _remember(self, task_id: str) -> None:
        self._recent[task_id] = None
        self._recent.move_to_end(task_id)
        if len(self._recent) > _RECENT:
            oldest, _ = self._recent.popitem(last=False)
            self._entries.pop(oldest, None)

    def _forget(self, task_id: str) -> None:
        self._entries.pop(task_id, None)
        self._recent.pop(task_id, None)

    def _read(self, task_id: str, entry: _Entry) -> None:
        if not entry.reading:
            entry.reading = True
            self._to_read.append(task_id)
            self._start_reads()

    def _start_reads(self) -> None:
        while self._to_read and self._reads < _READS:
            task_id = self._to_read.popleft()
            entry = self._entries.get(task_id)
            if entry is None:
                continue
            if not entry.sinks:
                entry.reading = False
                continue
            try:
                view = self._store.apply(operations.read_task(task_id))
            except OrkiError as error:
                self._unreadable(task_id, entry, error)
                continue
            self._reads += 1
            view.add_done_callback(partial(self._was_read, task_id, entry))

    def _was_read(self, task_id: str, entry: _Entry, view: asyncio.Future[Any]) -> None:
        self._reads -= 1
        current = self._entries.get(task_id) is entry
        if not view.cancelled() and current:
            error = view.exception()
            if isinstance(error, OrkiError):
                self._unreadable(task_id, entry, error)
            elif error is not None:
                _log.error("task %s could not be read: a defect", task_id, exc_info=error)
                self._unreadable(task_id, entry, OrkiError(f"task {task_id}: the orchestrator failed; see its log"))
            else:
                self._arrived(task_id, entry, view.result())
        self._start_reads()

    def _arrived(self, task_id: str, entry: _Entry, view: TaskView | None) -> None:
        entry.reading = False
        if view is None:
            self._deliver(task_id, entry, UnknownTask(f"there is no task {task_id}"))
        elif view.task.state in TERMINAL:
            self._deliver(task_id, entry, view.task)
        else:
            entry.task = view.task

    def _unreadable(self, task_id: str, entry: _Entry, error: OrkiError) -> None:
        entry.reading = False
        if entry.task is None or not isinstance(error, StoreUnavailable):
            self._deliver(task_id, entry, error)
        # A watch that was open when the store went down waits for the store.

    def _store_changed(self, up: bool) -> None:
        if up:
            self.read_all()  # The store may also have lost tasks.
