"""Labels, limits and turns: who gets which task, exact limits, and no task in the way of others."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from redis import Redis

from orki.control.v1.task_pb2 import Limit, Submission
from orki.errors.v1.errors_pb2 import Reason
from orki_contract.errors import InvalidArgument, Overloaded
from orki_contract.model import Backoff, TaskMethod
from orki_contract.trace import new_span
from orki_control import Client
from orki_control.session import AttemptKey
from orki_server._fields import MAX_LANES, PRIORITY_STEP, STATE_FIELDS
from orki_server._store import operations, upkeep
from orki_server._store.limits import check_limit, read_limits, set_limit
from orki_server._store.mail import queue_lengths
from orki_server._store.operations import Assigned, Recipient, new_task_id
from orki_server._store.placement import ANYWHERE, Placement, check_placement
from orki_server._store.store import Store

METHOD = TaskMethod(
    service="acme.v1.WorkService", name="Do", request="q", response="r", backoff=Backoff(initial=0.001), max_attempts=2
)
DO = "servertests.v1.WorkService/Do"
BASE = "orki:{o0}:"
QUEUE = f"{BASE}queue:{METHOD.full_name}"
GPU = Placement(labels=("gpu=a100", "zone=eu"))
KEY = "model:small"


async def submit(store: Store, placement: Placement = ANYWHERE, method: TaskMethod = METHOD) -> str:
    operation = operations.submit(
        task_id=new_task_id(0),
        method=method,
        request=b"q",
        digest="0" * 64,
        idempotency_key="",
        span=new_span(),
        actor="tester",
        placement=placement,
    )
    submitted = await store.apply(operation)
    return submitted.task_id if submitted.status == "new" else submitted.status


async def assigned(store: Store, slots: int = 1, labels: tuple[str, ...] = (), agent: str = "a1") -> Assigned:
    recipient = Recipient(agent, "i1", slots, (METHOD.full_name,), labels)
    return await store.offer(operations.offer(0, 60.0, (recipient,)))


async def take(store: Store, slots: int = 1, labels: tuple[str, ...] = (), agent: str = "a1") -> list[AttemptKey]:
    return [each.attempt for each in (await assigned(store, slots, labels, agent)).offers]


async def limit(store: Store, **fields: Any) -> None:
    await store.apply(set_limit(Limit(key=KEY, **fields)))


async def used(store: Store) -> int:
    return (await store.apply(read_limits()))[0].used


# --- labels ---


async def test_only_agents_with_all_labels_get_a_task(store: Store) -> None:
    task = await submit(store, GPU)
    for labels in ((), ("gpu=a100",), ("gpu=h100", "zone=eu"), ("gpu=a100,zone=eu",)):
        left = await assigned(store, 4, labels)
        assert (left.offers, left.again) == ((), 0.0)
    (key,) = await take(store, 1, ("other=1", "zone=eu", "gpu=a100"))
    assert key.task_id == task
    # It keeps them when it is queued again.
    await store.apply(operations.fail("a1", key, Reason.REASON_HANDLER_FAILED, "", "", True))
    await asyncio.sleep(0.01)
    await store.apply(upkeep.sweep(0, 10))
    assert await take(store) == []
    assert (await take(store, 1, GPU.labels))[0].task_id == task


async def test_tasks_that_no_agent_can_serve_hold_up_no_others(store: Store) -> None:
    for _ in range(300):
        await submit(store, GPU)
    usual = [await submit(store) for _ in range(3)]
    assert [key.task_id for key in await take(store, 9)] == usual
    assert (await store.apply(queue_lengths(0, (METHOD.full_name,))))[METHOD.full_name] > 300


async def test_lanes_and_their_marks_are_removed_when_they_are_empty(store: Store, redis_url: str) -> None:
    with Redis.from_url(redis_url) as redis:
        await submit(store, Placement(labels=GPU.labels, limits=(KEY,), fairness_key="t1"))
        await submit(store, Placement(fairness_key="t2"))
        assert redis.hlen(f"{BASE}lanes") == 2
        for key in await take(store, 9, GPU.labels):
            await store.apply(operations.succeed("a1", key, b""))
        await take(store, 9, GPU.labels)
        await take(store, 9, GPU.labels)
        names = {name.decode() for name in redis.scan_iter(f"{BASE}*")}
        assert not any(f"{BASE}{each}" in name for name in names for each in ("lanes", "turns", "holders", "queue"))
        assert redis.hget(f"{BASE}clock", "lanes") is None


async def test_the_number_of_lanes_is_bounded(store: Store, monkeypatch: pytest.MonkeyPatch, redis_url: str) -> None:
    with Redis.from_url(redis_url) as redis:
        redis.hset(f"{BASE}lanes", mapping={f"lane-{number}": "" for number in range(MAX_LANES - 1)})
        # Empty ones are removed first.
        first = await submit(store, GPU)
        assert (await take(store, 1, GPU.labels))[0].task_id == first
        redis.hset(f"{BASE}lanes", mapping={f"lane-{number}": "" for number in range(MAX_LANES)})
        for number in range(MAX_LANES):
            redis.zadd(f"{BASE}queue:lane-{number}", {"x": 1})
        assert await submit(store, Placement(labels=("a=b",))) == "lanes"
        assert (await submit(store)).startswith("t0-")


async def test_tasks_that_an_older_version_queued_go_to_their_lane(store: Store, redis_url: str) -> None:
    task = await submit(store, GPU)
    with Redis.from_url(redis_url) as redis:
        (lane,) = list(redis.scan_iter(f"{QUEUE}*"))
        redis.rename(lane, QUEUE)
        redis.delete(f"{BASE}lanes")
        redis.hdel(f"{BASE}clock", "lanes")
    assert await take(store) == []
    assert (await take(store, 1, GPU.labels))[0].task_id == task


# --- limits ---


async def test_a_limit_admits_as_many_attempts_as_it_says(store: Store) -> None:
    await limit(store, concurrency=2)
    limited = [await submit(store, Placement(limits=(KEY,))) for _ in range(4)]
    other = await submit(store)
    first = await assigned(store, 9)
    assert [each.attempt.task_id for each in first.offers] == [*limited[:2], other]
    assert (first.again, await used(store)) == (0.0, 2)
    assert await take(store, 9, agent="a2") == []
    await store.apply(operations.succeed("a1", first.offers[0].attempt, b""))
    assert [key.task_id for key in await take(store, 9, agent="a2")] == [limited[2]]
    # A removed limit admits everything; one that is declared later counts what runs.
    await limit(store)
    assert [key.task_id for key in await take(store, 9)] == [limited[3]]
    await limit(store, concurrency=3)
    assert await used(store) == 3


async def test_every_key_of_a_task_must_admit_it(store: Store) -> None:
    await limit(store, concurrency=5)
    await store.apply(set_limit(Limit(key="tenant:x", concurrency=1)))
    both = [await submit(store, Placement(limits=(KEY, "tenant:x"))) for _ in range(2)]
    only = await submit(store, Placement(limits=(KEY,)))
    assert [key.task_id for key in await take(store, 9)] == [both[0], only]


async def expire(store: Store, key: AttemptKey) -> None:
    name = f"{BASE}task:{key.task_id}"
    packed = await store.connection.call("HGET", name, "state")
    fields = dict(zip(STATE_FIELDS, packed.split(b"\x1f"), strict=True))
    due = {each: b"1" for each in ("offer_due", "lease_due") if fields[each]}
    await store.connection.call("HSET", name, "state", b"\x1f".join((fields | due | {"timer": b"1"}).values()))
    await store.connection.call("ZADD", f"{BASE}timers", 1, key.task_id)
    await store.apply(upkeep.sweep(0, 10))


ENDS: dict[str, Callable[[Store, AttemptKey], Awaitable[object]]] = {
    "result": lambda store, key: store.apply(operations.succeed("a1", key, b"")),
    "failure": lambda store, key: store.apply(
        operations.fail("a1", key, Reason.REASON_HANDLER_FAILED, "", "", retryable=False)
    ),
    "retried": lambda store, key: store.apply(
        operations.fail("a1", key, Reason.REASON_HANDLER_FAILED, "", "", retryable=True)
    ),
    "abandoned": lambda store, key: store.apply(operations.fail("a1", key, Reason.REASON_ABANDONED, "", "", True)),
    "declined": lambda store, key: store.apply(operations.decline("a1", key, Reason.REASON_DRAINING, "", False)),
    "lost": lambda store, key: store.apply(operations.lose("a1", key, "gone")),
    "cancelled": lambda store, key: store.apply(operations.confirm_cancelled("a1", key, Reason.REASON_CANCELLED)),
    "timed out": expire,
}


@pytest.mark.parametrize(
    ("end", "started"),
    # Only an offer is declined or lost.
    [(end, started) for end in ENDS for started in (False, True) if not (started and end in ("declined", "lost"))],
)
async def test_every_end_of_an_attempt_gives_its_place_back(store: Store, end: str, started: bool) -> None:
    await limit(store, concurrency=1)
    await submit(store, Placement(limits=(KEY,)))
    (key,) = await take(store)
    if started:
        await store.apply(operations.accept("a1", key))
    if end == "cancelled":
        await store.apply(operations.cancel(key.task_id, "", "t"))
    assert await used(store) == 1
    await ENDS[end](store, key)
    assert await used(store) == 0


async def test_a_place_that_an_older_version_kept_comes_back(store: Store, redis_url: str) -> None:
    await limit(store, concurrency=1)
    with Redis.from_url(redis_url) as redis:
        redis.sadd(f"{BASE}holders:{KEY}", new_task_id(0))
    task = await submit(store, Placement(limits=(KEY,)))
    assert (await take(store))[0].task_id == task
    assert await used(store) == 1


async def test_a_rate_spaces_the_offers(store: Store) -> None:
    await limit(store, interval_us=200_000, burst=2)
    for _ in range(4):
        await submit(store, Placement(limits=(KEY,)))
    first = await assigned(store, 9)
    assert len(first.offers) == 2
    assert first.again is not None
    assert 0.1 < first.again <= 0.2
    assert (await assigned(store, 9)).offers == ()
    await asyncio.sleep(first.again + 0.01)
    assert len(await take(store, 9)) == 1


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"key": ""}, "limit.key"),
        ({"key": "a b"}, "limit.key"),
        ({"key": "a", "concurrency": 1_000_001}, "limit.concurrency"),
        ({"key": "a", "interval_us": 86_400_000_001}, "limit.interval_us"),
        ({"key": "a", "interval_us": 1, "burst": 1_000_001}, "limit.burst"),
        ({"key": "a", "concurrency": 1, "burst": 2}, "limit.burst"),
    ],
)
def test_a_malformed_limit_is_refused(fields: Any, where: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^{where}: "):
        check_limit(Limit(**fields))


@pytest.mark.parametrize(
    ("submission", "where"),
    [
        (Submission(labels={"gpu": ""}), "labels"),
        (Submission(labels={"": "x"}), "labels"),
        (Submission(labels={"a=b": "x"}), "labels"),
        (Submission(labels={"a": "x,y"}), "labels"),
        (Submission(labels={str(number): "x" for number in range(17)}), "labels"),
        (Submission(limits=["a", "a\x1fb"]), "limits"),
        (Submission(limits=["a,b"]), "limits"),
        (Submission(limits=[""]), "limits"),
        (Submission(limits=[str(number) for number in range(9)]), "limits"),
        (Submission(fairness_key="a\nb"), "fairness_key"),
        (Submission(fairness_key="x" * 129), "fairness_key"),
    ],
)
def test_malformed_labels_and_keys_are_refused(submission: Submission, where: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^{where}: "):
        check_placement(submission, 0)


# --- turns ---


async def test_fairness_keys_take_turns_within_a_priority(store: Store) -> None:
    big = [await submit(store, Placement(fairness_key="big")) for _ in range(6)]
    small = [await submit(store, Placement(fairness_key="small")) for _ in range(2)]
    usual = [await submit(store) for _ in range(2)]
    urgent = await submit(store, Placement(priority=9, fairness_key="big"))
    order = [(await take(store))[0].task_id for _ in range(11)]
    assert order[0] == urgent
    names = {task: name for name, tasks in (("b", big), ("s", small), ("u", usual)) for task in tasks}
    assert Counter(names[task] for task in order[1:7]) == {"b": 2, "s": 2, "u": 2}
    assert [task for task in order if task in big] == big
    assert order[7:] == big[2:]


async def test_the_turns_hold_within_one_operation(store: Store) -> None:
    for name in ("big",) * 8 + ("small",) * 2:
        await submit(store, Placement(fairness_key=name))
    got = (await assigned(store, 4)).offers
    owners = [(await store.apply(operations.read_task(each.attempt.task_id))) for each in got]
    assert Counter(view.task.fairness_key for view in owners if view) == {"big": 2, "small": 2}


async def test_a_lower_priority_gets_a_turn_after_a_while(store: Store, redis_url: str) -> None:
    low = await submit(store, Placement(priority=4, fairness_key="low"))
    for _ in range(3):
        await submit(store, Placement(fairness_key="big"))
    assert (await take(store))[0].task_id != low
    with Redis.from_url(redis_url) as redis:
        redis.hincrby(f"{BASE}clock", "clock_us", (2 * PRIORITY_STEP + 1) * 1_000_000)
    got = [(await take(store))[0].task_id for _ in range(2)]
    assert low in got


# --- with orchestrators ---


@pytest.fixture
async def fleet(launch: Callable[..., Any], options: Callable[..., Any], redis_url: str) -> list[Any]:
    """Two orchestrators."""
    return [await launch(options(redis_url, orchestrator_id=name)) for name in ("o1", "o2")]


class Gauge:
    """Counts handlers that run at the same time."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.running = self.most = 0
        self.begun: list[float] = []

    async def __call__(self, _: Any) -> bytes:
        self.running += 1
        self.most = max(self.most, self.running)
        self.begun.append(time.monotonic())
        await asyncio.sleep(self.seconds)
        self.running -= 1
        return b""


