"""The programs of the event benchmarks: `python -m benchmarks.events_sides typed|hand PORT`.

Both take the same commands on standard input and move the same bytes. `typed` uses orki_events as an application would.
`hand` is what an expert would write on one connection: RESP commands packed by hand, replies parsed by hiredis.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import hiredis

from orki.events.v1.usage_pb2 import UsageEvent
from orki_contract import AUDIT_GROUP, EventStream, Group, Retention, Start, Stream
from orki_contract.trace import new_span, use_span
from orki_events import ConsumeOptions, Delivery, DeliveryBatch, Events, connect, consumer
from orki_events.entries import encode_envelope, new_event_id, stream_keys

BATCH = 500
SAMPLE = UsageEvent(
    agent_id="reviewer-1",
    task_id="t3-01hx5k7q",
    attempt=1,
    provider="acme",
    model="model-large-1",
    input_tokens=812,
    output_tokens=90,
    cost_micros=1_234,
)
STREAM: EventStream[UsageEvent, Any] = EventStream(
    UsageEvent,
    Stream(
        name="bench",
        message="orki.events.v1.UsageEvent",
        retention=Retention(max_entries=1_000_000),
        groups=(AUDIT_GROUP, Group(name="work")),
    ),
)
(KEY,) = stream_keys(STREAM.contract)
_numbers = itertools.count()


def entry_fields() -> tuple[bytes, ...]:
    """Return field names and values of an entry as orki's publisher writes them, with an event id of its own."""
    envelope = encode_envelope(
        event_id=new_event_id(),
        producer="bench@0123abcd",
        sequence=12_345,
        time_us=time.time_ns() // 1_000,
        span=new_span().child(),
    )
    return (b"e", envelope, b"d", SAMPLE.SerializeToString())


