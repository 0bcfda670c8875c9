"""`orki up` as a process: everything starts, answers, and stops without leftovers."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import aiohttp
import grpc
import pytest
from click.testing import CliRunner
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]
from redis import Redis

from orki_contract.errors import InvalidSetting
from orki_server._cli.root import root
from orki_server._process import Part, PartEnded, Supervisor
from orki_server.embedded import EmbeddedOptions, EmbeddedServer


async def start(*arguments: str, **settings: str) -> tuple[asyncio.subprocess.Process, dict[str, object]]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ORKI_")}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "orki_server", "up", "--json", *arguments),
        stdout=asyncio.subprocess.PIPE,
        env={**environment, **settings},
    )
    assert process.stdout is not None
    async with asyncio.timeout(60):
        line = await process.stdout.readline()
    return process, json.loads(line)


async def end(process: asyncio.subprocess.Process, number: signal.Signals) -> int:
    process.send_signal(number)
    async with asyncio.timeout(40):
        code = await process.wait()
    process._transport.close()  # type: ignore[attr-defined]
    return code


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("orki_server._cli.up", {"grpc", "redis", "aiohttp", "prometheus_client"}),
        ("orki_server._orchestrator", {"redis", "aiohttp", "prometheus_client"}),
        ("orki_server._observers.audit", {"grpc", "redis", "aiohttp", "prometheus_client"}),
        ("orki_server._observers.feed", {"grpc", "redis", "prometheus_client"}),
        ("orki_server._observers.metrics", {"grpc", "redis"}),
    ],
)
def test_each_process_imports_only_what_it_needs(module: str, absent: set[str]) -> None:
    program = f"import sys, {module}; print(*sys.modules)"
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert {name.partition(".")[0] for name in printed.split()} & absent == set()


@pytest.mark.timeout(120)
async def test_up_starts_everything_and_stops_it_in_order(tmp_path: Path) -> None:
    process, facts = await start("--listen", "127.0.0.1:0", "--directory", str(tmp_path))
    assert set(facts) == {"address", "redis_url", "metrics", "feed", "audit", "pids"}
    async with grpc.aio.insecure_channel(str(facts["address"])) as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    async with aiohttp.ClientSession() as http, http.get(str(facts["metrics"])) as page:
        assert page.status == 200
    with Redis.from_url(str(facts["redis_url"])) as redis:
        assert redis.config_get("appendonly") == {"appendonly": "yes"}
    pids = facts["pids"]
    assert isinstance(pids, dict)
    assert await end(process, signal.SIGINT) == 0
    assert [name for name, pid in pids.items() if alive(pid)] == []
    assert (tmp_path / "valkey").is_dir()


@pytest.mark.timeout(120)
async def test_up_does_not_print_the_password_of_its_redis() -> None:
    with EmbeddedServer() as server:
        with Redis.from_url(server.url) as redis:
            redis.config_set("requirepass", "s3cr3tPW")
        url = server.url.replace("://", "://:s3cr3tPW@")
        process, facts = await start("--listen", "127.0.0.1:0", "--no-observers", ORKI_REDIS_URL=url)
        assert await end(process, signal.SIGTERM) == 0
    assert facts["redis_url"] == server.url


@pytest.mark.timeout(120)
async def test_up_ends_when_its_orchestrator_ends() -> None:
    process, facts = await start("--listen", "127.0.0.1:0", "--no-observers")
    pids = facts["pids"]
    assert isinstance(pids, dict)
    os.kill(pids["serve"], signal.SIGKILL)
    async with asyncio.timeout(40):
        assert await process.wait() == 1
    process._transport.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("place", "says"), [("/proc/orki-up", "cannot be created"), ("file/below", "cannot be created")]
)
def test_up_reports_an_unusable_folder_in_one_sentence(tmp_path: Path, place: str, says: str) -> None:
    (tmp_path / "file").touch()
    ran = CliRunner().invoke(root, ["up", "--directory", str(tmp_path / place)])
    assert ran.exit_code == 2
    assert ran.output.startswith("orki: --directory ")
    assert says in ran.output
    assert ran.output.count("\n") == 1


def test_the_embedded_server_reports_an_unusable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InvalidSetting, match="cannot keep its files in"):
        EmbeddedServer(EmbeddedOptions(directory=tmp_path / "file/valkey")).start()


async def test_a_part_that_ends_before_it_is_ready_is_reported() -> None:
    supervisor = Supervisor()
    with pytest.raises(PartEnded, match="broken ended with exit code 3"):
        await supervisor.add(Part(name="broken", argv=(sys.executable, "-c", "raise SystemExit(3)")))
    await supervisor.stop()


async def test_a_part_that_is_not_essential_is_restarted(tmp_path: Path) -> None:
    marks = tmp_path / "starts"
    script = f"open({str(marks)!r}, 'a').write('x'); print('ready', flush=True); import time; time.sleep(0.2)"
    supervisor = Supervisor()
    child = await supervisor.add(Part(name="brief", argv=(sys.executable, "-c", script)))
    assert child.ready == "ready"
    async with asyncio.timeout(40):
        while len(marks.read_text()) < 2:
            await asyncio.sleep(0.05)
    await supervisor.stop()
    assert not supervisor.failed.done()


def test_the_embedded_server_keeps_appended_writes_after_a_kill(tmp_path: Path) -> None:
    with EmbeddedServer(EmbeddedOptions(directory=tmp_path, append_only=True)) as server:
        with Redis.from_url(server.url) as redis:
            redis.set("k", "v")
        server.kill()
        assert server.pid == 0
        server.start()
        with Redis.from_url(server.url) as redis:
            assert redis.get("k") == b"v"


def test_the_embedded_server_reports_a_taken_port(tmp_path: Path) -> None:
    with EmbeddedServer() as first:
        port = int(first.url.rsplit(":", 1)[1].split("/")[0])
        with pytest.raises(InvalidSetting, match="it is taken"):
            EmbeddedServer(EmbeddedOptions(directory=tmp_path, port=port)).start()


def test_second_start_picks_another_port_than_the_usual_one() -> None:
    with EmbeddedServer() as first:
        usual = int(first.url.rsplit(":", 1)[1].split("/")[0])
    servers = [EmbeddedServer(EmbeddedOptions(usual_port=usual)) for _ in range(4)]
    try:
        with ThreadPoolExecutor(len(servers)) as pool:
            urls = {server.url for server in pool.map(EmbeddedServer.start, servers)}
        assert len(urls) == len(servers)
        for url in urls:
            with Redis.from_url(url) as redis:
                assert redis.ping()
    finally:
        for server in servers:
            server.stop()


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_out_of_range_is_refused(port: int) -> None:
    with pytest.raises(InvalidSetting):
        EmbeddedOptions(port=port)
    with pytest.raises(InvalidSetting):
        EmbeddedOptions(usual_port=port)
