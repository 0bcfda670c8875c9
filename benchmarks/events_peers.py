"""How do publishing and consuming compare with FastStream on Redis Streams and with NATS JetStream?"""

from __future__ import annotations

import asyncio
import socket
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path

from benchmarks.events_publish import both_sides
from benchmarks.report import Report
from benchmarks.sides import PEERS, Side, SideFailed, in_turns, peer_environment, redis_server, side

_ROWS = (
    ("faststream", "single events", "publish_tasks", "consume_single", 20.0),
    ("faststream-batch", "batches", "publish", "consume", 4.0),
    ("jetstream", "batches", "publish", "consume", None),
)


async def _start(stack: AsyncExitStack, peer: str) -> Side:
    """Start a peer's server and program."""
    enter = stack.enter_async_context
    if peer == "jetstream":
        program = peer_environment("nats")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="orki-bench-"))
        server = str(Path(program).with_name("nats-server"))
        command = (server, "--jetstream", "--store_dir", folder, "--addr", "127.0.0.1", "--port", str(port))
        await enter(side("nats-server", *command, ready=False))
        await _listening(port)
        where = f"nats://127.0.0.1:{port}"
    else:
        program = peer_environment("faststream")
        port, _ = stack.enter_context(redis_server())
        where = f"redis://127.0.0.1:{port}/0"
    return await enter(side(peer, program, str(PEERS / "streams.py"), peer, where))


async def _listening(port: int) -> None:
    until = time.monotonic() + 20
    while True:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.close()
            return
        except OSError:
            if time.monotonic() > until:
                raise
            await asyncio.sleep(0.05)


async def measure(report: Report) -> None:
    """Measure all rows."""
    rounds, count = (1, 2_000) if report.quick else (5, 10_000)
    failed = []
    for peer, how, publish, consume, reach in _ROWS:
        async with AsyncExitStack() as stack:
            typed, hand, _ = await stack.enter_async_context(both_sides())
            await hand.ask(f"fill {count}")
            try:
                other = await _start(stack, peer)
                await _compare(report, typed, other, f"publish, {how}", (publish, "publish"), rounds, count, None)
                await _compare(report, typed, other, f"consume, {how}", (consume, "consume"), rounds, count, reach)
            except SideFailed as error:
                failed.append(f"{peer}: {error}")
    if failed:
        raise SideFailed("peers that were not measured:\n" + "\n".join(failed))


async def _compare(
    report: Report,
    typed: Side,
    other: Side,
    row: str,
    names: tuple[str, str],
    rounds: int,
    count: int,
    reach: float | None,
) -> None:
    """Add one row: the same work on both sides, in turns."""
    ours, theirs = await in_turns(rounds, (typed, f"{names[0]} {count}"), (other, f"{names[1]} {count}"))
    wanted = None if reach is None else (">=", reach)
    report.add(row, "events/s", ours, baseline=other.name, against=theirs, reach=wanted)
