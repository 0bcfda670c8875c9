"""What does a typed call cost beside the bare echo of the same bytes?

Each row measures a call and its baseline in turns (ABAB…), both ends pinned to one core, and prints medians, 99th
percentiles and the ratio of the medians.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter_ns
from typing import Any

from hotpath_baselines import asyncio_echo_server, c_rounds, echo_server, in_child, loop_echo_rounds, raw_echo_rounds

import orki_contract as oc
from orki_agent.hotpath import AsyncToolClient, SyncToolClient, ToolBridge
from orki_contract.trace import new_span, use_span

BENCH = "hotpath_call"
HEADER_BYTES = 56
BLOCK_BYTES = 16
TOKEN = bytes(range(32))


@oc.frame("bench.v1.Read", version=1, block_length=BLOCK_BYTES)
class Read(oc.FrameBase):
    """A request of a usual shape: two numbers and some bytes."""

    offset: int = oc.at(0, oc.Scalar.U64, number=1)
    length: int = oc.at(8, oc.Scalar.U32, number=2)
    body: bytes = oc.tail(default=b"")


READ = oc.Tool.declare("bench.v1.BenchToolService/Read", opcode=0x0101, request=Read, response=Read)


class BenchTools(oc.SyncToolService):
    """Answers with as many bytes as it got."""

    TOOLS = (READ,)

    def read(self, request: Read, call: oc.ToolCall) -> Read:
        """One call."""
        return Read(request.offset, request.length, request.body)


def serve(path: str) -> None:
    """The bridge's process."""
    with ToolBridge(BenchTools(), path=path, token=TOKEN):
        time.sleep(3_600)


def in_turns(rounds: int, each: int, *sides: Callable[[int], list[int]]) -> list[list[int]]:
    """Runs the sides in turns; gives the nanoseconds of each side."""
    taken: list[list[int]] = [[] for _ in sides]
    for number in range(rounds + 1):
        for side, sink in zip(sides, taken, strict=True):
            measured = side(each)
            if number:  # the first round warms up
                sink.extend(measured)
    return taken


