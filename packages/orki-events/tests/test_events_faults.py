"""Killed consumers; killed, hung, flushed and full servers; lost replies. Each test ends with the ledger."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orki.events.v1.usage_pb2 import UsageEvent
from orki_contract.errors import EventsUnavailable, OrkiError
from orki_contract.model import Backoff
from orki_events import ConsumeOptions, Delivery, Events, Gap, GapKind, GroupLedger, _position_store, consumer
from orki_events._position_store import Positions
from orki_events.connection import Connection, parse_address
from orki_events.losses import read_gaps

KEY = "orki:ev:{usage-of-tests}"
QUICK = ConsumeOptions(backoff=Backoff(initial=0.01, maximum=0.05), sweep_interval=0.1)


def numbered(count: int, start: int = 0) -> list[UsageEvent]:
    return [UsageEvent(attempt=number) for number in range(start, start + count)]


class Reader:
    """A push consumer of the group `work` that counts the events that it handled."""

    def __init__(self, events: Events, stream: Any, **options: Any) -> None:
        self.got: Counter[bytes] = Counter()
        self.numbers: Counter[int] = Counter()
        self.stop = asyncio.Event()
        self.hold = asyncio.Event()
        self.hold.set()

        @consumer(stream, group="work", options=options.pop("options", QUICK), **options)
        async def on_usage(event: UsageEvent, delivery: Delivery[UsageEvent]) -> None:
            await self.hold.wait()
            self.got[delivery.event_id] += 1
            self.numbers[event.attempt] += 1

        self.running = asyncio.create_task(events.run(on_usage, stop=self.stop))

    async def end(self) -> None:
        self.hold.set()
        self.stop.set()
        await asyncio.wait_for(self.running, 30)


async def drained(events: Events, stream: Any, limit_s: float = 40.0) -> GroupLedger:
    """Wait until the group `work` has settled everything, and return its ledger."""
    end = time.monotonic() + limit_s
    while True:
        ledger = await events.ledger(stream)
        work = ledger.groups["work"]
        if work.pending == work.unread == 0:
            total = work.processed + work.dead_lettered + work.declared_lost + work.before_start
            assert total == ledger.published
            return work
        assert time.monotonic() < end, ledger
        await asyncio.sleep(0.05)


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Start consumer processes, which end with the test."""
    started = []

    def start(url: str, stall: int = -1) -> tuple[subprocess.Popen[bytes], Callable[[], list[str]]]:
        file = tmp_path / f"consumer-{len(started)}"
        file.touch()
        command = [sys.executable, str(Path(__file__).with_name("consumer_process.py")), url, str(file), str(stall)]
        running = subprocess.Popen(command)
        started.append(running)
        return running, lambda: file.read_text().splitlines()

    yield start
    for running in started:
        running.kill()
        running.wait(30)


async def test_the_events_of_a_killed_consumer_go_to_another(
    server: Any, events: Events, usage: Any, process: Any, until: Any
) -> None:
    stream = usage()
    victim, lines = process(server.url, stall=20)
    await events.publish_many(stream, numbered(50))
    await until(lambda: "begun 20" in lines(), 30)
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait(30)
    reader = Reader(events, stream)
    work = await drained(events, stream)
    await reader.end()
    done = {int(line.split()[1]) for line in lines() if line.startswith("done")}
    assert 20 in reader.numbers
    assert done | reader.numbers.keys() == set(range(50))
    assert work == GroupLedger(processed=50, dead_lettered=0, declared_lost=0)


async def test_an_event_that_kills_every_consumer_is_dead_lettered(
    server: Any, events: Events, usage: Any, process: Any, until: Any
) -> None:
    stream = usage()
    await events.publish_many(stream, numbered(3))
    for _ in range(3):
        victim, lines = process(server.url, stall=1)
        await until(lambda lines=lines: "begun 1" in lines(), 30)
        os.kill(victim.pid, signal.SIGKILL)
        victim.wait(30)
    reader = Reader(events, stream)
    work = await drained(events, stream)
    await reader.end()
    assert 1 not in reader.numbers
    assert work == GroupLedger(processed=2, dead_lettered=1, declared_lost=0)
    (letter,) = await events.dead_letters(stream, group="work")
    assert (letter.reason.deliveries, letter.event) == (3, UsageEvent(attempt=1))


async def test_a_frozen_consumer_does_not_take_entries_from_its_successor(
    server: Any, events: Events, usage: Any, process: Any, until: Any
) -> None:
    stream = usage()
    frozen, lines = process(server.url, stall=5)
    await events.publish_many(stream, numbered(10))
    await until(lambda: "begun 5" in lines(), 30)
    os.kill(frozen.pid, signal.SIGSTOP)
    reader = Reader(events, stream)
    await until(lambda: 5 in reader.numbers, 30)
    os.kill(frozen.pid, signal.SIGCONT)
    work = await drained(events, stream)
    await asyncio.sleep(1.0)
    assert reader.numbers[5] == 1
    assert work == GroupLedger(processed=10, dead_lettered=0, declared_lost=0)
    await reader.end()


