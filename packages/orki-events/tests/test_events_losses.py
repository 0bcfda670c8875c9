"""Losses that positions show: entries that were trimmed unread, and servers that come back with older data.

Each test counts what was published and handled by itself and compares the sums with what was declared.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from orki.events.v1.usage_pb2 import UsageEvent
from orki_contract.model import Backoff
from orki_events import ConsumeOptions, Events, Gap, GapKind, GroupLedger
from orki_events.connection import Connection, parse_address
from orki_events.losses import read_gaps, read_positions

KEY = "orki:ev:{usage-of-tests}"
QUICK = ConsumeOptions(backoff=Backoff(initial=0.01, maximum=0.05), sweep_interval=0.1)


def numbered(count: int, start: int = 0) -> list[UsageEvent]:
    return [UsageEvent(agent_id=str(number), attempt=number) for number in range(start, start + count)]


class Reader:
    """Handles the events of one group in a task, as slowly as a test wants."""

    def __init__(self, events: Events, stream: Any, group: str = "work", pause: float = 0.0, **options: Any) -> None:
        self.numbers: list[int] = []
        self._events, self._stream, self._group, self._pause = events, stream, group, pause
        self._options = ConsumeOptions(backoff=QUICK.backoff, sweep_interval=0.1, **options)
        self.running = asyncio.create_task(self._run())

    async def _run(self) -> None:
        async with self._events.deliveries(self._stream, group=self._group, options=self._options) as deliveries:
            async for delivery in deliveries:
                async with delivery as event:
                    self.numbers.append(event.attempt)
                    if self._pause:
                        await asyncio.sleep(self._pause)

    async def end(self) -> None:
        self.running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.running


async def settled(events: Events, stream: Any, group: str, limit_s: float = 30.0) -> GroupLedger:
    """Wait until the group has settled everything, and return its ledger."""
    end = asyncio.get_running_loop().time() + limit_s
    while True:
        found = (await events.ledger(stream)).groups[group]
        if found.pending == found.unread == 0:
            return found
        assert asyncio.get_running_loop().time() < end, found
        await asyncio.sleep(0.05)


def counts_entries(server: Any) -> bool:
    """Whether the server knows how many entries a stream ever had (Redis 7 and Valkey)."""
    with server.client as client:
        return int(client.info("server")["redis_version"].split(".")[0]) >= 7


@pytest.fixture
async def link(server: Any) -> AsyncIterator[Connection]:
    found = Connection(parse_address(server.url), name="test", connect_timeout=5.0, answer_timeout=10.0)
    yield found
    await found.close()


def of_group(gaps: list[Gap], group: str, kind: GapKind) -> list[Gap]:
    return [gap for gap in gaps if gap.group == group and gap.kind is kind]


async def test_a_slow_group_is_told_what_it_lost(server: Any, opened: Any, usage: Any, gaps: list[Gap]) -> None:
    counted = counts_entries(server)
    # With a longer deadline than the test, entries that are trimmed in a consumer's hand stay pending.
    stream = usage(max_entries=1_000, ack_deadline=120.0)
    events = await opened()
    reader = Reader(events, stream, pause=0.002)
    for start in range(0, 20_000, 500):
        await events.publish_many(stream, numbered(500, start))
    work = await settled(events, stream, "work")
    # The position is compared every two seconds.
    await asyncio.sleep(3.0)
    await reader.end()
    handled = len(set(reader.numbers))
    assert handled < 20_000
    ledger = await events.ledger(stream)
    work = ledger.groups["work"]
    told = sum(gap.count or 0 for gap in gaps if gap.group == "work")
    assert (work.unaccounted, ledger.published) == (0, work.processed + work.declared_lost)
    # An entry that is trimmed between its handler's end and its acknowledgement counts as lost.
    assert work.processed <= handled
    if counted:
        assert work.processed == handled
        assert ledger.published == 20_000
        assert work.declared_lost <= told <= work.declared_lost + 64


async def test_a_group_whose_consumers_were_stopped_is_told_what_was_trimmed(
    server: Any, opened: Any, usage: Any, gaps: list[Gap], link: Connection
) -> None:
    if not counts_entries(server):
        pytest.skip("Redis 6.2 does not count entries")
    stream = usage()
    events = await opened()
    await events.publish_many(stream, numbered(10))
    first = Reader(events, stream, "audit")
    await settled(events, stream, "audit")
    await asyncio.sleep(2.5)
    await first.end()
    await events.publish_many(stream, numbered(5_000, 10))
    with server.client as client:
        client.xtrim(KEY, maxlen=100, approximate=False)
        oldest = client.xrange(KEY, count=1)[0][0].decode()
    second = Reader(await opened(), stream, "audit")
    audit = await settled(events, stream, "audit")
    await asyncio.sleep(3.0)
    await second.end()
    assert len(second.numbers) == 100
    assert [gap.count for gap in of_group(gaps, "audit", GapKind.TRIMMED_UNREAD)] == [4_900]
    assert audit == GroupLedger(processed=110, dead_lettered=0, declared_lost=4_900)
    (recorded,) = [each.gap for each in await read_gaps(link, stream.contract) if each.gap.group == "audit"]
    assert (recorded.kind, recorded.count) == (GapKind.TRIMMED_UNREAD, 4_900)
    assert not recorded.possible
    assert recorded.until < oldest
    assert recorded.until.split("-")[0] <= oldest.split("-")[0]


async def test_two_consumers_declare_a_loss_once_and_both_are_told(
    server: Any, opened: Any, usage: Any, gaps: list[Gap], link: Connection, until: Callable[..., Any]
) -> None:
    if not counts_entries(server):
        pytest.skip("Redis 6.2 does not count entries")
    stream = usage(ack_deadline=60.0)
    events = await opened()
    # Each takes 16 entries and handles the first one for ever.
    readers = [Reader(await opened(), stream, pause=3_600.0, prefetch=16) for _ in range(2)]
    await events.publish_many(stream, numbered(64))
    await until(lambda: all(each.numbers for each in readers))
    await asyncio.sleep(2.5)
    await events.publish_many(stream, numbered(1_000, 64))
    with server.client as client:
        client.xtrim(KEY, maxlen=100, approximate=False)
    await until(lambda: len(of_group(gaps, "work", GapKind.TRIMMED_UNREAD)) == 2)
    await asyncio.sleep(2.5)
    for each in readers:
        await each.end()
    assert [gap.count for gap in of_group(gaps, "work", GapKind.TRIMMED_UNREAD)] == [932, 932]
    recorded = [each.gap for each in await read_gaps(link, stream.contract)]
    assert [gap.count for gap in of_group(recorded, "work", GapKind.TRIMMED_UNREAD)] == [932]


async def test_a_loss_that_nobody_consumes_is_in_the_ledger(server: Any, opened: Any, usage: Any) -> None:
    stream = usage()
    events = await opened()
    await events.publish_many(stream, numbered(300))
    with server.client as client:
        client.xtrim(KEY, maxlen=100, approximate=False)
    work = (await events.ledger(stream)).groups["work"]
    if counts_entries(server):
        assert work == GroupLedger(processed=0, dead_lettered=0, declared_lost=200, unread=100)


async def test_deleted_entries_that_were_not_read_are_lost(
    server: Any, opened: Any, usage: Any, gaps: list[Gap]
) -> None:
    if not counts_entries(server):
        pytest.skip("Redis 6.2 does not count entries")
    stream = usage()
    events = await opened()
    await events.publish_many(stream, numbered(20))
    with server.client as client:
        client.xdel(KEY, *[entry_id for entry_id, _ in client.xrange(KEY)[5:8]])
    reader = Reader(events, stream)
    work = await settled(events, stream, "work")
    await asyncio.sleep(2.5)
    await reader.end()
    assert work == GroupLedger(processed=17, dead_lettered=0, declared_lost=3)
    assert sum(gap.count or 0 for gap in of_group(gaps, "work", GapKind.TRIMMED_UNREAD)) == 3


async def older(server: Any, events: Events, stream: Any, saved: int, lost: int) -> None:
    """Publish events, save the server's data after some of them, and restart the server with that."""
    await events.publish_many(stream, numbered(saved))
    with server.client as client:
        client.save()
    await events.publish_many(stream, numbered(lost, saved))
    server.kill()
    server.start()


