"""Budgets of trees of tasks: real orchestrators, agents and handlers that report usage."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from orki.control.v1 import task_pb2 as pb
from orki.control.v1.attempt_pb2 import TaskState
from orki_agent import Agent
from orki_contract import Budget, BudgetLeft
from orki_contract.errors import InvalidArgument, NotSuspended, UnknownMethod
from orki_control import Client, ClientOptions, JitterOptions

QUICK = JitterOptions(initial=0.05, maximum=0.2)
SUSPENDED = TaskState.TASK_STATE_SUSPENDED
QUEUED = TaskState.TASK_STATE_QUEUED


@contextlib.asynccontextmanager
async def running(agent: Agent, target: str) -> AsyncIterator[None]:
    task = asyncio.create_task(agent.run(target, backoff=QUICK, drain_grace=5.0))
    try:
        yield
    finally:
        agent.drain()
        async with asyncio.timeout(20):
            await asyncio.gather(task, return_exceptions=True)


def client_of(target: str) -> Client:
    return Client(target, ClientOptions(backoff=QUICK, patience=20))


async def submitted(client: Client, task: Any, request: Any, **settings: Any) -> Any:
    async with asyncio.timeout(30):
        while True:
            try:
                return await client.submit(task, request, **settings)
            except UnknownMethod:
                await asyncio.sleep(0.05)


async def until(condition: Callable[[], Any], timeout: float = 20.0) -> None:
    async with asyncio.timeout(timeout):
        while not await condition():
            await asyncio.sleep(0.03)


async def paused(client: Client, task_id: str) -> bool:
    task = await client.get(task_id)
    return task.state == SUSPENDED and task.over_budget


async def tokens(client: Client, task_id: str) -> list[tuple[int, int]]:
    """Used and limited tokens of the budgets of a task."""
    return [(each.used.tokens, each.budget.tokens) for each in await client.budgets(task_id)]


def use(ctx: Any, tokens: int) -> None:
    ctx.usage(model="m", input_tokens=tokens - 1, output_tokens=1, cost_micros=tokens * 10)


@pytest.mark.timeout(120)
async def test_a_budget_pauses_a_tree_over_two_orchestrators_until_it_is_raised(
    serve: Any, work: SimpleNamespace
) -> None:
    lefts: list[BudgetLeft] = []
    children: list[str] = []

    class Parent(work.WorkServiceBase):  # type: ignore[misc, name-defined]
        async def work(self, request: Any, ctx: Any) -> Any:
            lefts.append(ctx.budget)
            use(ctx, 100)
            handles = [
                await ctx.client.submit(
                    work.GRIND, work.WorkRequest(text=str(number)), idempotency_key=f"child-{number}"
                )
                for number in range(4)
            ]
            children[:] = [handle.task_id for handle in handles]
            await ctx.save_checkpoint(work.WorkCheckpoint(number=1))
            for handle in handles:
                await handle.result()
            return work.WorkResponse(text="done")

    class Child(work.GrindServiceSyncBase):  # type: ignore[misc, name-defined]
        def work(self, request: Any, ctx: Any) -> Any:
            for _ in range(2):
                use(ctx, 300)
            return work.WorkResponse(text=request.text)

    first, second = await serve(), await serve()
    parents, grinders = Agent("parents", Parent(), slots=2), Agent("grinders", Child(), slots=1)
    async with running(parents, first.address), running(grinders, second.address):
        async with client_of(first.address) as one, client_of(second.address) as two:
            handle = await submitted(one, work.WORK, work.WorkRequest(), budget=Budget(tokens=1000, calls=50))
            # The parent uses 100, the first child 600, and the second reaches 1,000 in its first call.
            await until(lambda: paused(two, children[-1]) if children else asyncio.sleep(0))
            states = [(await two.get(child)).state for child in children]
            assert states.count(TaskState.TASK_STATE_SUCCEEDED) == 1
            assert states.count(SUSPENDED) == 3
            # A second child may report its first call and no more; nothing else was started.
            assert await tokens(two, children[-1]) == [(1000, 1000)]
            for client in (one, two):
                (explained,) = (await client.explain(children[-1])).explanations
                assert explained.cause == pb.CAUSE_BUDGET
                assert explained.detail == (
                    f"paused: budget tokens 1,000 of 1,000 used by the tree of {handle.task_id}"
                )
            child = await one.get(children[-1])
            assert (child.parent_task_id, child.root_task_id) == (handle.task_id, handle.task_id)
            with pytest.raises(NotSuspended):
                await one.answer(children[-1], b"")
            with pytest.raises(InvalidArgument, match="only be raised"):
                await one.raise_budget(handle.task_id, Budget(tokens=999))
            with pytest.raises(InvalidArgument, match=f"without a budget.*{handle.task_id}"):
                await one.raise_budget(children[0], Budget(tokens=9999))
            raised = await two.raise_budget(handle.task_id, Budget(tokens=5000))
            assert (raised.budget.tokens, raised.budget.calls) == (5000, 50)
            assert (await handle.result(60)).text == "done"
            # Each child succeeded with two calls; a paused attempt's calls count as well.
            used = (await one.budgets(handle.task_id))[0].used
            assert used.tokens % 300 == 100
            assert used.tokens >= 100 + 4 * 600
            assert used.cost_micros == used.tokens * 10
    assert lefts[0] == BudgetLeft(tokens=1000, calls=50)
