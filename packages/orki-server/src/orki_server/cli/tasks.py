"""`orki tasks`: the tasks that the orchestrator knows, or one of them."""

from __future__ import annotations

__all__ = ["tasks"]

import time
from dataclasses import dataclass

import click

from orki.control.v1.task_pb2 import TaskSnapshot
from orki_server.cli.figures import age, duration
from orki_server.cli.repeat import repeated
from orki_server.cli.settings import json_option, open_client, run, with_orchestrator
from orki_server.cli.snapshots import STATES, state_name, task_json
from orki_server.cli.tables import Column, print_json, print_table

_COLUMNS = (
    Column(name="TASK", whole=True),
    Column(name="METHOD"),
    Column(name="STATE", judged=True, whole=True),
    Column(name="TRY", right=True),
    Column(name="AGENT"),
    Column(name="AGE", right=True, whole=True),
    Column(name="TOOK", right=True),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    states: tuple[str, ...]
    method: str
    agent: str
    limit: int


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
    "--state", "states", multiple=True, type=click.Choice(sorted(STATES)), help="Only tasks in this state; repeatable."
)
@click.option("--method", default="", metavar="SERVICE/METHOD", help="Only tasks of this method.")
@click.option("--agent", default="", metavar="AGENT", help="Only tasks whose current attempt this agent holds.")
@click.option("--limit", default=50, show_default=True, type=click.IntRange(1, 100_000), help="Most tasks shown.")
@click.option("--watch", is_flag=True, help="Print again every second until interrupted.")
@json_option
@with_orchestrator
def tasks(
    task_id: str | None, watch: bool, as_json: bool, orchestrator: str, insecure: bool, **filters: object
) -> None:
    """Show tasks, newest first; or one, with the failures of its attempts."""
    wanted = _Wanted(**filters)  # type: ignore[arg-type]
    if task_id is not None and filters != _UNFILTERED:
        raise click.UsageError("TASK shows one task; leave the filters out.")

    async def show() -> None:
        async with open_client(orchestrator, insecure) as client:
            if task_id is not None:
                found = [await client.get(task_id)]
            else:
                found = []
                page = min(wanted.limit, 1000)
                states = [STATES[name] for name in wanted.states]
                listed = client.list_tasks(states=states, method=wanted.method, agent_id=wanted.agent, page_size=page)
                async for each in listed:
                    found.append(each)
                    if len(found) == wanted.limit:
                        break
        if as_json:
            print_json([task_json(each) for each in found] if task_id is None else task_json(found[0]))
        elif task_id is None:
            print_table(_COLUMNS, map(_row, found), empty="no such tasks" if any(filters.values()) else "no tasks yet")
        else:
            _print_one(found[0])

    run(repeated(show, watch))


_UNFILTERED: dict[str, object] = {"states": (), "method": "", "agent": "", "limit": 50}


def _row(task: TaskSnapshot) -> tuple[str, ...]:
    now_us = time.time_ns() // 1000
    return (
        task.task_id,
        task.method.rpartition(".")[2],
        state_name(task.state),
        str(task.attempt.attempt) if task.HasField("attempt") else "-",
        task.agent_id or "-",
        age(task.submitted_us, now_us),
        duration(task.ended_us - task.submitted_us) if task.ended_us else "-",
    )


def _print_one(task: TaskSnapshot) -> None:
    shown = task_json(task)
    rows = [(name, str(shown[name])) for name in ("task_id", "method", "state", "attempt", "fence", "agent_id")]
    rows += [(name, shown[name] or "-") for name in ("submitted", "ended", "trace_id")]
    rows += [("earlier failure", _failure_text(each)) for each in shown["earlier_failures"]]
    if shown["failure"]:
        rows.append(("failure", _failure_text(shown["failure"])))
    print_table((Column(name="", whole=True), Column(name="", wraps=True)), rows, empty="")


def _failure_text(failure: dict[str, str]) -> str:
    return ", ".join(each for each in (failure["reason"], failure["error_type"], failure["message"]) if each)