async def test_a_server_with_older_data_is_reported_by_its_publisher(
    own_server: Any, opened: Any, usage: Any, gaps: list[Gap]
) -> None:
    server = own_server()
    stream = usage()
    events = await opened(at=server)
    await older(server, events, stream, 200, 500)
    await events.publish_many(stream, numbered(30, 700))
    assert [(gap.kind, gap.count) for gap in gaps if not gap.group] == [(GapKind.ROLLED_BACK, 500)]
    ledger = await events.ledger(stream)
    assert (ledger.published, ledger.rolled_back) == (730, 500)
    assert ledger.groups["work"] == GroupLedger(processed=0, dead_lettered=0, declared_lost=500, unread=230)


async def test_a_server_with_older_data_is_reported_by_a_consumer_that_stayed_up(
    own_server: Any, opened: Any, usage: Any, gaps: list[Gap]
) -> None:
    server = own_server()
    stream = usage()
    consuming = await opened(at=server)
    async with contextlib.AsyncExitStack() as stack:
        publisher = await opened(at=server)
        await publisher.publish_many(stream, numbered(200))
        reader = Reader(consuming, stream)
        await settled(publisher, stream, "work")
        await asyncio.sleep(2.5)
        with server.client as client:
            client.save()
        reader._pause = 3_600.0
        await publisher.publish_many(stream, numbered(500, 200))
        stack.push_async_callback(publisher.close)
    # The consumer compares its position every two seconds.
    await asyncio.sleep(3.0)
    server.kill()
    server.start()
    end = asyncio.get_running_loop().time() + 20
    while not of_group(gaps, "work", GapKind.ROLLED_BACK):
        assert asyncio.get_running_loop().time() < end, gaps
        await asyncio.sleep(0.05)
    assert [(gap.kind, gap.count) for gap in gaps if not gap.group] == [(GapKind.ROLLED_BACK, 500)]
    assert [gap.count for gap in of_group(gaps, "work", GapKind.ROLLED_BACK)] == [500]
    ledger = await consuming.ledger(stream)
    assert (ledger.published, ledger.rolled_back) == (700, 500)
    work = ledger.groups["work"]
    assert (work.processed, work.declared_lost, work.unaccounted) == (200, 500, 0)
    await reader.end()


