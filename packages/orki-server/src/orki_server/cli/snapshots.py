"""Snapshots of tasks and agents as tables and as JSON with stable keys."""

from __future__ import annotations

__all__ = ["STATES", "agent_json", "state_name", "task_json", "time_or_none"]

from collections.abc import Mapping
from typing import Any, Final

from orki.control.v1.attempt_pb2 import AttemptRef, Failure, TaskState
from orki.control.v1.task_pb2 import AgentSnapshot, TaskSnapshot
from orki.errors.v1.errors_pb2 import Reason
from orki_contract.trace import parse_traceparent
from orki_server.observers.timestamps import time_text

_PREFIX: Final = "TASK_STATE_"

STATES: Final[Mapping[str, TaskState.ValueType]] = {
    name.removeprefix(_PREFIX).lower(): number for name, number in TaskState.items() if number
}
"""States by the names that commands use."""


def state_name(state: TaskState.ValueType) -> str:
    """Such as `running`; the number of a state that only a newer orchestrator knows."""
    try:
        return TaskState.Name(state).removeprefix(_PREFIX).lower()
    except ValueError:
        return str(state)


def task_json(task: TaskSnapshot, response: dict[str, Any] | None = None) -> dict[str, Any]:
    """The task with stable keys.

    Args:
        task: The snapshot.
        response: Its response as JSON, where the caller knows its type.
    """
    span = parse_traceparent(task.traceparent)
    attempt = task.attempt if task.HasField("attempt") else None
    return {
        "task_id": task.task_id,
        "method": task.method,
        "state": state_name(task.state),
        "attempt": attempt.attempt if attempt else 0,
        "fence": attempt.fence if attempt else 0,
        "agent_id": task.agent_id,
        "submitted": time_or_none(task.submitted_us),
        "ended": time_or_none(task.ended_us),
        "trace_id": span.trace_id if span else "",
        "failure": _failure(task.failure) if task.HasField("failure") else None,
        "earlier_failures": [_failure(each) for each in task.earlier_failures],
        "response": response,
    }


def agent_json(agent: AgentSnapshot) -> dict[str, Any]:
    """The agent with stable keys."""
    return {
        "agent_id": agent.agent_id,
        "instance_id": agent.instance_id,
        "connected": agent.connected,
        "draining": agent.draining,
        "orchestrator_id": agent.orchestrator_id,
        "slots": agent.slots,
        "attempts": [
            {"task_id": each.task_id, "attempt": each.attempt, "fence": each.fence} for each in agent.attempts
        ],
        "services": list(agent.services),
        "last_heartbeat": time_or_none(agent.last_heartbeat_us),
        "loop_lag_us": agent.loop_lag_us,
        "memory_bytes": agent.memory_bytes,
    }


def time_or_none(time_us: int) -> str | None:
    """RFC 3339, or None for what has not happened."""
    return time_text(time_us) if time_us else None


def _attempt(attempt: AttemptRef) -> dict[str, Any]:
    return {"task_id": attempt.task_id, "attempt": attempt.attempt, "fence": attempt.fence}


def _failure(failure: Failure) -> dict[str, str]:
    try:
        reason = Reason.Name(failure.reason)
    except ValueError:
        reason = str(failure.reason)
    return {
        "reason": reason.removeprefix("REASON_"),
        "message": failure.message,
        "error_type": failure.error_type,
    }
