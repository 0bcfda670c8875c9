"""`orki tasks`, `orki agents`, `orki explain` and `orki cancel`: the tasks and agents that the orchestrator knows."""

from __future__ import annotations

import time
from collections.abc import Sequence, Set
from typing import TYPE_CHECKING, Any, Final

import click

from orki.control.v1.attempt_pb2 import Failure, TaskState
from orki.control.v1.task_pb2 import AgentSnapshot, Cause, Explanation, Suspension, TaskSnapshot
from orki_contract.trace import parse_traceparent
from orki_server._cli.formats import Columns, age, duration, print_json, print_rows, print_table, size
from orki_server._cli.options import (
    json_option,
    open_client,
    run_async,
    run_repeatedly,
    watch_option,
    with_orchestrator,
)
from orki_server._cli.pause import pauses_of
from orki_server._fields import DEFAULT_PRIORITY
from orki_server._observers.redaction import reason_text, time_text

if TYPE_CHECKING:
    from orki_control import Client

_STATE_NAMES: Final = {number: name.removeprefix("TASK_STATE_").lower() for name, number in TaskState.items()}
STATES: Final = {name: number for number, name in _STATE_NAMES.items() if number}
"""Task states by their names on the command line."""


def state_name(state: TaskState.ValueType) -> str:
    """Return a state's name such as `running`, or its number if this version does not know it."""
    return _STATE_NAMES.get(state, str(state))


