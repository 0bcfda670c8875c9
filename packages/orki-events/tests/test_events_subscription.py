"""Subscriptions end at the latest with their `Events`, however their loop was left."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from typing import Any

import pytest

from orki.events.v1.usage_pb2 import UsageEvent
from orki_contract.errors import LocalProtocolError
from orki_events import ConsumeOptions, Events

QUICK = ConsumeOptions(sweep_interval=0.05)


def consumers(server: Any) -> list[Any]:
    with server.client as client:
        return list(client.xinfo_consumers("orki:ev:{usage-of-tests}", "work"))


def own_tasks() -> list[str]:
    return [task.get_name() for task in asyncio.all_tasks() if "orki-events consumer" in task.get_name()]


async def test_a_loop_left_by_break_ends_with_its_events(opened: Callable[..., Any], usage: Any) -> None:
    events, stream = await opened(drain_timeout=0.4), usage()
    await events.publish(stream, UsageEvent())
    async for delivery in events.deliveries(stream, group="work"):
        assert delivery.deliveries == 1
        break
    assert own_tasks()
    # The delivery was not settled: the end waits for the drain timeout and leaves nothing running.
    await events.close()
    assert own_tasks() == []


async def test_a_referenced_subscription_ends_with_its_events(opened: Callable[..., Any], usage: Any) -> None:
    events, stream = await opened(), usage()
    await events.publish(stream, UsageEvent())
    source = events.deliveries(stream, group="work")
    async for delivery in source:
        delivery.acknowledge()
        break
    await events.close()
    assert own_tasks() == []
    with pytest.raises(StopAsyncIteration):
        await anext(source)


async def test_a_subscription_in_a_reference_cycle_ends_when_it_is_collected(
    server: Any, events: Events, usage: Any
) -> None:
    stream = usage()
    await events.publish(stream, UsageEvent())
    source: Any = events.deliveries(stream, group="work")
    async with await anext(source):
        pass
    cycle: list[Any] = [source]
    cycle.append(cycle)
    del source, cycle
    gc.collect()
    async with asyncio.timeout(10):
        while own_tasks():
            await asyncio.sleep(0.01)
    assert consumers(server) == []


async def test_the_end_of_the_block_ends_the_consumer(server: Any, events: Events, usage: Any) -> None:
    stream = usage()
    await events.publish(stream, UsageEvent())
    async with events.deliveries(stream, group="work", options=QUICK) as deliveries:
        async with await anext(deliveries) as event:
            assert event == UsageEvent()
        assert len(consumers(server)) == 1
    assert own_tasks() == []
    assert consumers(server) == []
    with pytest.raises(StopAsyncIteration):
        await anext(deliveries)


async def test_several_tasks_can_share_a_subscription(events: Events, usage: Any) -> None:
    stream, got = usage(), []
    await events.publish_many(stream, [UsageEvent(attempt=number) for number in range(20)])

    async def take() -> None:
        async for delivery in source:
            async with delivery as event:
                got.append(event.attempt)
            if len(got) == 20:
                await source.aclose()

    source = events.deliveries(stream, group="work")
    async with asyncio.timeout(20):
        await asyncio.gather(*(take() for _ in range(3)))
    assert sorted(got) == list(range(20))
    assert own_tasks() == []


async def test_a_cancelled_iteration_ends_its_consumer(server: Any, events: Events, usage: Any) -> None:
    stream = usage()
    await events.prepare(stream)
    waiting = asyncio.ensure_future(anext(events.deliveries(stream, group="work")))
    async with asyncio.timeout(10):
        while not own_tasks():
            await asyncio.sleep(0.01)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert own_tasks() == []
    assert consumers(server) == []


async def test_one_of_two_waiting_closers_can_be_cancelled(opened: Callable[..., Any], usage: Any) -> None:
    events, stream = await opened(drain_timeout=30), usage()
    await events.publish(stream, UsageEvent())
    source = events.deliveries(stream, group="work")
    delivery = await anext(source)
    patient, hasty = asyncio.create_task(source.aclose()), asyncio.create_task(source.aclose())
    await asyncio.sleep(0.05)
    hasty.cancel()
    async with asyncio.timeout(10):
        with pytest.raises(asyncio.CancelledError):
            await hasty
        await patient
    assert own_tasks() == []
    delivery.acknowledge()  # too late: harmless


async def test_nothing_starts_after_the_end(opened: Callable[..., Any], usage: Any) -> None:
    events = await opened()
    source = events.deliveries(usage(), group="work")
    await events.close()
    with pytest.raises(LocalProtocolError):
        await anext(source)


async def test_closing_ends_tails(opened: Callable[..., Any], usage: Any, server: Any) -> None:
    events, stream = await opened(block_timeout=30), usage()
    await events.publish(stream, UsageEvent(attempt=1))
    seen = []

    async def follow() -> None:
        async for entry in events.tail(stream, after="earliest"):
            seen.append(entry.event.attempt)

    following = asyncio.create_task(follow())
    left = events.tail(stream, after="earliest")
    assert (await anext(left)).event.attempt == 1
    async with asyncio.timeout(10):
        while not seen:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        # One tail waits in the server for half a minute, the other one pauses between two entries.
        await events.close()
        await following
        with server.client as client:
            assert [each["name"] for each in client.client_list() if ":tail." in each["name"]] == []
        assert [entry async for entry in left] == []