async def test_a_limit_is_exact_with_two_orchestrators(fleet: list[Any], stand_in: Callable[..., Any]) -> None:
    gauge = Gauge(0.02)
    for number, orchestrator in enumerate(fleet):
        agent = stand_in(orchestrator.address, agent_id=f"agent-{number}", slots=8, handler=gauge)
        await agent.ready()
    async with Client(fleet[0].address) as one, Client(fleet[1].address) as other:
        await one.set_limit(KEY, concurrency=3)
        tasks = []
        for client in (one, other):
            tasks += await client.submit_raw([Submission(method=DO, limits=[KEY]) for _ in range(40)])
        await asyncio.gather(*(one.wait_end(each.task_id) for each in tasks))
        (declared,) = await other.list_limits()
    assert (gauge.most, declared.concurrency, declared.used) == (3, 3, 0)


async def test_a_rate_holds_with_two_orchestrators(fleet: list[Any], stand_in: Callable[..., Any]) -> None:
    gauge = Gauge(0.0)
    for number, orchestrator in enumerate(fleet):
        agent = stand_in(orchestrator.address, agent_id=f"agent-{number}", slots=8, handler=gauge)
        await agent.ready()
    async with Client(fleet[0].address) as client:
        await client.set_limit(KEY, interval=0.1)
        tasks = await client.submit_raw([Submission(method=DO, limits=[KEY]) for _ in range(10)])
        await asyncio.gather(*(client.wait_end(each.task_id) for each in tasks))
    # The waits are those of the limit, not of a poll.
    assert 0.85 <= gauge.begun[-1] - gauge.begun[0] < 3