async def test_a_killed_server_with_an_append_only_file_loses_nothing(
    own_server: Any, opened: Any, usage: Any, gaps: Any
) -> None:
    # With `everysec`, the server may reply before it writes, while the disk is busy with the previous flush.
    server = own_server("--appendonly", "yes", "--appendfsync", "always")
    stream = usage()
    publisher, reading = await opened(at=server), await opened(at=server)
    reader = Reader(reading, stream)
    acknowledged: list[bytes] = []
    stop = asyncio.Event()

    async def publish() -> None:
        number = 0
        while not stop.is_set():
            acknowledged.extend(await publisher.publish_many(stream, numbered(20, number)))
            number += 20
            await asyncio.sleep(0.001)

    publishing = asyncio.create_task(publish())
    for _ in range(3):
        before = len(acknowledged)
        await asyncio.sleep(0.4)
        server.kill()
        await asyncio.sleep(0.1)
        server.start()
        up = time.monotonic()
        while len(acknowledged) < before + 100:
            await asyncio.sleep(0.01)
            assert time.monotonic() < up + 20
    stop.set()
    await publishing
    work = await drained(reading, stream)
    await reader.end()
    assert set(acknowledged) <= set(reader.got)
    assert work.processed == len(reader.got)
    assert (work.dead_lettered, work.declared_lost) == (0, 0)
    ledger = await publisher.ledger(stream)
    assert (ledger.published, ledger.missing, ledger.repeated) == (len(acknowledged), 0, 0)
    assert [gap for gap in gaps if gap.count != 0] == []


async def test_a_server_that_restarts_empty_is_reported(
    own_server: Any, opened: Any, usage: Any, gaps: list[Gap]
) -> None:
    server = own_server()
    stream = usage()
    events = await opened(at=server)
    reader = Reader(events, stream)
    await events.publish_many(stream, numbered(100))
    await drained(events, stream)
    reader.hold.clear()
    await events.publish_many(stream, numbered(50, 100))
    server.kill()
    server.start()
    await events.publish_many(stream, numbered(100, 150))
    reader.hold.set()
    work = await drained(events, stream)
    await reader.end()
    # The first 100 were settled before the server lost them, the next 50 were not.
    assert work == GroupLedger(processed=200, dead_lettered=0, declared_lost=50)
    assert set(range(100)) | set(range(150, 250)) <= reader.numbers.keys()
    # The publisher or the consumer recreated the groups and reported the loss.
    assert {(gap.kind, gap.group, gap.possible) for gap in gaps} >= {(GapKind.GROUP_RECREATED, "work", True)}
    # The gap also shows in the producer's sequence numbers.
    assert (await events.ledger(stream)).missing == 150


async def test_a_flush_is_survived_and_reported(
    server: Any, events: Events, usage: Any, gaps: list[Gap], until: Any
) -> None:
    stream = usage()
    reader = Reader(events, stream)
    await events.publish_many(stream, numbered(10))
    await drained(events, stream)
    with server.client as client:
        client.flushall()
    await until(lambda: [gap for gap in gaps if gap.group == "work"])
    await events.publish_many(stream, numbered(10, 10))
    await until(lambda: len(reader.numbers) == 20)
    await drained(events, stream)
    await reader.end()
    (gap,) = [gap for gap in gaps if gap.group == "work"]
    assert (gap.kind, gap.possible, gap.count) == (GapKind.GROUP_RECREATED, True, None)
    assert "forgot" in gap.message


async def test_a_destroyed_group_continues_at_its_saved_position(
    server: Any, events: Events, usage: Any, gaps: list[Gap], until: Any
) -> None:
    stream = usage()
    reader = Reader(events, stream)
    await events.publish_many(stream, numbered(100))
    await drained(events, stream)
    # Longer than the interval at which the group's position is saved.
    await asyncio.sleep(3.0)
    with server.client as client:
        client.xgroup_destroy(KEY, "work")
    await events.publish_many(stream, numbered(50, 100))
    await until(lambda: len(reader.numbers) == 150)
    work = await drained(events, stream)
    await reader.end()
    assert set(reader.numbers.values()) == {1}
    assert work == GroupLedger(processed=150, dead_lettered=0, declared_lost=0)
    assert [(gap.kind, gap.possible, gap.count) for gap in gaps] == [(GapKind.GROUP_RECREATED, False, 0)]


