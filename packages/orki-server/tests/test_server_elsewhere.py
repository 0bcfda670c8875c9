"""Tasks whose agent has its session at another orchestrator: every request works through any of them, at once.

Two real processes share a store. The agent connects to A, and the client to B.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import statistics
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from orki.control.v1 import task_pb2 as pb
from orki.control.v1.attempt_pb2 import TaskState
from orki_contract.errors import NotDirectable, StoreUnavailable
from orki_control import Client, ClientOptions
from orki_control.session import ArrivedOffer
from orki_server._orchestrator import Orchestrator
from orki_server._store import operations
from orki_server._store.store import Store
from orki_server.embedded import EmbeddedOptions, EmbeddedServer

DO = "servertests.v1.WorkService/Do"
DIRECT = "servertests.v1.WorkService/Direct"
OTHER = "servertests.v1.OtherService"
ORDER = b"\n\x02go"
Make = Callable[..., Any]


@pytest.fixture
async def other(served: Any, redis_url: str, tmp_path: Path) -> AsyncIterator[Any]:
    """Another orchestrator on the same store."""
    folder = tmp_path / "other"
    folder.mkdir()
    process = type(served)(redis_url, folder)
    await process.start()
    yield process
    await process.end(signal.SIGTERM)


async def forever(offer: ArrivedOffer) -> bytes:
    await asyncio.Event().wait()
    return b""


async def submit(client: Client, method: str = DO, request: bytes = b"") -> str:
    (task,) = await client.submit_raw([pb.Submission(method=method, request=request)])
    return task.task_id


async def running(client: Client, task_id: str) -> None:
    async with asyncio.timeout(20):
        while (await client.get(task_id)).state != TaskState.TASK_STATE_RUNNING:
            await asyncio.sleep(0.02)


def lose_wakeups(redis_url: str) -> None:
    """Forbid all channels: announcements are neither sent nor received."""
    with Redis.from_url(redis_url) as redis:
        redis.execute_command("ACL", "SETUSER", "default", "resetchannels")


@pytest.fixture(params=["announced", "not announced"])
def announced(request: Any, redis_url: str) -> Any:
    """Whether announcements arrive; without them polls find the same, later."""
    if request.param == "not announced":
        lose_wakeups(redis_url)
    yield request.param == "announced"
    with Redis.from_url(redis_url) as redis:
        redis.execute_command("ACL", "SETUSER", "default", "allchannels")


async def test_a_cancel_through_another_orchestrator_arrives_at_once(
    announced: bool, served: Any, other: Any, stand_in: Make
) -> None:
    agent = stand_in(served.address, handler=forever, slots=20)
    await agent.ready()
    waits = []
    async with Client(other.address) as client:
        for number in range(9):
            task_id = await submit(client)
            await running(client, task_id)
            started = time.monotonic()
            await client.cancel(task_id)
            # A heartbeat at this moment may find the cancel as well.
            await agent.until(lambda: len(set(agent.cancels)) == number + 1)  # noqa: B023
            waits.append(time.monotonic() - started)
            assert (await client.wait_end(task_id)).state == TaskState.TASK_STATE_CANCELLED
    assert statistics.median(waits) < (0.1 if announced else 1.5)


async def test_a_directive_through_another_orchestrator_is_answered(
    announced: bool, served: Any, other: Any, stand_in: Make
) -> None:
    agent = stand_in(served.address, handler=forever)
    await agent.ready()
    waits = []
    async with Client(other.address) as client:
        task_id = await submit(client, DIRECT)
        await running(client, task_id)
        for number in range(9):
            started = time.monotonic()
            attempt = await client.direct(task_id, ORDER)
            waits.append(time.monotonic() - started)
            assert attempt.task_id == task_id
            assert agent.directives == [ORDER] * (number + 1)
        assert statistics.median(waits) < (0.1 if announced else 3.0)
        # Refusals are the same through any orchestrator.
        undirected = await submit(client)
        with pytest.raises(NotDirectable, match="declares no directive"):
            await client.direct(undirected, ORDER)
        await client.cancel(task_id)
        await client.wait_end(task_id)
        with pytest.raises(NotDirectable, match="is cancelled"):
            await client.direct(task_id, ORDER)


async def test_a_watch_through_another_orchestrator_is_as_fast(served: Any, other: Any, stand_in: Make) -> None:
    """States, progress and result; the agent reports the same number of deltas to both."""
    agent = stand_in(served.address, slots=1)
    gate = asyncio.Event()

    async def report(offer: ArrivedOffer) -> bytes:
        for _ in range(20):
            await asyncio.sleep(0.03)
            agent.machine.progress(offer.attempt, b"\n\x08%08d" % (time.monotonic() * 1000 % 1e8))
            agent.say()
        await gate.wait()
        return offer.offer.request

    agent.handler = report
    await agent.ready()

    async def lags(address: str) -> float:
        """Return the median time from a report to the watcher, in seconds."""
        gate.clear()
        found, ended = [], 0.0
        async with Client(address) as client:
            task_id = await submit(client, DIRECT)
            async for news in client.watch(task_id):
                if news.HasField("progress"):
                    sent = int(news.progress.payload[2:])
                    found.append((time.monotonic() * 1000 % 1e8 - sent) / 1000)
                    if len(found) == 20:
                        ended = time.monotonic()
                        gate.set()
                elif news.task.state == TaskState.TASK_STATE_SUCCEEDED:
                    found.append(time.monotonic() - ended)
            started = time.monotonic()
            gate.set()
            await client.wait_end(await submit(client, DO))
            assert time.monotonic() - started < 2.0
        return statistics.median(found)

    here, there = await lags(served.address), await lags(other.address)
    assert there <= 3 * here + 0.01


async def test_results_arrive_through_another_orchestrator_as_fast(served: Any, other: Any, stand_in: Make) -> None:
    agent = stand_in(served.address)
    await agent.ready()

    async def cycle(address: str) -> float:
        found = []
        async with Client(address) as client:
            for _ in range(30):
                started = time.monotonic()
                await client.wait_end(await submit(client))
                found.append(time.monotonic() - started)
        return statistics.median(found)

    here, there = await cycle(served.address), await cycle(other.address)
    assert there <= 3 * here + 0.01


async def test_tasks_that_another_orchestrator_queues_are_found(
    announced: bool, served: Any, other: Any, stand_in: Make, work: Make
) -> None:
    """B also has an idle agent, of another service."""
    agent, idle = stand_in(served.address), stand_in(other.address, [work(OTHER)], agent_id="idle")
    await asyncio.gather(agent.ready(), idle.ready())
    waits = []
    async with Client(other.address) as client:
        for _ in range(5):
            count, started = len(agent.offers), time.monotonic()
            await submit(client)
            await agent.until(lambda: len(agent.offers) > count)  # noqa: B023
            waits.append(time.monotonic() - started)
    assert idle.offers == []
    assert statistics.median(waits) < (0.1 if announced else 1.5)


@pytest.mark.timeout(120)
async def test_all_goes_on_when_the_agent_s_orchestrator_is_killed(served: Any, other: Any, stand_in: Make) -> None:
    """Each time, the orchestrator that has the session is killed; the agent connects to the one that is left."""
    agent = stand_in(served.address, handler=forever)
    await agent.ready()
    async with Client(other.address, ClientOptions(patience=60.0)) as client:
        cancelled, directed = await submit(client), await submit(client, DIRECT)
        for task_id in (cancelled, directed):
            await running(client, task_id)
        watching = asyncio.create_task(client.wait_end(cancelled))
        await client.direct(directed, ORDER)
        await served.end(signal.SIGKILL)
        await asyncio.sleep(0.2)
        with pytest.raises(NotDirectable, match="is gone|did not answer|no session"):
            await client.direct(directed, ORDER)
        # The cancel is stored although nobody has the session.
        await client.cancel(cancelled)
        assert agent.cancels == []
        await agent.move(other.address)
        await agent.until(lambda: bool(agent.cancels))
        assert (await watching).state == TaskState.TASK_STATE_CANCELLED
        await client.direct(directed, ORDER)
        assert agent.directives == [ORDER] * 2
        # Back at A, through B.
        await served.start()
        await agent.move(served.address)
        await agent.until(lambda: len(agent.opened) == 3)
        await client.direct(directed, ORDER)
        assert agent.directives == [ORDER] * 3
        await client.cancel(directed)
        assert (await client.wait_end(directed)).state == TaskState.TASK_STATE_CANCELLED
    assert agent.revoked == []
    assert len(agent.offers) == 2


@pytest.mark.timeout(120)
async def test_all_goes_on_after_a_restart_of_the_store(
    tmp_path: Path, options: Make, launch: Make, stand_in: Make
) -> None:
    with EmbeddedServer(EmbeddedOptions(directory=tmp_path, append_only=True)) as server:
        first = await launch(options(server.url, orchestrator_id="o1"))
        second = await launch(options(server.url, orchestrator_id="o2"))
        agent = stand_in(first.address, handler=forever)
        await agent.ready()
        async with Client(second.address, ClientOptions(patience=60.0)) as client:
            task_id = await submit(client, DIRECT)
            await running(client, task_id)
            watching = asyncio.create_task(client.wait_end(task_id))
            server.kill()
            await asyncio.sleep(0.5)
            server.start()
            async with asyncio.timeout(30):
                while not agent.directives:
                    await asyncio.sleep(0.1)
                    with contextlib.suppress(NotDirectable, StoreUnavailable):
                        await client.direct(task_id, ORDER)
            waits = []
            for _ in range(5):
                started = time.monotonic()
                await client.direct(task_id, ORDER)
                waits.append(time.monotonic() - started)
            assert statistics.median(waits) < 0.1
            await client.cancel(task_id)
            assert (await watching).state == TaskState.TASK_STATE_CANCELLED
        await asyncio.gather(first.stop(), second.stop())


async def test_lost_connections_for_announcements_are_opened_again(
    served: Any, other: Any, redis_url: str, stand_in: Make
) -> None:
    agent = stand_in(served.address, handler=forever, slots=20)
    await agent.ready()
    async with Client(other.address) as client:
        for number in range(6):
            with Redis.from_url(redis_url) as redis:
                redis.execute_command("CLIENT", "KILL", "TYPE", "PUBSUB")
            task_id = await submit(client)
            await running(client, task_id)
            await client.cancel(task_id)
            await agent.until(lambda: len(agent.cancels) == number + 1, timeout=3.0)  # noqa: B023
            assert (await client.wait_end(task_id)).state == TaskState.TASK_STATE_CANCELLED


async def test_a_cancel_that_got_lost_is_found_at_a_heartbeat(
    orchestrator: Orchestrator, redis_url: str, stand_in: Make
) -> None:
    agent = stand_in(orchestrator.address, handler=forever)
    await agent.ready()
    async with Client(orchestrator.address) as client:
        task_id = await submit(client)
        await running(client, task_id)
        # To the store, this is the agent's orchestrator, so that it sends no mail.
        store = Store(redis_url, shards=4, caller="o1")
        await store.open()
        assert (await store.apply(operations.cancel(task_id, "", "t"))).status == "requested"
        await store.close()
        await agent.until(lambda: bool(agent.cancels), timeout=3.0)
        assert (await client.wait_end(task_id)).state == TaskState.TASK_STATE_CANCELLED
