"""Schedules: one task for each tick with any number of orchestrators, missed ticks, and refusals."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from redis import Redis

from orki.control.v1 import schedule_pb2 as pb
from orki.control.v1.task_pb2 import Submission, TaskSnapshot
from orki_contract.errors import InvalidArgument, OrkiError, StoreUnavailable, UnknownMethod
from orki_control import Client
from orki_server._keys import FleetKeys
from orki_server._schedules import Scheduler, Schedules, last_tick, next_tick
from orki_server._store.store import Store

DO = "servertests.v1.WorkService/Do"
MINUTE, SECOND = 60_000_000, 1_000_000
HOURLY = pb.Schedule(name="hourly", cron="0 * * * *", submission=Submission(method=DO))
BASE = 1_800_000_000 * SECOND  # a full hour


def each_second(name: str = "often", **fields: Any) -> pb.Schedule:
    return pb.Schedule(name=name, cron="* * * * * *", submission=Submission(method=DO), **fields)


async def tasks_of(client: Client) -> list[TaskSnapshot]:
    return [task async for task in client.list_tasks(method=DO)]


async def test_each_tick_gives_one_task_with_two_orchestrators(
    launch: Callable[..., Any], options: Callable[..., Any], stand_in: Callable[..., Any], redis_url: str
) -> None:
    first, second = [await launch(options(redis_url, orchestrator_id=name)) for name in ("o1", "o2")]
    agent = stand_in(second.address)
    await agent.ready()
    async with Client(second.address) as client:
        added = await client.schedules.add_raw(each_second())
        assert added.next_tick_us > added.since_us
        await asyncio.sleep(2.5)
        # The other one goes on alone.
        await first.stop()
        await asyncio.sleep(2.5)
        assert await client.schedules.remove("often")
        assert not await client.schedules.remove("often")
        tasks = await tasks_of(client)
        assert 4 <= len(tasks) <= 6
        seconds = sorted(task.submitted_us // SECOND for task in tasks)
        assert len(set(seconds)) == len(seconds)
        assert list(await client.schedules.list()) == []


async def test_a_paused_schedule_submits_nothing_and_makes_nothing_up(
    orchestrator: Any, stand_in: Callable[..., Any]
) -> None:
    agent = stand_in(orchestrator.address)
    await agent.ready()
    async with Client(orchestrator.address) as client:
        await client.schedules.add_raw(each_second(missed=pb.MISSED_TICKS_CATCH_UP, paused=True))
        await asyncio.sleep(2.2)
        assert await tasks_of(client) == []
        (shown,) = await client.schedules.list()
        assert (shown.paused, shown.next_tick_us, shown.actor) == (True, 0, "anonymous")
        changed = await client.schedules.pause("often", paused=False)
        assert changed.next_tick_us > 0
        await asyncio.sleep(1.6)
        await client.schedules.pause("often")
        assert 1 <= len(await tasks_of(client)) <= 2
        (shown,) = await client.schedules.list()
        assert shown.last_task_id in {task.task_id for task in await tasks_of(client)}


class Submitter:
    """Records submissions, and raises an error instead if there is one."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.error: OrkiError | None = None

    async def __call__(self, submission: Submission, actor: str) -> TaskSnapshot:
        if self.error is not None:
            raise self.error
        assert actor == "schedule:hourly"
        self.keys.append(submission.idempotency_key)
        return TaskSnapshot(task_id=f"t0-{len(self.keys)}")


async def prepared(store: Store, **fields: Any) -> tuple[Schedules, Scheduler, Submitter]:
    schedules, submitter = Schedules(store.connection), Submitter()
    schedule = pb.Schedule(since_us=BASE + 1, **fields)
    schedule.MergeFrom(HOURLY)
    assert await schedules.write(schedule, "add")
    return schedules, Scheduler(schedules, store.connection.up, submitter), submitter


@pytest.mark.parametrize(
    ("missed", "late", "expected"),
    [
        (pb.MISSED_TICKS_SKIP, 30, 1),
        (pb.MISSED_TICKS_SKIP, 90, 0),
        (pb.MISSED_TICKS_CATCH_UP, 30, 1),
        (pb.MISSED_TICKS_CATCH_UP, 90, 1),
    ],
)
async def test_missed_ticks_are_left_out_or_made_up_for_once(
    store: Store, missed: pb.MissedTicks.ValueType, late: int, expected: int
) -> None:
    schedules, scheduler, submitter = await prepared(store, missed=missed)
    await scheduler.look(BASE + 30 * MINUTE)
    assert submitter.keys == []
    now = BASE + 180 * MINUTE + late * SECOND
    await scheduler.look(now)
    await scheduler.look(now + SECOND)
    assert submitter.keys == [f"schedule:hourly:{BASE + 180 * MINUTE}"] * expected
    stored = await schedules.find("hourly")
    assert stored is not None
    assert stored.last_tick_us == BASE + 180 * MINUTE
    assert ("missed" in stored.last_failure.message) == (not expected)
    # The next one is on time again.
    await scheduler.look(BASE + 240 * MINUTE)
    assert submitter.keys[-1] == f"schedule:hourly:{BASE + 240 * MINUTE}"


