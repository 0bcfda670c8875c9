"""Order per key on partitioned streams, through failures, hand-over between consumers and takeover."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orki.events.v1.usage_pb2 import UsageEvent
from orki_contract.errors import LocalProtocolError
from orki_contract.model import Backoff
from orki_events import ConsumeOptions, Delivery, DeliveryBatch, Events, consumer

QUICK = ConsumeOptions(backoff=Backoff(initial=0.02, maximum=0.05), sweep_interval=0.1)
PARTITIONS = 4


def keyed(count: int, keys: int) -> list[UsageEvent]:
    return [UsageEvent(agent_id=f"agent-{number % keys}", attempt=number) for number in range(count)]


class Watch:
    """Records when the handling of each event begins and ends, and which keys were handled twice at once."""

    def __init__(self) -> None:
        self.ends: dict[str, list[int]] = defaultdict(list)
        self.running: dict[str, int] = defaultdict(int)
        self.overlaps = 0

    @property
    def finished(self) -> int:
        return len({number for each in self.ends.values() for number in each})

    def begin(self, event: UsageEvent) -> None:
        self.overlaps += self.running[event.agent_id] > 0
        self.running[event.agent_id] += 1

    def end(self, event: UsageEvent, good: bool) -> None:
        self.running[event.agent_id] -= 1
        if good:
            self.ends[event.agent_id].append(event.attempt)

    def check(self) -> None:
        assert self.overlaps == 0
        for key, numbers in self.ends.items():
            assert numbers == sorted(numbers), key


def singles(stream: Any, watch: Watch, odds: float, seed: int, pause: float = 0.001) -> Any:
    dice = random.Random(seed)

    @consumer(stream, group="work", concurrency=16, options=QUICK)
    async def on_usage(event: UsageEvent, delivery: Delivery[UsageEvent]) -> None:
        watch.begin(event)
        good = False
        try:
            await asyncio.sleep(dice.random() * pause)
            if dice.random() < odds and delivery.deliveries < 3:
                raise ValueError("not now")
            good = True
        finally:
            watch.end(event, good)

    return on_usage


async def test_failures_and_concurrency_keep_the_order_of_each_key(
    events: Events, usage: Any, until: Callable[..., Any]
) -> None:
    stream, watch, stop = usage(partitions=PARTITIONS, max_deliveries=5), Watch(), asyncio.Event()
    await events.publish_many(stream, keyed(2_000, 40))
    running = asyncio.create_task(events.run(singles(stream, watch, 0.2, 1), stop=stop))
    await until(lambda: watch.finished == 2_000, 60)
    stop.set()
    await asyncio.wait_for(running, 20)
    watch.check()


async def test_a_failing_entry_holds_back_its_key_only(events: Events, usage: Any, until: Callable[..., Any]) -> None:
    stream, got, stop = usage(partitions=PARTITIONS, ack_deadline=30.0), [], asyncio.Event()
    options = ConsumeOptions(prefetch=32, backoff=Backoff(initial=3.0, maximum=3.0))
    await events.publish_many(stream, keyed(400, 20))

    @consumer(stream, group="work", concurrency=4, options=options)
    async def on_usage(event: UsageEvent, delivery: Delivery[UsageEvent]) -> None:
        if event.attempt == 7 and delivery.deliveries == 1:
            raise ValueError("not now")
        got.append(event.attempt)

    running = asyncio.create_task(events.run(on_usage, stop=stop))
    await until(lambda: len(got) == 380, 10)
    assert all(number % 20 != 7 for number in got)
    await until(lambda: len(got) == 400, 20)
    assert got[380:] == list(range(7, 400, 20))
    stop.set()
    await asyncio.wait_for(running, 20)


async def test_a_dead_letter_lets_its_key_go_on(
    server: Any, events: Events, usage: Any, until: Callable[..., Any]
) -> None:
    stream, got, stop = usage(partitions=PARTITIONS, max_deliveries=2), [], asyncio.Event()
    await events.publish_many(stream, keyed(30, 3))

    @consumer(stream, group="work", options=QUICK)
    async def on_usage(event: UsageEvent, delivery: Delivery[UsageEvent]) -> None:
        if event.attempt == 4:
            raise ValueError("never")
        got.append(event.attempt)

    running = asyncio.create_task(events.run(on_usage, stop=stop))
    await until(lambda: len(got) == 29)
    stop.set()
    await asyncio.wait_for(running, 20)
    for key in range(3):
        assert [number for number in got if number % 3 == key] == [n for n in range(key, 30, 3) if n != 4]
    with server.client as client:
        assert client.xlen("orki:ev:{usage-of-tests.work.dead}") == 1


async def test_batches_keep_the_order_of_each_key(events: Events, usage: Any, until: Callable[..., Any]) -> None:
    stream, watch, stop = usage(partitions=PARTITIONS, max_deliveries=6), Watch(), asyncio.Event()
    await events.publish_many(stream, keyed(2_000, 40))
    dice = random.Random(3)
    last: dict[str, int] = defaultdict(lambda: -1)
    settled: dict[str, list[int]] = defaultdict(list)

    @consumer(stream, group="work", batch=50, concurrency=3, options=QUICK)
    async def on_batch(found: list[UsageEvent], batch: DeliveryBatch[UsageEvent]) -> None:
        for key in {event.agent_id for event in found}:
            watch.begin(UsageEvent(agent_id=key))
        await asyncio.sleep(0.002)
        refused: set[str] = set()
        for index, event in enumerate(found):
            if dice.random() < 0.05 and batch.deliveries[index] < 4:
                batch.reject(index, ValueError("not now"))
                refused.add(event.agent_id)
            elif event.agent_id not in refused:
                settled[event.agent_id].append(event.attempt)
                last[event.agent_id] = event.attempt
        for key in {event.agent_id for event in found}:
            watch.end(UsageEvent(agent_id=key), False)

    running = asyncio.create_task(events.run(on_batch, stop=stop))
    await until(lambda: sum(len(each) for each in settled.values()) == 2_000, 60)
    stop.set()
    await asyncio.wait_for(running, 20)
    assert watch.overlaps == 0
    for numbers in settled.values():
        assert numbers == sorted(set(numbers))


async def test_consumers_that_come_and_go_keep_the_order_and_lose_nothing(
    server: Any, opened: Any, usage: Any, until: Callable[..., Any]
) -> None:
    stream, watch = usage(partitions=PARTITIONS, max_deliveries=5, ack_deadline=2.0), Watch()
    publisher = await opened()
    runs = []

    async def join(seed: int) -> None:
        events, stop = await opened(), asyncio.Event()
        runs.append((asyncio.create_task(events.run(singles(stream, watch, 0.1, seed, 0.01), stop=stop)), stop))

    async def leave() -> None:
        task, stop = runs.pop(0)
        stop.set()
        await asyncio.wait_for(task, 20)

    await join(0)
    messages = keyed(4_000, 60)
    for step in range(8):
        await publisher.publish_many(stream, messages[step * 500 : step * 500 + 500])
        if step in (1, 2, 5):
            await join(step)
        elif step in (4, 6):
            await leave()
        await asyncio.sleep(0.7)
    await until(lambda: watch.finished == 4_000, 60)
    while runs:
        await leave()
    watch.check()
    assert sum(len(each) for each in watch.ends.values()) == 4_000
    with server.client as client:
        assert client.keys("orki:owner:*") == client.keys("orki:members:*") == []
        for number in range(PARTITIONS):
            assert client.xpending(f"orki:ev:{{usage-of-tests:{number}}}", "work")["pending"] == 0


async def test_partitions_are_shared_equally(server: Any, opened: Any, usage: Any, until: Callable[..., Any]) -> None:
    stream, watch = usage(partitions=PARTITIONS, ack_deadline=2.0), Watch()

    def owners() -> list[int]:
        with server.client as client:
            names = [client.get(f"orki:owner:{{usage-of-tests:{number}}}:work") for number in range(PARTITIONS)]
        return sorted(names.count(name) for name in set(names) - {None})

    runs = []
    for expected in ([4], [2, 2], [1, 1, 2], [1, 1, 1, 1], [1, 1, 1, 1]):
        events, stop = await opened(), asyncio.Event()
        runs.append((asyncio.create_task(events.run(singles(stream, watch, 0, 0), stop=stop)), stop))
        await until(lambda expected=expected: owners() == expected)
    for task, stop in runs:
        stop.set()
        await asyncio.wait_for(task, 20)


async def test_a_consumer_that_failed_owns_nothing(
    server: Any, opened: Any, usage: Any, until: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Leases outlive the test, unless they are released.
    stream, watch, stop = usage(partitions=PARTITIONS, ack_deadline=600.0), Watch(), asyncio.Event()
    events, consuming = await opened(), await opened()
    running = asyncio.create_task(events.run(singles(stream, watch, 0, 0), stop=stop))
    failing = asyncio.create_task(consuming.run(singles(stream, watch, 0, 0)))
    await until(lambda: server.client.zcard("orki:members:{usage-of-tests}:work") == 2)

    async def broken(*_: Any) -> None:
        raise LocalProtocolError("it is broken")

    (reader,) = consuming._readers
    monkeypatch.setattr(reader._executor, "run", broken)
    reader._command_queue.put_nowait(object())
    with pytest.raises(LocalProtocolError):
        await asyncio.wait_for(failing, 20)
    await until(lambda: server.client.zcard("orki:members:{usage-of-tests}:work") == 1)
    await events.publish_many(stream, keyed(100, 20))
    await until(lambda: watch.finished == 100)
    stop.set()
    await asyncio.wait_for(running, 20)


PROGRAM = """
import asyncio, json, sys, time
from orki_contract.model import Backoff
from orki_events import ConsumeOptions, EventOptions, connect, consumer
sys.path.insert(0, sys.argv[3])
from test_events_order import stream_of_processes

