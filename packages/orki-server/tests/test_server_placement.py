"""Priorities and delayed starts: the store's order of offers, and what submitters see."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest
from redis import Redis

from orki.control.v1.attempt_pb2 import TaskState
from orki.control.v1.task_pb2 import Submission, SubmitRequest
from orki.control.v1.task_pb2_grpc import TaskServiceStub
from orki.errors.v1.errors_pb2 import Reason
from orki_contract.errors import InvalidArgument
from orki_contract.model import Backoff, TaskMethod
from orki_contract.trace import new_span
from orki_control import Client
from orki_control.session import AttemptKey
from orki_control.transport import open_channel
from orki_server._fields import PRIORITY_STEP
from orki_server._store import operations, upkeep
from orki_server._store.operations import Recipient, new_task_id
from orki_server._store.placement import ANYWHERE, MAX_DELAY_MS, Placement, check_placement
from orki_server._store.store import Store
from orki_server._store.upkeep import Swept

METHOD = TaskMethod(
    service="acme.v1.WorkService",
    name="Do",
    request="q",
    response="r",
    backoff=Backoff(initial=0.001),
    total_timeout=60,
)
SERVICE = "servertests.v1.WorkService"
SHARD = 1
BASE = f"orki:{{o{SHARD}}}:"


async def submit(store: Store, placement: Placement = ANYWHERE) -> str:
    operation = operations.submit(
        task_id=new_task_id(SHARD),
        method=METHOD,
        request=b"q",
        digest="0" * 64,
        idempotency_key="",
        span=new_span(),
        actor="tester",
        placement=placement,
    )
    return (await store.apply(operation)).task_id


async def take(store: Store, slots: int = 1) -> list[AttemptKey]:
    recipient = Recipient("a1", "i1", slots, (METHOD.full_name,))
    return [each.attempt for each in (await store.offer(operations.offer(SHARD, 60.0, (recipient,)))).offers]


async def sweep(store: Store) -> Swept:
    return await store.apply(upkeep.sweep(SHARD, 100))


async def order(store: Store) -> list[str]:
    return [(await take(store))[0].task_id for _ in range(await queued(store))]


async def queued(store: Store) -> int:
    return int(await store.connection.call("ZCARD", f"{BASE}queue:{METHOD.full_name}"))


async def test_higher_priorities_are_offered_first_and_equal_ones_in_turn(store: Store) -> None:
    names = [None, 0, 9, 5, 9, 4, None, 6]
    tasks = [await submit(store, Placement(priority)) for priority in names]
    assert await order(store) == [tasks[at] for at in (2, 4, 7, 0, 3, 6, 5, 1)]


async def test_a_retried_task_keeps_its_priority(store: Store) -> None:
    urgent = await submit(store, Placement(9))
    (key,) = await take(store)
    await submit(store)
    await store.apply(operations.fail("a1", key, Reason.REASON_HANDLER_FAILED, "", "", True))
    await asyncio.sleep(0.01)
    await sweep(store)
    assert (await order(store))[0] == urgent


async def test_a_low_priority_does_not_wait_forever(store: Store, redis_url: str) -> None:
    low = await submit(store, Placement(4))
    with Redis.from_url(redis_url) as redis:
        name = f"{BASE}clock"
        clock = int(redis.hget(name, "clock_us") or 0)
        redis.hset(name, "clock_us", clock + (PRIORITY_STEP + 1) * 1_000_000)
    usual = await submit(store)
    assert await order(store) == [low, usual]


async def test_a_delayed_task_is_offered_after_its_start(store: Store) -> None:
    later = await submit(store, Placement(delay_ms=300))
    at = await submit(store, Placement(start_at_us=int((time.time() + 0.3) * 1e6)))
    past = await submit(store, Placement(start_at_us=1))
    swept = await sweep(store)
    assert swept.next_timer is not None
    assert 0 < swept.next_timer <= 0.302
    assert [key.task_id for key in await take(store, 9)] == [past]
    view = await store.apply(operations.read_task(later))
    assert view is not None
    assert (view.task.state, view.task.start_us) == (TaskState.TASK_STATE_QUEUED, view.task.submitted_us + 300_000)
    await asyncio.sleep(0.35)
    assert {each.kind for each in (await sweep(store)).expired} == {"retry"}
    assert {key.task_id for key in await take(store, 9)} == {later, at}


async def test_a_start_is_judged_by_the_server_s_clock(store: Store, redis_url: str) -> None:
    # The shard's clock stands still while no orchestrator runs; a start does not.
    task = await submit(store, Placement(delay_ms=300))
    with Redis.from_url(redis_url) as redis:
        name = f"{BASE}clock"
        for field in ("clock_us", "wall_us"):
            redis.hset(name, field, int(redis.hget(name, field) or 0) - 3_600_000_000)
    await asyncio.sleep(0.35)
    await sweep(store)
    assert [key.task_id for key in await take(store)] == [task]


async def test_a_delayed_task_can_be_cancelled_and_its_total_timeout_begins_at_its_start(
    store: Store, redis_url: str
) -> None:
    with Redis.from_url(redis_url) as redis:
        task = await submit(store, Placement(delay_ms=3_600_000))
        assert redis.zscore(f"{BASE}timers", task) == pytest.approx((time.time() + 3660) * 1000, abs=5000)
        await store.apply(operations.cancel(task, "", "t"))
        view = await store.apply(operations.read_task(task))
        assert view is not None
        assert view.task.state == TaskState.TASK_STATE_CANCELLED
        assert redis.exists(f"{BASE}starts") == 0
        # Without delayed tasks, batches read nothing about them.
        await sweep(store)
        await sweep(store)
        assert redis.hget(f"{BASE}clock", "starts") is None


async def test_a_delayed_task_without_its_record_does_not_hold_up_others(store: Store, redis_url: str) -> None:
    lost, kept, damaged = [await submit(store, Placement(delay_ms=1)) for _ in range(3)]
    with Redis.from_url(redis_url) as redis:
        redis.delete(f"{BASE}task:{lost}")
        redis.hset(f"{BASE}task:{damaged}", "state", "x")
    await asyncio.sleep(0.01)
    assert (await sweep(store)).damaged == (damaged,)
    assert [key.task_id for key in await take(store, 9)] == [kept]
    assert (await sweep(store)).damaged == ()


@pytest.mark.parametrize(
    ("submission", "where"),
    [
        (Submission(priority=10), "priority"),
        (Submission(delay_ms=MAX_DELAY_MS + 1), "delay_ms"),
        (Submission(start_at_us=-1), "start_at_us"),
        (Submission(start_at_us=1 << 62), "start_at_us"),
        (Submission(start_at_us=10**15 + MAX_DELAY_MS * 1000 + 1), "start_at_us"),
    ],
)
def test_values_out_of_range_are_refused(submission: Submission, where: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^{where}: "):
        check_placement(submission, 10**15)


@pytest.mark.parametrize("by_session", [True, False])
async def test_a_placement_holds_from_the_client_to_the_agent(
    launch: Callable[..., Any],
    options: Callable[..., Any],
    stand_in: Callable[..., Any],
    redis_url: str,
    by_session: bool,
) -> None:
    orchestrator = await launch(options(redis_url, shards=1))
    blocked = asyncio.Event()

    async def handler(offer: Any) -> bytes:
        await blocked.wait()
        return b""

    agent = stand_in(orchestrator.address, slots=1, handler=handler)
    await agent.ready()

    def asked(body: bytes, **values: Any) -> Submission:
        return Submission(method=f"{SERVICE}/Do", request=bytes([10, len(body)]) + body, **values)

    async with Client(orchestrator.address) as client:
        await client.submit_raw([asked(b"first")])
        await agent.until(lambda: len(agent.offers) == 1)
        submissions = [
            asked(b"usual"),
            asked(b"late", delay_ms=1500, priority=9),
            asked(b"low", priority=1),
            asked(b"urgent", priority=9),
        ]
        if by_session:
            snapshots = await client.submit_raw(submissions)
        else:
            async with open_channel(orchestrator.address) as channel:
                answer = await TaskServiceStub(channel).Submit(SubmitRequest(submissions=submissions))
            snapshots = [each.task for each in answer.outcomes]
        assert [each.priority for each in snapshots] == [0, 9, 1, 9]
        assert snapshots[1].start_us == snapshots[1].submitted_us + 1_500_000
        stored = await client.get(snapshots[1].task_id)
        assert (stored.priority, stored.start_us) == (9, snapshots[1].start_us)
        with pytest.raises(InvalidArgument, match="priority"):
            await client.submit_raw([asked(b"bad", priority=10)])
        begun = time.time_ns() // 1000
        blocked.set()
        ended = [await client.wait_end(each.task_id) for each in snapshots]
    assert [each.offer.request[2:] for each in agent.offers] == [*(b"first", b"urgent", b"usual", b"low", b"late")]
    assert ended[1].ended_us >= max(ended[1].start_us, begun)
