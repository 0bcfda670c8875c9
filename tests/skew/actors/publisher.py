"""Publishes readings, and harvests if the contract declares them."""

from __future__ import annotations

import asyncio

from garden.v1 import garden_orki, garden_pb2
from values import bed, instructions, known, reading, report, report_error, stream

from orki_contract.errors import OrkiError
from orki_events import connect


async def main() -> None:
    wanted = instructions()
    kind = garden_pb2.MoistureEvent
    numbers = range(wanted["first"], wanted["first"] + wanted["count"])
    async with connect(wanted["redis"]) as events:
        report(ready=True)
        try:
            ids = await events.publish_many(
                stream(garden_orki, "MoistureEvent"), [kind(**known(kind, reading(number))) for number in numbers]
            )
            picked = 0
            if (harvests := stream(garden_orki, "HarvestEvent")) is not None:
                harvest = [garden_pb2.HarvestEvent(bed=bed(number), grams=number) for number in numbers]
                picked = len(await events.publish_many(harvests, harvest))
        except OrkiError as error:
            report_error("refused", error)
        else:
            report(done={"moisture": len(ids), "harvest": picked})


if __name__ == "__main__":
    asyncio.run(main())
