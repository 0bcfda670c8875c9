"""Publishes some events with the code of the environment that runs it: `publisher.py URL WHO COUNT`."""

from __future__ import annotations

import asyncio
import sys

from orki.events.v1 import usage_orki
from orki.events.v1.usage_pb2 import UsageEvent
from orki_contract import EventStream
from orki_events import connect

# The generator calls it after the stream.
USAGE = next(each for each in vars(usage_orki).values() if isinstance(each, EventStream))


async def main(url: str, who: str, count: int) -> None:
    """Each event carries who sent it."""
    async with connect(url) as events:
        await events.publish_many(USAGE, [UsageEvent(agent_id=f"{number}", model=who) for number in range(count)])
    print(USAGE.contract.name)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