async def test_labelled_tasks_run_one_after_another_beside_idle_agents(
    orchestrator: Any, stand_in: Callable[..., Any]
) -> None:
    idle = [stand_in(orchestrator.address, agent_id=f"idle-{number}") for number in range(3)]
    able = stand_in(orchestrator.address, agent_id="able", slots=1, labels={"gpu": "a100", "zone": "eu"})
    for agent in (*idle, able):
        await agent.ready()
    async with Client(orchestrator.address) as client:
        began = time.monotonic()
        tasks = await client.submit_raw([Submission(method=DO, labels={"gpu": "a100"}) for _ in range(20)])
        ended = await asyncio.gather(*(client.wait_end(each.task_id) for each in tasks))
        assert time.monotonic() - began < 5
        assert {each.agent_id for each in ended} == {"able"}
        assert dict(ended[0].labels) == {"gpu": "a100"}
        nobody = (await client.submit_raw([Submission(method=DO, labels={"gpu": "h100"})]))[0]
        other = (await client.submit_raw([Submission(method=DO)]))[0]
        await client.wait_end(other.task_id)
        assert not (await client.get(nobody.task_id)).HasField("attempt")
        found = [each.task_id async for each in client.list_tasks(labels={"gpu": "a100"}, page_size=3)]
        assert sorted(found) == sorted(each.task_id for each in tasks)
        assert [each.task_id async for each in client.list_tasks(labels={"gpu": "h100"})] == [nobody.task_id]
        with pytest.raises(InvalidArgument, match="labels"):
            [each async for each in client.list_tasks(labels={"a b": "c"})]
        (shown,) = [each for each in await client.list_agents() if each.agent_id == "able"]
        assert dict(shown.labels) == {"gpu": "a100", "zone": "eu"}


