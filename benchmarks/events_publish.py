"""What does a typed, batched publish cost beside a hand-written redis-py pipeline of the same bytes?"""

from __future__ import annotations

import asyncio
import time

import redis.asyncio as redis
from events_server import KEY, SAMPLE, STREAM, Report, entry_fields, main

from orki_contract.trace import new_span, use_span
from orki_events import Events, connect

BATCH = 500
PIPELINE = "redis-py pipeline of 500 XADD"


async def pipelines(client: redis.Redis, count: int) -> list[float]:
    """Events a second by hand."""
    fields = entry_fields()
    begun = time.perf_counter()
    for _ in range(count // BATCH):
        pipeline = client.pipeline(transaction=False)
        for _ in range(BATCH):
            pipeline.xadd(KEY, fields, maxlen=1_000_000, approximate=True)
        await pipeline.execute()
    return [count / (time.perf_counter() - begun)]


async def typed_batches(events: Events, count: int) -> list[float]:
    """Events a second by publish_many."""
    begun = time.perf_counter()
    for _ in range(count // BATCH):
        await events.publish_many(STREAM, [SAMPLE] * BATCH)
    return [count / (time.perf_counter() - begun)]


async def typed_crowd(events: Events, count: int) -> list[float]:
    """Events a second by 500 tasks that publish one event each."""
    begun = time.perf_counter()
    for _ in range(count // BATCH):
        await asyncio.gather(*(events.publish(STREAM, SAMPLE) for _ in range(BATCH)))
    return [count / (time.perf_counter() - begun)]


async def collected(events: Events, count: int) -> list[float]:
    """Events a second by collect, flushed at the end."""
    begun = time.perf_counter()
    for place in range(count):
        events.collect(STREAM, SAMPLE)
        if place % 5_000 == 4_999:
            await events.flush()
    await events.flush()
    return [count / (time.perf_counter() - begun)]


async def one_by_one(events: Events, count: int) -> list[float]:
    """Microseconds of a lone publish."""
    taken = []
    for _ in range(count):
        begun = time.perf_counter()
        await events.publish(STREAM, SAMPLE)
        taken.append((time.perf_counter() - begun) * 1e6)
    return taken


async def one_by_one_by_hand(client: redis.Redis, count: int) -> list[float]:
    """Microseconds of a lone XADD."""
    fields = entry_fields()
    taken = []
    for _ in range(count):
        begun = time.perf_counter()
        await client.xadd(KEY, fields, maxlen=1_000_000, approximate=True)
        taken.append((time.perf_counter() - begun) * 1e6)
    return taken


async def measure(report: Report, port: int, quick: bool) -> None:
    """All rows."""
    count = 5_000 if quick else 20_000
    client = redis.Redis(port=port)
    async with connect(f"redis://127.0.0.1:{port}") as events:
        with use_span(new_span().child()):
            rows = {
                "publish_many, 500 typed events": typed_batches,
                "publish, 500 tasks at once": typed_crowd,
                "collect and flush": collected,
            }
            for row, side in rows.items():
                ours, theirs = await report.turns(
                    lambda side=side: side(events, count), lambda: pipelines(client, count)
                )
                report.add(row, "events/s", ours, PIPELINE, theirs, ">=", 0.8)
            ours, theirs = await report.turns(
                lambda: one_by_one(events, count // 20), lambda: one_by_one_by_hand(client, count // 20)
            )
            report.add("publish, one at a time", "us", ours, "redis-py XADD", theirs, "<=", 1.3)
    await client.aclose()


if __name__ == "__main__":
    main("events_publish", measure)