def percentile(values: list[int], part: float) -> float:
    """A percentile in microseconds."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * part))] / 1_000


def row(name: str, measured: list[int], baseline: str, base: list[int], reach: float) -> dict[str, Any]:
    """One row of the report."""
    median, base_median = statistics.median(measured) / 1_000, statistics.median(base) / 1_000
    ratio = median / base_median
    return {
        "bench": BENCH,
        "row": name,
        "unit": "us",
        "median": round(median, 2),
        "p99": round(percentile(measured, 0.99), 2),
        "baseline": baseline,
        "baseline_median": round(base_median, 2),
        "baseline_p99": round(percentile(base, 0.99), 2),
        "ratio": round(ratio, 3),
        "reach": {"op": "<=", "value": reach},
        "met": ratio <= reach,
    }


def rate_row(name: str, measured: float, base: float, reach: float) -> dict[str, Any]:
    """A row of rates, where more is better."""
    ratio = measured / base
    return {
        "bench": BENCH,
        "row": name,
        "unit": "calls/s",
        "median": round(measured),
        "p99": None,
        "baseline": "the same client, one call at a time",
        "baseline_median": round(base),
        "ratio": round(ratio, 3),
        "reach": {"op": ">=", "value": reach},
        "met": ratio >= reach,
    }


def sync_rounds(client: SyncToolClient, size: int) -> Callable[[int], list[int]]:
    """Typed calls, one at a time."""
    request = Read(7, 9, bytes(size - BLOCK_BYTES))

    def rounds(count: int) -> list[int]:
        taken = []
        for _ in range(count):
            start = perf_counter_ns()
            client.call(READ, request)
            taken.append(perf_counter_ns() - start)
        return taken

    return rounds


def measure_sync(path: str, size: int, rounds: int, each: int) -> list[dict[str, Any]]:
    """Sync client: plain, and traced with records, against a raw echo and C."""
    wire = HEADER_BYTES + size
    records: deque[object] = deque(maxlen=1_024)
    ours, theirs = socket.socketpair()
    with ExitStack() as stack:
        stack.enter_context(in_child(lambda: echo_server(theirs, wire)))
        theirs.close()
        stack.enter_context(ours)
        plain = stack.enter_context(SyncToolClient(path, TOKEN, name="bench"))
        watched = stack.enter_context(SyncToolClient(path, TOKEN, name="bench", on_call=records.append))
        native = stack.enter_context(c_rounds(wire))
        full = sync_rounds(watched, size)

        def traced(count: int) -> list[int]:
            with use_span(new_span()):
                return full(count)

        sides = [sync_rounds(plain, size), traced, raw_echo_rounds(ours, wire), *([native] if native else [])]
        call, call_traced, raw, *floor = in_turns(rounds, each, *sides)
    echo = "raw Python echo"
    rows = [
        row(f"sync call, {size} B", call, echo, raw, 1.5),
        row(f"sync call, {size} B, traced and recorded", call_traced, echo, raw, 1.5),
    ]
    return rows + [row(f"sync call, {size} B, beside C", call, "C ping-pong", native, 2.5) for native in floor]


async def measure_async(path: str, size: int, rounds: int, each: int) -> list[dict[str, Any]]:
    """Async client, traced and recorded as inside an agent, against a raw asyncio echo; then 32 calls in flight."""
    wire = HEADER_BYTES + size
    records: deque[object] = deque(maxlen=1_024)
    request = Read(7, 9, bytes(size - BLOCK_BYTES))
    ours, theirs = socket.socketpair()
    with in_child(lambda: asyncio_echo_server(theirs)):
        theirs.close()
        base_rounds = await loop_echo_rounds(ours, wire)
        async with AsyncToolClient(path, TOKEN, name="bench", on_call=records.append) as client:
            measured: list[int] = []
            base: list[int] = []
            with use_span(new_span()):
                for number in range(rounds + 1):
                    taken = []
                    for _ in range(each):
                        start = perf_counter_ns()
                        await client.call(READ, request)
                        taken.append(perf_counter_ns() - start)
                    echoed: list[int] = await base_rounds(each)  # type: ignore[misc]
                    if number:
                        measured += taken
                        base += echoed
                one = await paced(client, request, each, 1)
                many = await paced(client, request, each, 32)
    return [
        row(f"async call, {size} B, traced and recorded", measured, "raw asyncio Protocol echo", base, 1.5),
        rate_row(f"async calls, {size} B, 32 in flight", many, one, 3.0),
    ]


async def paced(client: AsyncToolClient, request: Read, each: int, depth: int) -> float:
    """Calls a second with so many in flight."""

    async def caller() -> None:
        for _ in range(each // depth):
            await client.call(READ, request)

    start = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(depth)))
    return each // depth * depth / (time.perf_counter() - start)


def main() -> int:
    """Runs and reports; gives 0 also where a reach is not met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, for a look")
    parser.add_argument("--core", type=int, default=min(os.sched_getaffinity(0)), help="core for both ends")
    options = parser.parse_args()
    rounds, each = (4, 500) if options.quick else (20, 2_000)
    os.sched_setaffinity(0, {options.core})
    rows = []
    with tempfile.TemporaryDirectory(prefix="orki-bench-") as folder:
        path = str(Path(folder) / "tools")
        with in_child(lambda: serve(path)):
            while not os.path.exists(path):
                time.sleep(0.01)
            for size in (64, 1_024):
                rows += measure_sync(path, size, rounds, each)
            rows += asyncio.run(measure_async(path, 64, rounds, max(200, each // 4)))
    for each_row in rows:
        p99 = f"{each_row['p99']:9.2f}" if each_row["p99"] is not None else " " * 9
        print(
            f"{each_row['row']:45} {each_row['median']:9.2f} {p99} {each_row['unit']:8} ÷ "
            f"{each_row['baseline_median']:9.2f} ({each_row['baseline']}) = {each_row['ratio']:6.3f}, "
            f"wanted {each_row['reach']['op']} {each_row['reach']['value']}: {'met' if each_row['met'] else 'not met'}"
        )
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
