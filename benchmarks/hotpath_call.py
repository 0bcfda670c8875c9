"""What does a typed tool call cost beside a bare echo of the same bytes?

Client and server are programs started apart and pinned, all to one core, or the two ends to two cores.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from benchmarks.report import Report
from benchmarks.sides import Side, cpu_per_operation, in_turns, python, side

_HEADER_BYTES = 56
_SIDES = "benchmarks.hotpath_sides"
RAW = "blocking Python echo of the same bytes"


def cores() -> tuple[int, int]:
    """Return two cores that this process may use; the same one twice where there is one alone."""
    allowed = sorted(os.sched_getaffinity(0))
    return allowed[0], allowed[-1]


@asynccontextmanager
async def pair(
    name: str, server: tuple[str, ...], client: tuple[str, ...], size: int, placement: tuple[int, int]
) -> AsyncIterator[tuple[Side, Side]]:
    """Run a server and a client on a socket of their own; give both.

    Args:
        name: For messages and for the CPU figures.
        server: Command of the server, without path and size.
        client: Command of the client, likewise.
        size: Bytes of a request.
        placement: Core of the client and core of the server.
    """
    with tempfile.TemporaryDirectory(prefix="orki-bench-") as folder:
        ends = (str(Path(folder) / "socket"), str(size))
        async with side(f"{name} server", *server, *ends, core=placement[1]) as served:
            async with side(f"{name} client", *client, *ends, core=placement[0]) as calling:
                yield calling, served


def ours(client: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the commands of the bridge and of one of our clients."""
    return python(_SIDES, "bridge"), python(_SIDES, client)


def compiled(folder: str) -> str | None:
    """Compile the C program and return its path; None without a compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        return None
    program = str(Path(folder) / "pingpong")
    source = str(Path(__file__).with_name("hotpath_pingpong.c"))
    subprocess.run([compiler, "-O2", "-o", program, source], check=True)
    return program


async def measure(report: Report) -> None:
    """Measure all rows."""
    one, other = cores()
    await _measure_sync(report, 64, (one, one), "one core")
    if not report.quick:
        await _measure_sync(report, 1_024, (one, one), "one core")
        await _measure_sync(report, 64, (one, other), "two cores")
    await _measure_async(report, 64, (one, one))


async def _measure_sync(report: Report, size: int, placement: tuple[int, int], where: str) -> None:
    rounds, count = (4, 1_000) if report.quick else (20, 2_000)
    command = f"one {count}"
    raw = (python(_SIDES, "echo"), python(_SIDES, "raw"))
    with tempfile.TemporaryDirectory(prefix="orki-bench-") as folder:
        async with AsyncExitStack() as stack:
            enter = stack.enter_async_context
            plain, served = await enter(pair("call", *ours("call"), size, placement))
            traced, _ = await enter(pair("traced call", *ours("call_traced"), size, placement))
            echo, _ = await enter(pair("raw", *raw, size, placement))
            sides = [plain, traced, echo]
            if program := compiled(folder):
                c_pair = ((program, "serve"), (program, "call"))
                native, _ = await enter(pair("C", *c_pair, size + _HEADER_BYTES, placement))
                sides.append(native)
            taken = await in_turns(rounds, *[(each, command) for each in sides])
            processes = [("client", plain.pid), ("bridge", served.pid)]
            cpu = await cpu_per_operation(count * 10, processes, plain, f"one {count * 10}")
    row = f"sync call, {size} B, {where}"
    report.add(row, "us", taken[0], baseline=RAW, against=taken[2], reach=("<=", 1.5), cpu_us=cpu)
    report.add(f"{row}, traced and recorded", "us", taken[1], baseline=RAW, against=taken[2], reach=("<=", 1.5))
    for native_values in taken[3:]:
        report.add(row, "us", taken[0], baseline="C ping-pong", against=native_values, reach=("<=", 2.5))


async def _measure_async(report: Report, size: int, placement: tuple[int, int]) -> None:
    rounds, count = (4, 500) if report.quick else (20, 1_000)
    raw = (python(_SIDES, "asyncio_echo"), python(_SIDES, "asyncio_raw"))
    async with (
        pair("async call", *ours("call_async"), size, placement) as (client, served),
        pair("asyncio", *raw, size, placement) as (echo, _),
    ):
        command = f"one {count}"
        taken, base = await in_turns(rounds, (client, command), (echo, command))
        processes = [("client", client.pid), ("bridge", served.pid)]
        cpu = await cpu_per_operation(count * 10, processes, client, f"one {count * 10}")
        row = f"async call, {size} B, one core, traced and recorded"
        report.add(row, "us", taken, baseline="bare asyncio.Protocol echo", against=base, reach=("<=", 1.5), cpu_us=cpu)
        deep, flat = await in_turns(rounds, (client, f"many 32 {count * 4}"), (client, f"many 1 {count}"))
        report.add(
            f"async calls, {size} B, 32 in flight",
            "calls/s",
            deep,
            baseline="one call at a time",
            against=flat,
            reach=(">=", 3.0),
        )
