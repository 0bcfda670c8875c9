"""What does consuming cost beside XREADGROUP COUNT 500, one XACK and FromString by hand? And how late is an event?"""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import Any

import redis.asyncio as redis
from events_server import KEY, SAMPLE, STREAM, Report, entry_fields, main

from orki.events.v1.usage_pb2 import UsageEvent
from orki_contract.model import Group, Start
from orki_events import ConsumeOptions, Delivery, DeliveryBatch, EventOptions, Events, connect, consumer

BATCH = 500
BY_HAND = "redis-py XREADGROUP COUNT 500, XACK, FromString"
_numbers = itertools.count()


async def fill(client: redis.Redis, count: int) -> None:
    """Puts entries into the stream, each with an event id of its own."""
    for _ in range(count // BATCH):
        pipeline = client.pipeline(transaction=False)
        for _ in range(BATCH):
            pipeline.xadd(KEY, entry_fields())
        await pipeline.execute()


async def by_hand(client: redis.Redis, count: int) -> list[float]:
    """Events a second by hand."""
    group = f"hand-{next(_numbers)}"
    await client.xgroup_create(KEY, group, "0")
    begun = time.perf_counter()
    got = 0
    while got < count:
        reply: Any = await client.xreadgroup(group, "one", {KEY: ">"}, count=BATCH, block=1_000)
        entries = reply[0][1]
        for _, fields in entries:
            UsageEvent.FromString(fields[b"d"])
        await client.xack(KEY, group, *(entry_id for entry_id, _ in entries))
        got += len(entries)
    return [count / (time.perf_counter() - begun)]


async def typed(events: Events, count: int, batch: int) -> list[float]:
    """Events a second by a consumer of batches, or of single events where `batch` is 0."""
    name = f"typed-{next(_numbers)}"
    stream = STREAM.subscribed(Group(name=name, ack_deadline_ms=60_000))
    stop = asyncio.Event()
    got = 0
    begun = ended = 0.0

    def note(more: int) -> None:
        nonlocal got, begun, ended
        got += more
        if got >= count:
            stop.set()

    @consumer(stream, group=name, batch=BATCH, options=ConsumeOptions(prefetch=4 * BATCH))
    async def on_batch(found: list[UsageEvent], delivery: DeliveryBatch[UsageEvent]) -> None:
        note(len(found))

    @consumer(stream, group=name, options=ConsumeOptions(prefetch=4 * BATCH))
    async def on_event(event: UsageEvent, delivery: Delivery[UsageEvent]) -> None:
        note(1)

    begun = time.perf_counter()
    # The end waits for the last acknowledgement and for the consumer's leave.
    await events.run(on_batch if batch else on_event, stop=stop)
    ended = time.perf_counter()
    return [count / (ended - begun)]


async def late_typed(events: Events, reader: Events, count: int) -> list[float]:
    """Microseconds from publish to handler, at light load."""
    name = f"late-{next(_numbers)}"
    stream = STREAM.subscribed(Group(name=name, start=Start.LATEST))
    taken: list[float] = []
    stop, here = asyncio.Event(), asyncio.Event()
    sent = 0.0

    @consumer(stream, group=name)
    async def on_event(event: UsageEvent, delivery: Delivery[UsageEvent]) -> None:
        taken.append((time.perf_counter() - sent) * 1e6)
        here.set()

    running = asyncio.create_task(reader.run(on_event, stop=stop))
    # The group begins behind what is there: publish until it has begun.
    while not taken:
        await events.publish(STREAM, SAMPLE)
        await asyncio.sleep(0.01)
    taken.clear()
    for _ in range(count):
        here.clear()
        await asyncio.sleep(0.001)
        sent = time.perf_counter()
        await events.publish(STREAM, SAMPLE)
        await here.wait()
    stop.set()
    await running
    return taken[len(taken) // 10 :]


async def late_by_hand(client: redis.Redis, port: int, count: int) -> list[float]:
    """Microseconds from XADD to the end of a blocking XREADGROUP and its decoding."""
    group = f"late-hand-{next(_numbers)}"
    await client.xgroup_create(KEY, group, "$")
    reading = redis.Redis(port=port)
    taken: list[float] = []
    here = asyncio.Event()
    sent = 0.0

    async def read() -> None:
        while len(taken) < count:
            reply: Any = await reading.xreadgroup(group, "one", {KEY: ">"}, count=BATCH, block=1_000)
            for entry_id, fields in reply[0][1]:
                UsageEvent.FromString(fields[b"d"])
                taken.append((time.perf_counter() - sent) * 1e6)
                here.set()
                await client.xack(KEY, group, entry_id)

    running = asyncio.create_task(read())
    fields: Any = entry_fields()
    for _ in range(count):
        here.clear()
        await asyncio.sleep(0.001)
        sent = time.perf_counter()
        await client.xadd(KEY, fields)
        await here.wait()
    await running
    await reading.aclose()
    return taken[len(taken) // 10 :]


async def measure(report: Report, port: int, quick: bool) -> None:
    """All rows."""
    count = 10_000 if quick else 50_000
    client = redis.Redis(port=port)
    url = f"redis://127.0.0.1:{port}"
    async with connect(url, options=EventOptions(block_timeout=1.0)) as events, connect(url) as reader:
        await fill(client, count)
        for row, batch in (("batches of 500, decoded and acknowledged", BATCH), ("single events, 16 at once", 0)):
            ours, theirs = await report.turns(
                lambda batch=batch: typed(events, count, batch), lambda: by_hand(client, count)
            )
            report.add(row, "events/s", ours, BY_HAND, theirs, ">=", 0.8 if batch else 0.2)
        await client.delete(KEY, "orki:groups:{bench}")
        await events.prepare(STREAM)
        turns = 60 if quick else 200
        ours, theirs = await report.turns(
            lambda: late_typed(events, reader, turns), lambda: late_by_hand(client, port, turns)
        )
        report.add(
            "publish to handler, light load", "us", ours, "redis-py XADD, blocking XREADGROUP", theirs, "<=", 1.3
        )
    await client.aclose()


if __name__ == "__main__":
    main("events_consume", measure)