async def test_entries_of_a_lost_reply_are_read_again(
    server: Any, proxy: Any, opened: Any, usage: Any, until: Any
) -> None:
    stream = usage(ack_deadline=600.0)
    publisher, reading = await opened(), await opened(at=proxy)
    reader = Reader(reading, stream)
    await publisher.publish_many(stream, numbered(10))
    await until(lambda: len(reader.numbers) == 10)
    proxy.lose_answers = True
    await publisher.publish_many(stream, numbered(10, 10))
    await until(lambda: proxy.lost >= 2)
    proxy.lose_answers = False
    await until(lambda: len(reader.numbers) == 20)
    work = await drained(publisher, stream)
    await reader.end()
    assert work == GroupLedger(processed=20, dead_lettered=0, declared_lost=0)


async def test_a_hung_server_times_out_and_nothing_is_lost(
    own_server: Any, opened: Any, usage: Any, until: Any
) -> None:
    server = own_server()
    stream = usage()
    events = await opened(at=server, answer_timeout=0.5, publish_timeout=1.0)
    reader = Reader(events, stream)
    await events.publish_many(stream, numbered(10))
    await until(lambda: len(reader.numbers) == 10)
    assert server.process is not None
    os.kill(server.process.pid, signal.SIGSTOP)
    try:
        with pytest.raises(EventsUnavailable, match="it is unknown whether the server has it"):
            await events.publish(stream, UsageEvent(attempt=10))
    finally:
        os.kill(server.process.pid, signal.SIGCONT)
    await events.publish_many(stream, numbered(10, 11))
    await until(lambda: set(range(10)) | set(range(11, 21)) <= reader.numbers.keys())
    work = await drained(events, stream)
    await reader.end()
    assert work.processed in (20, 21)


async def test_consumers_continue_on_a_server_without_memory(
    own_server: Any, opened: Any, usage: Any, until: Any
) -> None:
    server = own_server()
    stream = usage()
    events = await opened(at=server, publish_timeout=0.3)
    await events.publish_many(stream, numbered(500))
    with server.client as client:
        client.config_set("maxmemory", 1)
        reader = Reader(events, stream)
        await until(lambda: len(reader.numbers) == 500)
        await until(lambda: client.xpending(KEY, "work")["pending"] == 0)
        client.config_set("maxmemory", 0)
    work = await drained(events, stream)
    await reader.end()
    assert work == GroupLedger(processed=500, dead_lettered=0, declared_lost=0)


async def test_publishing_waits_while_the_server_is_a_replica(
    own_server: Any, opened: Any, usage: Any, until: Any
) -> None:
    server = own_server()
    stream = usage()
    events = await opened(at=server)
    reader = Reader(events, stream)
    await events.publish_many(stream, numbered(10))
    await until(lambda: len(reader.numbers) == 10)
    with server.client as client:
        client.execute_command("REPLICAOF", "127.0.0.1", "1")
        publishing = asyncio.create_task(events.publish_many(stream, numbered(10, 10)))
        await asyncio.sleep(1.0)
        assert not publishing.done()
        client.execute_command("REPLICAOF", "NO", "ONE")
    await asyncio.wait_for(publishing, 20)
    await until(lambda: len(reader.numbers) == 20)
    assert await drained(events, stream) == GroupLedger(processed=20, dead_lettered=0, declared_lost=0)
    await reader.end()


async def test_a_missing_permission_fails_at_once(own_server: Any, opened: Any, usage: Any) -> None:
    server = own_server()
    events = await opened(at=server)
    stream = usage()
    with server.client as client:
        client.execute_command("ACL", "SETUSER", "default", "-xreadgroup")
    reader = Reader(events, stream)
    with pytest.raises(OrkiError, match="NOPERM"):
        await asyncio.wait_for(reader.running, 20)


@pytest.mark.parametrize("group", ["", "work"])
async def test_entries_that_arrive_while_a_snapshot_is_on_its_way_are_not_lost(
    server: Any, events: Events, usage: Any, gaps: list[Gap], monkeypatch: pytest.MonkeyPatch, group: str
) -> None:
    stream = usage()
    await events.publish_many(stream, [UsageEvent(attempt=number) for number in range(10)])
    link = Connection(parse_address(server.url), name="test", connect_timeout=5.0, answer_timeout=5.0)
    positions = Positions(gaps.append)
    await positions.compare(link, stream.contract, KEY, group, consumes=bool(group))
    take = _position_store.take_snapshot

    async def slowly(*arguments: Any) -> Any:
        found = await take(*arguments)
        with server.client as client:
            first, last = (client.xadd(KEY, {"e": "", "d": ""}) for _ in range(2))
        positions.arrived(link, KEY, group, first, last, 2)
        return found

    monkeypatch.setattr(_position_store, "take_snapshot", slowly)
    for _ in range(3):
        await positions.compare(link, stream.contract, KEY, group, consumes=bool(group))
    monkeypatch.undo()
    await positions.compare(link, stream.contract, KEY, group, consumes=bool(group))
    assert gaps == []
    assert await read_gaps(link, stream.contract) == []
    await link.close()
