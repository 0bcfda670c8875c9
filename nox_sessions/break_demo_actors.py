"""The processes of the break demo, run in environments that hold only the wheels under test.

break_demo_actors.py publish URL SENDER COUNT    publish COUNT events and print the stream's name
break_demo_actors.py consume URL SENDER COUNT    read COUNT events of SENDER and print a count by sender
break_demo_actors.py serve                       run the embedded server until the input ends; print its URL
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from typing import Any

LONGEST = 30.0
# The consumer reads on for this long, to count the events of other senders.
AFTER = 1.5


async def publish(url: str, sender: str, count: int) -> None:
    """Publish events that carry the sender's name."""
    from orki.events.v1.usage_pb2 import UsageEvent
    from orki_events import connect

    stream = _stream()
    async with connect(url) as events:
        await events.publish_many(stream, [UsageEvent(agent_id=f"{number}", model=sender) for number in range(count)])
    print(stream.contract.name)


async def consume(url: str, sender: str, count: int) -> None:
    """Read as the declared group `metrics`."""
    from orki.events.v1.usage_pb2 import UsageEvent
    from orki_events import Delivery, connect, consumer

    seen: Counter[str] = Counter()
    enough, stop = asyncio.Event(), asyncio.Event()

    @consumer(_stream(), group="metrics")
    async def on_usage(event: UsageEvent, delivery: Delivery) -> None:
        seen[event.model] += 1
        if seen[sender] >= count:
            enough.set()

    async def watch() -> None:
        await asyncio.wait_for(enough.wait(), LONGEST)
        await asyncio.sleep(AFTER)
        stop.set()

    async with connect(url) as events:
        watching = asyncio.create_task(watch())
        await asyncio.wait({watching, asyncio.create_task(events.run(on_usage, stop=stop))})
        watching.result()
    print(json.dumps(seen))


def serve() -> None:
    """Run the embedded server."""
    from orki_server.embedded import EmbeddedServer

    server = EmbeddedServer().start()
    try:
        print(server.url, flush=True)
        sys.stdin.read()
    finally:
        server.stop()


def _stream() -> Any:
    # The generator names the constant after the stream, and the demo renames the stream.
    from orki.events.v1 import usage_orki
    from orki_contract import EventStream

    return next(each for each in vars(usage_orki).values() if isinstance(each, EventStream))


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve()
    else:
        actor = {"publish": publish, "consume": consume}[sys.argv[1]]
        asyncio.run(actor(sys.argv[2], sys.argv[3], int(sys.argv[4])))
