"""A consumer in its own process, for tests that kill it: `consumer_process.py URL FILE STALL`.

Writes a line to FILE when it begins an event and another when it is done; on event number STALL it never ends.
"""

from __future__ import annotations

import asyncio
import os
import sys

from orki.events.v1.usage_pb2 import UsageEvent
from orki_contract import EventStream
from orki_contract.model import AUDIT_GROUP, Group, Retention, Stream
from orki_events import Delivery, connect, consumer

STREAM: EventStream[UsageEvent, str] = EventStream(
    UsageEvent,
    Stream(
        name="usage-of-tests",
        message="orki.events.v1.UsageEvent",
        retention=Retention(max_entries=100_000),
        groups=(AUDIT_GROUP, Group(name="work", ack_deadline=1.0, max_deliveries=3)),
    ),
)


async def main(url: str, file: str, stall: int) -> None:
    out = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    @consumer(STREAM, group="work", concurrency=4)
    async def on_usage(event: UsageEvent, delivery: Delivery[UsageEvent]) -> None:
        os.write(out, b"begun %d\n" % event.attempt)
        if event.attempt == stall:
            await asyncio.sleep(3_600)
        os.write(out, b"done %d\n" % event.attempt)

    async with connect(url, producer=f"process@{os.getpid()}") as events:
        await events.run(on_usage)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