def task_json(task: TaskSnapshot, response: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return a task as JSON with stable keys; `response` is None if it has none or its type is unknown."""
    span = parse_traceparent(task.traceparent)
    attempt = task.attempt if task.HasField("attempt") else None
    return {
        "task_id": task.task_id,
        "method": task.method,
        "state": state_name(task.state),
        "priority": task.priority if task.HasField("priority") else DEFAULT_PRIORITY,
        "start": time_or_none(task.start_us),
        "labels": dict(task.labels),
        "limits": list(task.limits),
        "fairness_key": task.fairness_key,
        "attempt": attempt.attempt if attempt else 0,
        "fence": attempt.fence if attempt else 0,
        "agent_id": task.agent_id,
        "submitted": time_or_none(task.submitted_us),
        "ended": time_or_none(task.ended_us),
        "trace_id": span.trace_id if span else "",
        "failure": _failure(task.failure) if task.HasField("failure") else None,
        "earlier_failures": [_failure(each) for each in task.earlier_failures],
        "response": response,
        "suspension": _suspension(task.suspension) if task.HasField("suspension") else None,
        "parent_task_id": task.parent_task_id or None,
        "root_task_id": task.root_task_id or None,
        "over_budget": task.over_budget,
    }


def agent_json(agent: AgentSnapshot) -> dict[str, Any]:
    """Return an agent as JSON with stable keys."""
    return {
        "agent_id": agent.agent_id,
        "instance_id": agent.instance_id,
        "connected": agent.connected,
        "draining": agent.draining,
        "orchestrator_id": agent.orchestrator_id,
        "slots": agent.slots,
        "labels": dict(agent.labels),
        "attempts": [
            {"task_id": each.task_id, "attempt": each.attempt, "fence": each.fence} for each in agent.attempts
        ],
        "services": list(agent.services),
        "last_heartbeat": time_or_none(agent.last_heartbeat_us),
        "loop_lag_us": agent.loop_lag_us,
        "memory_bytes": agent.memory_bytes,
    }


def time_or_none(time_us: int) -> str | None:
    """Return a time in RFC 3339; None for 0."""
    return time_text(time_us) if time_us else None


def _suspension(suspension: Suspension) -> dict[str, Any]:
    deadline_us = suspension.suspended_us + suspension.deadline_ms * 1000 if suspension.deadline_ms else 0
    return {
        "number": suspension.number,
        "question": suspension.question,
        "suspended": time_or_none(suspension.suspended_us),
        "deadline": time_or_none(deadline_us),
    }


def _failure(failure: Failure) -> dict[str, str]:
    return {"reason": reason_text(failure.reason), "message": failure.message, "error_type": failure.error_type}


_COLUMNS: Final = Columns(
    ("TASK", "METHOD", "STATE", "PRI", "TRY", "AGENT", "AGE", "TOOK"),
    right={"PRI", "TRY", "AGE", "TOOK"},
    uncut={"TASK", "AGE"},
)
_UNFILTERED: Final[dict[str, Any]] = {"states": (), "method": "", "agent": "", "labels": (), "limit": 50}


@click.command(
    epilog="""\b
Examples:
  orki tasks --state running --state queued
  orki tasks --method acme.review.v1.ReviewService/ReviewFile --limit 20
  orki tasks --json | jq -r '.[] | select(.failure) | .failure.message'
  orki tasks TASK
""",
)
@click.argument("task_id", metavar="[TASK]", required=False)
@click.option(
    "--state",
    "states",
    multiple=True,
    type=click.Choice(sorted(STATES)),
    help="Only tasks in this state; may be repeated.",
)
@click.option("--method", default="", metavar="SERVICE/METHOD", help="Only tasks of this method.")
@click.option("--agent", default="", metavar="AGENT", help="Only tasks whose current attempt runs on this agent.")
@click.option(
    "--label",
    "labels",
    multiple=True,
    metavar="NAME=VALUE",
    help="Only tasks that ask for this label; may be repeated.",
)
@click.option(
    "--limit", default=50, show_default=True, type=click.IntRange(1, 100_000), help="Maximum number of tasks."
)
@watch_option
@json_option
@with_orchestrator
@run_async
async def tasks(
    task_id: str | None, watch: bool, as_json: bool, orchestrator: str, insecure: bool, **filters: Any
) -> None:
    """List tasks, newest first.

    With TASK, show one task with its state, times, and the failures of its attempts.

    \b
    STATE  state of the task; `in 5 min 2 s` until the start of a delayed one; `paused` for a
           queued one whose service or method is paused
    PRI    priority; - for the default
    TRY    number of the attempt
    """
    if task_id is not None and filters != _UNFILTERED:
        raise click.UsageError("filters cannot be combined with TASK.")

    async def show() -> None:
        async with open_client(orchestrator, insecure) as client:
            if task_id is not None:
                _print_one(await client.get(task_id), as_json)
                return
            found = await _list(client, **filters)
            waits = any(each.state == TaskState.TASK_STATE_QUEUED for each in found)
            paused = {each.target for each in await pauses_of(client)} if waits and not as_json else set()
        empty = "no such tasks" if any(filters.values()) else "no tasks yet"
        rows = [_row(each, paused) for each in found]
        print_rows(as_json, [task_json(each) for each in found], _COLUMNS, rows, empty=empty)

    await run_repeatedly(show, watch)


async def _list(
    client: Client, states: Sequence[str], method: str, agent: str, labels: Sequence[str], limit: int
) -> list[TaskSnapshot]:
    numbers = [STATES[name] for name in states]
    given = dict(label.partition("=")[::2] for label in labels)
    size = min(limit, 1000)
    found = []
    async for each in client.list_tasks(states=numbers, method=method, agent_id=agent, labels=given, page_size=size):
        found.append(each)
        if len(found) == limit:
            break
    return found


def _row(task: TaskSnapshot, paused: Set[str]) -> tuple[str, ...]:
    now_us = time.time_ns() // 1000
    return (
        task.task_id,
        task.method.rpartition(".")[2],
        _state(task, now_us, paused),
        str(task.priority) if task.HasField("priority") else "-",
        str(task.attempt.attempt) if task.HasField("attempt") else "-",
        task.agent_id or "-",
        age(task.submitted_us, now_us),
        duration(task.ended_us - task.submitted_us) if task.ended_us else "-",
    )


def _state(task: TaskSnapshot, now_us: int, paused: Set[str]) -> str:
    waits = task.state == TaskState.TASK_STATE_QUEUED and task.start_us > now_us and not task.HasField("attempt")
    if task.state == TaskState.TASK_STATE_QUEUED and not paused.isdisjoint((task.method, task.method.split("/")[0])):
        return "paused"
    if task.over_budget:
        return "over budget"
    return f"in {duration(task.start_us - now_us)}" if waits else state_name(task.state)


def _print_one(task: TaskSnapshot, as_json: bool) -> None:
    shown = task_json(task)
    if as_json:
        print_json(shown)
        return
    rows = [(name, str(shown[name])) for name in ("task_id", "method", "state", "attempt", "fence", "agent_id")]
    rows += [
        (name, "-" if shown[name] in (None, "") else str(shown[name]))
        for name in ("priority", "submitted", "start", "ended", "trace_id")
    ]
    rows += [("label", f"{name}={value}") for name, value in sorted(task.labels.items())]
    rows += [("limit", key) for key in task.limits]
    rows += [("fairness_key", task.fairness_key)] if task.fairness_key else []
    rows += [(name, shown[name]) for name in ("parent_task_id", "root_task_id") if shown[name]]
    if task.over_budget:
        rows.append(("waits for", f"a budget that is used up; see: orki budget show {task.task_id}"))
    elif shown["suspension"] and task.state == TaskState.TASK_STATE_SUSPENDED:
        rows += [(name, shown["suspension"][name] or "-") for name in ("question", "suspended", "deadline")]
    rows += [("earlier failure", _failure_text(each)) for each in shown["earlier_failures"]]
    if shown["failure"]:
        rows.append(("failure", _failure_text(shown["failure"])))
    print_table(Columns(("", " "), uncut={""}, wraps={" "}), rows)


def _failure_text(failure: dict[str, str]) -> str:
    return ", ".join(each for each in (failure["reason"], failure["error_type"], failure["message"]) if each)


_AGENT_COLUMNS: Final = Columns(
    ("AGENT", "STATE", "BUSY", "SERVES", "SEEN", "LAG", "MEMORY"),
    right={"BUSY", "SEEN", "LAG", "MEMORY"},
    uncut={"BUSY", "SEEN"},
)
_AGENT_STATES: Final = {
    (True, False): "connected",
    (True, True): "draining",
    (False, True): "left",
    (False, False): "lost",
}
"""States of agents by `connected` and `draining`."""


@click.command(
    epilog="""\b
Examples:
  orki agents --watch
  orki agents --json | jq -r '.[] | select(.connected | not) | .agent_id'
""",
)
@watch_option
@json_option
@with_orchestrator
@run_async
async def agents(watch: bool, as_json: bool, orchestrator: str, insecure: bool) -> None:
    """List the agents that are connected or were connected recently.

    \b
    STATE   connected
            draining: takes no more offers
            left: drained and stopped
            lost: its session broke
    BUSY    running attempts / slots
    SEEN    time since the last heartbeat
    LAG     delay of the agent's event loop
    """

    async def show() -> None:
        async with open_client(orchestrator, insecure) as client:
            found = await client.list_agents()
        empty = "no agents yet: start one with `orki-agent run MODULE:ATTRIBUTE`"
        print_rows(as_json, [agent_json(each) for each in found], _AGENT_COLUMNS, map(_agent_row, found), empty=empty)

    await run_repeatedly(show, watch)


def _agent_row(agent: AgentSnapshot) -> tuple[str, ...]:
    return (
        agent.agent_id,
        _AGENT_STATES[agent.connected, agent.draining],
        f"{len(agent.attempts)}/{agent.slots}",
        ", ".join(each.rpartition(".")[2] for each in agent.services),
        age(agent.last_heartbeat_us, time.time_ns() // 1000),
        duration(agent.loop_lag_us),
        size(agent.memory_bytes),
    )


_CAUSE_COLUMNS: Final = Columns(("CAUSE", "AGENT", "ORCHESTRATOR", "DETAIL"), uncut={"CAUSE"}, wraps={"DETAIL"})


@click.command(
    epilog="""\b
Examples:
  orki explain TASK
  orki explain TASK --json | jq -r '.[].cause'
""",
)
@click.argument("task_id", metavar="TASK")
@json_option
@with_orchestrator
@run_async
async def explain(task_id: str, as_json: bool, orchestrator: str, insecure: bool) -> None:
    """Show what a task waits for, and which agent has it."""
    async with open_client(orchestrator, insecure) as client:
        found = [_explanation_json(each) for each in (await client.explain(task_id)).explanations]
    rows = [tuple(each[name] or "-" for name in ("cause", "agent_id", "orchestrator_id", "detail")) for each in found]
    print_rows(as_json, found, _CAUSE_COLUMNS, rows, empty="nothing is known about the task")


def _explanation_json(explanation: Explanation) -> dict[str, Any]:
    known = explanation.cause in Cause.values()
    return {
        "cause": Cause.Name(explanation.cause).removeprefix("CAUSE_").lower() if known else str(explanation.cause),
        "agent_id": explanation.agent_id,
        "orchestrator_id": explanation.orchestrator_id,
        "until": time_or_none(explanation.until_us),
        "detail": explanation.detail,
    }


@click.command(
    epilog="""\b
Example:
  orki cancel TASK --message 'wrong input'
""",
)
@click.argument("task_id", metavar="TASK")
@click.option("--message", default="", help="Reason, shown in the task's trace.")
@json_option
@with_orchestrator
@run_async
async def cancel(task_id: str, message: str, as_json: bool, orchestrator: str, insecure: bool) -> None:
    """Request cancellation of a task.

    The agent stops the attempt and acknowledges. Cancelling a task twice, or after its end, has no effect.
    """
    async with open_client(orchestrator, insecure) as client:
        task = await client.cancel(task_id, message)
    if as_json:
        print_json(task_json(task))
    else:
        click.echo(f"{task.task_id} is {state_name(task.state)}")
