"""Consumes groups until its input ends, and reports the events."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from garden.v1 import garden_orki
from values import instructions, report, report_error, stream

from orki_contract.errors import OrkiError
from orki_events import connect, consumer


def reader(message: str, group: str, into: list[dict[str, Any]]) -> Any:
    """Return a consumer that records every field of each event, defaults included."""

    @consumer(stream(garden_orki, message), group=group)
    async def on_event(event: Any, delivery: Any) -> None:
        fields = {field.name: getattr(event, field.name) for field in event.DESCRIPTOR.fields}
        into.append({"group": group, **fields})

    return on_event


async def main() -> None:
    wanted = instructions()
    read: list[dict[str, Any]] = []
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.run_in_executor(None, sys.stdin.read).add_done_callback(lambda _: stop.set())
    async with connect(wanted["redis"]) as events:
        readers = [reader(message, group, read) for message, group in wanted["groups"]]
        report(ready=True)
        try:
            await events.run(*readers, stop=stop)
        except OrkiError as error:
            report_error("refused", error)
        else:
            report(done={"read": read})


if __name__ == "__main__":
    asyncio.run(main())