class Typed:
    """orki_events."""

    def __init__(self, events: Events, reader: Events) -> None:
        self._events = events
        self._reader = reader

    async def publish(self, count: int) -> list[float]:
        """Publish batches of 500."""
        begun = time.perf_counter()
        for _ in range(count // BATCH):
            await self._events.publish_many(STREAM, [SAMPLE] * BATCH)
        return [count / (time.perf_counter() - begun)]

    async def publish_tasks(self, count: int) -> list[float]:
        """Publish from 500 concurrent tasks, one event each."""
        begun = time.perf_counter()
        for _ in range(count // BATCH):
            await asyncio.gather(*(self._events.publish(STREAM, SAMPLE) for _ in range(BATCH)))
        return [count / (time.perf_counter() - begun)]

    async def collect(self, count: int) -> list[float]:
        """Collect events and flush every 5,000."""
        begun = time.perf_counter()
        for number in range(1, count + 1):
            self._events.collect(STREAM, SAMPLE)
            if number % 5_000 == 0:
                await self._events.flush()
        await self._events.flush()
        return [count / (time.perf_counter() - begun)]

    async def publish_one(self, count: int) -> list[float]:
        """Publish one event at a time."""
        taken = []
        for _ in range(count):
            begun = time.perf_counter()
            await self._events.publish(STREAM, SAMPLE)
            taken.append((time.perf_counter() - begun) * 1e6)
        return taken

    async def consume(self, count: int) -> list[float]:
        """Consume a new group from the first entry, in batches."""
        return await self._consume(count, BATCH)

    async def consume_single(self, count: int) -> list[float]:
        """Consume a new group from the first entry, one event a call, 16 calls at once."""
        return await self._consume(count, 0)

    async def _consume(self, count: int, batch: int) -> list[float]:
        name = f"typed-{next(_numbers)}"
        stream = STREAM.with_groups(Group(name=name))
        stop = asyncio.Event()
        got = 0

        def note(more: int) -> None:
            nonlocal got
            got += more
            if got >= count:
                stop.set()

        options = ConsumeOptions(prefetch=4 * BATCH)

        @consumer(stream, group=name, batch=BATCH, options=options)
        async def on_batch(found: list[UsageEvent], delivery: DeliveryBatch[UsageEvent]) -> None:
            note(len(found))

        @consumer(stream, group=name, concurrency=16, options=options)
        async def on_event(event: UsageEvent, delivery: Delivery[UsageEvent]) -> None:
            note(1)

        begun = time.perf_counter()
        # `run` returns after the last acknowledgement and the consumer's removal.
        await self._reader.run(on_batch if batch else on_event, stop=stop)
        return [count / (time.perf_counter() - begun)]

    async def latency(self, count: int) -> list[float]:
        """Measure from publish to handler at light load."""
        name = f"late-{next(_numbers)}"
        stream = STREAM.with_groups(Group(name=name, start=Start.LATEST))
        taken: list[float] = []
        stop, arrived = asyncio.Event(), asyncio.Event()
        sent = 0.0

        @consumer(stream, group=name)
        async def on_event(event: UsageEvent, delivery: Delivery[UsageEvent]) -> None:
            taken.append((time.perf_counter() - sent) * 1e6)
            arrived.set()

        running = asyncio.create_task(self._reader.run(on_event, stop=stop))
        while not taken:  # The group starts at the latest entry: publish until it exists.
            await self._events.publish(STREAM, SAMPLE)
            await asyncio.sleep(0.01)
        taken.clear()
        for _ in range(count):
            arrived.clear()
            await asyncio.sleep(0.001)
            sent = time.perf_counter()
            await self._events.publish(STREAM, SAMPLE)
            await arrived.wait()
        stop.set()
        await running
        return taken


def pack(*words: bytes) -> bytes:
    """Pack one RESP command."""
    return b"*%d\r\n" % len(words) + b"".join([b"$%d\r\n%b\r\n" % (len(word), word) for word in words])


class Wire:
    """One connection: bytes out, parsed replies in."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.setblocking(False)
        self._reader = hiredis.Reader()

    async def ask(self, packed: bytes, count: int) -> list[Any]:
        """Send commands and return as many replies."""
        loop = asyncio.get_running_loop()
        sending = asyncio.ensure_future(loop.sock_sendall(self._socket, packed)) if len(packed) > 65_536 else None
        if sending is None:
            await loop.sock_sendall(self._socket, packed)
        replies: list[Any] = []
        while len(replies) < count:
            reply = self._reader.gets()
            if reply is False:
                self._reader.feed(await loop.sock_recv(self._socket, 1 << 18))
            else:
                replies.append(reply)
        if sending is not None:
            await sending
        return replies


class Hand:
    """Hand-packed commands on one connection."""

    def __init__(self, port: int) -> None:
        self._wire = Wire(port)
        self._blocking = Wire(port)
        self._add = (b"XADD", KEY.encode(), b"MAXLEN", b"~", b"1000000", b"*")

    async def publish(self, count: int) -> list[float]:
        """Pipelines of 500 XADDs."""
        fields = entry_fields()
        begun = time.perf_counter()
        for _ in range(count // BATCH):
            packed = b"".join([pack(*self._add, *fields) for _ in range(BATCH)])
            await self._wire.ask(packed, BATCH)
        return [count / (time.perf_counter() - begun)]

    publish_tasks = collect = publish

    async def publish_one(self, count: int) -> list[float]:
        """One XADD at a time."""
        fields = entry_fields()
        taken = []
        for _ in range(count):
            begun = time.perf_counter()
            await self._wire.ask(pack(*self._add, *fields), 1)
            taken.append((time.perf_counter() - begun) * 1e6)
        return taken

    async def fill(self, count: int) -> list[float]:
        """Add entries with different event ids."""
        for _ in range(count // BATCH):
            packed = b"".join([pack(*self._add, *entry_fields()) for _ in range(BATCH)])
            await self._wire.ask(packed, BATCH)
        return [0.0]

    async def _group(self, start: bytes) -> bytes:
        group = b"hand-%d" % next(_numbers)
        await self._wire.ask(pack(b"XGROUP", b"CREATE", self._add[1], group, start, b"MKSTREAM"), 1)
        return group

    def _read(self, group: bytes) -> bytes:
        return pack(
            *(b"XREADGROUP", b"GROUP", group, b"one", b"COUNT", b"%d" % BATCH, b"BLOCK", b"1000", b"STREAMS"),
            *(self._add[1], b">"),
        )

    async def consume(self, count: int) -> list[float]:
        """XREADGROUP COUNT 500, FromString, one XACK."""
        group = await self._group(b"0")
        read = self._read(group)
        begun = time.perf_counter()
        got = 0
        while got < count:
            ((((_, entries),)),) = await self._wire.ask(read, 1)
            for _, fields in entries:
                UsageEvent.FromString(fields[3])
            await self._wire.ask(pack(b"XACK", self._add[1], group, *[entry_id for entry_id, _ in entries]), 1)
            got += len(entries)
        return [count / (time.perf_counter() - begun)]

    consume_single = consume

    async def latency(self, count: int) -> list[float]:
        """Measure from XADD to the end of a blocking XREADGROUP and its decoding."""
        group = await self._group(b"$")
        read = self._read(group)
        taken: list[float] = []
        arrived = asyncio.Event()
        sent = 0.0

        async def reader() -> None:
            while len(taken) < count:
                (reply,) = await self._blocking.ask(read, 1)
                for entry_id, fields in reply[0][1] if reply else ():
                    UsageEvent.FromString(fields[3])
                    taken.append((time.perf_counter() - sent) * 1e6)
                    arrived.set()
                    await self._blocking.ask(pack(b"XACK", self._add[1], group, entry_id), 1)

        running = asyncio.create_task(reader())
        add = pack(*self._add, *entry_fields())
        for _ in range(count):
            arrived.clear()
            await asyncio.sleep(0.001)
            sent = time.perf_counter()
            await self._wire.ask(add, 1)
            await arrived.wait()
        await running
        return taken


async def serve(program: Any) -> None:
    """Answer commands `METHOD COUNT` from standard input."""
    loop = asyncio.get_running_loop()
    print(json.dumps({"ready": True}), flush=True)
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        name, count = line.split()
        method: Callable[[int], Awaitable[list[float]]] = getattr(program, name)
        with use_span(new_span().child()):
            print(json.dumps({"values": await method(int(count))}), flush=True)


async def main(role: str, port: int) -> None:
    """Run one role."""
    if role == "hand":
        await serve(Hand(port))
    else:
        url = f"redis://127.0.0.1:{port}/0"
        async with connect(url) as events, connect(url) as reader:
            await events.prepare(STREAM)
            await serve(Typed(events, reader))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
