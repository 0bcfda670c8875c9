"""Bugs of other libraries that no other test covers; docs/peer-bugs.md lists all of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from orki.control.v1 import task_pb2 as pb
from orki.control.v1.attempt_pb2 import TaskState
from orki.control.v1.session_pb2 import SuspendedOutcome
from orki_contract.errors import HandlerFailed
from orki_control import Client, ClientOptions
from orki_control.session import ArrivedOffer
from orki_server._orchestrator import Orchestrator, OrchestratorOptions
from orki_server.embedded import EmbeddedOptions, EmbeddedServer

DO = "servertests.v1.WorkService/Do"
Make = Callable[..., Any]


@pytest.fixture
async def client(orchestrator: Orchestrator) -> AsyncIterator[Client]:
    async with Client(orchestrator.address) as opened:
        yield opened


async def submit(client: Client, **values: Any) -> str:
    (task,) = await client.submit_raw([pb.Submission(**({"method": DO, "request": b"\n\x01q"} | values))])
    return task.task_id


async def in_state(client: Client, task_id: str, state: TaskState, attempt: int = 1) -> None:
    async with asyncio.timeout(15):
        while True:
            task = await client.get(task_id)
            if (task.state, task.attempt.attempt) == (state, attempt):
                return
            await asyncio.sleep(0.02)


async def test_a_cancel_ends_a_task_that_waits_for_its_retry(
    orchestrator: Orchestrator, client: Client, stand_in: Make, work: Make
) -> None:
    async def handler(offer: ArrivedOffer) -> bytes:
        raise HandlerFailed("it fails")

    agent = stand_in(orchestrator.address, [work(retry_backoff={"initial": {"seconds": 60}})], handler=handler)
    await agent.ready()
    task_id = await submit(client)
    await in_state(client, task_id, TaskState.TASK_STATE_QUEUED)
    async with asyncio.timeout(5):
        await client.cancel(task_id)
        assert (await client.wait_end(task_id)).state == TaskState.TASK_STATE_CANCELLED
    assert len(agent.offers) == 1


@pytest.mark.parametrize("how", ["retried", "suspended"])
async def test_a_cancel_reaches_a_later_attempt(
    orchestrator: Orchestrator, client: Client, stand_in: Make, work: Make, how: str
) -> None:
    async def handler(offer: ArrivedOffer) -> Any:
        if offer.attempt.attempt == 1 and how == "retried":
            raise HandlerFailed("the first attempt fails")
        if offer.attempt.attempt == 1:
            return SuspendedOutcome(question="may I?")
        await asyncio.sleep(60)

    agent = stand_in(orchestrator.address, [work(retry_backoff={"initial": {"nanos": 1_000_000}})], handler=handler)
    await agent.ready()
    task_id = await submit(client)
    if how == "suspended":
        await in_state(client, task_id, TaskState.TASK_STATE_SUSPENDED)
        await client.answer(task_id, b"yes")
    await in_state(client, task_id, TaskState.TASK_STATE_RUNNING, 2)
    async with asyncio.timeout(5):
        await client.cancel(task_id)
        assert (await client.wait_end(task_id)).state == TaskState.TASK_STATE_CANCELLED
    assert agent.cancels == [agent.offers[1].attempt]


@pytest.mark.timeout(120)
async def test_delayed_and_retried_tasks_start_after_a_restart_of_the_store(
    tmp_path: Path, options: Make, launch: Make, stand_in: Make, work: Make
) -> None:
    async def handler(offer: ArrivedOffer) -> bytes:
        if not offer.offer.request and offer.attempt.attempt == 1:
            raise HandlerFailed("the first attempt fails")
        return b""

    with EmbeddedServer(EmbeddedOptions(directory=tmp_path, append_only=True)) as server:
        orchestrator = await launch(options(server.url))
        contract = work(retry_backoff={"initial": {"seconds": 2}, "maximum": {"seconds": 2}})
        agent = stand_in(orchestrator.address, [contract], handler=handler)
        await agent.ready()
        async with Client(orchestrator.address, ClientOptions(patience=60.0)) as client:
            retried = await submit(client, request=b"")
            await in_state(client, retried, TaskState.TASK_STATE_QUEUED)
            delayed = await submit(client, delay_ms=2000)
            # The append-only file is written once a second.
            await asyncio.sleep(1.2)
            server.kill()
            server.start()
            up = time.monotonic()
            for task_id in (delayed, retried):
                assert (await client.wait_end(task_id)).state == TaskState.TASK_STATE_SUCCEEDED
            assert time.monotonic() - up < 20.0
        await orchestrator.stop()


async def test_idle_agents_add_hardly_any_commands(redis_url: str, launch: Make, stand_in: Make) -> None:
    orchestrator = await launch(OrchestratorOptions(listen="127.0.0.1:0", redis_url=redis_url))
    rates = []
    with Redis.from_url(redis_url) as redis:

        def processed() -> int:
            stats: Any = redis.info("commandstats")
            return sum(stats.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in ("eval", "evalsha"))

        for count in (1, 16):
            agents = [stand_in(orchestrator.address, agent_id=f"idle-{count}-{number}") for number in range(count)]
            await asyncio.gather(*(agent.ready() for agent in agents))
            await asyncio.sleep(1.0)
            before = processed()
            await asyncio.sleep(4.0)
            rates.append((processed() - before) / 4.0)
    # The timers of 8 shards, ten times a second.
    assert max(rates) < 120, f"{rates} script calls a second"
    assert rates[1] - rates[0] < 20, f"{rates} script calls a second"
