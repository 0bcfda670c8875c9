"""Pauses: what is paused is not offered by any orchestrator, stays queued, and goes on after the resume."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from redis import Redis

from orki.control.v1.task_pb2 import Submission
from orki_contract.errors import DamagedRecord, InvalidArgument, UnknownMethod
from orki_control import Client
from orki_server._keys import FleetKeys

SERVICE = "servertests.v1.WorkService"
DO, DIRECT = f"{SERVICE}/Do", f"{SERVICE}/Direct"


async def submit(client: Client, *methods: str) -> list[str]:
    return [each.task_id for each in await client.submit_raw([Submission(method=each) for each in methods])]


async def offered_within(agent: Any, seconds: float) -> list[str]:
    await asyncio.sleep(seconds)
    return [each.attempt.task_id for each in agent.offers]


async def test_a_paused_service_keeps_its_tasks_queued_and_running_attempts_go_on(
    orchestrator: Any, stand_in: Callable[..., Any]
) -> None:
    go_on = asyncio.Event()

    async def handler(_: Any) -> bytes:
        await go_on.wait()
        return b""

    agent = stand_in(orchestrator.address, handler=handler)
    await agent.ready()
    async with Client(orchestrator.address) as client:
        (running,) = await submit(client, DO)
        await agent.until(lambda: len(agent.offers) == 1)
        made = await client.pause(SERVICE, "the model is down")
        assert (made.target, made.message) == (SERVICE, "the model is down")
        waiting = await submit(client, DO, DIRECT)
        go_on.set()
        assert (await client.wait_end(running)).ended_us > 0
        # Longer than the poll for queued tasks.
        assert await offered_within(agent, 1.2) == [running]
        assert list(await client.list_pauses()) == [made]
        assert await client.resume(SERVICE)
        assert not await client.resume(SERVICE)
        for task in waiting:
            await client.wait_end(task)
        assert list(await client.list_pauses()) == []


async def test_a_method_is_paused_alone(orchestrator: Any, stand_in: Callable[..., Any]) -> None:
    agent = stand_in(orchestrator.address)
    await agent.ready()
    async with Client(orchestrator.address) as client:
        await client.pause(DO)
        waiting, free = await submit(client, DO, DIRECT)
        await client.wait_end(free)
        # A service that is resumed does not resume a method that was paused by its own name.
        await client.pause(SERVICE)
        assert await client.resume(SERVICE)
        assert await offered_within(agent, 0.8) == [free]
        assert await client.resume(DO)
        await client.wait_end(waiting)


async def test_every_orchestrator_holds_a_pause_and_it_survives_them(
    launch: Callable[..., Any], options: Callable[..., Any], stand_in: Callable[..., Any], redis_url: str
) -> None:
    first, second = await launch(options(redis_url)), await launch(options(redis_url, orchestrator_id="o2"))
    agent = stand_in(second.address)
    await agent.ready()
    async with Client(first.address) as one, Client(second.address) as other:
        await one.pause(SERVICE)
        (waiting,) = await submit(other, DO)
        assert await offered_within(agent, 0.8) == []
        await first.stop()
        third = await launch(options(redis_url, orchestrator_id="o3"))
        late = stand_in(third.address, agent_id="agent-2")
        await late.ready()
        assert await offered_within(late, 0.8) == []
        assert await other.resume(SERVICE)
        await other.wait_end(waiting)


@pytest.mark.parametrize(
    ("target", "error"),
    [
        ("", InvalidArgument),
        ("no name", InvalidArgument),
        (f"{SERVICE}/Do/More", InvalidArgument),
        (SERVICE + "\n", InvalidArgument),
        ("other.v1.Service", UnknownMethod),
        (f"{SERVICE}/Dont", UnknownMethod),
    ],
)
async def test_an_unknown_target_is_refused(
    orchestrator: Any, stand_in: Callable[..., Any], target: str, error: type[Exception]
) -> None:
    agent = stand_in(orchestrator.address)
    await agent.ready()
    async with Client(orchestrator.address) as client:
        with pytest.raises(error):
            await client.pause(target)
        with pytest.raises(InvalidArgument, match="message"):
            await client.pause(SERVICE, "x" * 1001)
        assert list(await client.list_pauses()) == []


async def test_a_damaged_list_is_a_typed_error(orchestrator: Any, redis_url: str) -> None:
    with Redis.from_url(redis_url) as redis:
        redis.hset(FleetKeys.PAUSES, "x", b"\xff")
    async with Client(orchestrator.address) as client:
        with pytest.raises(DamagedRecord, match="pauses"):
            await client.list_pauses()
