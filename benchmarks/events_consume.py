"""What does consuming cost beside XREADGROUP COUNT 500, one XACK and FromString by hand, and how late is an event?"""

from __future__ import annotations

from benchmarks.events_publish import HAND, both_sides
from benchmarks.report import Report
from benchmarks.sides import cpu_per_operation, in_turns


async def measure(report: Report) -> None:
    """Measure all rows."""
    rounds, count, turns = (2, 10_000, 60) if report.quick else (9, 50_000, 200)
    rows = (
        ("batches of 500, decoded and acknowledged", "consume", 1.0),
        ("single events, 16 calls at once", "consume_single", 0.8),
    )
    async with both_sides() as (typed, hand, processes):
        await hand.ask(f"fill {count}")
        for row, name, reach in rows:
            command = f"{name} {count}"
            ours, theirs = await in_turns(rounds, (typed, command), (hand, command))
            cpu = await cpu_per_operation(count, processes, typed, command)
            report.add(row, "events/s", ours, baseline=HAND, against=theirs, reach=(">=", reach), cpu_us=cpu)
    async with both_sides() as (typed, hand, _):
        command = f"latency {turns}"
        ours, theirs = await in_turns(rounds, (typed, command), (hand, command))
        report.add("publish to handler, light load", "us", ours, baseline=HAND, against=theirs, reach=("<=", 1.25))
