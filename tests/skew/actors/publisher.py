"""Publishes readings, and a harvest where the contract here knows one."""

from __future__ import annotations

import asyncio

from garden.v1 import garden_orki, garden_pb2
from orki_contract.errors import OrkiError
from orki_events import connect
from values import asked, bed, known, reading, tell, tell_error


async def main() -> None:
    wanted = asked()
    kind = garden_pb2.MoistureEvent
    numbers = range(wanted["first"], wanted["first"] + wanted["count"])
    async with connect(wanted["redis"]) as events:
        tell(ready=True)
        try:
            ids = await events.publish_many(
                garden_orki.MOISTURE, [kind(**known(kind, reading(number))) for number in numbers]
            )
            picked = 0
            if hasattr(garden_orki, "HARVEST"):
                harvest = [garden_pb2.HarvestEvent(bed=bed(number), grams=number) for number in numbers]
                picked = len(await events.publish_many(garden_orki.HARVEST, harvest))
        except OrkiError as error:
            tell_error("refused", error)
        else:
            tell(done={"moisture": len(ids), "harvest": picked})


if __name__ == "__main__":
    asyncio.run(main())
