"""The code of the README and of the package's docstring runs."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

import orki_events
from orki.events.v1.usage_orki import USAGE
from orki.events.v1.usage_pb2 import UsageEvent
from orki_events import Events

URL = "redis://127.0.0.1:6379/0"
README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def code(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_the_first_example_publishes_and_consumes(server: Any) -> None:
    example = code(README)[0].replace(URL, server.url)
    assert server.url in example
    run = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, timeout=60, check=False)
    assert (run.stdout, run.stderr) == ("m-1\n", "")


async def test_the_second_example_serves_until_it_is_cancelled(
    events: Events, until: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(code(README)[1], "README.md", "exec"), names)
    await events.prepare(USAGE)
    serving = asyncio.create_task(names["serve"](events))
    output = ""

    def printed() -> bool:
        nonlocal output
        output += capsys.readouterr().out
        return output == "m-2\n"

    await until(printed)
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving


async def test_the_third_example_exports_an_event(events: Events) -> None:
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(code(README)[2], "README.md", "exec"), names)
    await events.prepare(USAGE)
    await events.publish(USAGE, UsageEvent(model="m-3"))
    async for delivery in events.deliveries(USAGE, group="audit"):
        made, payload = names["exported"](delivery)
        assert made["type"] == "orki.events.v1.UsageEvent"
        assert UsageEvent.FromString(payload).model == "m-3"
        break


async def test_the_example_of_the_docstring_runs(server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert orki_events.__doc__ is not None
    (example,) = code(orki_events.__doc__)
    names: dict[str, Any] = {"USAGE": USAGE, "UsageEvent": UsageEvent, "connect": orki_events.connect}
    body = textwrap.indent(example.replace(URL, server.url), "    ")
    exec(compile(f"async def main():\n{body}", "docstring", "exec"), names)
    await names["main"]()
    assert capsys.readouterr().out == "m\n"
