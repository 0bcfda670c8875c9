"""The clock of a shard: what the infrastructure missed is not the agent's fault; clock steps are seen."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import pytest
from redis import Redis

from orki.control.v1.attempt_pb2 import TaskState
from orki.control.v1.task_pb2 import TaskSnapshot
from orki.errors.v1.errors_pb2 import Reason
from orki_contract.model import Backoff, TaskMethod
from orki_contract.trace import new_span
from orki_control.session import AttemptKey
from orki_events.connection import Script
from orki_server._store import operations, upkeep
from orki_server._store.batcher import shard_script
from orki_server._store.operations import Recipient, new_task_id
from orki_server._store.replies import Renewed
from orki_server._store.store import Store
from orki_server._store.upkeep import Swept

METHOD = TaskMethod(
    service="acme.v1.WorkService",
    name="Do",
    request="q",
    response="r",
    heartbeat_timeout=5.0,
    max_attempts=1,
    backoff=Backoff(initial=2.0),
)
TIME = "orki:test:time"


class World:
    """Orchestrators on one shard, and the server's clock."""

    def __init__(self, url: str, redis: Redis) -> None:
        self._url = url
        self._redis = redis
        self._stores: dict[str, Store] = {}
        self.stopped: set[str] = set()
        self._now_ms = 1_700_000_000_000
        self.step(0)

    async def orchestrator(self, name: str) -> Store:
        store = Store(self._url, shards=1, caller=name)
        text = shard_script(60.0).text.replace(
            "redis.call('TIME')",
            f"(function() local t = redis.call('GET', '{TIME}') return "
            "{ string.sub(t, 1, -4), string.sub(t, -3) .. '000' } end)()",
        )
        store._batcher._script = Script(text)
        await store.open()
        self._stores[name] = store
        return store

    def step(self, seconds: float) -> None:
        """Step the server's clock."""
        self._now_ms += round(seconds * 1000)
        self._redis.set(TIME, self._now_ms)

    async def run(self, seconds: float, act: Callable[[], Any] | None = None) -> list[Swept]:
        """Let time pass: every orchestrator that is not stopped sweeps twice a second. Returns what changed."""
        swept = []
        for _ in range(round(seconds * 2)):
            self.step(0.5)
            for name, store in self._stores.items():
                if name not in self.stopped:
                    if act is not None:
                        await act()
                    swept.append(await store.apply(upkeep.sweep(0, 10)))
        return [each for each in swept if each.expired]

    async def close(self) -> None:
        for store in self._stores.values():
            await store.close()
        self._redis.delete(TIME)


@pytest.fixture
async def world(redis_url: str) -> AsyncIterator[World]:
    with Redis.from_url(redis_url) as redis:
        made = World(redis_url, redis)
        yield made
        await made.close()


async def running(store: Store, method: TaskMethod = METHOD) -> AttemptKey:
    submission = operations.submit(
        task_id=new_task_id(0),
        method=method,
        request=b"",
        digest="0" * 64,
        idempotency_key="",
        span=new_span(),
        actor="t",
    )
    await store.apply(submission)
    recipient = Recipient("a1", "i1", 1, (METHOD.full_name,))
    ((offered,),) = [(await store.offer(operations.offer(0, 60.0, (recipient,)))).offers]
    await store.apply(operations.accept("a1", offered.attempt))
    return offered.attempt


async def task_of(store: Store, attempt: AttemptKey) -> TaskSnapshot:
    view = await store.apply(operations.read_task(attempt.task_id))
    assert view is not None
    return view.task


async def test_a_silent_agent_loses_its_lease_when_it_ends(world: World) -> None:
    store = await world.orchestrator("A")
    await world.orchestrator("B")
    attempt = await running(store)
    assert await world.run(4.5) == []
    ((expired,),) = [each.expired for each in await world.run(1)]
    assert (expired.attempt, expired.reason) == (attempt, Reason.REASON_LEASE_EXPIRED)
    assert (await task_of(store, attempt)).state == TaskState.TASK_STATE_FAILED


@pytest.mark.parametrize("step", [60.0, -60.0, 3600.0, -3600.0])
async def test_a_step_of_the_server_s_clock_expires_no_lease(world: World, step: float) -> None:
    store = await world.orchestrator("A")
    attempt = await running(store)

    async def renew() -> None:
        assert await store.apply(operations.renew(0, "a1", (attempt,))) == Renewed()

    await world.run(2, renew)
    world.step(step)
    assert await world.run(3.5) == []
    await world.run(2, renew)
    assert await world.run(4.5) == []
    assert (await task_of(store, attempt)).state == TaskState.TASK_STATE_RUNNING
    await world.run(1)
    assert (await task_of(store, attempt)).failure.reason == Reason.REASON_LEASE_EXPIRED


@pytest.mark.parametrize("step", [60.0, -60.0])
async def test_a_step_of_the_server_s_clock_delays_and_hastens_no_retry(world: World, step: float) -> None:
    store = await world.orchestrator("A")
    attempt = await running(store, replace(METHOD, max_attempts=2, backoff=Backoff(initial=4.0)))
    await store.apply(operations.fail("a1", attempt, Reason.REASON_HANDLER_FAILED, "", "", True))
    await world.run(1)
    world.step(step)
    assert await world.run(1.5) == []
    assert [each.kind for swept in await world.run(2) for each in swept.expired] == ["retry"]


