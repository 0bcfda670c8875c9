"""How long after a killed server answers again does a new event reach its handler?"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sized
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.events_sides import SAMPLE, STREAM
from benchmarks.report import Report
from chaos.rig import RedisServer
from orki.events.v1.usage_pb2 import UsageEvent
from orki_events import Delivery, connect, consumer


async def _until(condition: Callable[[], bool], timeout: float = 60.0) -> None:
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"the condition did not hold within {timeout:g} s")
        await asyncio.sleep(0.001)


def _more(found: Sized, than: int) -> bool:
    return len(found) > than


async def measure(report: Report) -> None:
    """Kill the server again and again while events flow; check the ledger at the end."""
    with TemporaryDirectory(prefix="orki-bench-") as folder:
        server = RedisServer(Path(folder))
        server.start()
        try:
            await _measure(report, server, 3 if report.quick else 15)
        finally:
            server.process.stop()


async def _measure(report: Report, server: RedisServer, rounds: int) -> None:
    handled: set[bytes] = set()
    acknowledged: set[bytes] = set()
    stop, publishing = asyncio.Event(), asyncio.Event()
    publishing.set()

    @consumer(STREAM, group="work")
    async def on_event(event: UsageEvent, delivery: Delivery[UsageEvent]) -> None:
        handled.add(delivery.event_id)

    taken = []
    async with connect(f"redis://127.0.0.1:{server.port}") as events:

        async def publish() -> None:
            while publishing.is_set():
                acknowledged.update(await events.publish_many(STREAM, [SAMPLE] * 20))
                await asyncio.sleep(0.002)

        running = asyncio.create_task(events.run(on_event, stop=stop))
        flowing = asyncio.create_task(publish())
        for _ in range(rounds):
            await asyncio.sleep(0.5)
            await asyncio.to_thread(server.process.kill)
            await asyncio.sleep(0.5)
            before = len(handled)
            await asyncio.to_thread(server.start)
            begun = time.perf_counter()
            await _until(partial(_more, handled, before))
            taken.append(time.perf_counter() - begun)
        publishing.clear()
        await flowing
        await _until(lambda: acknowledged <= handled)
        stop.set()
        await running
        ledger = (await events.ledger(STREAM)).dump()
    work = ledger["groups"]["work"]
    report.add("server answers again to first handled event", "s", taken, reach=("<", 1.0))
    exact = ledger["published"] == work["processed"] and work["declared_lost"] == 0
    report.add("events missing from the ledger", "events", [0.0 if exact else 1.0], reach=("<=", 0.0))
