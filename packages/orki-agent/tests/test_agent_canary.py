"""A sensitive value appears nowhere but where it belongs: a walk over everything that a fleet shows."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
from redis import Redis

from orki.control.v1.attempt_pb2 import TaskState
from orki.events.v1.audit_orki import AUDIT
from orki.events.v1.audit_pb2 import AuditEvent
from orki_agent import Agent
from orki_contract import EventStream
from orki_contract.errors import HandlerRejected, OrkiError
from orki_contract.masking import MASK
from orki_contract.model import Group
from orki_control import Client, JitterOptions
from orki_events import connect, consumer

pytestmark = pytest.mark.timeout(150)

CANARY = "xyzzy-canary-7731"
QUICK = JitterOptions(initial=0.05, maximum=0.2)


def leak(token: str) -> None:
    """Raise what a careless handler raises: the value in the text, the repr, the cause and a note."""
    try:
        raise KeyError(token)
    except KeyError as cause:
        cause.add_note(f"with {token}")
        raise ValueError(f"cannot use {token!r}: {{'token': '{token}'}}") from cause


@pytest.fixture
async def observed(store: str, tmp_path: Path) -> AsyncIterator[Callable[..., Awaitable[str]]]:
    """Start `orki ARGUMENTS` with its log in a file; returns what its readiness line says."""
    started: list[asyncio.subprocess.Process] = []

    async def start(*arguments: str) -> str:
        with (tmp_path / "logs").open("a") as log:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "orki_server", *arguments, "--redis", store),
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                cwd=tmp_path,
            )
        started.append(process)
        assert process.stdout is not None
        async with asyncio.timeout(30):
            line = (await process.stdout.readline()).decode()
        return line.partition(" ready: ")[2].strip()

    yield start
    for process in started:
        process.terminate()
    await asyncio.gather(*(process.communicate() for process in started))


async def command(cwd: Path, *arguments: str) -> str:
    """Return what `orki ARGUMENTS` prints."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "orki_server", *arguments), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=cwd
    )
    out, _ = await asyncio.wait_for(process.communicate(), 60)
    text = out.decode()
    assert "Traceback" not in text
    return text


async def read_feed(url: str, wanted: int) -> str:
    text = ""
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"{url}events", headers={"Last-Event-ID": "nowhere"}) as response,
    ):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(4):
                async for line in response.content:
                    text += line.decode()
                    if text.count("data: ") >= wanted:
                        break
    return text


async def test_a_canary_appears_nowhere(
    store: str,
    observed: Callable[..., Awaitable[str]],
    work: SimpleNamespace,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    address = (await observed("serve", "--listen", "127.0.0.1:0", "--verbose")).split()[0]
    await observed("observe", "audit", "audit.jsonl")
    metrics = await observed("observe", "metrics", "--port", "0")
    feed = await observed("observe", "feed", "--port", "0")
    shown: dict[str, str] = {}

    class Working(work.WorkServiceBase):  # type: ignore[misc, name-defined]
        async def work(self, request: Any, ctx: Any) -> Any:
            found = ctx.usage(model="model", input_tokens=7, output_tokens=7)
            if asyncio.iscoroutine(found):
                await found
            leak(request.token)

    class Grinding(work.GrindServiceSyncBase):  # type: ignore[misc, name-defined]
        def work(self, request: Any, ctx: Any) -> Any:
            raise HandlerRejected(f"refused {request.token}")

    agent = Agent("worker", Working(), Grinding())
    running = asyncio.create_task(agent.run(address, agent_id="a-1", backoff=QUICK, drain_grace=5.0))
    at = ("--orchestrator", address)
    async with Client(address) as client:
        ids = []
        for task in (work.WORK, work.GRIND):
            while True:
                with contextlib.suppress(Exception):
                    handle = await client.submit(task, work.WorkRequest(text="shown", token=CANARY))
                    break
                await asyncio.sleep(0.1)
            with pytest.raises(OrkiError) as failed:
                await handle.result(30)
            shown[f"error of {task.contract.name}"] = f"{failed.value!r} {failed.value}"
            snapshot = await client.get(handle.task_id)
            assert snapshot.state == TaskState.TASK_STATE_FAILED
            assert MASK in snapshot.failure.message
            watched = [str(news) async for news in client.watch(handle.task_id)]
            shown[f"watch of {task.contract.name}"] = "".join(watched)
            ids.append(handle.task_id)
    for task_id in ids:
        for name in ("tasks", "explain"):
            shown[f"{name} {task_id}"] = await command(tmp_path, name, task_id, *at)
            shown[f"{name} {task_id} JSON"] = await command(tmp_path, name, task_id, *at, "--json")
        shown[f"trace {task_id}"] = await command(tmp_path, "trace", task_id, "--redis", store, *at)

    # An event with a sensitive field, and a consumer whose handler fails with its value.
    letters = EventStream(AUDIT.message, replace(AUDIT.contract, groups=(*AUDIT.contract.groups, Group(name="mail"))))
    handled = asyncio.Event()

    @consumer(letters, group="mail")
    async def mail(event: AuditEvent, _: Any) -> None:
        if event.actor != "me":
            return
        handled.set()
        try:
            leak(event.detail)
        except ValueError as error:
            raise HandlerRejected(f"no mail: {error}") from error

    async with connect(store) as events:
        await events.publish(letters, AuditEvent(actor="me", action="test", detail=CANARY))
        stop = asyncio.Event()
        consuming = asyncio.create_task(events.run(mail, stop=stop))
        await asyncio.wait_for(handled.wait(), 30)
        while not (found := await events.raw_dead_letters(letters.contract, group="mail")):
            await asyncio.sleep(0.1)
        assert MASK in found[0].reason.message
        shown["dead letters"] = str(found[0].reason)
        stop.set()
        await consuming
    for stream in ("tasks", "agents", "usage", "audit"):
        tail = ("streams", "tail", stream, "--from-start", "--limit", "1", "--redis", store)
        shown[f"tail of {stream}"] = await command(tmp_path, *tail, "--json")
    for name in ("agents", "doctor"):
        shown[name] = await command(tmp_path, name, *at, *(("--redis", store) if name == "doctor" else ()))
    async with aiohttp.ClientSession() as session, session.get(metrics) as response:
        shown["metrics"] = await response.text()
    shown["feed"] = await read_feed(feed, 12)
    agent.drain()
    await asyncio.gather(running, return_exceptions=True)
    audit = tmp_path / "audit.jsonl"
    while '"action":"test"' not in audit.read_text():
        await asyncio.sleep(0.1)
    shown["audit"] = audit.read_text()
    shown["logs of the servers"] = (tmp_path / "logs").read_text()
    shown["logs of the agent and the consumer"] = caplog.text
    with Redis.from_url(store) as redis:
        reasons = [fields.get(b"r", b"") for key in redis.scan_iter(match="*dead*") for _, fields in redis.xrange(key)]
        shown["reasons in the server"] = repr(reasons)
    assert "cannot use" in caplog.text
    assert "no mail" in caplog.text
    assert {name for name, text in shown.items() if CANARY in text} == set()
    assert {name for name, text in shown.items() if not text} == {"logs of the servers"} & {
        name for name, text in shown.items() if not text
    }