async def test_without_any_orchestrator_no_attempt_is_charged(world: World) -> None:
    """All orchestrators stop for longer than a lease, and the agent comes back in time."""
    store = await world.orchestrator("A")
    attempt = await running(store)
    await world.run(4)
    world.step(100)
    assert await world.run(5) == []
    (kept,) = await store.apply(operations.resume(0, "a1", (attempt,)))
    assert kept.attempt == attempt
    assert await world.run(4.5) == []


async def test_an_attempt_that_its_agent_gave_up_meanwhile_is_not_charged(world: World) -> None:
    store = await world.orchestrator("A")
    attempt = await running(store)
    world.step(100)
    expired, *_ = [each for swept in await world.run(20) for each in swept.expired]
    assert expired.kind == "attempt"
    task = await task_of(store, attempt)
    assert task.state == TaskState.TASK_STATE_QUEUED, "it was the only attempt, and it does not count"
    assert "was not heard of" in task.earlier_failures[0].message


async def test_the_agent_of_a_dead_orchestrator_is_not_charged(world: World) -> None:
    """Another orchestrator lives, but the agent is not connected to it."""
    dead, alive = await world.orchestrator("dead"), await world.orchestrator("alive")
    attempt = await running(dead)
    world.stopped.add("dead")
    assert await world.run(9) == []
    expired, *_ = [each for swept in await world.run(10) for each in swept.expired]
    assert expired.kind == "attempt"
    assert (await task_of(alive, attempt)).state == TaskState.TASK_STATE_QUEUED


async def test_the_agent_of_a_stopped_orchestrator_goes_on_when_it_continues(world: World) -> None:
    stopped, alive = await world.orchestrator("stopped"), await world.orchestrator("alive")
    attempt = await running(stopped)
    world.stopped.add("stopped")
    assert await world.run(8) == []
    world.stopped.clear()
    # Its first batch may be a sweep, before it reads the agent's heartbeats.
    assert await world.run(0.5) == []
    for _ in range(2):
        assert await stopped.apply(operations.renew(0, "a1", (attempt,))) == Renewed()
        assert await world.run(1) == []
    assert await stopped.apply(operations.renew(0, "a1", (attempt,))) == Renewed()
    assert await world.run(4.5) == []
    ((expired,),) = [each.expired for each in await world.run(2)]
    assert expired.reason == Reason.REASON_LEASE_EXPIRED
    assert (await task_of(alive, attempt)).state == TaskState.TASK_STATE_FAILED


async def test_a_renewal_that_is_read_late_does_not_charge_the_attempt(world: World) -> None:
    """The agent gave the attempt up while its heartbeats waited for the orchestrator."""
    stopped, alive = await world.orchestrator("stopped"), await world.orchestrator("alive")
    attempt = await running(stopped)
    world.stopped.add("stopped")
    await world.run(6)
    world.stopped.clear()
    await world.run(0.5)
    assert await stopped.apply(operations.renew(0, "a1", (attempt,))) == Renewed()
    expired, *_ = [each for swept in await world.run(30) for each in swept.expired]
    assert expired.kind == "attempt"
    assert (await task_of(alive, attempt)).state == TaskState.TASK_STATE_QUEUED


async def test_stall_and_attempt_timeouts_are_extended_by_what_was_missed(world: World) -> None:
    store = await world.orchestrator("A")
    attempt = await running(store, replace(METHOD, stall_timeout=8.0, attempt_timeout=10.0))

    async def renew() -> None:
        await store.apply(operations.renew(0, "a1", (attempt,)))

    await world.run(7, renew)
    world.step(30)
    assert await world.run(5, renew) == []
    ((expired,),) = [each.expired for each in await world.run(10, renew)]
    assert expired.reason == Reason.REASON_STALLED


async def test_slow_batches_do_not_stop_the_clock(world: World) -> None:
    """A server so slow that each batch is late still executes timers."""
    store = await world.orchestrator("A")
    attempt = await running(store, replace(METHOD, max_attempts=2))
    await store.apply(operations.fail("a1", attempt, Reason.REASON_HANDLER_FAILED, "", "", True))
    kinds = []
    for _ in range(4):
        world.step(1.5)
        kinds += [each.kind for each in (await store.apply(upkeep.sweep(0, 10))).expired]
    assert kinds == ["retry"]


async def test_old_orchestrators_are_forgotten(world: World, redis_url: str) -> None:
    first = await world.orchestrator("first")
    await first.apply(upkeep.sweep(0, 0))
    world.stopped.add("first")
    second = await world.orchestrator("second")
    for _ in range(20):
        await second.apply(upkeep.sweep(0, 0))
        world.step(0.9)
    with Redis.from_url(redis_url) as redis:
        redis.hset("orki:{o0}:clock", "host:ancient", "5 0")
        third = await world.orchestrator("third")
        await third.apply(upkeep.sweep(0, 0))
        await asyncio.sleep(0)
        hosts = {name for name in redis.hkeys("orki:{o0}:clock") if name.startswith(b"host:")}  # type: ignore[union-attr]
        assert hosts == {b"host:first", b"host:second", b"host:third"}