async def test_an_idempotency_key_finds_a_counted_task(fleet: list[Any], stand_in: Callable[..., Any]) -> None:
    agent = stand_in(fleet[0].address, taking=False)
    await agent.ready()
    async with Client(fleet[0].address) as one, Client(fleet[1].address) as other:
        found = {
            (await client.submit_raw([Submission(method=DO, limits=[KEY], idempotency_key="k")]))[0].task_id
            for client in (one, other, one)
        }
        assert len(found) == 1


async def test_a_further_lane_is_refused_with_a_reason(
    launch: Callable[..., Any], options: Callable[..., Any], stand_in: Callable[..., Any], redis_url: str
) -> None:
    orchestrator = await launch(options(redis_url, shards=1))
    agent = stand_in(orchestrator.address, taking=False)
    await agent.ready()
    with Redis.from_url(redis_url) as redis:
        redis.hset(f"{BASE}lanes", mapping={f"lane-{number}": "" for number in range(MAX_LANES)})
        for number in range(MAX_LANES):
            redis.zadd(f"{BASE}queue:lane-{number}", {"x": 1})
    async with Client(orchestrator.address) as client:
        with pytest.raises(Overloaded, match="fairness key"):
            await client.submit_raw([Submission(method=DO, labels={"a": "b"})])
