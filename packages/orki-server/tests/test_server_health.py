"""Every state of a server that orki reports, produced on real servers, and what the orchestrator does with it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]
from redis import Redis
from redis.exceptions import RedisError

from orki_contract.errors import InvalidSetting
from orki_events.connection import parse_address
from orki_server._health.findings import STATES, Check
from orki_server._health.probe import ServerProbe
from orki_server._orchestrator import EVENTS_SERVICE, Orchestrator
from orki_server.embedded import server_binary

pytestmark = pytest.mark.timeout(120)

_RUNBOOK = Path(__file__).parents[3] / "docs" / "runbook.md"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A server process of a test, with settings of its own."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.port = free_port()
        self.folder = folder / str(self.port)
        self.folder.mkdir()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.redis = Redis(port=self.port, socket_timeout=10.0)
        self.process: subprocess.Popen[bytes] | None = None
        self.start(*arguments)

    def start(self, *arguments: str, wait: bool = True) -> None:
        base = ("--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(self.folder), "--save", "")
        base += ("--enable-protected-configs", "local")
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen([str(server_binary()), *base, *arguments], stdout=log, stderr=log)
        end = time.monotonic() + 20
        while wait:
            with contextlib.suppress(RedisError):
                if self.redis.ping():
                    return
            assert time.monotonic() < end
            time.sleep(0.02)

    def config(self, name: str, value: Any) -> None:
        self.redis.config_set(name, value)

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self.redis.close()


Start = Callable[..., Server]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Start]:
    """Start servers with arguments."""
    started: list[Server] = []

    def start(*arguments: str) -> Server:
        started.append(Server(tmp_path, *arguments))
        return started[-1]

    yield start
    for each in started:
        each.kill()


@pytest.fixture
async def probe() -> AsyncIterator[Callable[[str], ServerProbe]]:
    opened: list[ServerProbe] = []

    def create(url: str, timeout: float = 1.0) -> ServerProbe:
        opened.append(ServerProbe(parse_address(url), server="store", timeout=timeout))
        return opened[-1]

    yield create
    for each in opened:
        await each.close()


def problems(checks: list[Check]) -> dict[str, Check]:
    """Return the checks that are not ok, by their state, except for the usual lack of persistence."""
    return {check.state: check for check in checks if check.state not in ("ok", "not-persistent")}


async def in_thread(work: Callable[..., object], *arguments: Any) -> None:
    with ThreadPoolExecutor(1) as pool:
        await asyncio.get_running_loop().run_in_executor(pool, work, *arguments)


async def eventually(look: Callable[[], Awaitable[bool]], timeout: float = 30.0) -> None:
    end = time.monotonic() + timeout
    while not await look():
        assert time.monotonic() < end, "not in time"
        await asyncio.sleep(0.1)


# --- The states. Each producer brings a healthy server into one state, for real. ---


def _fill(server: Server, share: float) -> None:
    server.redis.setrange("ballast", 8 << 20, b"x")
    server.config("maxmemory", int(server.redis.info("memory")["used_memory"] / share))


def _evict(server: Server) -> None:
    server.redis.setrange("ballast", 8 << 20, b"x")
    server.redis.setrange("victim", 8 << 20, b"x")
    server.config("maxmemory-policy", "allkeys-lru")
    server.config("maxmemory", 12 << 20)
    server.redis.set("more", b"1")
    server.config("maxmemory", 0)
    server.config("maxmemory-policy", "noeviction")


def _fail_saves(server: Server) -> None:
    gone = server.folder / "gone"
    gone.mkdir()
    server.config("dir", str(gone))
    shutil.rmtree(gone)
    server.config("stop-writes-on-bgsave-error", "no")
    server.redis.bgsave()
    while server.redis.info("persistence")["rdb_bgsave_in_progress"]:
        time.sleep(0.02)


def _refuse_writes(server: Server) -> None:
    server.config("save", "3600 1")
    _fail_saves(server)
    server.config("stop-writes-on-bgsave-error", "yes")


def _load(server: Server) -> None:
    pipe = server.redis.pipeline()
    for number in range(8_000):
        pipe.set(f"key-{number}", os.urandom(100))
    pipe.execute()
    server.redis.save()
    server.kill()
    server.start("--key-load-delay", "1000", "--loading-process-events-interval-bytes", "1024", wait=False)
    time.sleep(0.5)


def _run_script(server: Server) -> None:
    server.config("busy-reply-threshold", 100)
    with socket.create_connection(("127.0.0.1", server.port)) as caller:
        caller.sendall(b'EVAL "while true do end" 0\r\n')
        time.sleep(0.5)


STATES_OF_SERVERS: dict[str, tuple[str, Callable[[Server], object]]] = {
    "unreachable": ("reachable", Server.kill),
    "hung": ("reachable", lambda server: server.signal(signal.SIGSTOP)),
    "busy": ("reachable", _run_script),
    "refused": ("reachable", lambda server: server.config("requirepass", "opensesame")),
    "loading": ("reachable", _load),
    "replica": ("role", lambda server: server.redis.execute_command("REPLICAOF", "127.0.0.1", free_port())),
    "read-only": ("writes", lambda server: server.config("min-replicas-to-write", 1)),
    "evicting": ("eviction", lambda server: server.config("maxmemory-policy", "volatile-ttl")),
    "evicted": ("evicted", _evict),
    "memory-high": ("memory", lambda server: _fill(server, 0.87)),
    "memory-critical": ("memory", lambda server: _fill(server, 0.97)),
    "memory-full": ("memory", lambda server: _fill(server, 1.2)),
    "persistence-failing": ("persistence", _fail_saves),
}


@pytest.mark.parametrize("state", STATES_OF_SERVERS)
async def test_each_state_of_a_server_is_found(server: Start, probe: Callable[..., ServerProbe], state: str) -> None:
    own = server()
    # A server that loads answers only now and then.
    asking = probe(own.url, timeout=10.0 if state == "loading" else 1.0)
    assert problems(await asking.checks()) == {}
    check_name, produce = STATES_OF_SERVERS[state]
    await in_thread(produce, own)
    # One that is connected already needs no password.
    found = problems(await (probe(own.url) if state == "refused" else asking).checks())
    assert state in found, found
    check = found[state]
    assert check.name == f"store.{check_name}"
    assert check.figure
    assert check.cause.endswith(".")
    assert check.next_step
    assert "opensesame" not in str(found)


async def test_a_server_that_cannot_save_refuses_writes(server: Start, probe: Callable[..., ServerProbe]) -> None:
    own = server()
    await in_thread(_refuse_writes, own)
    found = problems(await probe(own.url).checks())
    assert {"persistence-failing", "read-only"} <= found.keys()


async def test_a_stopped_replica_is_behind_and_then_lost(server: Start, probe: Callable[..., ServerProbe]) -> None:
    primary, replica = server("--repl-timeout", "25"), server()
    replica.redis.execute_command("REPLICAOF", "127.0.0.1", primary.port)
    asking = probe(primary.url)

    async def state() -> dict[str, Check]:
        return {check.name: check for check in await asking.checks()}

    async def is_online() -> bool:
        return (await state())["store.replication"].figure.startswith("1 of 1 replica, 0 B and 0")

    await eventually(is_online)
    replica.signal(signal.SIGSTOP)
    try:
        primary.redis.set("more", bytes(100_000))
        began = time.monotonic()

        async def is_behind() -> bool:
            return (await state())["store.replication"].state == "replica-behind"

        await eventually(is_behind, 10)
        assert time.monotonic() - began < 9
        assert "97.7 KiB" in (await state())["store.replication"].figure
    finally:
        replica.signal(signal.SIGCONT)
    await eventually(is_online)
    replica.kill()

    async def is_lost() -> bool:
        return (await state())["store.replication"].state == "replica-lost"

    await eventually(is_lost, 10)


# --- The orchestrator. ---


async def status(orchestrator: Orchestrator, service: str = "") -> str:
    async with grpc.aio.insecure_channel(orchestrator.address) as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service))
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-lru"])
@pytest.mark.parametrize("role", ["redis_url", "events_url"])
async def test_an_orchestrator_refuses_a_server_that_evicts(
    server: Start, options: Callable[..., Any], redis_url: str, policy: str, role: str
) -> None:
    own = server("--maxmemory-policy", policy)
    orchestrator = Orchestrator(options(**{"redis_url": redis_url, role: own.url}))
    with pytest.raises(InvalidSetting, match=f"{policy}.*CONFIG SET maxmemory-policy noeviction"):
        await orchestrator.start()


def _replicate_nothing(server: Server) -> None:
    server.config("min-replicas-to-write", 1)


WHILE_RUNNING: dict[str, tuple[str, Callable[[Server], object], Callable[[Server], object]]] = {
    "evicting": (
        "eviction",
        lambda server: server.config("maxmemory-policy", "allkeys-lru"),
        lambda server: server.config("maxmemory-policy", "noeviction"),
    ),
    "hung": (
        "reachable",
        lambda server: server.signal(signal.SIGSTOP),
        lambda server: server.signal(signal.SIGCONT),
    ),
    "memory-full": ("memory", lambda server: _fill(server, 1.2), lambda server: server.config("maxmemory", 0)),
    "read-only": ("writes", _replicate_nothing, lambda server: server.config("min-replicas-to-write", 0)),
}


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("state", WHILE_RUNNING)
async def test_the_orchestrator_notices_a_state_by_itself(
    server: Start,
    options: Callable[..., Any],
    redis_url: str,
    caplog: pytest.LogCaptureFixture,
    state: str,
    separate: bool,
) -> None:
    own = server()
    orchestrator = Orchestrator(
        options(redis_url=redis_url, events_url=own.url) if separate else options(redis_url=own.url)
    )
    name, produce, repair = WHILE_RUNNING[state]
    check = f"{'events_server' if separate else 'store'}.{name}"

    def told() -> list[str]:
        return [each.getMessage() for each in caplog.records if each.getMessage().startswith(f"{check} is ")]

    async def serves(service: str) -> bool:
        return await status(orchestrator, service) == "SERVING"

    await orchestrator.start()
    try:
        with caplog.at_level(logging.WARNING, "orki.server.health"):
            await eventually(lambda: serves(EVENTS_SERVICE))
            assert told() == []
            await in_thread(produce, own)

            async def is_noticed() -> bool:
                return not await serves(EVENTS_SERVICE)

            await eventually(is_noticed, 8)
            # Tasks need the store only.
            assert await serves("") is separate
            await asyncio.sleep(2.5)
            (message,) = told()
            assert message.startswith(f"{check} is {state}: ")
            await in_thread(repair, own)
            await eventually(lambda: serves(EVENTS_SERVICE), 15)
            await eventually(lambda: serves(""), 15)
            assert len(told()) == 2
            assert told()[1].startswith(f"{check} is ok again")
    finally:
        os.kill(own.process.pid, signal.SIGCONT)  # type: ignore[union-attr]
        await orchestrator.stop()


def test_the_runbook_explains_each_state() -> None:
    text = _RUNBOOK.read_text(encoding="utf-8")
    missing = [state for state in STATES if state != "ok" and f"| `{state}` |" not in text]
    assert missing == []
