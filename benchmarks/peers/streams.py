"""Publishing and consuming on peers of the event plane: `streams.py faststream|faststream-batch|jetstream WHERE`.

Each takes `publish N`, `consume N` (publish N first, unmeasured) and answers with events a second.
"""

import asyncio
import json
import logging
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

BATCH = 500
PAYLOAD = b"x" * 90
Commands = dict[str, Callable[[int], Awaitable[float]]]


async def serve(commands: Commands) -> None:
    """Answer commands from standard input."""
    loop = asyncio.get_running_loop()
    print(json.dumps({"ready": True}), flush=True)
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        name, count = line.split()
        begun = time.perf_counter()
        skipped = await commands[name](int(count))
        print(json.dumps({"values": [int(count) / (time.perf_counter() - begun - skipped)]}), flush=True)


async def faststream(url: str, *, batch: bool) -> None:
    """FastStream on Redis Streams, with single events or batches of 500."""
    from faststream.redis import RedisBroker, StreamSub

    broker = RedisBroker(url, logger=None)
    got, wanted, done = 0, 0, asyncio.Event()

    def note(more: int) -> None:
        nonlocal got
        got += more
        if got >= wanted:
            done.set()

    more: dict[str, Any] = {"batch": True, "max_records": BATCH} if batch else {"max_records": BATCH}
    stream = StreamSub("bench", group="bench", consumer="one", polling_interval=5, **more)

    if batch:

        @broker.subscriber(stream=stream)
        async def on_batch(found: list[bytes]) -> None:
            note(len(found))
    else:

        @broker.subscriber(stream=stream)
        async def on_event(found: bytes) -> None:
            note(1)

    async def publish(count: int) -> float:
        async def some() -> None:  # As many publishers as redis-py's pool has connections, about.
            for _ in range(count // 64 + 1):
                await broker.publish(PAYLOAD, stream="bench")

        await asyncio.gather(*(some() for _ in range(64)))
        return 0.0

    async def consume(count: int) -> float:
        nonlocal got, wanted
        begun = time.perf_counter()
        await publish(count)
        skipped = time.perf_counter() - begun
        got, wanted = 0, count
        done.clear()
        await broker.start()
        await done.wait()
        await broker.stop()
        await broker.connect()
        return skipped

    await broker.connect()
    redis: Any = await broker.connect()
    await redis.execute_command("XGROUP", "CREATE", "bench", "bench", "$", "MKSTREAM")
    await serve({"publish": publish, "consume": consume})


async def jetstream(url: str) -> None:
    """NATS JetStream by nats-py: asynchronous publishes with acknowledgements, pull consumers in batches."""
    import nats

    client = await nats.connect(url)
    stream: Any = client.jetstream(publish_async_max_pending=4_000)
    await stream.add_stream(name="bench", subjects=["bench"])
    number = 0

    async def publish(count: int) -> float:
        for _ in range(count // BATCH):
            await asyncio.gather(*[await stream.publish_async("bench", PAYLOAD) for _ in range(BATCH)])
        return 0.0

    async def consume(count: int) -> float:
        nonlocal number
        number += 1
        begun = time.perf_counter()
        await stream.purge_stream("bench")
        await publish(count)
        subscription = await stream.pull_subscribe("bench", durable=f"d{number}")
        skipped = time.perf_counter() - begun
        got = 0
        while got < count:
            found = await subscription.fetch(BATCH, timeout=5)
            for message in found:
                await message.ack()
            got += len(found)
        return skipped

    await serve({"publish": publish, "consume": consume})


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    name, where = sys.argv[1:]
    if name == "jetstream":
        asyncio.run(jetstream(where))
    else:
        asyncio.run(faststream(where, batch=name == "faststream-batch"))
