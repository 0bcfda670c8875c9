"""Agents and clients of real orchestrators: processes on one store, any of which is killed."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orki.control.v1.attempt_pb2 import TaskState
from orki_agent import Agent
from orki_contract.errors import InvalidSetting, UnknownMethod
from orki_control import Client, ClientOptions, JitterOptions

QUICK = JitterOptions(initial=0.05, maximum=0.2)


def service(work: SimpleNamespace, handler: Callable[[Any, Any], Any]) -> Any:
    class Service(work.WorkServiceBase):  # type: ignore[misc, name-defined]
        async def work(self, request: Any, ctx: Any) -> Any:
            return await handler(request, ctx)

    return Service()


@asynccontextmanager
async def running(agent: Agent, target: Any, **changes: Any) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(agent.run(target, backoff=QUICK, drain_grace=5.0, **changes))
    try:
        yield task
        assert not task.done(), task.exception()
    finally:
        agent.drain()
        async with asyncio.timeout(20):
            await asyncio.gather(task, return_exceptions=True)


async def test_an_agent_may_connect_to_another_host_if_that_is_asked_for(work: SimpleNamespace) -> None:
    agent = Agent("worker", service(work, lambda request, ctx: None))
    assert agent.settings("orki.internal:50051", insecure=True).insecure
    with pytest.raises(InvalidSetting, match="not encrypted"):
        agent.settings("127.0.0.1:50051,orki.internal:50051")


async def submitted(client: Client, task: Any, request: Any) -> Any:
    """A submission of a method that an agent may still have to register."""
    async with asyncio.timeout(20):
        while True:
            try:
                return await client.submit(task, request)
            except UnknownMethod:
                await asyncio.sleep(0.05)


async def connected(client: Client, orchestrator_id: str) -> float:
    """Return when an agent has a session with this orchestrator."""
    async with asyncio.timeout(30):
        while True:
            agents = await client.list_agents()
            if any(each.connected and each.orchestrator_id == orchestrator_id for each in agents):
                return time.monotonic()
            await asyncio.sleep(0.02)


@pytest.mark.timeout(120)
async def test_the_store_knows_at_once_that_the_first_task_runs(serve: Any, work: SimpleNamespace) -> None:
    served = await serve("--heartbeat-interval-ms", "5000", "--orchestrator-id", "a")
    starts = 0

    async def handler(request: Any, ctx: Any) -> Any:
        nonlocal starts
        starts += 1
        async for _ in ctx.directives():
            return work.WorkResponse(text="directed")

    waits = []
    async with Client(served.address) as client:
        for number in range(3):
            async with running(Agent("worker", service(work, handler)), served.address, agent_id=f"first-{number}"):
                await connected(client, "a")
                began = time.monotonic()
                handle = await submitted(client, work.WORK, work.WorkRequest())
                async for news in client.watch(handle.task_id):
                    if news.task.state == TaskState.TASK_STATE_RUNNING:
                        waits.append(time.monotonic() - began)
                        break
                await handle.direct(work.WorkDirective(text="now"))
                assert (await handle.result(10)).text == "directed"
                assert (await client.get(handle.task_id)).attempt.attempt == 1
    assert starts == 3
    # The machine may be busy once; a wait for the heartbeat takes seconds each time.
    assert min(waits) < 0.1, waits
    assert max(waits) < 2.0, waits


@pytest.mark.timeout(120)
@pytest.mark.parametrize("form", ["text", "sequence"])
async def test_a_killed_orchestrator_is_left_for_the_next_one(serve: Any, work: SimpleNamespace, form: str) -> None:
    first, second = await serve("--orchestrator-id", "a"), await serve("--orchestrator-id", "b")
    target: Any = [first.address, second.address]
    if form == "text":
        target = ", ".join(target)
    attempts = []

    async def handler(request: Any, ctx: Any) -> Any:
        attempts.append(ctx.attempt)
        await ctx.progress(work.WorkProgress(number=1))
        async for directive in ctx.directives():
            await ctx.progress(work.WorkProgress(number=2))
            return work.WorkResponse(text=directive.text)

    options = ClientOptions(backoff=QUICK, patience=20)
    async with (
        running(Agent("worker", service(work, handler), slots=1), target, agent_id=f"moving-{form}"),
        Client(target, options) as client,
    ):
        await connected(client, "a")
        handle = await submitted(client, work.WORK, work.WorkRequest())
        deltas = handle.progress()
        assert (await anext(deltas)).number == 1
        waiting = asyncio.create_task(handle.result(30))
        await first.end(signal.SIGKILL)
        killed = time.monotonic()
        moved = await connected(client, "b") - killed
        assert moved < work.WORK.contract.heartbeat_timeout / 2
        await handle.direct(work.WorkDirective(text="on b"))
        assert (await waiting).text == "on b"
        assert [delta.number async for delta in deltas] == [2], "the watch resumed after the first delta"
        assert (await client.get(handle.task_id)).attempt.attempt == 1
        again = await client.submit(work.WORK, work.WorkRequest())
        while (await client.get(again.task_id)).state != TaskState.TASK_STATE_RUNNING:
            await asyncio.sleep(0.02)
        await again.cancel()
    assert attempts == [1, 1]


@pytest.mark.timeout(120)
async def test_a_name_of_several_addresses_counts_as_several(
    serve: Any, work: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.2", 0))
        port = probe.getsockname()[1]
    hosts = ("127.0.0.2", "127.0.0.3")
    first, second = [await serve("--orchestrator-id", host, listen=f"{host}:{port}") for host in hosts]
    real = socket.getaddrinfo

    def resolve(host: Any, *arguments: Any, **options: Any) -> Any:
        if host != "fleet.test":
            return real(host, *arguments, **options)
        return [info for each in hosts for info in real(each, *arguments, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)

    async def handler(request: Any, ctx: Any) -> Any:
        await asyncio.sleep(request.seconds)
        return work.WorkResponse(text="done")

    target = f"fleet.test:{port}"
    options = ClientOptions(backoff=QUICK, patience=20, insecure=True)
    async with (
        running(Agent("worker", service(work, handler)), target, agent_id="named", insecure=True),
        Client(target, options) as client,
    ):
        handle = await submitted(client, work.WORK, work.WorkRequest(seconds=4))
        while (await client.get(handle.task_id)).state != TaskState.TASK_STATE_RUNNING:
            await asyncio.sleep(0.02)
        found = [each for each in await client.list_agents() if each.agent_id == "named"]
        dying, other = (first, hosts[1]) if found[0].orchestrator_id == hosts[0] else (second, hosts[0])
        await dying.end(signal.SIGKILL)
        assert (await handle.result(30)).text == "done"
        await connected(client, other)
        assert (await client.get(handle.task_id)).attempt.attempt == 1


@pytest.mark.timeout(120)
async def test_the_command_takes_several_addresses(
    serve: Any, work: SimpleNamespace, work_path: Path, tmp_path: Path
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        nobody = f"127.0.0.1:{probe.getsockname()[1]}"
    served = await serve("--orchestrator-id", "c")
    program = PROGRAM.format(conftest=str(Path(__file__).with_name("conftest.py")))
    (tmp_path / "an_agent.py").write_text(program)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "orki_agent", "run", "an_agent:agent"),
        cwd=tmp_path,
        env={"PYTHONPATH": str(work_path), "ORKI_ORCHESTRATOR": f"{nobody},{served.address}"},
    )
    try:
        async with Client(served.address) as client:
            handle = await submitted(client, work.WORK, work.WorkRequest())
            assert (await handle.result(20)).text == "done"
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(15):
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


PROGRAM = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("contract_of_the_tests", {conftest!r})
contract = importlib.util.module_from_spec(spec)
sys.modules["contract_of_the_tests"] = contract
spec.loader.exec_module(contract)
from orki_agent import Agent
from orki_contract.images import image_of
work = contract.make_work(image_of(contract.PACKAGE))

class Worker(work.WorkServiceBase):
    async def work(self, request, ctx):
        return work.WorkResponse(text="done")

agent = Agent("worker", Worker())
"""
