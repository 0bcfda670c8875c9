"""The windows of a consumer on a real server: entries that are handled or queued, and those that wait for a retry."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest

from orki.events.v1.usage_pb2 import UsageEvent
from orki_contract.model import Backoff
from orki_events import ConsumeOptions, Delivery, DeliveryBatch, Events, consumer
from orki_events._delivery_partition import Partition
from orki_events._delivery_table import Outcome

KEY = "orki:ev:{usage-of-tests}"


def numbered(count: int, start: int = 0) -> list[UsageEvent]:
    return [UsageEvent(attempt=number) for number in range(start, start + count)]


def pending(server: Any, group: str = "work") -> int:
    with server.client as client:
        return int(client.xpending(KEY, group)["pending"])


@pytest.mark.parametrize("form", ["single", "batch"])
@pytest.mark.parametrize("failing", [17, 32, 64])
async def test_entries_that_wait_for_a_retry_take_no_place_in_the_prefetch(
    events: Events, usage: Any, until: Callable[..., Any], failing: int, form: str
) -> None:
    stream, got, stop = usage(ack_deadline=30.0), [], asyncio.Event()
    options = ConsumeOptions(prefetch=32, backoff=Backoff(initial=20.0, maximum=30.0))
    await events.publish_many(stream, numbered(failing + 500))

    @consumer(stream, group="work", concurrency=8, options=options)
    async def on_usage(event: UsageEvent, delivery: Delivery[UsageEvent]) -> None:
        if event.attempt < failing:
            raise ValueError("not yet")
        got.append(event.attempt)

    @consumer(stream, group="work", batch=8, options=options)
    async def on_batch(found: list[UsageEvent], batch: DeliveryBatch[UsageEvent]) -> None:
        for index, event in enumerate(found):
            if event.attempt < failing:
                batch.reject(index, ValueError("not yet"))
            else:
                got.append(event.attempt)

    begun = time.monotonic()
    running = asyncio.create_task(events.run(on_usage if form == "single" else on_batch, stop=stop))
    await until(lambda: len(got) == 500, 8)
    assert time.monotonic() - begun < 8
    stop.set()
    await asyncio.wait_for(running, 20)


async def test_entries_beyond_the_retry_window_wait_on_the_server_and_come_back(
    server: Any, events: Events, usage: Any, until: Callable[..., Any]
) -> None:
    stream, tries, stop = usage(ack_deadline=3.0), {}, asyncio.Event()  # type: ignore[var-annotated]
    options = ConsumeOptions(
        prefetch=16, retry_entries=5, backoff=Backoff(initial=0.8, maximum=0.8), sweep_interval=0.1
    )
    await events.publish_many(stream, numbered(40))

    @consumer(stream, group="work", concurrency=4, options=options)
    async def on_usage(event: UsageEvent, delivery: Delivery[UsageEvent]) -> None:
        tries.setdefault(event.attempt, []).append((delivery.deliveries, time.monotonic()))
        if delivery.deliveries == 1:
            raise ValueError("once more")

    def owners() -> list[bytes]:
        with server.client as client:
            return [each["consumer"] for each in client.xpending_range(KEY, "work", "-", "+", 100)]

    running = asyncio.create_task(events.run(on_usage, stop=stop))
    await until(lambda: len(tries) == 40)
    await until(lambda: owners().count(b"handed-back") == 35)
    await until(lambda: all(len(each) == 2 for each in tries.values()) and pending(server) == 0)
    stop.set()
    await asyncio.wait_for(running, 20)
    assert {tuple(made for made, _ in each) for each in tries.values()} == {(1, 2)}
    waits = [second - first for (_, first), (_, second) in tries.values()]
    assert min(waits) > 0.3  # The wait is jittered.


async def test_large_entries_are_bounded_by_their_size(
    server: Any, events: Events, usage: Any, until: Callable[..., Any]
) -> None:
    stream, begun, go, stop = usage(ack_deadline=30.0), [], asyncio.Event(), asyncio.Event()
    body = "x" * (1 << 20)
    for number in range(100):
        await events.publish(stream, UsageEvent(attempt=number, model=body[: (1 << 20) - 200]))

    @consumer(stream, group="work", batch=100, options=ConsumeOptions(prefetch_bytes=8 << 20))
    async def on_batch(found: list[UsageEvent], batch: DeliveryBatch[UsageEvent]) -> None:
        begun.append(len(found))
        await go.wait()

    running = asyncio.create_task(events.run(on_batch, stop=stop))
    await until(lambda: begun)
    await asyncio.sleep(1)
    held = pending(server)
    # The first read takes 16, since the size is not known before it.
    assert held <= 16
    go.set()
    await until(lambda: sum(begun) == 100)
    await until(lambda: pending(server) == 0)
    stop.set()
    await asyncio.wait_for(running, 20)
    assert max(begun) <= 16


async def test_large_failing_entries_wait_on_the_server(
    server: Any, events: Events, usage: Any, until: Callable[..., Any]
) -> None:
    stream, begun, stop = usage(ack_deadline=20.0), [], asyncio.Event()
    for number in range(60):
        await events.publish(stream, UsageEvent(attempt=number, model="x" * ((1 << 20) - 200)))
    options = ConsumeOptions(prefetch_bytes=4 << 20, retry_bytes=5 << 20, backoff=Backoff(initial=15.0, maximum=15.0))

    @consumer(stream, group="work", concurrency=4, options=options)
    async def on_usage(event: UsageEvent, delivery: Delivery[UsageEvent]) -> None:
        begun.append(event.attempt)
        raise ValueError("later")

    running = asyncio.create_task(events.run(on_usage, stop=stop))
    await until(lambda: len(begun) == 60)

    def owners() -> list[bytes]:
        with server.client as client:
            return [each["consumer"] for each in client.xpending_range(KEY, "work", "-", "+", 100)]

    await until(lambda: owners().count(b"handed-back") >= 55)
    assert len(owners()) == 60
    stop.set()
    await asyncio.wait_for(running, 20)


@pytest.mark.parametrize("sent", [False, True])
def test_an_entry_that_is_trimmed_before_its_acknowledgement_counts_as_processed(sent: bool) -> None:
    partition = Partition("key")
    if sent:
        # Another acknowledgement is in progress, or this one's.
        partition.settle([b"2-0"], Outcome.PROCESSED)
        assert partition.next_ack() is not None
    partition.settle([b"1-0"], Outcome.PROCESSED)
    partition.remove([b"1-0", b"2-0", b"3-0"])
    partition.acking = False
    acks = []
    while (ack := partition.next_ack()) is not None:
        partition.acking = False
        acks.append((ack.outcome, ack.extra, ack.regained, ack.kept))
    regained = 2 if sent else 1
    assert acks == [(Outcome.PROCESSED, regained, regained, 0), (Outcome.DECLARED_LOST, 3, 0, regained)]


async def test_an_idle_consumer_reads_no_bodies(
    server: Any, events: Events, usage: Any, until: Callable[..., Any]
) -> None:
    stream, got, stop = usage(), [], asyncio.Event()
    for number in range(5):
        await events.publish(stream, UsageEvent(attempt=number, model="x" * 1_000_000))

    @consumer(stream, group="work")
    async def on_usage(event: UsageEvent, delivery: Delivery[UsageEvent]) -> None:
        got.append(event.attempt)

    running = asyncio.create_task(events.run(on_usage, stop=stop))
    await until(lambda: len(got) == 5)
    await asyncio.sleep(1)

    def sent() -> int:
        with server.client as client:
            return int(client.info("stats")["total_net_output_bytes"])

    before = sent()
    await asyncio.sleep(6)
    rate = (sent() - before) / 6
    assert rate < 10_000
    stop.set()
    await running
