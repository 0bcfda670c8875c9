"""The operations of `suspension.lua`: what a task keeps from one attempt for the next."""

from __future__ import annotations

from functools import partial

from orki_control.session import AttemptKey
from orki_server._store.operations import Argument, Operation, shard_of
from orki_server._store.replies import ReportReply, TaskReply, report_reply, task_reply


def _report(op: str, agent_id: str, attempt: AttemptKey, *details: Argument) -> Operation[ReportReply]:
    task_id = attempt.task_id
    return Operation(op, shard_of(task_id), (task_id, attempt.fence, agent_id, *details), report_reply)


def save_checkpoint(agent_id: str, attempt: AttemptKey, number: int, payload: bytes) -> Operation[ReportReply]:
    """Store a checkpoint of an attempt in place of the task's last one.

    A number that is not above the last one of the attempt changes nothing.
    """
    return _report("checkpoint", agent_id, attempt, number, payload)


def suspend(agent_id: str, attempt: AttemptKey, question: str, deadline_ms: int) -> Operation[ReportReply]:
    """End an attempt. The task waits for an answer, for at most `deadline_ms` (0: without limit)."""
    return _report("suspend", agent_id, attempt, question, deadline_ms)


def answer(task_id: str, suspension: int, payload: bytes, actor: str) -> Operation[TaskReply]:
    """Answer a suspended task, which is queued again. `suspension` is the number of the suspension, or 0."""
    arguments = (task_id, suspension, payload, actor)
    return Operation("answer", shard_of(task_id), arguments, partial(task_reply, task_id), patient=False)
