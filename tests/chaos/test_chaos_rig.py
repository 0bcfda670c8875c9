"""Schedules replay, the proxy injects what it promises, and no child outlives its parent."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import redis

from chaos.control import KINDS as CONTROL_KINDS
from chaos.events import KINDS, LOSSES
from chaos.proxy import FaultProxy
from chaos.rig import ChildFailed, Process, RedisServer
from chaos.schedule import Kind, draw, length


@pytest.mark.parametrize("kinds", [CONTROL_KINDS, KINDS, KINDS | LOSSES])
def test_a_seed_gives_the_same_schedule_again_and_another_seed_another_one(kinds: Mapping[str, Kind]) -> None:
    first = draw(7, kinds, 40, 0.5)
    assert first == draw(7, kinds, 40, 0.5)
    assert first != draw(8, kinds, 40, 0.5)
    assert {fault.kind for fault in draw(1, kinds, 500, 0.5)} == set(kinds)


def test_faults_of_a_schedule_do_not_overlap() -> None:
    faults = draw(3, CONTROL_KINDS, 100, 0.5)
    for before, after in pairwise(faults):
        assert after.at > before.at + before.duration
    assert length(faults) == faults[-1].at + faults[-1].duration


@pytest.fixture
async def proxy() -> AsyncIterator[FaultProxy]:
    """A proxy before a server that echoes."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while chunk := await reader.read(1024):
                writer.write(chunk)
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    async with FaultProxy(server.sockets[0].getsockname()[1]) as proxy:
        yield proxy
    server.close()
    await asyncio.sleep(0)


async def ask(proxy: FaultProxy, timeout: float = 5.0) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    try:
        writer.write(b"ping")
        async with asyncio.timeout(timeout):
            return await reader.read(1024)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def test_the_proxy_forwards_both_directions(proxy: FaultProxy) -> None:
    assert await ask(proxy) == b"ping"


async def test_a_cut_resets_open_connections(proxy: FaultProxy) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    writer.write(b"ping")
    assert await reader.read(1024) == b"ping"
    proxy.cut()
    try:
        ended = await reader.read(1024)
    except ConnectionResetError:
        ended = b""
    assert ended == b""
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


async def test_a_stalled_proxy_forwards_nothing_until_it_is_healed(proxy: FaultProxy) -> None:
    proxy.stall()
    with pytest.raises(TimeoutError):
        await ask(proxy, timeout=0.2)
    waiting = asyncio.create_task(ask(proxy))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    proxy.heal()
    assert await waiting == b"ping"


async def test_abandoned_connections_stay_open_and_new_ones_work(proxy: FaultProxy) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    writer.write(b"ping")
    assert await reader.read(1024) == b"ping"
    proxy.abandon()
    writer.write(b"ping")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await reader.read(1024)
    assert await ask(proxy) == b"ping"
    proxy.heal()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await reader.read(1024)
    writer.close()


def difference(client: redis.Redis) -> float:
    """Return the server's time less this machine's. The server reads its clock when it waits for commands."""
    now: Any = client.time()
    return float(now[0]) - time.time()


@pytest.mark.skipif(sys.platform != "linux", reason="the clock is stepped by a library that is preloaded")
def test_a_step_of_the_clock_moves_the_servers_time_and_not_its_timers(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    server.start()
    try:
        with server.client as client:
            for seconds in (60, -60, 0):
                server.step_clock(seconds)
                until = time.monotonic() + 10
                while abs(difference(client) - seconds) > 5:
                    assert time.monotonic() < until, f"the clock was not stepped by {seconds} s"
            server.step_clock(-60)
            assert client.blpop(["never"], timeout=0.1) is None
    finally:
        server.process.kill()


async def test_lost_replies_are_counted_and_the_connection_ends(proxy: FaultProxy) -> None:
    proxy.lose_replies = True
    assert await ask(proxy) == b""
    assert proxy.lost == 1


@pytest.mark.parametrize(
    "arguments",
    [
        *([], ["nothing"], ["control", "--seeds", "0"], ["control", "--faults", "-1"], ["control", "--seeds", "x"]),
        ["control", "--json", "/no/such/directory/rows.json"],
        ["control", "--keep", "/proc/no/such"],
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-m", "chaos", *arguments], cwd=root, capture_output=True, timeout=60)
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr


async def test_a_process_that_ends_by_itself_is_reported_with_its_log(tmp_path: Path) -> None:
    process = Process("short", [sys.executable, "-c", "raise SystemExit('broken')"], tmp_path / "short.log")
    process.start()
    until = time.monotonic() + 20
    while process.running and time.monotonic() < until:
        await asyncio.sleep(0.02)
    with pytest.raises(ChildFailed, match="short ended with 1.*\n.*broken"):
        process.check()


@pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux has PR_SET_PDEATHSIG; elsewhere close() ends the children"
)
def test_children_end_when_the_driver_is_killed(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from chaos.rig import Process\n"
        "child = Process('child', [sys.executable, '-c', 'import time; time.sleep(600)'], Path(sys.argv[1]))\n"
        "child.start(); print(child._process.pid, flush=True); time.sleep(600)"
    )
    root = Path(__file__).resolve().parents[2]
    driver = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "log")], stdout=subprocess.PIPE, env={**os.environ}, cwd=root
    )
    assert driver.stdout is not None
    child = int(driver.stdout.readline())
    driver.send_signal(signal.SIGKILL)
    driver.wait(20)
    driver.stdout.close()
    until = time.monotonic() + 20
    while Path(f"/proc/{child}").exists() and time.monotonic() < until:
        state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
        if state == "Z":  # Killed; its new parent has not reaped it yet.
            break
        time.sleep(0.02)
    else:
        assert not Path(f"/proc/{child}").exists()
