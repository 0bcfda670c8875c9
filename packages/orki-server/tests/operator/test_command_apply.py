"""`orki streams apply`: each role of the event plane does its work on a real server, and nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from orki.events.v1.usage_orki import USAGE
from orki.events.v1.usage_pb2 import UsageEvent
from orki_contract.errors import OrkiError
from orki_contract.model import Backoff
from orki_events import ConsumeOptions, connect
from orki_events.connection import Connection, parse_address
from orki_server._acl import roles
from orki_server.embedded import EmbeddedServer

pytestmark = pytest.mark.timeout(120)

_AT_ONCE = ConsumeOptions(backoff=Backoff(initial=0.001, maximum=0.001), sweep_interval=0.05)
_READER = "orki-consumer-secrets-readers"
_FORBIDDEN_TO_ALL: tuple[tuple[str, ...], ...] = (
    ("FLUSHALL",),
    ("KEYS", "*"),
    ("CONFIG", "GET", "*"),
    ("ACL", "LIST"),
    ("EVAL", "return 1", "0"),
    ("SCRIPT", "FLUSH"),
    ("SHUTDOWN",),
    ("XGROUP", "DESTROY", "orki:ev:{usage}", "audit"),
    ("XDEL", "orki:ev:{usage}", "1-1"),
    ("SET", "foreign", "1"),
    ("GET", "foreign"),
    ("HSET", "orki:streams", "usage", "{}"),
    ("HSET", "orki:retention", "usage", "{}"),
    ("XADD", "orki:{o0}:outbox", "*", "a", "b"),
    ("HGETALL", "orki:{o0}:task:x"),
)
FORBIDDEN: dict[str, tuple[tuple[str, ...], ...]] = {
    "orki-publisher": (
        *_FORBIDDEN_TO_ALL,
        ("DEL", "orki:ev:{usage}"),
        ("XREADGROUP", "GROUP", "audit", "me", "STREAMS", "orki:ev:{usage}", ">"),
        ("XACK", "orki:ev:{usage}", "audit", "1-1"),
        ("XADD", "orki:ev:{usage.audit.dead}", "*", "a", "b"),
    ),
    _READER: (
        *_FORBIDDEN_TO_ALL,
        ("DEL", "orki:ev:{usage}"),
        ("XADD", "orki:ev:{secrets:0}", "*", "a", "b"),
        ("XRANGE", "orki:ev:{usage}", "-", "+"),
        ("XREADGROUP", "GROUP", "audit", "me", "STREAMS", "orki:ev:{usage}", ">"),
        ("XADD", "orki:ev:{secrets.audit.dead}", "*", "a", "b"),
    ),
    "orki-observer": (
        *_FORBIDDEN_TO_ALL[:-1],
        ("XADD", "orki:ev:{usage}", "*", "a", "b"),
        ("HGETALL", "orki:{o0}:task:x"),
    ),
    "orki-orchestrator": (
        ("FLUSHALL",),
        ("KEYS", "*"),
        ("CONFIG", "GET", "*"),
        ("ACL", "LIST"),
        ("SHUTDOWN",),
        ("SET", "foreign", "1"),
    ),
    "orki-operator": (("FLUSHALL",), ("SHUTDOWN",), ("SET", "foreign", "1")),
}


@pytest.fixture
def server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer() as started:
        yield started


@pytest.fixture
async def applied(server: EmbeddedServer, user: Any, orki: Any) -> Callable[[str], str]:
    """A server with streams and users; returns the URL for a role."""
    async with connect(server.url) as events:
        await events.prepare(user.stream)
        await events.prepare(USAGE)
    ended = await orki("streams", "apply", "--json", "--redis", server.url)
    assert ended.code == 0, ended.err
    users = json.loads(ended.out)["users"]
    admin = Connection(parse_address(server.url), name="t", connect_timeout=5, answer_timeout=5)
    for name in users:
        await admin.execute(("ACL", "SETUSER", name, "on", ">secret"))
    # A second run changes no password.
    assert (await orki("streams", "apply", "--redis", server.url)).code == 0
    await admin.close()
    return lambda role: server.url.replace("redis://", f"redis://{role}:secret@")


@pytest.mark.parametrize("role", FORBIDDEN)
async def test_each_role_is_refused_everything_else(applied: Callable[[str], str], role: str) -> None:
    link = Connection(parse_address(applied(role)), name="t", connect_timeout=5, answer_timeout=5)
    allowed = []
    for command in FORBIDDEN[role]:
        (reply,) = await link.pipeline(command)
        if not isinstance(reply, OrkiError) or "NOPERM" not in reply.message:
            allowed.append((command, reply))
    await link.close()
    assert allowed == []


async def test_publisher_and_consumer_do_their_work(applied: Callable[[str], str], user: Any) -> None:
    async with connect(applied("orki-publisher")) as events:
        for number in range(20):
            await events.publish(user.stream, user.filled(f"r{number}", number))
    handled, failures = set(), 0
    async with connect(applied(_READER)) as events, asyncio.timeout(60):
        async for delivery in events.deliveries(user.stream, group="readers", options=_AT_ONCE):
            with contextlib.suppress(ValueError):
                async with delivery as event:
                    if event.number == 3:
                        failures += 1
                        raise ValueError("always")
                    handled.add(event.number)
            if len(handled) == 19 and failures >= 5:
                break
    async with connect(applied("orki-operator")) as events:
        ledger = (await events.ledger(user.stream)).groups["readers"]
        assert (ledger.processed, ledger.dead_lettered, ledger.pending, ledger.unread) == (19, 1, 0, 0)


async def test_a_publisher_may_probe_durability(applied: Callable[[str], str], server: EmbeddedServer) -> None:
    link = Connection(parse_address(server.url), name="t", connect_timeout=5, answer_timeout=5)
    probe = ("ACL", "DRYRUN", "orki-publisher", "SET")
    assert await link.execute((*probe, "orki:durable", "", "PX", "1")) == b"OK"
    assert await link.execute((*probe, "orki:ev:{usage}", "")) != b"OK"
    await link.close()


async def test_the_observers_do_their_work(
    applied: Callable[[str], str],
    observer: Callable[..., Any],
    user: Any,
    tmp_path: Path,
    until: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ORKI_REDIS_URL", applied("orki-observer"))
    audit = observer("observe", "audit", "audit.jsonl")
    metrics = observer("observe", "metrics", "--port", "0")
    feed = observer("observe", "feed", "--port", "0")
    async with aiohttp.ClientSession() as http:
        async with http.get(f"{feed.where}events") as response:
            async with connect(applied("orki-publisher")) as events:
                await events.publish(user.stream, user.filled("r"))
                await events.publish(USAGE, UsageEvent(model="m", input_tokens=7))
            text = ""
            async with asyncio.timeout(30):
                while "acmewatch.v1.SecretEvent" not in text or "UsageEvent" not in text:
                    text += (await response.content.readline()).decode()
        await until(lambda: (tmp_path / "audit.jsonl").read_text().count("\n") == 2)
        async with asyncio.timeout(30):
            while 'orki_tokens_total{agent="",kind="input",model="m",provider=""} 7.0' not in text:
                async with http.get(metrics.where) as page:
                    text = await page.text()
                await asyncio.sleep(0.1)
    for each in (audit, metrics, feed):
        assert "NOPERM" not in each.log
        assert each.end() == 0


async def test_the_orchestrator_does_its_work(
    applied: Callable[[str], str], observer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, orki: Any
) -> None:
    monkeypatch.setenv("ORKI_REDIS_URL", applied("orki-orchestrator"))
    process = observer("serve", "--listen", "127.0.0.1:0")
    address = process.where.split()[0]
    await asyncio.sleep(2)
    ended = await orki("doctor", "--orchestrator", address, "--json", ORKI_REDIS_URL=applied("orki-operator"))
    assert {check["name"] for check in json.loads(ended.out)["checks"] if check["verdict"] == "bad"} == set()
    assert "NOPERM" not in process.log
    assert process.end() == 0


async def test_an_orchestrator_loads_the_scripts_that_a_server_has_lost(
    applied: Callable[[str], str],
    server: EmbeddedServer,
    observer: Callable[..., Any],
    user: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ORKI_REDIS_URL", applied("orki-orchestrator"))
    observer("serve", "--listen", "127.0.0.1:0")
    admin = Connection(parse_address(server.url), name="t", connect_timeout=5, answer_timeout=5)
    async with connect(applied("orki-publisher")) as publisher, connect(applied(_READER)) as events:
        async with asyncio.timeout(60):
            await publisher.publish(user.stream, user.filled("r", 1))
            async for delivery in events.deliveries(user.stream, group="readers"):
                async with delivery as event:
                    pass
                if event.number == 2:
                    break
                await admin.execute(("SCRIPT", "FLUSH"))
                await publisher.publish(user.stream, user.filled("r", 2))
    await admin.close()


async def test_the_commands_can_be_printed(server: EmbeddedServer, user: Any, orki: Any) -> None:
    async with connect(server.url) as events:
        await events.prepare(user.stream)
    ended = await orki("streams", "apply", "--print", "--users", "acme", "--redis", server.url)
    lines = ended.out.splitlines()
    assert lines
    assert all(line.startswith("ACL SETUSER acme-") for line in lines)
    assert any("acme-consumer-secrets-readers" in line and "~orki:*:{secrets}*" in line for line in lines)
    link = Connection(parse_address(server.url), name="t", connect_timeout=5, answer_timeout=5)
    assert await link.execute(("ACL", "USERS")) == [b"default"]
    await link.close()


def test_older_servers_get_rules_that_they_understand(user: Any) -> None:
    for role in roles([user.stream.contract], version=(6, 2, 14)):
        assert not any(rule.startswith(("%", "(")) or rule in ("+waitaof", "clearselectors") for rule in role.rules)
