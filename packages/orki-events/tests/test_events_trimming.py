"""Trimming without publishers, its tolerance, its lease, and the policies that keep unread entries."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest

from orki.events.v1.usage_pb2 import UsageEvent
from orki_contract import EventStream
from orki_contract.errors import EventsStreamFull
from orki_contract.model import AUDIT_GROUP, Group, Overflow, Retention, Start, Stream
from orki_events import Delivery, Events, consumer

KEY = "orki:ev:{kept}"


def kept(*groups: Group, partitions: int = 1, **retention: Any) -> EventStream[UsageEvent, Any]:
    """Return a stream with a retention."""
    return EventStream(
        UsageEvent,
        Stream(
            name="kept",
            message="orki.events.v1.UsageEvent",
            retention=Retention(**{"max_entries": 1_000_000, **retention}),
            partitions=partitions,
            partition_key="agent_id" if partitions > 1 else "",
            groups=(AUDIT_GROUP, *groups),
        ),
    )


def numbered(count: int, start: int = 0, size: int = 0) -> list[UsageEvent]:
    return [
        UsageEvent(agent_id=f"a{number}", attempt=number, model="m" * size) for number in range(start, start + count)
    ]


def length(server: Any, key: str = KEY) -> int:
    with server.client as client:
        return int(client.xlen(key))


def oldest_age(server: Any, key: str = KEY) -> float:
    """Return the age of the oldest entry in seconds, by the server's clock."""
    with server.client as client:
        seconds, micros = client.time()
        first = client.xrange(key, count=1)
    if not first:
        return 0.0
    return float(seconds) + micros / 1e6 - int(first[0][0].split(b"-")[0]) / 1e3


async def read_all(events: Events, stream: Any, group: str, until: Callable[..., Any], count: int) -> list[int]:
    got: list[int] = []
    stop = asyncio.Event()

    @consumer(stream, group=group, concurrency=16)
    async def on_usage(event: UsageEvent, delivery: Delivery[UsageEvent]) -> None:
        got.append(event.attempt)

    running = asyncio.create_task(events.run(on_usage, stop=stop))
    await until(lambda: len(got) >= count)
    stop.set()
    await running
    return got


@pytest.mark.parametrize("partitions", [1, 3])
async def test_old_entries_go_without_a_publisher(
    server: Any, opened: Callable[..., Any], until: Callable[..., Any], partitions: int
) -> None:
    events, stream = await opened(), kept(max_age=1.0, partitions=partitions)
    await events.publish_many(stream, numbered(750))
    keys = [KEY] if partitions == 1 else [f"orki:ev:{{kept:{number}}}" for number in range(partitions)]
    assert sum(length(server, key) for key in keys) == 750
    begun = time.monotonic()
    await until(lambda: sum(length(server, key) for key in keys) == 0)
    assert time.monotonic() - begun < 4.0


async def test_the_age_is_kept_while_many_events_arrive(server: Any, opened: Callable[..., Any]) -> None:
    events, stream = await opened(), kept(max_age=1.0, max_entries=100_000_000)
    batch, ages, until_s = numbered(500), [], time.monotonic() + 6.0
    published = 0
    while time.monotonic() < until_s:
        await events.publish_many(stream, batch)
        published += 500
        if published % 10_000 == 0:
            ages.append(oldest_age(server))
    # The age, a tenth of it, and slack for a loaded machine.
    assert max(ages) < 3.0, (published, ages)


async def test_the_size_is_kept_within_a_tolerance(server: Any, opened: Any, until: Any) -> None:
    events, stream = await opened(), kept(max_bytes=1_000_000)
    await events.publish_many(stream, numbered(4_000, size=1_000))
    with server.client as client:
        await until(lambda: client.memory_usage(KEY) < 1_300_000)
        await asyncio.sleep(2.0)
        assert client.memory_usage(KEY) > 600_000
        newest = UsageEvent.FromString(client.xrevrange(KEY, count=1)[0][1][b"d"])
    assert newest.attempt == 3_999


