"""SIGTERM while the server is gone or hangs: every process ends within its stated time."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from orki.events.v1.usage_orki import USAGE
from orki.events.v1.usage_pb2 import UsageEvent
from orki_events import connect
from orki_server.embedded import EmbeddedServer

_LIMIT = 5.0
_COMMANDS = {
    "serve": ("serve", "--listen", "127.0.0.1:0", "--drain-grace-ms", "0"),
    "audit": ("observe", "audit", "audit.jsonl"),
    "metrics": ("observe", "metrics", "--port", "0"),
    "feed": ("observe", "feed", "--port", "0"),
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("wait", [0.0, 3.0])
@pytest.mark.parametrize("hangs", [False, True])
@pytest.mark.parametrize("name", _COMMANDS)
async def test_a_process_stops_in_time_without_its_server(
    observer: Callable[..., Any], name: str, hangs: bool, wait: float
) -> None:
    with EmbeddedServer() as server:
        async with connect(server.url) as events:
            await events.publish(USAGE, UsageEvent(model="m"))
        process = observer(*_COMMANDS[name], "--redis", server.url)
        await asyncio.sleep(1.5)
        if hangs:
            os.kill(server.pid, signal.SIGSTOP)
        else:
            server.kill()
        await asyncio.sleep(wait)
        began = time.monotonic()
        try:
            assert process.end() == 0
        finally:
            if hangs:
                os.kill(server.pid, signal.SIGCONT)
        assert time.monotonic() - began < _LIMIT
        assert "Traceback" not in process.log
