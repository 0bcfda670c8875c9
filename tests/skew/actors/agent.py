"""An agent that waters beds, with whichever contract is installed. It drains when its input ends."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from garden.v1 import garden_orki, garden_pb2
from values import instructions, known, report, report_error, stream

from orki_agent import Agent
from orki_contract.errors import OrkiError


class Beds(garden_orki.BedServiceBase):
    """Copies the request into its response."""

    def __init__(self, name: str) -> None:
        self._name = name

    async def water(self, request: Any, ctx: Any) -> Any:
        await ctx.progress(garden_pb2.WaterProgress(fraction=0.5))
        await ctx.publish(
            stream(garden_orki, "MoistureEvent"), garden_pb2.MoistureEvent(bed=request.bed, fraction=0.25)
        )
        await asyncio.sleep(request.linger)
        response = {
            "bed": request.bed,
            "poured": request.millilitres,
            "agent": self._name,
            "attempt": ctx.attempt,
            "because": getattr(request, "reason", ""),
        }
        return garden_pb2.WaterResponse(**known(garden_pb2.WaterResponse, response))

    async def prune(self, request: Any, ctx: Any) -> Any:
        return garden_pb2.PruneResponse(stems=len(request.bed))


async def main() -> None:
    wanted = instructions()
    agent = Agent("gardener", Beds(wanted["agent_id"]), slots=wanted.get("slots", 4))
    loop = asyncio.get_running_loop()
    waiting = loop.run_in_executor(None, sys.stdin.read)
    waiting.add_done_callback(lambda _: agent.drain())
    report(ready=True)
    try:
        await agent.run(wanted["orchestrator"], agent_id=wanted["agent_id"], drain_grace=20.0)
    except OrkiError as error:
        report_error("refused", error)
    else:
        report(done=True)


if __name__ == "__main__":
    asyncio.run(main())
