"""Waits until groups have processed all published events, and reports the ledger."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from garden.v1 import garden_orki
from values import instructions, report, stream

from orki_events import connect


async def main() -> None:
    wanted = instructions()
    deadline = time.monotonic() + wanted["patience"]
    async with connect(wanted["redis"]) as events:
        while True:
            found: dict[str, Any] = {}
            for message, group in wanted["groups"]:
                ledger = (await events.ledger(stream(garden_orki, message))).dump()
                row = ledger["groups"].get(group, {"processed": 0})
                found[f"{message}/{group}"] = {"published": ledger["published"], **row}
            settled = all(row["published"] == row["processed"] >= wanted["least"] for row in found.values())
            if settled or time.monotonic() > deadline:
                break
            await asyncio.sleep(0.1)
    report(done=found)


if __name__ == "__main__":
    asyncio.run(main())
