"""Consumes with the code of the environment that runs it: `consumer.py URL WHO COUNT`; prints a count by sender.

It waits until it has COUNT events of WHO, and then a little longer for those of anybody else.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter

from orki.events.v1 import usage_orki
from orki.events.v1.usage_pb2 import UsageEvent
from orki_contract import EventStream
from orki_events import Delivery, connect, consumer

LONGEST_S = 30.0
AFTER_S = 1.5

# The generator calls it after the stream.
USAGE = next(each for each in vars(usage_orki).values() if isinstance(each, EventStream))


async def main(url: str, who: str, count: int) -> None:
    """Reads as the declared group `metrics`."""
    seen: Counter[str] = Counter()
    enough, stop = asyncio.Event(), asyncio.Event()

    @consumer(USAGE, group="metrics")
    async def on_usage(event: UsageEvent, delivery: Delivery) -> None:
        seen[event.model] += 1
        if seen[who] >= count:
            enough.set()

    async def watch() -> None:
        await asyncio.wait_for(enough.wait(), LONGEST_S)
        await asyncio.sleep(AFTER_S)
        stop.set()

    async with connect(url) as events:
        watching = asyncio.create_task(watch())
        await asyncio.wait({watching, asyncio.create_task(events.run(on_usage, stop=stop))})
        watching.result()
    print(json.dumps(seen))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