async def test_another_process_takes_a_dead_trimmers_stream_over(
    server: Any, opened: Callable[..., Any], until: Callable[..., Any]
) -> None:
    stream = kept(max_age=0.5)
    one, other = await opened(producer="one"), await opened(producer="other")
    await one.publish_many(stream, numbered(10))
    with server.client as client:
        await until(lambda: client.get("orki:trimmer:kept") == b"one")
        await other.publish_many(stream, numbered(10))
        await asyncio.sleep(1.5)
        assert client.get("orki:trimmer:kept") == b"one"
        # As if its process had been killed.
        one._trimmer._task.cancel()
        await other.publish_many(stream, numbered(10))
        await until(lambda: client.get("orki:trimmer:kept") == b"other", 12)
        await until(lambda: client.xlen(KEY) == 0)


async def test_a_closed_process_leaves_its_lease(server: Any, opened: Callable[..., Any], until: Any) -> None:
    events = await opened(producer="one")
    await events.publish(kept(max_age=0.5), UsageEvent())
    with server.client as client:
        await until(lambda: client.get("orki:trimmer:kept") == b"one")
        await events.close()
        assert client.get("orki:trimmer:kept") is None


async def test_all_registered_streams_are_trimmed_by_who_offers_it(
    server: Any, opened: Callable[..., Any], until: Callable[..., Any]
) -> None:
    publisher = await opened()
    await publisher.publish_many(kept(max_age=0.5), numbered(10))
    await publisher.close()
    assert length(server) == 10
    operator = await opened()
    operator.keep_trimmed()
    await until(lambda: length(server) == 0)


async def test_unread_entries_are_kept_up_to_the_ceiling_and_publishing_waits(
    server: Any, opened: Callable[..., Any], until: Callable[..., Any]
) -> None:
    stream = kept(Group(name="work"), max_entries=100, overflow=Overflow.BLOCK, ceiling_entries=1_000)
    events = await opened(publish_timeout=60)
    await events.publish_many(stream, numbered(900))
    waiting = asyncio.create_task(events.publish_many(stream, numbered(1_100, start=900)))
    await asyncio.sleep(2.5)
    assert not waiting.done()
    assert length(server) == 1_000
    # One group alone frees nothing.
    assert sorted(await read_all(events, stream, "audit", until, 1_000)) == list(range(1_000))
    await asyncio.sleep(2.5)
    assert length(server) == 1_000
    readers = [read_all(events, stream, "work", until, 2_000), read_all(events, stream, "audit", until, 1_000)]
    work, _ = await asyncio.gather(*readers)
    assert sorted(work) == list(range(2_000))
    await asyncio.wait_for(waiting, 20)
    await until(lambda: length(server) <= 100)
    assert length(server) == 100


async def test_unread_entries_are_kept_up_to_the_ceiling_and_publishing_fails(
    server: Any, opened: Callable[..., Any]
) -> None:
    stream = kept(max_entries=10, overflow=Overflow.FAIL, ceiling_entries=50)
    events = await opened()
    begun = time.monotonic()
    with pytest.raises(EventsStreamFull, match="keeps 50 entries"):
        await events.publish_many(stream, numbered(80))
    assert time.monotonic() - begun < 5.0
    assert length(server) == 50
    with server.client as client:
        raw = client.xrange(KEY)
    assert [UsageEvent.FromString(fields[b"d"]).attempt for _, fields in raw] == list(range(50))


async def test_age_does_not_drop_what_a_group_has_not_settled(
    server: Any, opened: Callable[..., Any], until: Callable[..., Any]
) -> None:
    late = Group(name="late", start=Start.LATEST)
    stream = kept(Group(name="work"), late, max_age=0.5, overflow=Overflow.BLOCK)
    events = await opened()
    await events.publish_many(stream, numbered(20))
    await asyncio.sleep(2.0)
    assert length(server) == 20
    await read_all(events, stream, "audit", until, 20)
    async with events.deliveries(stream, group="work") as deliveries:
        first = await anext(deliveries)
        second = await anext(deliveries)
        second.acknowledge()
        await asyncio.sleep(2.0)
        assert length(server) == 20
        first.acknowledge()
    await read_all(events, stream, "work", until, 18)
    await read_all(events, stream, "late", until, 20)
    await until(lambda: length(server) == 0)


async def test_a_script_that_the_server_forgot_is_loaded_again(server: Any, opened: Callable[..., Any]) -> None:
    stream = kept(overflow=Overflow.FAIL)
    events = await opened()
    await events.publish_many(stream, numbered(3))
    with server.client as client:
        client.script_flush()
    await asyncio.wait_for(events.publish_many(stream, numbered(3, start=3)), 10)
    assert length(server) == 6
