"""Push and pull consumers on a real server: groups, retries, dead letters and drains."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from orki.errors.v1.errors_pb2 import Reason
from orki.events.v1.envelope_pb2 import DeadLetter
from orki.events.v1.usage_pb2 import UsageEvent
from orki_contract.errors import HandlerRejected, InvalidSetting, UnknownGroup
from orki_contract.model import Backoff, Group, Start
from orki_contract.trace import current_span, new_span
from orki_events import ConsumeOptions, Delivery, DeliveryBatch, Events, Gap, GapKind, consumer

KEY = "orki:ev:{usage-of-tests}"
QUICK = ConsumeOptions(backoff=Backoff(initial=0.01, maximum=0.05), sweep_interval=0.1)


def numbered(count: int, start: int = 0) -> list[UsageEvent]:
    return [UsageEvent(attempt=number) for number in range(start, start + count)]


def pending(server: Any, group: str = "work") -> int:
    with server.client as client:
        return int(client.xpending(KEY, group)["pending"])


def dead(server: Any, key: str = "orki:ev:{usage-of-tests.work.dead}") -> list[tuple[bytes, DeadLetter]]:
    with server.client as client:
        raw = client.execute_command("XRANGE", key, "-", "+")
    return [(fields.get(b"d", b""), DeadLetter.FromString(fields[b"x"])) for _, fields in raw]


async def test_a_push_consumer_handles_and_acknowledges_every_event(
    server: Any, events: Events, usage: Any, until: Callable[..., Any]
) -> None:
    stream, got, stop = usage(), [], asyncio.Event()

    @consumer(stream, group="work", concurrency=4)
    async def on_usage(event: UsageEvent, delivery: Delivery[UsageEvent]) -> None:
        got.append((event.attempt, delivery.deliveries))

    running = asyncio.create_task(events.run(on_usage, stop=stop))
    await events.publish_many(stream, numbered(300))
    await until(lambda: len(got) == 300)
    stop.set()
    await asyncio.wait_for(running, 20)
    assert sorted(got) == [(number, 1) for number in range(300)]
    assert pending(server) == 0
    with server.client as client:
        assert client.xinfo_consumers(KEY, "work") == []


async def test_a_pulled_delivery_is_acknowledged_at_the_end_of_its_block(
    server: Any, events: Events, usage: Any, until: Callable[..., Any]
) -> None:
    stream, got = usage(), []
    await events.publish_many(stream, numbered(50))
    async for delivery in events.deliveries(stream, group="work"):
        async with delivery as event:
            got.append(event.attempt)
        if len(got) == 50:
            break
    assert got == list(range(50))
    await until(lambda: pending(server) == 0)


async def test_an_error_in_the_block_causes_another_delivery(events: Events, usage: Any) -> None:
    stream, tries = usage(), []
    await events.publish(stream, UsageEvent(attempt=7))
    source = events.deliveries(stream, group="work", options=QUICK)
    async for delivery in source:
        tries.append(delivery.deliveries)
        if delivery.deliveries == 1:
            with pytest.raises(ValueError, match="not today"):
                async with delivery:
                    raise ValueError("not today")
        else:
            async with delivery:
                break
    assert tries == [1, 2]


async def test_a_batch_is_a_list_and_can_fail_in_part(server: Any, events: Events, usage: Any) -> None:
    stream, sizes, got, stop = usage(), [], [], asyncio.Event()
    await events.publish_many(stream, numbered(250))

    @consumer(stream, group="work", batch=100, options=QUICK)
    async def on_batch(batch: list[UsageEvent], delivery: DeliveryBatch[UsageEvent]) -> None:
        sizes.append(len(batch))
        for place, event in enumerate(batch):
            if event.attempt == 13 and delivery.deliveries[place] == 1:
                delivery.reject(place, ValueError("unlucky"))
            else:
                got.append(event.attempt)
        if len(got) == 250:
            stop.set()

    await asyncio.wait_for(events.run(on_batch, stop=stop), 20)
    assert sorted(got) == list(range(250))
    assert max(sizes) == 100
    assert pending(server) == 0


async def test_two_groups_are_independent(events: Events, usage: Any) -> None:
    stream, seen, stop = usage(), {"audit": [], "work": []}, asyncio.Event()  # type: ignore[var-annotated]
    await events.publish_many(stream, numbered(100))

    def reader(group: str) -> Any:
        @consumer(stream, group=group)
        async def on_usage(event: UsageEvent, delivery: Delivery[UsageEvent]) -> None:
            seen[group].append(event.attempt)
            if all(len(each) == 100 for each in seen.values()):
                stop.set()

        return on_usage

    await asyncio.wait_for(events.run(reader("audit"), reader("work"), stop=stop), 20)
    assert {group: sorted(each) for group, each in seen.items()} == {
        group: list(range(100)) for group in ("audit", "work")
    }


async def test_a_failing_event_is_retried_and_dead_lettered_with_its_reason(
    server: Any, events: Events, usage: Any, until: Callable[..., Any]
) -> None:
    stream, tries, stop = usage(), [], asyncio.Event()

    @consumer(stream, group="work", options=QUICK)
    async def on_usage(event: UsageEvent, delivery: Delivery[UsageEvent]) -> None:
        tries.append(delivery.deliveries)
        if event.attempt == 1:
            raise HandlerRejected("never")
        raise ValueError("poison")

    await events.publish_many(stream, [UsageEvent(attempt=0)])
    running = asyncio.create_task(events.run(on_usage, stop=stop))
    await until(lambda: len(dead(server)) == 1)
    await events.publish_many(stream, [UsageEvent(attempt=1)])
    await until(lambda: len(dead(server)) == 2)
    await until(lambda: pending(server) == 0)
    stop.set()
    await asyncio.wait_for(running, 20)
    assert tries == [1, 2, 3, 1]
    (first, why), (second, rejected) = dead(server)
    assert UsageEvent.FromString(first).attempt == 0
    assert UsageEvent.FromString(second).attempt == 1
    assert (why.stream, why.key, why.group, why.deliveries) == ("usage-of-tests", KEY, "work", 3)
    assert (why.reason, why.message) == (Reason.REASON_DELIVERIES_EXHAUSTED, "ValueError: poison")
    assert (rejected.deliveries, rejected.reason) == (1, Reason.REASON_HANDLER_REJECTED)


@pytest.mark.parametrize("batch", [0, 10])
async def test_undecodable_entries_are_dead_lettered_and_others_are_handled(
    batch: int, server: Any, events: Events, usage: Any, until: Callable[..., Any]
) -> None:
    stream, got, stop = usage(), [], asyncio.Event()
    await events.publish(stream, UsageEvent(attempt=1))
    with server.client as client:
        client.xadd(KEY, {"something": "else"})
        client.xadd(KEY, {"e": b"\xff\xff", "d": b"x"})
        client.xadd(KEY, {"e": b"\x0a\x10" + b"i" * 16, "d": b"\xff\xff\xff"})
        client.xadd(KEY, {"e": b"\x0a\x02ii", "d": b""})
    await events.publish(stream, UsageEvent(attempt=2))

    @consumer(stream, group="work", options=QUICK)
    async def on_usage(event: UsageEvent, delivery: Delivery[UsageEvent]) -> None:
        got.append(event.attempt)

    @consumer(stream, group="work", batch=10, options=QUICK)
    async def on_batch(found: list[UsageEvent], delivery: DeliveryBatch[UsageEvent]) -> None:
        got.extend(event.attempt for event in found)

    running = asyncio.create_task(events.run(on_batch if batch else on_usage, stop=stop))
    await until(lambda: len(dead(server)) == 4)
    await until(lambda: pending(server) == 0)
    stop.set()
    await asyncio.wait_for(running, 20)
    assert sorted(got) == [1, 2]
    assert {letter.reason for _, letter in dead(server)} == {Reason.REASON_EVENT_UNDECODABLE}


async def test_a_repeated_event_is_handled_once(
    server: Any, events: Events, usage: Any, until: Callable[..., Any]
) -> None:
    stream, got, stop = usage(), [], asyncio.Event()
    event_id = b"the same, always"
    for _ in range(3):
        await events.publish(stream, UsageEvent(attempt=1), event_id=event_id)
    await events.publish(stream, UsageEvent(attempt=2))

    @consumer(stream, group="work")
    async def on_usage(event: UsageEvent, delivery: Delivery[UsageEvent]) -> None:
        got.append(event.attempt)

    running = asyncio.create_task(events.run(on_usage, stop=stop))
    await until(lambda: len(got) >= 2 and pending(server) == 0)
    stop.set()
    await asyncio.wait_for(running, 20)
    assert sorted(got) == [1, 2]


async def test_a_slow_handler_keeps_its_entry(server: Any, opened: Any, usage: Any, until: Callable[..., Any]) -> None:
    # The deadline leaves time for a renewal on a busy machine, and passes twice while the handler works.
    stream, calls, stop = usage(ack_deadline=1.0), [], asyncio.Event()
    one, other = await opened(), await opened()
    await one.publish(stream, UsageEvent())

    @consumer(stream, group="work", options=QUICK)
    async def on_usage(event: UsageEvent, delivery: Delivery[UsageEvent]) -> None:
        calls.append(delivery.deliveries)
        await asyncio.sleep(2.2)

    running = [asyncio.create_task(each.run(on_usage, stop=stop)) for each in (one, other)]
    await until(lambda: calls)
    await until(lambda: pending(server) == 0)
    stop.set()
    await asyncio.wait_for(asyncio.gather(*running), 20)
    assert calls == [1]


async def test_a_handler_that_hangs_is_cancelled_and_retried(events: Events, usage: Any) -> None:
    stream, tries, stop = usage(), [], asyncio.Event()
    await events.publish(stream, UsageEvent())
    options = ConsumeOptions(backoff=Backoff(initial=0.01), handler_timeout=0.1)

    @consumer(stream, group="work", options=options)
    async def on_usage(event: UsageEvent, delivery: Delivery[UsageEvent]) -> None:
        tries.append(delivery.deliveries)
        if delivery.deliveries == 1:
            await asyncio.sleep(3_600)
        stop.set()

    await asyncio.wait_for(events.run(on_usage, stop=stop), 20)
    assert tries == [1, 2]


async def test_events_that_a_stopped_consumer_did_not_begin_go_to_another_at_once(
    server: Any, opened: Any, usage: Any, until: Callable[..., Any]
) -> None:
    stream, begun, stop, go = usage(ack_deadline=600.0), [], asyncio.Event(), asyncio.Event()
    one, other = await opened(), await opened()
    await one.publish_many(stream, numbered(10))

    @consumer(stream, group="work", concurrency=1, options=ConsumeOptions(prefetch=10))
    async def waits(event: UsageEvent, delivery: Delivery[UsageEvent]) -> None:
        begun.append(event.attempt)
        await go.wait()

    running = asyncio.create_task(one.run(waits, stop=stop))
    await until(lambda: begun and pending(server) == 10)
    stop.set()
    await asyncio.sleep(0.2)
    go.set()
    await asyncio.wait_for(running, 20)
    assert begun == [0]
    got = []
    async for delivery in other.deliveries(stream, group="work", options=QUICK):
        async with delivery as event:
            got.append((event.attempt, delivery.deliveries))
        if len(got) == 9:
            break
    assert sorted(got) == [(number, 1) for number in range(1, 10)]


async def test_a_handler_runs_in_a_child_of_the_events_span(events: Events, usage: Any) -> None:
    stream, spans, stop, span = usage(), [], asyncio.Event(), new_span()
    await events.publish(stream, UsageEvent(), span=span)

    @consumer(stream, group="work")
    async def on_usage(event: UsageEvent, delivery: Delivery[UsageEvent]) -> None:
        spans.append((current_span(), delivery.span))
        stop.set()

    await asyncio.wait_for(events.run(on_usage, stop=stop), 20)
    ((inside, published),) = spans
    assert (inside.trace_id, inside.parent_id) == (span.trace_id, span.span_id)
    assert published == span


async def test_all_partitions_are_read(events: Events, usage: Any) -> None:
    stream, got = usage(partitions=4), []
    await events.publish_many(stream, [UsageEvent(agent_id=f"agent-{number}") for number in range(100)])
    async for batch in events.delivery_batches(stream, group="work", size=10):
        async with batch as found:
            got.extend(event.agent_id for event in found)
        if len(got) == 100:
            break
    assert sorted(got) == sorted(f"agent-{number}" for number in range(100))


async def test_a_group_that_starts_at_the_latest_sees_only_later_events(events: Events, usage: Any) -> None:
    early = usage()
    await events.publish(early, UsageEvent(attempt=1))
    late = early.with_groups(Group(name="latecomer", start=Start.LATEST))
    got = []

    async def follow() -> None:
        async for delivery in events.deliveries(late, group="latecomer"):
            async with delivery as event:
                got.append(event.attempt)
            return

    following = asyncio.create_task(follow())
    for attempt in range(2, 400):
        await events.publish(early, UsageEvent(attempt=attempt))
        if following.done():
            break
        await asyncio.sleep(0.01)
    await asyncio.wait_for(following, 20)
    assert got[0] >= 2
    assert [each.contract.group("latecomer").start for each in await events.registered_streams()] == [Start.LATEST]


async def test_observers_read_raw_entries_without_the_streams_code(events: Events, usage: Any) -> None:
    stream = usage()
    await events.publish_many(stream, numbered(3))
    (registered,) = await events.registered_streams()
    async for batch in events.raw_deliveries(registered.contract, group="audit"):
        async with batch as found:
            assert [UsageEvent.FromString(raw).attempt for raw in found] == [0, 1, 2]
            assert [envelope.sequence for envelope in batch.envelopes] == [1, 2, 3]
            assert len(set(batch.event_ids)) == 3
        break


async def test_trimmed_entries_are_acknowledged_and_reported(
    server: Any, events: Events, usage: Any, gaps: list[Gap], until: Callable[..., Any]
) -> None:
    stream, stop = usage(ack_deadline=0.1), asyncio.Event()
    await events.publish_many(stream, numbered(5))
    with server.client as client:
        client.xreadgroup("work", "dead-one", {KEY: ">"})
        client.xtrim(KEY, maxlen=0, approximate=False)

    @consumer(stream, group="work", options=QUICK)
    async def on_usage(event: UsageEvent, delivery: Delivery[UsageEvent]) -> None:
        raise AssertionError

    running = asyncio.create_task(events.run(on_usage, stop=stop))
    await until(lambda: gaps)
    stop.set()
    await asyncio.wait_for(running, 20)
    assert [(gap.kind, gap.group, gap.count) for gap in gaps] == [(GapKind.TRIMMED_WHILE_PENDING, "work", 5)]
    assert pending(server) == 0
    with server.client as client:
        assert client.hget("orki:groups:{usage-of-tests}", "declared_lost:work") == b"5"


async def test_unknown_groups_and_invalid_consumers_are_refused(events: Events, usage: Any) -> None:
    stream = usage()
    with pytest.raises(UnknownGroup, match=r'no group "wrok" \(declared: audit, work\)'):

        @consumer(stream, group="wrok")
        async def misspelt(event: UsageEvent, delivery: Delivery[UsageEvent]) -> None: ...

    with pytest.raises(UnknownGroup, match="declared: audit, work"):
        async for _ in events.deliveries(stream, group="wrok"):
            pass
    with pytest.raises(InvalidSetting, match="async def"):

        @consumer(stream, group="work")
        def plain(event: UsageEvent, delivery: Delivery[UsageEvent]) -> Any: ...

    for settings in ({"concurrency": 0}, {"batch": 0}, {"batch": 100_000}):
        with pytest.raises(InvalidSetting):
            consumer(stream, group="work", **settings)(on_nothing)


async def on_nothing(event: UsageEvent, delivery: Delivery[UsageEvent]) -> None:
    """A handler."""


async def test_a_decorated_handler_can_be_called_directly(usage: Any) -> None:
    seen = []

    @consumer(usage(), group="work")
    async def on_usage(event: UsageEvent, delivery: Delivery[UsageEvent]) -> None:
        seen.append(event)

    await on_usage(UsageEvent(attempt=3), None)  # type: ignore[arg-type]
    assert seen == [UsageEvent(attempt=3)]
