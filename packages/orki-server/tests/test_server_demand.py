"""Demand is kept by method: only agents that serve a queued task are asked, and an idle fleet asks for nobody."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from redis import Redis

from orki.control.v1 import task_pb2 as pb
from orki.control.v1.attempt_pb2 import TaskState
from orki_control import Client
from orki_control.session import ArrivedOffer
from orki_server._orchestrator import Orchestrator

DO = "servertests.v1.WorkService/Do"
OTHER = "servertests.v1.OtherService"
Make = Callable[..., Any]


@pytest.fixture
async def client(orchestrator: Orchestrator) -> AsyncIterator[Client]:
    async with Client(orchestrator.address) as opened:
        yield opened


class Commands:
    """Records the commands of the store between `start` and `stop`."""

    def __init__(self, redis_url: str) -> None:
        self.found: list[str] = []
        self._url = redis_url
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._record)

    def _record(self) -> None:
        with Redis.from_url(self._url) as redis, redis.monitor() as monitor:
            self._ready.set()
            for command in monitor.listen():
                self.found.append(command["command"])
                if command["command"] == "PING":
                    return

    async def start(self) -> None:
        self._thread.start()
        while not self._ready.is_set():
            await asyncio.sleep(0.01)

    async def stop(self) -> list[str]:
        """Return the script calls."""
        with Redis.from_url(self._url) as redis:
            redis.execute_command("PING")
        while self._thread.is_alive():
            await asyncio.sleep(0.01)
        self._thread.join()
        return [each for each in self.found if each.startswith("EVALSHA")]


async def seconds_of(client: Client, count: int) -> float:
    """Return the time that empty tasks take, one slot after another."""
    started = time.monotonic()
    tasks = await client.submit_raw([pb.Submission(method=DO)] * count)
    ends = await asyncio.gather(*(client.wait_end(task.task_id) for task in tasks))
    assert {end.state for end in ends} == {TaskState.TASK_STATE_SUCCEEDED}
    return time.monotonic() - started


async def test_an_idle_agent_of_another_service_delays_no_task(
    orchestrator: Orchestrator, client: Client, stand_in: Make, work: Make
) -> None:
    agent = stand_in(orchestrator.address, slots=1)
    await agent.ready()
    await seconds_of(client, 30)
    alone = await seconds_of(client, 30)
    other = stand_in(orchestrator.address, [work(OTHER)], agent_id="other", slots=8)
    await other.ready()
    beside = await seconds_of(client, 30)
    assert beside <= 2 * alone + 0.1
    assert other.offers == []


async def test_tasks_of_a_busy_method_hold_up_no_other_method(
    orchestrator: Orchestrator, client: Client, stand_in: Make, work: Make
) -> None:
    """More tasks are queued for one agent than it has slots; another agent's tasks pass them."""
    release = asyncio.Event()

    async def block(offer: ArrivedOffer) -> bytes:
        await release.wait()
        return offer.offer.request

    busy = stand_in(orchestrator.address, [work(OTHER)], agent_id="busy", slots=1, handler=block)
    agent = stand_in(orchestrator.address, slots=1)
    await asyncio.gather(busy.ready(), agent.ready())
    waiting = await client.submit_raw([pb.Submission(method=f"{OTHER}/Do")] * 10)
    await busy.until(lambda: bool(busy.offers))
    assert await seconds_of(client, 30) < 2.0
    release.set()
    ends = await asyncio.gather(*(client.wait_end(task.task_id) for task in waiting))
    assert {end.state for end in ends} == {TaskState.TASK_STATE_SUCCEEDED}


async def test_an_idle_orchestrator_asks_for_nobody(
    orchestrator: Orchestrator, redis_url: str, client: Client, stand_in: Make
) -> None:
    agents = [stand_in(orchestrator.address, agent_id=f"idle-{number}") for number in range(8)]
    await asyncio.gather(*(agent.ready() for agent in agents))
    await seconds_of(client, 4)
    await asyncio.sleep(0.3)
    commands = Commands(redis_url)
    await commands.start()
    await asyncio.sleep(3.0)
    calls = await commands.stop()
    assert calls
    assert [each for each in calls if " offer " in each] == []
    # The names of the agents are the heartbeats' and the snapshots' only.
    assert [each for each in calls if "idle-" in each and " renew " not in each] == []


async def test_one_task_asks_few_of_many_idle_agents(
    orchestrator: Orchestrator, redis_url: str, client: Client, stand_in: Make
) -> None:
    agents = [stand_in(orchestrator.address, agent_id=f"idle-{number}") for number in range(40)]
    await asyncio.gather(*(agent.ready() for agent in agents))
    await asyncio.sleep(0.5)
    commands = Commands(redis_url)
    await commands.start()
    for _ in range(10):
        await seconds_of(client, 1)
    found = [each for each in await commands.stop() if " offer " in each]
    assert found
    assert max(each.count("idle-") for each in found) <= 2
    # They take turns.
    assert len({agent for agent in agents if agent.offers}) >= 8
