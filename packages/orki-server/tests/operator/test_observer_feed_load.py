"""The feed with as many browsers as it serves, and with one that is too slow."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest

from orki.events.v1.usage_orki import USAGE
from orki.events.v1.usage_pb2 import UsageEvent
from orki_events import Events
from orki_events.connection import parse_address
from orki_server._observers.feed import FeedOptions, run_feed

pytestmark = pytest.mark.timeout(240)

_BROWSERS = 500


def _resident(pid: int) -> int:
    """Return the resident memory of a process in bytes."""
    pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    return int(pages) * 4096


async def test_500_browsers_get_every_event_in_bounded_memory(
    observer: Callable[..., Any], valkey_url: str, events: Events, link: Any
) -> None:
    await events.prepare(USAGE)
    process = observer("observe", "feed", "--redis", valkey_url, "--port", "0")
    pid, before = process.process.pid, _resident(process.process.pid)
    connected = 0

    async def browse(http: aiohttp.ClientSession) -> int:
        nonlocal connected
        found = 0
        async with http.get(f"{process.where}events") as response:
            assert response.status == 200
            async for line in response.content:
                connected += line.startswith(b"event: hello")
                found += line.startswith(b'data: {"event_id')
                if found == 5:
                    return found
        return found

    timeout = aiohttp.ClientTimeout(total=200)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as http:
        browsing = [asyncio.create_task(browse(http)) for _ in range(_BROWSERS)]
        while connected < _BROWSERS:
            await asyncio.sleep(0.1)
        async with http.get(f"{process.where}events") as refused:
            assert refused.status == 503
        for _ in range(5):
            await events.publish(USAGE, UsageEvent(model="x" * 10_000))
        assert await asyncio.gather(*browsing) == [5] * _BROWSERS
        assert _resident(pid) - before < 300 << 20
    # A closed browser leaves no connection, and nothing that would keep entries.
    async with asyncio.timeout(60):
        while b"name=orki:feed " in await link.execute((b"CLIENT", b"LIST")):
            await asyncio.sleep(0.1)
    groups = await link.execute((b"XINFO", b"GROUPS", b"orki:ev:{usage}"))
    assert {group[1] for group in groups} == {b"audit", b"metrics"}
    assert process.end() == 0


async def test_a_slow_browser_is_told_and_resumes_without_a_loss(
    valkey_url: str, events: Events, capsys: pytest.CaptureFixture[str]
) -> None:
    await events.prepare(USAGE)
    stopped = asyncio.Event()
    options = FeedOptions(send_timeout=1.0)
    running = asyncio.create_task(run_feed(parse_address(valkey_url), options, stopped))
    text = ""
    while "ready" not in text:
        await asyncio.sleep(0.05)
        text += capsys.readouterr().out
    url = urlsplit(text.split()[-1])
    # It reads nothing, with a small buffer, while more arrives than all buffers hold.
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(raw, (url.hostname, url.port))
        await loop.sock_sendall(raw, f"GET /events HTTP/1.1\r\nHost: {url.netloc}\r\n\r\n".encode())
        await asyncio.sleep(0.3)
        for number in range(1, 101):
            await events.publish(USAGE, UsageEvent(model="x" * 100_000, input_tokens=number))
        await asyncio.sleep(1.3)
        received = b""
        async with asyncio.timeout(60):
            while piece := await loop.sock_recv(raw, 1 << 16):
                received += piece
                if b"event: slow" in received and received.endswith(b"0\r\n\r\n"):
                    break
    blocks = [block for block in received.decode().replace("\r\n", "\n").split("\n\n") if "data: " in block]
    lines = received.decode().splitlines()
    slow = lines.index("event: slow")
    cursor = lines[slow + 1].removeprefix("id: ")
    assert blocks
    told = [line for line in lines[:slow] if line.startswith('data: {"event_id')]
    numbers = [int(json.loads(line[6:])["event"]["input_tokens"]) for line in told]
    async with (
        aiohttp.ClientSession() as http,
        http.get(f"{url.geturl()}events", headers={"Last-Event-ID": cursor}) as response,
        asyncio.timeout(60),
    ):
        while numbers[-1] < 100:
            line = await response.content.readline()
            if line.startswith(b'data: {"event_id'):
                numbers.append(int(json.loads(line[6:])["event"]["input_tokens"]))
    assert numbers == list(range(1, 101))
    stopped.set()
    await running