async def test_a_tick_is_tried_again_while_the_store_is_down_and_a_refusal_is_kept(store: Store) -> None:
    schedules, scheduler, submitter = await prepared(store)
    now = BASE + 60 * MINUTE
    submitter.error = StoreUnavailable("down")
    await scheduler.look(now)
    assert (await schedules.read())["hourly"].last_tick_us == 0  # type: ignore[union-attr]
    submitter.error = None
    await scheduler.look(now + SECOND)
    assert submitter.keys == [f"schedule:hourly:{now}"]
    submitter.error = UnknownMethod("nobody serves it")
    await scheduler.look(now + 60 * MINUTE)
    stored = await schedules.find("hourly")
    assert stored is not None
    assert (stored.last_tick_us, stored.last_failure.message) == (now + 60 * MINUTE, "nobody serves it")


async def test_an_older_tick_replaces_no_newer_one_and_none_survives_its_schedule(store: Store) -> None:
    schedules, _, _ = await prepared(store)
    await schedules.ticked("hourly", 9 * SECOND, pb.Schedule(last_task_id="new"))
    await schedules.ticked("hourly", 8 * SECOND, pb.Schedule(last_task_id="old"))
    stored = await schedules.find("hourly")
    assert stored is not None
    assert (stored.last_tick_us, stored.last_task_id) == (9 * SECOND, "new")
    assert await schedules.remove("hourly")
    await schedules.ticked("hourly", 10 * SECOND, pb.Schedule())
    assert not await schedules.write(HOURLY, "change")
    assert await store.connection.call("EXISTS", FleetKeys.TICKS, FleetKeys.SCHEDULES) == 0


async def test_a_damaged_schedule_hurts_only_itself(orchestrator: Any, stand_in: Any, redis_url: str) -> None:
    agent = stand_in(orchestrator.address)
    await agent.ready()
    with Redis.from_url(redis_url) as redis:
        redis.hset(FleetKeys.SCHEDULES, "bad", b"\xff")
    async with Client(orchestrator.address) as client:
        await client.schedules.add_raw(each_second())
        await asyncio.sleep(2.2)
        assert await tasks_of(client)
        bad, good = await client.schedules.list()
        assert ("cannot be read" in bad.last_failure.message, good.name) == (True, "often")
        assert await client.schedules.remove("bad")


@pytest.mark.parametrize(
    ("fields", "error", "where"),
    [
        ({"name": ""}, InvalidArgument, "schedule.name"),
        ({"name": "a b"}, InvalidArgument, "schedule.name"),
        ({"cron": ""}, InvalidArgument, "schedule.cron"),
        ({"cron": "61 * * * *"}, InvalidArgument, "schedule.cron"),
        ({"cron": "0 0 30 2 *"}, InvalidArgument, "schedule.cron"),
        ({"cron": "@daily"}, InvalidArgument, "schedule.cron"),
        ({"time_zone": "Mars/Base"}, InvalidArgument, "schedule.time_zone"),
        ({"time_zone": "../etc/passwd"}, InvalidArgument, "schedule.time_zone"),
        ({"missed": 7}, InvalidArgument, "schedule.missed"),
        ({"submission": Submission(method="x.v1.Other/Do")}, UnknownMethod, "x.v1.Other"),
        ({"submission": Submission(method=DO, request=b"\xff")}, InvalidArgument, "request"),
        ({"submission": Submission(method=DO, priority=10)}, InvalidArgument, "priority"),
        ({"submission": Submission(method=DO, idempotency_key="k")}, InvalidArgument, "schedule.submission"),
        ({"submission": Submission(method=DO, start_at_us=1)}, InvalidArgument, "schedule.submission"),
    ],
)
async def test_a_malformed_schedule_is_refused(
    orchestrator: Any, stand_in: Any, fields: Any, error: type[Exception], where: str
) -> None:
    agent = stand_in(orchestrator.address)
    await agent.ready()
    asked = pb.Schedule(name="daily", cron="0 2 * * *", submission=Submission(method=DO))
    if "submission" in fields:
        asked.ClearField("submission")
        asked.submission.CopyFrom(fields.pop("submission"))
    for name, value in fields.items():
        setattr(asked, name, value)
    async with Client(orchestrator.address) as client:
        with pytest.raises(error, match=where):
            await client.schedules.add_raw(asked)
        assert list(await client.schedules.list()) == []


async def test_a_name_is_taken_once_and_an_unknown_one_is_refused(orchestrator: Any, stand_in: Any) -> None:
    agent = stand_in(orchestrator.address)
    await agent.ready()
    async with Client(orchestrator.address) as client:
        await client.schedules.add_raw(HOURLY)
        with pytest.raises(InvalidArgument, match="there is a schedule hourly"):
            await client.schedules.add_raw(HOURLY)
        await client.schedules.add_raw(HOURLY, replace=True)
        with pytest.raises(InvalidArgument, match="no schedule"):
            await client.schedules.pause("other")


def test_ticks_follow_the_clock_of_their_time_zone() -> None:
    zone = ZoneInfo("Europe/Berlin")
    daily = pb.Schedule(name="d", cron="30 8 * * *", time_zone="Europe/Berlin")
    # The clocks change on 29 March.
    before = round(datetime(2026, 3, 28, 12, tzinfo=zone).timestamp()) * SECOND
    first = next_tick(daily, before)
    second = next_tick(daily, first)
    assert second - first == 24 * 60 * MINUTE
    assert datetime.fromtimestamp(first / SECOND, zone).hour == datetime.fromtimestamp(second / SECOND, zone).hour == 8
    assert first - last_tick(daily, before) == 23 * 60 * MINUTE
    assert last_tick(daily, first) == first
