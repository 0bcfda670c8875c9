"""`orki doctor` as a process, against servers in every state that it reports."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from orki_contract.errors import OrkiError
from orki_contract.model import Backoff
from orki_events import ConsumeOptions, Events, connect
from orki_events.connection import Connection, parse_address
from orki_server.embedded import EmbeddedServer

pytestmark = pytest.mark.timeout(180)

_AT_ONCE = ConsumeOptions(backoff=Backoff(initial=0.001, maximum=0.001), sweep_interval=0.05)


@pytest.fixture
def own_valkey() -> Iterator[EmbeddedServer]:
    """A server that the test may misconfigure and stop."""
    with EmbeddedServer() as server:
        yield server


async def doctor(orki: Any, url: str, orchestrator: str, *more: str) -> tuple[int, dict[str, dict[str, str]]]:
    ended = await orki("doctor", "--redis", url, "--orchestrator", orchestrator, "--timeout", "2", "--json", *more)
    found = json.loads(ended.out)
    checks = {each["name"]: each for each in found["checks"]}
    for each in checks.values():
        assert sorted(each) == ["cause", "figure", "name", "next_step", "state", "verdict"]
        assert each["verdict"] == "ok" or (each["cause"] and each["next_step"]), each
    assert found["healthy"] == (ended.code == 0)
    return ended.code, checks


async def test_a_healthy_fleet(orchestrator: Any, redis_url: str, orki: Any) -> None:
    code, checks = await doctor(orki, redis_url, orchestrator.address)
    assert code == 0, checks
    assert checks["store.reachable"]["verdict"] == checks["orchestrator"]["verdict"] == "ok"
    assert checks["store.eviction"]["figure"] == "noeviction"
    table = await orki("doctor", "--redis", redis_url, "--orchestrator", orchestrator.address, COLUMNS="80")
    assert all(len(line) <= 80 for line in table.out.splitlines())
    assert table.code == 0


async def test_an_evicting_policy_and_a_missing_group_are_bad(
    own_valkey: EmbeddedServer, link: Any, events: Events, user: Any, valkey_url: str, orki: Any, dead_port: int
) -> None:
    await events.publish(user.stream, user.filled("r"))
    await link.execute((b"XGROUP", b"DESTROY", "orki:ev:{secrets:0}", b"readers"))
    await link.execute((b"CONFIG", b"SET", b"maxmemory-policy", b"allkeys-lru"))
    try:
        code, checks = await doctor(orki, valkey_url, f"127.0.0.1:{dead_port}")
    finally:
        await link.execute((b"CONFIG", b"SET", b"maxmemory-policy", b"noeviction"))
    assert code == 1
    assert checks["store.eviction"]["verdict"] == "bad"
    assert checks["events.secrets.readers"]["figure"] == "missing"
    assert checks["events.secrets.audit"]["state"] == "group-unattended"
    assert checks["orchestrator"]["verdict"] == "bad"


async def test_a_hung_store_is_distinguished_from_an_unreachable_one(
    own_valkey: EmbeddedServer, orki: Any, dead_port: int
) -> None:
    os.kill(own_valkey.pid, signal.SIGSTOP)
    try:
        code, checks = await doctor(orki, own_valkey.url, f"127.0.0.1:{dead_port}")
    finally:
        os.kill(own_valkey.pid, signal.SIGCONT)
    assert (code, checks["store.reachable"]["figure"].split(":")[0]) == (1, "hung")
    code, checks = await doctor(orki, f"redis://127.0.0.1:{dead_port}/0", f"127.0.0.1:{dead_port}")
    assert (code, checks["store.reachable"]["figure"].split(":")[0]) == (1, "unreachable")


async def test_a_server_that_runs_a_long_script_is_busy_and_not_hung(
    own_valkey: EmbeddedServer, orki: Any, dead_port: int
) -> None:
    async with contextlib.AsyncExitStack() as stack:

        def opened() -> Connection:
            link = Connection(parse_address(own_valkey.url), name="t", connect_timeout=5, answer_timeout=60)
            stack.push_async_callback(link.close)
            return link

        runs, asks = opened(), opened()
        await runs.execute((b"CONFIG", b"SET", b"busy-reply-threshold", b"100"))
        script = asyncio.create_task(runs.execute((b"EVAL", b"while true do end", 0)))
        await asyncio.sleep(1)
        code, checks = await doctor(orki, own_valkey.url, f"127.0.0.1:{dead_port}")
        await asks.execute((b"SCRIPT", b"KILL"))
        with contextlib.suppress(OrkiError):
            await script
    found = checks["store.reachable"]
    assert (code, found["verdict"], found["figure"].split(":")[0]) == (1, "bad", "busy")
    assert "runs a long script" in found["figure"]
    assert "SCRIPT KILL" in found["next_step"]
    assert "estart" not in json.dumps(found)


async def test_a_missing_password_is_reported(own_valkey: EmbeddedServer, orki: Any, dead_port: int) -> None:
    own = Connection(parse_address(own_valkey.url), name="t", connect_timeout=5, answer_timeout=5)
    await own.execute((b"CONFIG", b"SET", b"requirepass", b"opensesame"))
    await own.close()
    code, checks = await doctor(orki, own_valkey.url, f"127.0.0.1:{dead_port}")
    assert (code, checks["store.reachable"]["verdict"]) == (1, "bad")
    assert "password" in checks["store.reachable"]["cause"]
    right = own_valkey.url.replace("redis://", "redis://:opensesame@")
    code, checks = await doctor(orki, right, f"127.0.0.1:{dead_port}")
    assert checks["store.reachable"]["verdict"] == "ok"
    assert "opensesame" not in json.dumps(checks)


async def test_another_server_on_the_orchestrators_port_is_reported(orki: Any, own_valkey: EmbeddedServer) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        code, checks = await doctor(orki, own_valkey.url, f"127.0.0.1:{silent.getsockname()[1]}")
    assert (code, checks["orchestrator"]["verdict"]) == (1, "bad")


async def test_dead_letters_are_bad_until_they_are_replayed(
    orchestrator: Any, user: Any, redis_url: str, orki: Any
) -> None:
    """Uses the commands that the doctor suggests."""
    async with connect(redis_url) as events:
        await events.publish(user.stream, user.filled("r", 7))

        async def fail(times: int) -> None:
            async for delivery in events.deliveries(user.stream, group="readers", options=_AT_ONCE):
                with contextlib.suppress(ValueError):
                    async with delivery:
                        raise ValueError("the printer is out of paper")
                times -= 1
                if not times:
                    return

        await asyncio.wait_for(fail(user.stream.contract.group("readers").max_deliveries), 60)
        code, checks = await doctor(orki, redis_url, orchestrator.address)
        assert code == 1
        found = checks["events.secrets.readers.dead_letters"]
        assert (found["verdict"], found["figure"]) == ("bad", "1 dead letter")
        assert "events.secrets.audit.dead_letters" not in checks
        command = "streams dead secrets readers"
        assert f"orki {command}" in found["next_step"]
        shown = await orki(*command.split(), "--redis", redis_url, "--json")
        (letter,) = json.loads(shown.out)
        assert (letter["deliveries"], letter["replayed"]) == (5, False)
        assert "out of paper" in letter["message"]
        table = await orki("streams", "--redis", redis_url, "dead", "secrets", "readers", COLUMNS="80")
        assert letter["entry_id"] in table.out
        assert "DELIVERIES_EXHAUSTED" in table.out
        replayed = await orki(*command.split(), "--replay", "--redis", redis_url)
        assert "1 of 1 replayed" in replayed.err
        async with asyncio.timeout(30):
            async for delivery in events.deliveries(user.stream, group="readers"):
                async with delivery as event:
                    assert event.number == 7
                break
    code, checks = await doctor(orki, redis_url, orchestrator.address)
    assert "events.secrets.readers.dead_letters" not in checks
    assert code == 0, checks


@pytest.mark.parametrize(("stream", "group"), [("nobody", "readers"), ("secrets", "nobody")])
async def test_dead_letters_of_an_unknown_group_or_stream_are_refused(
    events: Events, user: Any, valkey_url: str, orki: Any, stream: str, group: str
) -> None:
    await events.prepare(user.stream)
    ended = await orki("streams", "dead", stream, group, "--redis", valkey_url)
    assert (ended.code, ended.out) == (1, "")
    assert "nobody" in ended.err
