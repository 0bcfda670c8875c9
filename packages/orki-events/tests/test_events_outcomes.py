"""The outcome belongs to the event: one broken, trimmed or stolen entry changes nothing for the others."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from orki.events.v1.envelope_pb2 import DeadLetter
from orki.events.v1.usage_pb2 import UsageEvent
from orki_contract.errors import EventUndecodable
from orki_contract.model import Backoff
from orki_events import ConsumeOptions, Delivery, DeliveryBatch, Events, Gap, GapKind, consumer
from orki_events.entries import encode_envelope, new_event_id

KEY = "orki:ev:{usage-of-tests}"
DEAD = "orki:ev:{usage-of-tests.work.dead}"
QUICK = ConsumeOptions(backoff=Backoff(initial=0.01, maximum=0.05), sweep_interval=0.1)


def numbered(count: int, start: int = 0) -> list[UsageEvent]:
    return [UsageEvent(attempt=number) for number in range(start, start + count)]


def good_envelope() -> bytes:
    return encode_envelope(event_id=new_event_id(), producer="p", sequence=1, time_us=1, span=None)


BROKEN: dict[str, dict[bytes, bytes]] = {
    # It begins like an envelope, so its event id can be read.
    "envelope cut off": {b"e": good_envelope()[:18] + b"\x12\x7fcut", b"d": b""},
    "envelope of noise": {b"e": b"\xff\xff\xff", b"d": b""},
    "event id too short": {b"e": b"\x0a\x02ab", b"d": b""},
    "envelope absent": {b"d": b""},
    "message absent": {b"e": good_envelope()},
    "message of noise": {b"e": good_envelope(), b"d": b"\xff\xff\xff"},
}


async def publish_with(server: Any, events: Events, stream: Any, fields: dict[bytes, bytes]) -> str:
    """Publish 300 events with one broken entry among them, and return its id."""
    await events.publish_many(stream, numbered(150))
    with server.client as client:
        entry_id = client.xadd(KEY, fields)
    await events.publish_many(stream, numbered(150, 150))
    return str(entry_id, "ascii")


def letters(server: Any) -> list[DeadLetter]:
    with server.client as client:
        return [DeadLetter.FromString(fields[b"x"]) for _, fields in client.xrange(DEAD)]


def pending(server: Any, group: str = "work") -> int:
    with server.client as client:
        return int(client.xpending(KEY, group)["pending"])


@pytest.mark.parametrize("form", ["push", "push batches", "pull", "pull batches"])
@pytest.mark.parametrize("kind", BROKEN)
async def test_a_broken_entry_among_300_is_the_only_dead_letter(
    server: Any, events: Events, usage: Any, until: Callable[..., Any], kind: str, form: str
) -> None:
    stream = usage()
    broken = await publish_with(server, events, stream, BROKEN[kind])
    got: set[int] = set()
    stop = asyncio.Event()

    @consumer(stream, group="work", options=QUICK)
    async def on_usage(event: UsageEvent, delivery: Delivery[UsageEvent]) -> None:
        _ = delivery.envelope
        got.add(event.attempt)

    @consumer(stream, group="work", batch=100, options=QUICK)
    async def on_batch(batch: list[UsageEvent], delivery: DeliveryBatch[UsageEvent]) -> None:
        assert len(delivery.envelopes) == len(batch)
        got.update(event.attempt for event in batch)

    async def pull() -> None:
        async with events.deliveries(stream, group="work", options=QUICK) as source:
            async for delivery in source:
                try:
                    async with delivery as event:
                        _ = delivery.envelope
                        got.add(event.attempt)
                except EventUndecodable:
                    continue

    async def pull_batches() -> None:
        async with events.delivery_batches(stream, group="work", options=QUICK) as source:
            async for batch in source:
                try:
                    async with batch as found:
                        assert len(batch.envelopes) == len(found)
                        got.update(event.attempt for event in found)
                except EventUndecodable:
                    continue

    work: Any = {
        "push": lambda: events.run(on_usage, stop=stop),
        "push batches": lambda: events.run(on_batch, stop=stop),
        "pull": pull,
        "pull batches": pull_batches,
    }[form]
    running = asyncio.create_task(work())
    await until(lambda: len(got) == 300 and len(letters(server)) == 1 and pending(server) == 0)
    stop.set()
    if form.startswith("pull"):
        running.cancel()
    await asyncio.wait([running])
    assert got == set(range(300))
    assert [(each.entry_id, each.deliveries) for each in letters(server)] == [(broken, 1)]


@pytest.mark.parametrize("kind", BROKEN)
async def test_a_tail_continues_after_a_broken_entry(server: Any, events: Events, usage: Any, kind: str) -> None:
    stream = usage()
    broken = await publish_with(server, events, stream, BROKEN[kind])
    got, refused = [], []
    async for entry in events.tail(stream, after="earliest", follow=False):
        try:
            _ = entry.envelope
            got.append(entry.event.attempt)
        except EventUndecodable:
            refused.append(entry.entry_id)
    assert got == list(range(300))
    assert refused == [broken]


@pytest.mark.parametrize("outcome", ["handled at once", "after renewals", "after a retry"])
async def test_entries_in_hand_are_handled_although_they_were_trimmed(
    server: Any, events: Events, usage: Any, until: Callable[..., Any], gaps: list[Gap], outcome: str
) -> None:
    stream = usage(ack_deadline=0.6)
    await events.publish_many(stream, numbered(10))
    got: list[int] = []
    begun: list[int] = []
    go, stop = asyncio.Event(), asyncio.Event()

    @consumer(stream, group="work", concurrency=2, options=QUICK)
    async def on_usage(event: UsageEvent, delivery: Delivery[UsageEvent]) -> None:
        begun.append(event.attempt)
        await go.wait()
        if outcome == "after a retry" and delivery.deliveries == 1:
            raise ValueError("once more")
        got.append(event.attempt)

    running = asyncio.create_task(events.run(on_usage, stop=stop))
    await until(lambda: len(begun) == 2 and pending(server) >= 8)
    await until(lambda: pending(server) in (8, 10))
    held = pending(server)
    with server.client as client:
        client.xtrim(KEY, maxlen=0, approximate=False)
    if outcome != "handled at once":
        # Several renewals, each of which looks for the entries on the server.
        await asyncio.sleep(1.5)
    go.set()
    await until(lambda: len(got) >= held)
    await until(lambda: pending(server) == 0)
    stop.set()
    await asyncio.wait_for(running, 20)
    assert sorted(got) == list(range(held))
    assert letters(server) == []
    with server.client as client:
        counted = client.hgetall("orki:groups:{usage-of-tests}")
    assert int(counted[b"processed:work"]) == held
    assert int(counted.get(b"declared_lost:work", 0)) == 0
    assert [gap for gap in gaps if gap.kind is GapKind.TRIMMED_WHILE_PENDING] == []


async def test_entries_in_hand_that_are_trimmed_and_never_handled_are_reported(
    server: Any, opened: Any, usage: Any, until: Callable[..., Any], gaps: list[Gap]
) -> None:
    stream = usage(ack_deadline=0.6)
    events = await opened()
    await events.publish_many(stream, numbered(10))
    source = events.deliveries(stream, group="work", options=ConsumeOptions(prefetch=10))
    delivery = await anext(source)
    await until(lambda: pending(server) == 10)
    with server.client as client:
        client.xtrim(KEY, maxlen=0, approximate=False)
    await asyncio.sleep(1.5)
    delivery.acknowledge()
    await source.aclose()
    assert pending(server) == 0
    with server.client as client:
        counted = client.hgetall("orki:groups:{usage-of-tests}")
    assert (int(counted[b"processed:work"]), int(counted[b"declared_lost:work"])) == (1, 9)
    assert sum(gap.count or 0 for gap in gaps if gap.kind is GapKind.TRIMMED_WHILE_PENDING) == 9


async def test_a_drain_ends_although_another_consumer_claimed_the_cancelled_entry(
    server: Any, opened: Any, usage: Any, until: Callable[..., Any]
) -> None:
    stream = usage(ack_deadline=4.0)
    events = await opened(drain_timeout=0.3)
    await events.publish(stream, UsageEvent(attempt=1))
    begun, stop = asyncio.Event(), asyncio.Event()

    @consumer(stream, group="work", options=QUICK)
    async def on_usage(event: UsageEvent, delivery: Delivery[UsageEvent]) -> None:
        begun.set()
        await asyncio.sleep(60)

    running = asyncio.create_task(events.run(on_usage, stop=stop))
    await asyncio.wait_for(begun.wait(), 20)
    with server.client as client:
        entry_id = client.xrange(KEY)[0][0]
        client.xclaim(KEY, "work", "another", 0, [entry_id])
    # A renewal tells the consumer that the entry belongs to another.
    await asyncio.sleep(1.8)
    stop.set()
    await asyncio.wait_for(running, 20)
    with server.client as client:
        assert [each["consumer"] for each in client.xpending_range(KEY, "work", "-", "+", 10)] == [b"another"]
