"""Budgets of trees of tasks in the store: charges, waiting tasks and raises, each step repeated as after a crash."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
from redis import Redis

from orki.control.v1.attempt_pb2 import Budget, BudgetBalance, TaskState
from orki.control.v1.task_pb2 import Submission
from orki.errors.v1.errors_pb2 import Reason
from orki_contract.errors import DamagedRecord, InvalidArgument
from orki_contract.model import Backoff, TaskMethod
from orki_contract.trace import new_span
from orki_control import Client
from orki_control.session import AttemptKey
from orki_server._budgets import Budgets
from orki_server._keys import ShardKeys
from orki_server._session import SessionRegistry
from orki_server._store import operations, upkeep
from orki_server._store.budget import (
    Admitted,
    admitted,
    balance,
    charge,
    check_amounts,
    lineage,
    lineage_of,
    open_budget,
    over_budget,
    packed,
    raise_budget,
    used_up,
)
from orki_server._store.operations import OfferedAttempt, Recipient, new_task_id
from orki_server._store.replies import ReportStatus
from orki_server._store.store import Store
from orki_server._store.suspension import answer

METHOD = TaskMethod(
    service="acme.v1.WorkService",
    name="Do",
    request="q",
    response="r",
    max_attempts=1,
    total_timeout=600.0,
    backoff=Backoff(initial=0.001),
)
SHARD, OTHER = 1, 2


def tokens(number: int, calls: int = 0) -> Budget:
    return Budget(tokens=number, calls=calls)


async def submitted(
    store: Store, budget: Budget | None = None, parent: str = "", accounts: Sequence[str] = (), shard: int = SHARD
) -> str:
    task_id = new_task_id(shard)
    own = packed(budget) if budget else ""
    if own and accounts:
        assert await store.apply(open_budget(accounts[0], task_id, own)) == "opened"
    operation = operations.submit(
        task_id=task_id,
        method=METHOD,
        request=b"q",
        digest="0" * 64,
        idempotency_key="",
        span=new_span(),
        actor="t",
        lineage=(parent, parent, ",".join(accounts), own),
    )
    await store.apply(operation)
    return task_id


async def taken(store: Store, shard: int = SHARD, *, accepted: bool = True) -> OfferedAttempt:
    recipient = Recipient("a1", "a1-1", 1, (METHOD.full_name,))
    (offered,) = (await store.offer(operations.offer(shard, 2.0, (recipient,)))).offers
    if accepted:
        await store.apply(operations.accept("a1", offered.attempt))
    return offered


async def state(store: Store, task_id: str) -> Any:
    view = await store.apply(operations.read_task(task_id))
    assert view is not None
    return view.task


def shown(balances: Sequence[BudgetBalance]) -> list[tuple[str, int, int]]:
    return [(each.task_id, each.used.tokens, each.budget.tokens) for each in balances]


async def admit_all(store: Store, shard: int = SHARD) -> list[tuple[int, str]]:
    queued: list[tuple[int, str]] = []
    budgets = Budgets(store, SessionRegistry(), lambda *task: queued.append(task), lambda *change: None)
    await budgets._admit_all(shard)
    return queued


async def test_a_report_that_is_repeated_or_late_charges_nothing(store: Store) -> None:
    root = await submitted(store, tokens(100))
    key = (await taken(store)).attempt
    for total, used in ((10, 10), (10, 10), (30, 30), (20, 30), (0, 30), (31, 31)):
        assert shown(await store.apply(charge([root], key, tokens(total)))) == [(root, used, 100)]
    # Another attempt, and another task, begin at 0.
    again = AttemptKey(root, 2, key.fence + 1)
    assert shown(await store.apply(charge([root], again, tokens(5)))) == [(root, 36, 100)]
    assert shown(await store.apply(charge([root], AttemptKey(new_task_id(0), 1, 9), tokens(4)))) == [(root, 40, 100)]
    # Amounts are counted apart.
    (both,) = await store.apply(charge([root], key, Budget(tokens=31, cost_micros=7, calls=3)))
    assert both.used == Budget(tokens=40, cost_micros=7, calls=3)


async def test_what_is_charged_is_the_sum_of_the_maxima_of_the_reports(store: Store) -> None:
    draw = random.Random(7)
    root = await submitted(store, tokens(1 << 40))
    attempts = [AttemptKey(new_task_id(draw.randrange(4)), number, 9) for number in (1, 2, 3) for _ in range(4)]
    most = dict.fromkeys(attempts, 0)
    reports = [(draw.choice(attempts), draw.randrange(1 << 35)) for _ in range(300)]
    for start in range(0, len(reports), 20):
        # They come in one batch.
        futures = [store.apply(charge([root], key, tokens(total))) for key, total in reports[start : start + 20]]
        for (key, total), future in zip(reports[start : start + 20], futures, strict=True):
            await future
            most[key] = max(most[key], total)
    assert shown(await store.apply(balance([root], attempts[0]))) == [(root, sum(most.values()), 1 << 40)]


async def test_a_charge_counts_for_each_budget_above_the_task(store: Store) -> None:
    root = await submitted(store, tokens(100))
    child = await submitted(store, tokens(20), root, [root], shard=OTHER)
    grandchild = await submitted(store, None, child, [root, child], shard=0)
    assert (await store.apply(lineage_of(grandchild))).accounts == (root, child)  # type: ignore[union-attr]
    view = await state(store, child)
    assert (view.parent_task_id, view.root_task_id) == (root, root)
    key = (await taken(store, 0)).attempt
    balances = await store.apply(charge([root, child], key, tokens(20)))
    assert shown(balances) == [(root, 20, 100), (child, 20, 20)]
    assert used_up(balances) == f"budget tokens 20 of 20 used by the tree of {child}"
    # The root's own use leaves the child's budget alone.
    balances = await store.apply(charge([root], (await taken(store)).attempt, tokens(50)))
    assert shown(balances) == [(root, 70, 100)]
    assert not used_up(balances)


async def test_only_the_attempt_that_runs_has_a_lineage(store: Store) -> None:
    root = await submitted(store, tokens(100))
    key = (await taken(store)).attempt
    found = await store.apply(lineage(key))
    assert found is not None
    assert (found.root, found.accounts, found.runs) == (root, (root,), True)
    forged = await store.apply(lineage(key._replace(fence=key.fence + 1)))
    assert forged is not None
    assert not forged.runs
    assert await store.apply(lineage(key._replace(task_id=new_task_id(SHARD)))) is None
    plain = await submitted(store, shard=OTHER)
    assert (await store.apply(lineage_of(plain))).accounts == ()  # type: ignore[union-attr]


async def test_a_paused_task_keeps_its_attempts_and_its_total_timeout_and_takes_no_answer(store: Store) -> None:
    root = await submitted(store, tokens(10))
    key = (await taken(store)).attempt
    balances = await store.apply(charge([root], key, tokens(10), waits=True))
    reply = await store.apply(over_budget("a1", key, f"paused: {used_up(balances)}"))
    assert (reply.status, reply.state, reply.retry_after) == (
        ReportStatus.ACCEPTED,
        TaskState.TASK_STATE_SUSPENDED,
        None,
    )
    # An agent that sends the result again learns that it was accepted.
    repeated = await store.apply(over_budget("a1", key, "paused"))
    assert repeated.status is ReportStatus.REPEATED
    task = await state(store, root)
    assert task.over_budget
    assert not task.HasField("suspension")
    assert (await store.apply(answer(root, 0, b"yes", "t"))).status == "idle"
    swept = await store.apply(upkeep.sweep(SHARD, 10))
    assert swept.next_timer is None
    assert await store.apply(admitted(SHARD)) == []
    # A raise to what is used already admits nobody.
    status, raised = await store.apply(raise_budget(root, root, tokens(10)))
    assert (status, shown([raised])) == ("raised", [(root, 10, 10)])
    assert await admit_all(store) == []
    await store.apply(raise_budget(root, root, tokens(11)))
    assert (await store.apply(upkeep.sweep(SHARD, 10))).has_raised
    assert await admit_all(store) == [(SHARD, METHOD.full_name)]
    assert await admit_all(store) == []
    assert not (await store.apply(upkeep.sweep(SHARD, 10))).has_raised
    # One attempt is allowed, and the paused one does not count.
    again = (await taken(store)).attempt
    assert again.attempt == 2
    await store.apply(operations.succeed("a1", again, b"r"))
    assert (await state(store, root)).state == TaskState.TASK_STATE_SUCCEEDED


@pytest.mark.parametrize("dies", ["before the suspension", "after the suspension", "before it is forgotten"])
async def test_an_orchestrator_that_dies_while_a_task_is_paused_or_admitted_loses_no_task(
    store: Store, dies: str
) -> None:
    root = await submitted(store, tokens(10))
    child = await submitted(store, None, root, [root], shard=OTHER)
    key = (await taken(store, OTHER)).attempt
    await store.apply(charge([root], key, tokens(10), waits=True))
    if dies != "before the suspension":
        await store.apply(over_budget("a1", key, "paused"))
    await store.apply(raise_budget(root, root, tokens(20)))
    assert await store.apply(admitted(SHARD)) == [Admitted(root, child, 1)]
    queued = await admit_all(store)
    if dies == "before the suspension":
        # The agent may still bring its result to another orchestrator. Until then, the task stays on the list.
        assert queued == []
        assert await store.apply(admitted(SHARD)) == [Admitted(root, child, 1)]
        balances = await store.apply(charge([root], key, tokens(10), waits=True))
        reply = await store.apply(over_budget("a1", key, "paused", raised=not used_up(balances)))
        assert (reply.state, reply.retry_after) == (TaskState.TASK_STATE_QUEUED, 0.0)
    else:
        assert queued == [(OTHER, METHOD.full_name)]
    if dies == "before it is forgotten":
        await store.apply(charge([root], key, tokens(10), waits=True))
    assert not (await state(store, child)).over_budget
    assert (await taken(store, OTHER)).attempt.attempt == 2
    assert await admit_all(store) == []
    assert await store.apply(admitted(SHARD)) == []


async def test_an_offer_that_was_not_sent_is_taken_back_without_a_trace_in_the_count(store: Store) -> None:
    root = await submitted(store, tokens(10))
    await store.apply(charge([root], AttemptKey(root, 9, 9), tokens(10)))
    offered = await taken(store, accepted=False)
    assert offered.accounts == (root,)
    balances = await store.apply(balance(offered.accounts, offered.attempt, waits=True))
    await store.apply(over_budget("a1", offered.attempt, f"paused: {used_up(balances)}", unsent=True))
    assert (await state(store, root)).over_budget
    await store.apply(raise_budget(root, root, tokens(20)))
    assert await admit_all(store) == [(SHARD, METHOD.full_name)]
    key = (await taken(store)).attempt
    await store.apply(operations.fail("a1", key, Reason.REASON_HANDLER_FAILED, "no", "", True))
    # It was the only attempt.
    assert (await state(store, root)).state == TaskState.TASK_STATE_FAILED


async def test_a_task_waits_for_all_its_budgets(store: Store) -> None:
    root = await submitted(store, tokens(10))
    child = await submitted(store, tokens(10), root, [root], shard=OTHER)
    key = (await taken(store, OTHER)).attempt
    await store.apply(charge([root, child], key, tokens(10), waits=True))
    await store.apply(over_budget("a1", key, "paused"))
    await store.apply(raise_budget(root, root, tokens(20)))
    assert await admit_all(store) == []
    await store.apply(raise_budget(root, child, tokens(20)))
    assert await admit_all(store) == [(OTHER, METHOD.full_name)]


async def test_a_paused_task_is_cancelled_at_once(store: Store) -> None:
    root = await submitted(store, tokens(10))
    key = (await taken(store)).attempt
    await store.apply(charge([root], key, tokens(10), waits=True))
    await store.apply(over_budget("a1", key, "paused"))
    assert (await store.apply(operations.cancel(root, "", "t"))).status == "done"
    task = await state(store, root)
    assert (task.state, task.over_budget) == (TaskState.TASK_STATE_CANCELLED, False)
    await store.apply(raise_budget(root, root, tokens(20)))
    assert await admit_all(store) == []
    # A cancel that comes before the pause wins.
    other = await submitted(store, tokens(10))
    key = (await taken(store)).attempt
    await store.apply(operations.cancel(other, "", "t"))
    await store.apply(charge([other], key, tokens(10), waits=True))
    reply = await store.apply(over_budget("a1", key, "paused"))
    assert reply.state == TaskState.TASK_STATE_CANCELLED


async def test_a_budget_is_only_raised(store: Store) -> None:
    root = await submitted(store, tokens(10, calls=2))
    for lower in (tokens(9), tokens(20, calls=1), Budget(cost_micros=5)):
        assert (await store.apply(raise_budget(root, root, lower)))[0] == "lower"
    status, raised = await store.apply(raise_budget(root, root, Budget(calls=3)))
    assert (status, raised.budget) == ("raised", tokens(10, calls=3))
    assert (await store.apply(raise_budget(root, new_task_id(0), tokens(10))))[0] == "unknown"


async def test_budgets_end_with_the_task_at_the_top(redis_url: str) -> None:
    store = Store(redis_url, shards=4, retention=0.05)
    await store.open()
    try:
        root = await submitted(store, tokens(10))
        key = (await taken(store)).attempt
        await store.apply(charge([root], key, tokens(1)))
        await store.apply(operations.succeed("a1", key, b"r"))
        name = f"{ShardKeys(SHARD).base}budgets:{root}"
        with Redis.from_url(redis_url) as redis:
            assert 0 < redis.pttl(name) <= 60_050
            while redis.exists(name):
                await store.apply(upkeep.sweep(SHARD, 10))
        # Tasks below it go on without a budget, and no charge brings it back.
        assert await store.apply(charge([root], AttemptKey(new_task_id(0), 1, 9), tokens(5), waits=True)) == []
        assert await store.apply(open_budget(root, new_task_id(0), "5,0,0")) == "gone"
        with Redis.from_url(redis_url) as redis:
            assert not redis.exists(name)
    finally:
        await store.close()


async def test_a_damaged_budget_is_a_typed_error_and_holds_up_no_other(store: Store, redis_url: str) -> None:
    damaged, sound = await submitted(store, tokens(10)), await submitted(store, tokens(10), shard=SHARD)
    key = (await taken(store)).attempt
    other = (await taken(store)).attempt
    assert (key.task_id, other.task_id) == (damaged, sound)
    for each in (key, other):
        await store.apply(charge([each.task_id], each, tokens(10), waits=True))
        await store.apply(over_budget("a1", each, "paused"))
        await store.apply(raise_budget(each.task_id, each.task_id, tokens(20)))
    with Redis.from_url(redis_url) as redis:
        redis.hset(f"{ShardKeys(SHARD).base}budgets:{damaged}", f"limit:{damaged}", "many")
    with pytest.raises(DamagedRecord):
        await store.apply(charge([damaged], key, tokens(11)))
    assert await admit_all(store) == [(SHARD, METHOD.full_name)]
    assert not (await state(store, sound)).over_budget


@pytest.mark.parametrize("budget", [Budget(), Budget(tokens=(1 << 53) + 1)])
def test_a_budget_without_amounts_or_beyond_the_store_s_numbers_is_refused(budget: Budget) -> None:
    with pytest.raises(InvalidArgument, match="budget"):
        check_amounts(budget)
    assert not Submission().HasField("budget")


async def test_a_method_s_budget_counts_unless_the_submission_has_one(
    orchestrator: Any, stand_in: Any, work: Any
) -> None:
    agent = stand_in(orchestrator.address, [work(budget={"tokens": 70})], taking=False)
    await agent.ready()
    method = "servertests.v1.WorkService/Do"
    async with Client(orchestrator.address) as client:
        declared, own = await client.submit_raw(
            [Submission(method=method), Submission(method=method, budget=Budget(calls=3))]
        )
        assert [each.budget for each in await client.budgets(declared.task_id)] == [Budget(tokens=70)]
        assert [each.budget for each in await client.budgets(own.task_id)] == [Budget(calls=3)]
        with pytest.raises(InvalidArgument, match="budget"):
            await client.submit_raw([Submission(method=method, budget=Budget())])
