"""Consumes groups until its input ends, and says what it read."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from garden.v1 import garden_orki
from values import asked, stream, tell, tell_error

from orki_contract.errors import OrkiError
from orki_events import connect, consumer


def reader(message: str, group: str, into: list[dict[str, Any]]) -> Any:
    """A consumer that notes every field of what it reads, defaults included."""

    @consumer(stream(garden_orki, message), group=group)
    async def on_event(event: Any, delivery: Any) -> None:
        fields = {field.name: getattr(event, field.name) for field in event.DESCRIPTOR.fields}
        into.append({"group": group, **fields})

    return on_event


async def main() -> None:
    wanted = asked()
    read: list[dict[str, Any]] = []
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.run_in_executor(None, sys.stdin.read).add_done_callback(lambda _: stop.set())
    async with connect(wanted["redis"]) as events:
        readers = [reader(message, group, read) for message, group in wanted["groups"]]
        tell(ready=True)
        try:
            await events.run(*readers, stop=stop)
        except OrkiError as error:
            tell_error("refused", error)
        else:
            tell(done={"read": read})


if __name__ == "__main__":
    asyncio.run(main())