async def test_a_process_that_starts_after_the_loss_is_told(
    own_server: Any, opened: Any, usage: Any, gaps: list[Gap]
) -> None:
    server = own_server()
    stream = usage()
    publisher = await opened(at=server)
    await older(server, publisher, stream, 200, 500)
    await publisher.publish_many(stream, numbered(30, 700))
    gaps.clear()
    fresh = await opened(at=server)
    reader = Reader(fresh, stream)
    await settled(fresh, stream, "work")
    await asyncio.sleep(2.5)
    await reader.end()
    assert [(gap.count) for gap in of_group(gaps, "work", GapKind.ROLLED_BACK)] == [500]
    assert (await fresh.ledger(stream)).groups["work"] == GroupLedger(processed=230, dead_lettered=0, declared_lost=500)
    # Once is enough.
    gaps.clear()
    again = await opened(at=server)
    reader = Reader(again, stream)
    await asyncio.sleep(2.5)
    await reader.end()
    assert gaps == []


async def test_several_witnesses_declare_a_rollback_once(
    own_server: Any, opened: Any, usage: Any, gaps: list[Gap]
) -> None:
    server = own_server()
    stream = usage()
    publisher = await opened(at=server)
    readers = [Reader(await opened(at=server), stream, group) for group in ("work", "work", "audit")]
    await publisher.publish_many(stream, numbered(200))
    await settled(publisher, stream, "audit")
    await settled(publisher, stream, "work")
    with server.client as client:
        client.save()
    await publisher.publish_many(stream, numbered(500, 200))
    await settled(publisher, stream, "audit")
    await settled(publisher, stream, "work")
    await asyncio.sleep(2.5)
    server.kill()
    server.start()
    await publisher.publish_many(stream, numbered(50, 700))
    await asyncio.sleep(5.0)
    ledger = await publisher.ledger(stream)
    for each in readers:
        await each.end()
    assert (ledger.published, ledger.rolled_back) == (750, 500)
    # Both groups had settled what the server lost: nothing is lost for them.
    assert ledger.groups["work"] == GroupLedger(processed=750, dead_lettered=0, declared_lost=0)
    assert ledger.groups["audit"] == GroupLedger(processed=750, dead_lettered=0, declared_lost=0)
    assert [gap for gap in gaps if gap.group] == []


async def test_a_flush_is_a_rollback_with_its_count(
    server: Any, opened: Any, usage: Any, gaps: list[Gap], until: Callable[..., Any]
) -> None:
    stream = usage()
    events = await opened()
    reader = Reader(events, stream)
    await events.publish_many(stream, numbered(100))
    await settled(events, stream, "work")
    reader._pause = 3_600.0
    await events.publish_many(stream, numbered(50, 100))
    with server.client as client:
        client.flushall()
    await until(lambda: of_group(gaps, "", GapKind.ROLLED_BACK))
    await asyncio.sleep(3.0)
    await reader.end()
    assert [gap.count for gap in of_group(gaps, "", GapKind.ROLLED_BACK)] == [150]
    ledger = await events.ledger(stream)
    assert (ledger.published, ledger.groups["work"].declared_lost) == (150, 50)


