"""Submits waterings once the named agents are connected, and reports the responses."""

from __future__ import annotations

import asyncio
from typing import Any

from garden.v1 import garden_orki, garden_pb2
from values import bed, instructions, known, report, report_error, watering

from orki_contract.errors import OrkiError
from orki_control import Client


async def wait_for(orki: Client, agents: list[str]) -> None:
    """Wait until all agents have a session."""
    while not {each.agent_id for each in await orki.list_agents() if each.connected} >= set(agents):
        await asyncio.sleep(0.05)


async def result(handle: Any) -> dict[str, Any]:
    """Return the fields of a response, defaults included."""
    response = await handle.result()
    return {field.name: getattr(response, field.name) for field in response.DESCRIPTOR.fields}


async def prune(client: Any) -> Any:
    """Return the result of the task added in v2; None without it."""
    if not hasattr(client, "prune"):
        return None
    try:
        return (await client.prune(garden_pb2.PruneRequest(bed=bed(1)), timeout=20)).stems
    except OrkiError as error:
        return type(error).__name__


async def main() -> None:
    wanted = instructions()
    async with Client(wanted["orchestrator"]) as orki:
        try:
            async with asyncio.timeout(20):
                await wait_for(orki, wanted["agents"])
        except TimeoutError:
            report(refused={"type": "TimeoutError", "message": f"{wanted['agents']} have no session after 20 s"})
            return
        client = garden_orki.BedServiceClient(orki)
        requests = [
            garden_pb2.WaterRequest(**known(garden_pb2.WaterRequest, watering(number)), linger=wanted["linger"])
            for number in range(wanted["first"], wanted["first"] + wanted["count"])
        ]
        try:
            handles = await client.water.submit_many(requests)
            report(ready=True)
            async with asyncio.timeout(wanted["patience"]):
                responses = await asyncio.gather(*(result(handle) for handle in handles))
                pruned = await prune(client) if wanted["prune"] else None
        except (OrkiError, TimeoutError) as error:
            report_error("refused", error)
        else:
            report(done={"responses": responses, "pruned": pruned})


if __name__ == "__main__":
    asyncio.run(main())