async def main():
    @consumer(stream_of_processes(), group="work", concurrency=8, options=ConsumeOptions(sweep_interval=0.1))
    async def on_usage(event, delivery):
        print(json.dumps([time.monotonic(), "begin", event.agent_id, event.attempt]), flush=True)
        await asyncio.sleep(0.005)
        print(json.dumps([time.monotonic(), "end", event.agent_id, event.attempt]), flush=True)
    async with connect(sys.argv[1], producer=sys.argv[2], options=EventOptions(block_timeout=0.2)) as events:
        await events.run(on_usage)

asyncio.run(main())
"""


def start_process(url: str, name: str, log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as sink:
        return subprocess.Popen([sys.executable, "-c", PROGRAM, url, name, os.path.dirname(__file__)], stdout=sink)


def stream_of_processes() -> Any:
    from orki_contract import EventStream
    from orki_contract.model import AUDIT_GROUP, Group, Retention, Start, Stream

    work = Group(name="work", start=Start.EARLIEST, ack_deadline=1.5, max_deliveries=5)
    return EventStream(
        UsageEvent,
        Stream(
            name="usage-of-tests",
            message="orki.events.v1.UsageEvent",
            retention=Retention(max_entries=100_000),
            partitions=PARTITIONS,
            partition_key="agent_id",
            groups=(AUDIT_GROUP, work),
        ),
    )


@pytest.mark.timeout(180)
@pytest.mark.parametrize("fault", [signal.SIGSTOP, signal.SIGKILL])
async def test_a_stopped_or_killed_owner_is_replaced_and_the_order_is_kept(
    server: Any, events: Events, tmp_path: Path, until: Callable[..., Any], fault: signal.Signals
) -> None:
    stream = stream_of_processes()
    await events.prepare(stream)
    logs = [tmp_path / f"{number}.log" for number in range(2)]
    processes = []
    for number, log in enumerate(logs):
        processes.append(start_process(server.url, f"consumer-{number}", log))

    def lines(log: Path) -> list[Any]:
        return [json.loads(line) for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def handled() -> set[int]:
        return {each[3] for log in logs for each in lines(log) if each[1] == "end"}

    try:
        with server.client as client:

            def shared() -> bool:
                names = [client.get(f"orki:owner:{{usage-of-tests:{number}}}:work") for number in range(PARTITIONS)]
                return None not in names and len(set(names)) == 2

            await until(shared, 60)
            messages = keyed(3_000, 50)
            for step in range(0, 3_000, 100):
                if step == 600:
                    processes[0].send_signal(fault)
                    stopped_at = time.monotonic()
                if step == 2_400 and fault is signal.SIGSTOP:
                    woken_at = time.monotonic()
                    processes[0].send_signal(signal.SIGCONT)
                await events.publish_many(stream, messages[step : step + 100])
                await asyncio.sleep(0.2)
            await until(lambda: len(handled()) == 3_000, 90)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    begins: dict[str, list[tuple[float, int, int]]] = defaultdict(list)
    for number, log in enumerate(logs):
        for at, kind, key, attempt in lines(log):
            if kind == "begin":
                begins[key].append((at, attempt, number))
    for found in begins.values():
        begun: set[int] = set()
        highest = {0: -1, 1: -1}
        for at, attempt, number in sorted(found):
            assert attempt > highest[number]
            highest[number] = attempt
            if attempt < max(highest.values()) or attempt in begun:
                # Only what the other process had begun, without an acknowledgement, is handled again.
                assert number == 1
                assert at > stopped_at
            begun.add(attempt)
    if fault is signal.SIGSTOP:
        first = [at for found in begins.values() for at, _, number in found if number == 0 and at > woken_at]
        assert stopped_at < woken_at
        assert first, "the process that was stopped must get a share again"
