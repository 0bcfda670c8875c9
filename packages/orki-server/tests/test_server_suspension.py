"""Checkpoints and suspensions in the store."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from redis import Redis

from orki.control.v1.attempt_pb2 import TaskState
from orki.errors.v1.errors_pb2 import Reason
from orki_contract.errors import DamagedRecord
from orki_contract.model import Backoff, TaskMethod
from orki_contract.trace import new_span
from orki_control.session import AttemptKey
from orki_server._events import Outbox, task_event
from orki_server._keys import ShardKeys
from orki_server._store import operations, upkeep
from orki_server._store.operations import OfferedAttempt, Recipient, new_task_id
from orki_server._store.replies import ReportStatus
from orki_server._store.store import Store
from orki_server._store.suspension import answer, save_checkpoint, suspend

METHOD = TaskMethod(
    service="acme.v1.WorkService",
    name="Do",
    request="q",
    response="r",
    max_attempts=1,
    backoff=Backoff(initial=0.001),
)
SHARD = 1
SUSPENDED = TaskState.TASK_STATE_SUSPENDED


async def submitted(store: Store, method: TaskMethod = METHOD) -> str:
    task_id = new_task_id(SHARD)
    operation = operations.submit(
        task_id=task_id, method=method, request=b"q", digest="0" * 64, idempotency_key="", span=new_span(), actor="t"
    )
    await store.apply(operation)
    return task_id


async def taken(store: Store, agent: str = "a1") -> OfferedAttempt:
    recipient = Recipient(agent, f"{agent}-1", 1, (METHOD.full_name,))
    (offered,) = (await store.offer(operations.offer(SHARD, 2.0, (recipient,)))).offers
    await store.apply(operations.accept(agent, offered.attempt))
    return offered


async def state(store: Store, task_id: str) -> Any:
    view = await store.apply(operations.read_task(task_id))
    assert view is not None
    return view.task


async def lost(store: Store, key: AttemptKey, agent: str = "a1") -> None:
    await store.apply(operations.fail(agent, key, Reason.REASON_ABANDONED, "gone", "", True))
    await asyncio.sleep(0.25)
    await store.apply(upkeep.sweep(SHARD, 10))


async def test_the_next_attempt_gets_the_last_checkpoint(store: Store) -> None:
    await submitted(store)
    first = await taken(store)
    assert first.checkpoint is None
    for number, payload in ((1, b"one"), (2, b"\x00 two \x1f")):
        reply = await store.apply(save_checkpoint("a1", first.attempt, number, payload))
        assert reply.status is ReportStatus.ACCEPTED
    await lost(store, first.attempt)
    second = await taken(store, "a2")
    assert second.checkpoint == b"\x00 two \x1f"
    # It stays for further attempts, and an empty one is a checkpoint too.
    await store.apply(save_checkpoint("a2", second.attempt, 1, b""))
    await lost(store, second.attempt, "a2")
    assert (await taken(store)).checkpoint == b""


async def test_only_the_holder_of_the_fence_stores_checkpoints_and_none_that_is_older(store: Store) -> None:
    await submitted(store)
    key = (await taken(store)).attempt
    await store.apply(save_checkpoint("a1", key, 2, b"two"))
    assert (await store.apply(save_checkpoint("a1", key, 1, b"one"))).status is ReportStatus.REPEATED
    assert (await store.apply(save_checkpoint("a1", key, 2, b"again"))).status is ReportStatus.REPEATED
    stale = key._replace(fence=key.fence + 1)
    for agent, attempt in (("a2", key), ("a1", stale), ("a1", stale._replace(task_id=new_task_id(SHARD)))):
        assert (await store.apply(save_checkpoint(agent, attempt, 9, b"forged"))).status is ReportStatus.STALE
    await lost(store, key)
    assert (await store.apply(save_checkpoint("a1", key, 9, b"late"))).status is ReportStatus.STALE
    assert (await taken(store)).checkpoint == b"two"


async def test_checkpoints_of_one_batch_apply_in_their_order(store: Store) -> None:
    await submitted(store)
    key = (await taken(store)).attempt
    reports = [store.apply(save_checkpoint("a1", key, number, b"%d" % number)) for number in (1, 3, 2)]
    statuses = [(await each).status for each in reports]
    assert statuses == [ReportStatus.ACCEPTED, ReportStatus.ACCEPTED, ReportStatus.REPEATED]
    await lost(store, key)
    assert (await taken(store)).checkpoint == b"3"


async def test_checkpoint_and_answer_are_emptied_at_the_end_of_the_task(store: Store, redis_url: str) -> None:
    task_id = await submitted(store)
    key = (await taken(store)).attempt
    await store.apply(save_checkpoint("a1", key, 1, b"c" * 1000))
    await store.apply(suspend("a1", key, "?", 0))
    await store.apply(answer(task_id, 0, b"a" * 1000, "t"))
    last = await taken(store)
    assert (last.checkpoint, last.answer) == (b"c" * 1000, b"a" * 1000)
    await store.apply(operations.succeed("a1", last.attempt, b"r"))
    with Redis.from_url(redis_url) as redis:
        fields: Any = redis.hgetall(ShardKeys(SHARD).task(task_id))
    assert (fields[b"checkpoint"], fields[b"answer"]) == (b"", b"")


async def test_a_suspended_task_is_in_no_queue_and_its_attempt_does_not_count(store: Store) -> None:
    task_id = await submitted(store)
    for number in range(1, 4):  # max_attempts is 1
        offered = await taken(store)
        assert offered.attempt.attempt == number
        reply = await store.apply(suspend("a1", offered.attempt, f"question {number}", 0))
        assert (reply.status, reply.state) == (ReportStatus.ACCEPTED, SUSPENDED)
        assert (await store.apply(suspend("a1", offered.attempt, "again", 0))).status is ReportStatus.REPEATED
        recipient = Recipient("a1", "a1-1", 1, (METHOD.full_name,))
        assert not (await store.offer(operations.offer(SHARD, 2.0, (recipient,)))).offers
        task = await state(store, task_id)
        assert (task.suspension.number, task.suspension.question) == (number, f"question {number}")
        assert (await store.apply(answer(task_id, number, b"%d" % number, "t"))).status == "done"
    last = await taken(store)
    assert last.answer == b"3"
    # A failure counts as ever.
    failed = await store.apply(operations.fail("a1", last.attempt, Reason.REASON_HANDLER_FAILED, "", "", True))
    assert failed.state == TaskState.TASK_STATE_FAILED


async def test_answers_have_typed_outcomes(store: Store) -> None:
    task_id = await submitted(store)
    assert (await store.apply(answer(new_task_id(SHARD), 0, b"", "t"))).status == "unknown"
    assert (await store.apply(answer(task_id, 0, b"early", "t"))).status == "idle"
    key = (await taken(store)).attempt
    assert (await store.apply(answer(task_id, 0, b"early", "t"))).status == "idle"
    await store.apply(suspend("a1", key, "?", 0))
    assert (await store.apply(answer(task_id, 2, b"other", "t"))).status == "idle"
    assert (await store.apply(answer(task_id, 1, b"yes", "t"))).status == "done"
    assert (await store.apply(answer(task_id, 1, b"yes", "t"))).status == "repeated"
    assert (await store.apply(answer(task_id, 0, b"no", "t"))).status == "answered"
    second = await taken(store)
    assert second.answer == b"yes"
    assert (await store.apply(answer(task_id, 1, b"yes", "t"))).status == "repeated"
    # A new suspension takes a new answer.
    await store.apply(suspend("a1", second.attempt, "again?", 0))
    assert (await store.apply(answer(task_id, 1, b"yes", "t"))).status == "idle"
    assert (await store.apply(answer(task_id, 2, b"yes", "t"))).status == "done"
    await store.apply(operations.succeed("a1", (await taken(store)).attempt, b""))
    # A client may repeat its call when the task has ended meanwhile.
    assert (await store.apply(answer(task_id, 2, b"yes", "t"))).status == "repeated"
    assert (await store.apply(answer(task_id, 2, b"no", "t"))).status == "ended"


async def test_the_total_timeout_pauses_while_a_task_is_suspended(store: Store) -> None:
    task_id = await submitted(store, replace(METHOD, total_timeout=0.6))
    await store.apply(suspend("a1", (await taken(store)).attempt, "?", 0))
    for _ in range(8):  # The shard's clock needs batches.
        await asyncio.sleep(0.1)
        await store.apply(upkeep.sweep(SHARD, 10))
    assert (await state(store, task_id)).state == SUSPENDED
    await store.apply(answer(task_id, 0, b"", "t"))
    for _ in range(8):
        await asyncio.sleep(0.1)
        await store.apply(upkeep.sweep(SHARD, 10))
    task = await state(store, task_id)
    assert (task.state, task.failure.reason) == (TaskState.TASK_STATE_FAILED, Reason.REASON_TOTAL_TIMEOUT)


async def test_a_suspension_with_a_deadline_goes_on_without_an_answer(store: Store) -> None:
    task_id = await submitted(store)
    await store.apply(suspend("a1", (await taken(store)).attempt, "?", 50))
    assert (await state(store, task_id)).suspension.deadline_ms == 50
    await asyncio.sleep(0.06)
    swept = await store.apply(upkeep.sweep(SHARD, 10))
    assert [each.kind for each in swept.expired] == ["retry"]
    assert (await store.apply(answer(task_id, 1, b"late", "t"))).status == "idle"
    second = await taken(store)
    assert (second.answer, second.answer_overdue) == (None, True)
    await store.apply(suspend("a1", second.attempt, "?", 0))
    await store.apply(answer(task_id, 0, b"now", "t"))
    third = await taken(store)
    assert (third.answer, third.answer_overdue) == (b"now", False)


@pytest.mark.parametrize("when", ["suspended", "before"])
async def test_a_cancel_ends_a_suspended_task(store: Store, when: str) -> None:
    task_id = await submitted(store)
    key = (await taken(store)).attempt
    if when == "before":
        await store.apply(operations.cancel(task_id, "", "t"))
        assert (await store.apply(suspend("a1", key, "?", 0))).state == TaskState.TASK_STATE_CANCELLED
    else:
        await store.apply(suspend("a1", key, "?", 0))
        assert (await store.apply(operations.cancel(task_id, "", "t"))).status == "done"
    assert (await state(store, task_id)).state == TaskState.TASK_STATE_CANCELLED
    assert (await store.apply(answer(task_id, 0, b"", "t"))).status == "ended"


async def test_suspension_and_answer_are_events(store: Store) -> None:
    task_id = await submitted(store)
    await store.apply(suspend("a1", (await taken(store)).attempt, "may I?", 0))
    await store.apply(answer(task_id, 0, b"yes", "mary"))
    records = [record for shard in await Outbox(store).read(100) for record in shard if record.task_id == task_id]
    assert [record.kind for record in records] == ["submitted", "offered", "started", "suspended", "resumed"]
    assert [record.revision for record in records] == [1, 2, 3, 4, 5]
    events = [task_event(record) for record in records[3:]]
    assert (events[0].suspended.question, events[1].resumed.answer_bytes, records[4].actor) == ("may I?", 3, "mary")


async def test_an_operation_that_fails_leaves_the_suspensions_of_its_batch_alone(store: Store, redis_url: str) -> None:
    task_id = await submitted(store)
    await store.apply(suspend("a1", (await taken(store)).attempt, "one?", 0))
    await store.apply(answer(task_id, 0, b"", "t"))
    key = (await taken(store)).attempt
    with Redis.from_url(redis_url) as redis:
        redis.set(ShardKeys(SHARD).progress(task_id), "no stream")
    failing = store.apply(operations.report_progress("a1", key, 10, 1, b"p"))
    last = store.apply(suspend("a1", key, "two?", 0))
    with pytest.raises(DamagedRecord):
        await failing
    await last
    task = await state(store, task_id)
    assert (task.suspension.number, task.suspension.question) == (2, "two?")
