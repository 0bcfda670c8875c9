"""What does a typed publish cost beside XADD commands packed by hand on one connection?"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from benchmarks.report import Report
from benchmarks.sides import Side, cpu_per_operation, in_turns, python, redis_server, side

HAND = "RESP packed by hand, one connection, same bytes"
_SIDES = "benchmarks.events_sides"


@asynccontextmanager
async def both_sides() -> AsyncIterator[tuple[Side, Side, list[tuple[str, int]]]]:
    """Run a server, the typed program and the hand-written one; give both, and the processes whose CPU counts."""
    with redis_server() as (port, redis_pid):
        async with (
            side("typed", *python(_SIDES, "typed", str(port))) as typed,
            side("hand", *python(_SIDES, "hand", str(port))) as hand,
        ):
            yield typed, hand, [("program", typed.pid), ("redis", redis_pid)]


async def measure(report: Report) -> None:
    """Measure all rows."""
    rounds, count = (2, 5_000) if report.quick else (9, 20_000)
    rows = (
        ("publish_many, 500 typed events a call", "publish", 0.95),
        ("publish, 500 concurrent tasks", "publish_tasks", 0.8),
        ("collect and flush", "collect", 0.8),
    )
    async with both_sides() as (typed, hand, processes):
        for row, name, reach in rows:
            command = f"{name} {count}"
            ours, theirs = await in_turns(rounds, (typed, command), (hand, command))
            cpu = await cpu_per_operation(count, processes, typed, command)
            report.add(row, "events/s", ours, baseline=HAND, against=theirs, reach=(">=", reach), cpu_us=cpu)
        command = f"publish_one {count // 20}"
        ours, theirs = await in_turns(rounds, (typed, command), (hand, command))
        report.add("publish, one at a time", "us", ours, baseline=HAND, against=theirs, reach=("<=", 1.3))
