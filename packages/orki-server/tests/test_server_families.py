"""Children that end with their parent, in the store and with orchestrators that die."""

from __future__ import annotations

from typing import Any

import pytest

from orki.control.v1.attempt_pb2 import TaskState
from orki.errors.v1.errors_pb2 import Reason
from orki_contract.model import Backoff, TaskMethod
from orki_contract.trace import new_span
from orki_control.session import AttemptKey
from orki_server._families import Families
from orki_server._session import SessionRegistry
from orki_server._store import operations, upkeep
from orki_server._store.family import adopt, disown, orphans
from orki_server._store.operations import Recipient, new_task_id
from orki_server._store.store import Store

METHOD = TaskMethod(service="acme.v1.WorkService", name="Do", request="q", response="r", backoff=Backoff(initial=0.001))
SHARD = 1


async def submitted(store: Store, task_id: str = "") -> str:
    task_id = task_id or new_task_id(SHARD)
    operation = operations.submit(
        task_id=task_id, method=METHOD, request=b"q", digest="0" * 64, idempotency_key="", span=new_span(), actor="t"
    )
    await store.apply(operation)
    return task_id


async def parent(store: Store) -> AttemptKey:
    await submitted(store)
    recipient = Recipient("a1", "a1-1", 1, (METHOD.full_name,))
    (offered,) = (await store.offer(operations.offer(SHARD, 2.0, (recipient,)))).offers
    await store.apply(operations.accept("a1", offered.attempt))
    return offered.attempt


async def state(store: Store, task_id: str) -> TaskState.ValueType:
    view = await store.apply(operations.read_task(task_id))
    assert view is not None
    return view.task.state


async def ended(store: Store, key: AttemptKey, how: str) -> None:
    if how == "cancelled":
        await store.apply(operations.cancel(key.task_id, "", "t"))
        await store.apply(operations.confirm_cancelled("a1", key, Reason.REASON_CANCELLED))
    elif how == "failed":
        await store.apply(operations.fail("a1", key, Reason.REASON_HANDLER_REJECTED, "", "", False))
    else:
        await store.apply(operations.succeed("a1", key, b""))


async def cancel_orphans(store: Store) -> list[tuple[str, bool]]:
    changed: list[tuple[str, bool]] = []
    families = Families(store, SessionRegistry(), lambda task_id, is_end: changed.append((task_id, is_end)))
    await families._cancel_orphans(SHARD)
    return changed


@pytest.mark.parametrize("how", ["cancelled", "failed", "succeeded"])
async def test_children_are_cancelled_when_their_parent_is_cancelled_or_fails(store: Store, how: str) -> None:
    key = await parent(store)
    children = [new_task_id(shard) for shard in (0, SHARD)]
    for child in children:
        assert await store.apply(adopt(key, child)) == "adopted"
        await submitted(store, child)
    other = await submitted(store)
    await ended(store, key, how)
    swept = await store.apply(upkeep.sweep(SHARD, 10))
    assert swept.has_orphans == (how != "succeeded")
    changed = await cancel_orphans(store)
    expected = TaskState.TASK_STATE_QUEUED if how == "succeeded" else TaskState.TASK_STATE_CANCELLED
    assert [await state(store, child) for child in children] == [expected] * 2
    assert sorted(changed) == ([] if how == "succeeded" else sorted((child, True) for child in children))
    assert await state(store, other) == TaskState.TASK_STATE_QUEUED
    assert await store.apply(orphans(SHARD, 10)) == []
    assert not (await store.apply(upkeep.sweep(SHARD, 10))).has_orphans


async def test_only_a_running_attempt_has_children(store: Store) -> None:
    key = await parent(store)
    assert await store.apply(adopt(key._replace(fence=key.fence + 1), new_task_id(SHARD))) == "stale"
    assert await store.apply(adopt(key._replace(task_id=new_task_id(SHARD)), new_task_id(SHARD))) == "stale"
    await ended(store, key, "failed")
    assert await store.apply(adopt(key, new_task_id(SHARD))) == "stale"


async def test_a_family_is_listed_until_its_children_were_cancelled(store: Store) -> None:
    key = await parent(store)
    child = new_task_id(SHARD)
    await store.apply(adopt(key, child))
    await ended(store, key, "failed")
    # An orchestrator that dies here leaves the work to another one.
    for _ in range(2):
        (family,) = await store.apply(orphans(SHARD, 10))
        assert (family.parent, family.children) == (key.task_id, (child,))
    await store.apply(disown(key.task_id))
    assert await store.apply(orphans(SHARD, 10)) == []


async def test_a_child_that_is_created_after_its_parent_s_end_is_cancelled(store: Store) -> None:
    key = await parent(store)
    child = new_task_id(SHARD)
    await store.apply(adopt(key, child))
    await ended(store, key, "failed")
    assert await cancel_orphans(store) == []
    await submitted(store, child)
    assert await cancel_orphans(store) == [(child, True)]
    assert await store.apply(orphans(SHARD, 10)) == []


async def test_the_end_of_a_child_ends_its_own_children(store: Store) -> None:
    key, child = await parent(store), await parent(store)
    grandchild = await submitted(store)
    await store.apply(adopt(key, child.task_id))
    await store.apply(adopt(child, grandchild))
    await ended(store, key, "failed")
    await cancel_orphans(store)
    assert await state(store, child.task_id) == TaskState.TASK_STATE_CANCELLING
    await store.apply(operations.confirm_cancelled("a1", child, Reason.REASON_CANCELLED))
    await cancel_orphans(store)
    assert await state(store, grandchild) == TaskState.TASK_STATE_CANCELLED


async def test_a_family_is_recorded_with_the_end_of_an_abandoned_parent(store: Store) -> None:
    key = await parent(store)
    await store.apply(adopt(key, new_task_id(SHARD)))
    await store.apply(operations.cancel(key.task_id, "", "t"))
    await store.apply(operations.fail("a1", key, Reason.REASON_ABANDONED, "the agent is gone", "", True))
    found: Any = await store.apply(orphans(SHARD, 10))
    assert [each.parent for each in found] == [key.task_id]