async def test_a_restart_that_loses_nothing_reports_nothing(
    own_server: Any, opened: Any, usage: Any, gaps: list[Gap]
) -> None:
    server = own_server("--appendonly", "yes", "--appendfsync", "always")
    stream = usage()
    events = await opened(at=server)
    reader = Reader(events, stream)
    for start in range(0, 600, 200):
        await events.publish_many(stream, numbered(200, start))
        with server.client as client:
            client.xtrim(KEY, maxlen=100, approximate=False) if start == 400 else None
        server.kill()
        server.start()
    await settled(events, stream, "work")
    await asyncio.sleep(3.0)
    await reader.end()
    assert [gap for gap in gaps if gap.kind is GapKind.ROLLED_BACK] == []
    ledger = await events.ledger(stream)
    assert ledger.rolled_back == 0
    assert ledger.published == 600 or not counts_entries(server)
    assert ledger.groups["work"].unaccounted == 0


async def test_removed_pending_entries_are_unaccounted(server: Any, events: Events, usage: Any) -> None:
    stream = usage()
    await events.publish_many(stream, numbered(10))
    with server.client as client:
        client.xreadgroup("work", "gone", {KEY: ">"}, count=10)
        client.xgroup_delconsumer(KEY, "work", "gone")
    work = (await events.ledger(stream)).groups["work"]
    assert work == GroupLedger(processed=0, dead_lettered=0, declared_lost=0, unaccounted=10)
    await events.prepare(stream)
    with server.client as client:
        client.xtrim(KEY, maxlen=6, approximate=False)
    ledger = await events.ledger(stream)
    work = ledger.groups["work"]
    if counts_entries(server):
        assert (ledger.published, work.processed, work.declared_lost, work.unaccounted) == (10, 0, 0, 10)


async def test_dead_letters_that_were_trimmed_themselves_are_counted(server: Any, events: Events, usage: Any) -> None:
    stream = usage(max_deliveries=1)
    await events.publish_many(stream, numbered(300))

    async with events.delivery_batches(stream, group="work", size=50, options=QUICK) as batches:
        done = 0
        async for batch in batches:
            with contextlib.suppress(RuntimeError):
                async with batch as found:
                    done += len(found)
                    raise RuntimeError("refused")
            if done == 300:
                break
    with server.client as client:
        client.xtrim("orki:ev:{usage-of-tests.work.dead}", maxlen=100, approximate=False)
    work = await settled(events, stream, "work")
    assert work == GroupLedger(processed=0, dead_lettered=300, declared_lost=0)


async def test_the_lag_is_right_after_a_trim(server: Any, opened: Any, usage: Any, link: Connection) -> None:
    # Redis 7.0 counts on from where the group was before the trim.
    stream = usage()
    events = await opened()
    await events.publish_many(stream, numbered(10))
    with server.client as client:
        client.xreadgroup("work", "a", {KEY: ">"}, count=10)
        await events.publish_many(stream, numbered(3_000, 10))
        client.xtrim(KEY, maxlen=20, approximate=False)
        client.xreadgroup("work", "a", {KEY: ">"}, count=15)
        (position,) = await read_positions(link, [KEY])
        assert position.groups["work"].lag == 5
        client.xreadgroup("work", "a", {KEY: ">"}, count=5)
    (position,) = await read_positions(link, [KEY])
    assert position.groups["work"].lag == 0
    if counts_entries(server):
        assert position.groups["work"].lost == 2_980


async def test_a_key_of_another_type_is_no_stream(server: Any, opened: Any, usage: Any, link: Connection) -> None:
    events = await opened()
    await events.publish_many(usage(), numbered(3))
    with server.client as client:
        client.set("orki:ev:{other}", "text")
    other, stream = await read_positions(link, ["orki:ev:{other}", KEY])
    assert (other.exists, stream.exists, stream.length) == (False, True, 3)


async def test_an_idle_consumer_beside_large_entries_costs_little(server: Any, opened: Any, usage: Any) -> None:
    # XINFO STREAM replies with the first and the last entry.
    stream = usage()
    events = await opened()
    await events.publish_many(stream, [UsageEvent(model="x" * 1_000_000) for _ in range(2)])
    reader = Reader(events, stream)
    await settled(events, stream, "work")
    with server.client as client:
        before = client.info("stats")["total_net_output_bytes"]
        await asyncio.sleep(6.0)
        sent = client.info("stats")["total_net_output_bytes"] - before
    await reader.end()
    assert sent < 100_000
