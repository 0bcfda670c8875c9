"""Calls the probe's tools with both kinds of client, and reports the replies."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

from garden.v1 import garden_orki, garden_pb2
from values import instructions, known, measuring, report, report_error

from orki_agent.hotpath import AsyncToolClient, SyncToolClient
from orki_contract.errors import OrkiError


def measure_request(number: int) -> Any:
    kind = garden_orki.MeasureRequest
    names = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in measuring(number).items() if name in names})


def fields_of(reply: Any) -> dict[str, Any]:
    """Return the fields of a frame or a message, defaults included."""
    if dataclasses.is_dataclass(reply):
        return {field.name: getattr(reply, field.name) for field in dataclasses.fields(reply)}
    return {field.name: getattr(reply, field.name) for field in reply.DESCRIPTOR.fields}


def describe_request() -> Any:
    kind = garden_pb2.DescribeRequest
    return kind(**known(kind, {"probe": "p", "language": "de"}))


def blocking(path: str, token: bytes, numbers: range) -> dict[str, Any]:
    client = SyncToolClient(path, token, name="skew")
    try:
        tools = garden_orki.ProbeToolServiceSyncClient(client)
        calibrated = None
        measured = [fields_of(tools.measure(measure_request(number))) for number in numbers]
        if hasattr(tools, "calibrate"):
            try:
                calibrated = tools.calibrate(describe_request()).words
            except OrkiError as error:
                calibrated = type(error).__name__
        described = fields_of(tools.describe(describe_request()))
    finally:
        client.close()
    return {"measured": measured, "described": described, "calibrated": calibrated}


async def pipelined(path: str, token: bytes, numbers: range) -> list[dict[str, Any]]:
    client = AsyncToolClient(path, token, name="skew")
    try:
        tools = garden_orki.ProbeToolServiceClient(client)
        return [fields_of(each) for each in await asyncio.gather(*(tools.measure(measure_request(n)) for n in numbers))]
    finally:
        await client.close()


def main() -> None:
    wanted = instructions()
    numbers = range(1, 1 + wanted["count"])
    path, token = wanted["path"], bytes.fromhex(wanted["token"])
    report(ready=True)
    for call in (blocking, lambda *given: asyncio.run(pipelined(*given))):
        try:
            outcome = call(path, token, numbers)
        except OrkiError as error:
            report_error("refused", error)
        else:
            report(done=outcome)


if __name__ == "__main__":
    main()
