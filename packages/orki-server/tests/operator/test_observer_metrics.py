"""The metrics observer as a process: values after events, kills and a clean stop."""

from __future__ import annotations

import asyncio
import random
import re
import signal
import socket
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest

from orki.events.v1.agent_orki import AGENTS
from orki.events.v1.agent_pb2 import AgentConnected, AgentEvent, AgentStopped
from orki.events.v1.usage_orki import USAGE
from orki.events.v1.usage_pb2 import UsageEvent
from orki_events import Events
from orki_events.connection import Connection, parse_address

Start = Callable[..., Any]

pytestmark = pytest.mark.timeout(180)


def metrics(observer: Start, url: str, port: int = 0) -> Any:
    return observer("observe", "metrics", "--redis", url, "--port", str(port))


async def scraped(url: str) -> str:
    async with aiohttp.ClientSession() as http, http.get(url) as response:
        assert response.status == 200
        assert response.headers["Content-Type"].startswith("text/plain; version=")
        return await response.text()


async def shown(url: str, *wanted: str, limit_s: float = 30.0) -> str:
    """Return the metrics once they contain all wanted lines."""
    text = ""
    for _ in range(int(limit_s / 0.1)):
        text = await scraped(url)
        if all(line in text for line in wanted):
            return text
        await asyncio.sleep(0.1)
    raise AssertionError(f"{wanted} not in:\n{text}")


async def test_metrics_of_events_groups_and_agents(
    observer: Start, valkey_url: str, events: Events, user: Any, canary: str
) -> None:
    await events.publish(USAGE, UsageEvent(model="m", agent_id="a", input_tokens=812))
    await events.publish(AGENTS, AgentEvent(agent_id="a", instance_id="1", connected=AgentConnected()))
    await events.publish(AGENTS, AgentEvent(agent_id="b", instance_id="2", connected=AgentConnected()))
    await events.publish(AGENTS, AgentEvent(agent_id="b", instance_id="2", stopped=AgentStopped()))
    await events.publish(user.stream, user.filled("r"))
    process = metrics(observer, valkey_url)
    text = await shown(
        process.where,
        'orki_tokens_total{agent="a",kind="input",model="m",provider=""} 812.0',
        "orki_agents_connected 1.0",
        'orki_agent_steps_total{step="connected"} 2.0',
        'orki_group_lag_entries{group="audit",stream="secrets"} 1.0',
        'orki_group_lag_entries{group="metrics",stream="usage"} 0.0',
    )
    assert canary not in text
    assert process.end() == 0
    assert canary not in process.log
    assert "Traceback" not in process.log


async def test_a_kill_loses_no_event(observer: Start, valkey_url: str, events: Events, link: Any) -> None:
    seed = random.randrange(1 << 30)
    draw = random.Random(seed)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = metrics(observer, valkey_url, port)
    counted = 0.0
    for round_ in range(3):
        for number in range(100):
            await events.publish(USAGE, UsageEvent(model="m", input_tokens=1 + number % 3))
        if round_ < 2:
            await asyncio.sleep(draw.uniform(0, 0.2))
            process.end(signal.SIGKILL)
            process.start()
    await shown(process.where, 'orki_group_lag_entries{group="metrics",stream="usage"} 0.0')
    for _ in range(300):
        if (await link.execute((b"XPENDING", "orki:ev:{usage}", b"metrics")))[0] == 0:
            break
        await asyncio.sleep(0.1)
    assert (await link.execute((b"XPENDING", "orki:ev:{usage}", b"metrics")))[0] == 0, f"seed {seed}"
    counted = float(re.findall(r'orki_events_total\{stream="usage"\} ([0-9.]+)', await scraped(process.where))[0])
    assert 100 <= counted <= 300, f"seed {seed}"
    assert process.end() == 0


async def test_the_dashboard_shows_every_family_and_no_other(
    observer: Start, valkey_url: str, events: Events, user: Any
) -> None:
    await events.publish(USAGE, UsageEvent(model="m", agent_id="a", input_tokens=812))
    process = metrics(observer, valkey_url)
    text = await shown(process.where, 'orki_check_state{check="store.memory"} 0.0')
    families = dict(line.split()[2:4] for line in text.splitlines() if line.startswith("# TYPE"))
    exposed = {f"{name}_bucket" if kind == "histogram" else name for name, kind in families.items()}
    async with aiohttp.ClientSession() as http:
        async with http.get(process.where.replace("/metrics", "/dashboard.json")) as response:
            dashboard = await response.json()
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    assert {name for query in queries for name in re.findall(r"orki_[a-z_]+", query)} == exposed


async def test_agents_are_counted_in_the_store_after_their_events_were_trimmed(
    observer: Start, orchestrator: Any, stand_in: Callable[..., Any], redis_url: str
) -> None:
    for number in range(3):
        await stand_in(orchestrator.address, agent_id=f"a{number}").ready()
    link = Connection(parse_address(redis_url), name="t", connect_timeout=5, answer_timeout=5)
    while (await link.execute((b"XLEN", b"orki:ev:{agents}"))) < 3:
        await asyncio.sleep(0.05)
    await link.execute((b"XTRIM", b"orki:ev:{agents}", b"MAXLEN", 0))
    await link.close()
    process = metrics(observer, redis_url)
    await shown(process.where, "orki_agents_connected 3.0")


async def test_unknown_parameters_and_pages(observer: Start, valkey_url: str) -> None:
    process = metrics(observer, valkey_url)
    async with aiohttp.ClientSession() as http:
        async with http.get(f"{process.where}?name=x") as response:
            assert response.status == 400
        async with http.get(process.where.replace("/metrics", "/other")) as response:
            assert response.status == 404


async def test_without_an_event_server_the_observer_serves_and_stops(observer: Start, dead_port: int) -> None:
    process = metrics(observer, f"redis://127.0.0.1:{dead_port}/0")
    assert "orki_agents_connected" in await scraped(process.where)
    await shown(process.where, 'orki_check_state{check="store.reachable"} 2.0')
    assert process.end() == 0
    assert "Traceback" not in process.log


async def test_a_server_that_refuses_the_observer_ends_it(observer: Start, valkey_url: str, link: Any) -> None:
    await link.execute((b"ACL", b"SETUSER", b"nobody", b"on", b">x", b"-@all", b"+client", b"+ping", b"resetkeys"))
    process = metrics(observer, valkey_url.replace("redis://", "redis://nobody:x@"))
    try:
        assert process.process.wait(30) == 1
    finally:
        await link.execute((b"ACL", b"DELUSER", b"nobody"))
    assert "NOPERM" in process.log
    assert "Traceback" not in process.log


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--host", "0.0.0.0"], 2, "loopback"),
        (["--port", "x"], 2, "not a valid integer"),
        (["--redis", "ftp://x"], 2, "redis://"),
        (["extra"], 2, "unexpected extra argument"),
    ],
)
def test_invalid_settings_end_the_observer_with_one_sentence(
    command: Callable[..., Any], arguments: list[str], code: int, says: str
) -> None:
    ended = command("observe", "metrics", *arguments)
    assert ended.returncode == code, ended.stderr
    assert says in ended.stderr
    assert "Traceback" not in ended.stderr
