"""Budgets of trees of tasks: real orchestrators, agents and handlers that report usage."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orki.control.v1 import task_pb2 as pb
from orki.control.v1.attempt_pb2 import TaskState
from orki_agent import Agent, BudgetUsedUp
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


async def tokens(client: Client, task_id: str, expected: list[tuple[int, int]]) -> bool:
    """Whether the budgets of a task have these used and maximum tokens."""
    return [(each.used.tokens, each.budget.tokens) for each in await client.budgets(task_id)] == expected


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
            await until(lambda: paused(two, children[-1]) if children else nothing())
            states = [(await two.get(child)).state for child in children]
            assert states.count(TaskState.TASK_STATE_SUCCEEDED) == 1
            assert states.count(SUSPENDED) == 3
            assert await tokens(two, children[-1], [(1000, 1000)])
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


PROGRAM = """
import asyncio, importlib.util, os, sys, time
spec = importlib.util.spec_from_file_location("contract_of_the_tests", {conftest!r})
contract = importlib.util.module_from_spec(spec)
sys.modules["contract_of_the_tests"] = contract
spec.loader.exec_module(contract)
from orki_agent import Agent, Subprocess
from orki_contract.images import image_of
work = contract.make_work(image_of(contract.PACKAGE))

class Worker(work.WorkServiceBase):
    async def work(self, request, ctx):
        ctx.usage(model="m", input_tokens=60, output_tokens=40)
        if os.environ.get("HOLD"):
            await asyncio.sleep(600)
        return work.WorkResponse()

class Grinder(work.GrindServiceSyncBase):
    def work(self, request, ctx):
        left = []
        for _ in range(3):
            left.append(str(ctx.budget.tokens))
            ctx.usage(model="m", input_tokens=60, output_tokens=40)
            time.sleep(0.1)
        return work.WorkResponse(text=",".join(left))

agent = Agent("worker", Worker(), Subprocess(Grinder()), slots=2)
"""


@contextlib.asynccontextmanager
async def process_of(
    target: str, work_path: Path, folder: Path, **env: str
) -> AsyncIterator[asyncio.subprocess.Process]:
    (folder / "budget_agent.py").write_text(PROGRAM.format(conftest=str(Path(__file__).with_name("conftest.py"))))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "orki_agent", "run", "budget_agent:agent"),
        cwd=folder,
        env={"PYTHONPATH": str(work_path), "ORKI_ORCHESTRATOR": target, **env},
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@pytest.mark.timeout(150)
async def test_what_a_killed_agent_has_reported_is_charged_once_and_the_next_attempt_adds(
    serve: Any, work: SimpleNamespace, work_path: Path, tmp_path: Path
) -> None:
    served = await serve()
    async with client_of(served.address) as client:
        async with process_of(served.address, work_path, tmp_path, HOLD="1") as process:
            handle = await submitted(client, work.WORK, work.WorkRequest(), budget=Budget(tokens=1000))
            await until(lambda: tokens(client, handle.task_id, [(100, 1000)]))
            process.kill()
            await process.wait()
        (before,) = await client.budgets(handle.task_id)
        async with process_of(served.address, work_path, tmp_path):
            await handle.result(60)
        (after,) = await client.budgets(handle.task_id)
        # A slow machine may have withdrawn an offer before, whose attempt has used its tokens as well.
        assert before.used.tokens == 100 * before.used.calls
        assert (after.used.tokens, after.used.calls) == (before.used.tokens + 100, before.used.calls + 1)


@pytest.mark.timeout(150)
async def test_a_child_process_knows_and_reports_what_it_uses(
    serve: Any, work: SimpleNamespace, work_path: Path, tmp_path: Path
) -> None:
    served = await serve()
    async with client_of(served.address) as client, process_of(served.address, work_path, tmp_path):
        handle = await submitted(client, work.GRIND, work.WorkRequest(), budget=Budget(tokens=500))
        assert (await handle.result(60)).text == "500,400,300"
        small = await client.submit(work.GRIND, work.WorkRequest(), budget=Budget(tokens=150))
        await until(lambda: paused(client, small.task_id))
        assert await tokens(client, small.task_id, [(200, 150)])
        await client.raise_budget(small.task_id, Budget(tokens=1000))
        assert (await small.result(60)).text == "800,700,600"


@pytest.mark.timeout(150)
@pytest.mark.parametrize("used_up", [False, True], ids=["enough", "used up"])
async def test_an_orchestrator_that_dies_before_the_result_charges_nothing_twice(
    serve: Any, work: SimpleNamespace, used_up: bool
) -> None:
    """The agent sends its totals and its result again, to the other orchestrator."""
    gate = asyncio.Event()
    seen: list[BaseException] = []

    class Worker(work.WorkServiceBase):  # type: ignore[misc, name-defined]
        async def work(self, request: Any, ctx: Any) -> Any:
            if ctx.attempt == 1:
                use(ctx, 50)
                await gate.wait()
            try:
                use(ctx, 50)
            except BaseException as error:
                seen.append(error)
                raise
            return work.WorkResponse(text=str(ctx.attempt))

    first, second = await serve(), await serve()
    async with client_of(second.address) as client:
        async with running(Agent("worker", Worker()), f"{first.address},{second.address}"):
            limit = 100 if used_up else 1000
            handle = await submitted(client, work.WORK, work.WorkRequest(), budget=Budget(tokens=limit))
            await until(lambda: tokens(client, handle.task_id, [(50, limit)]))
            await first.end(signal.SIGKILL)
            gate.set()
            if used_up:
                await until(lambda: paused(client, handle.task_id), 60)
                assert [type(each) for each in seen] == [BudgetUsedUp]
                await client.raise_budget(handle.task_id, Budget(tokens=1000))
            assert (await handle.result(60)).text == ("2" if used_up else "1")
            assert await tokens(client, handle.task_id, [(150 if used_up else 100, 1000)])


@pytest.mark.timeout(150)
async def test_a_smaller_budget_of_a_child_pauses_the_child_alone(serve: Any, work: SimpleNamespace) -> None:
    """The orchestrator of the paused child is down while its budget is raised."""
    children: list[str] = []

    class Parent(work.WorkServiceBase):  # type: ignore[misc, name-defined]
        async def work(self, request: Any, ctx: Any) -> Any:
            handles = [
                await ctx.client.submit(
                    work.GRIND, work.WorkRequest(), idempotency_key=f"{amount}", budget=Budget(tokens=amount)
                )
                for amount in (100, 5000)
            ]
            children[:] = [handle.task_id for handle in handles]
            await handles[1].result()
            use(ctx, 10)
            await handles[0].result()
            return work.WorkResponse(text="done")

    class Child(work.GrindServiceSyncBase):  # type: ignore[misc, name-defined]
        def work(self, request: Any, ctx: Any) -> Any:
            use(ctx, 100)
            return work.WorkResponse()

    first, second = await serve(), await serve()
    targets = f"{second.address},{first.address}"
    async with (
        client_of(first.address) as client,
        running(Agent("parents", Parent()), first.address),
        running(Agent("grinders", Child(), slots=2), targets),
    ):
        handle = await submitted(client, work.WORK, work.WorkRequest(), budget=Budget(tokens=10_000))
        await until(lambda: paused(client, children[0]) if children else nothing())
        root = (handle.task_id,)
        await until(lambda: tokens(client, handle.task_id, [(210, 10_000)]))
        assert [each.task_id for each in await client.budgets(children[0])] == [*root, children[0]]
        (explained,) = (await client.explain(children[0])).explanations
        assert explained.detail == f"paused: budget tokens 100 of 100 used by the tree of {children[0]}"
        await second.end(signal.SIGKILL)
        await client.raise_budget(children[0], Budget(tokens=250))
        assert (await handle.result(60)).text == "done"
        assert await tokens(client, children[0], [(310, 10_000), (200, 250)])


@pytest.mark.timeout(120)
async def test_nothing_of_a_used_up_tree_is_offered(serve: Any, work: SimpleNamespace) -> None:
    started: list[str] = []

    class Worker(work.WorkServiceBase):  # type: ignore[misc, name-defined]
        async def work(self, request: Any, ctx: Any) -> Any:
            started.append(request.text)
            if request.text == "root":
                for number in range(3):
                    await ctx.client.submit(work.WORK, work.WorkRequest(text=f"{number}"), delay=3.0)
                use(ctx, 100)
            return work.WorkResponse()

    served = await serve()
    async with client_of(served.address) as client, running(Agent("worker", Worker(), slots=4), served.address):
        handle = await submitted(client, work.WORK, work.WorkRequest(text="root"), budget=Budget(calls=1))
        await until(lambda: paused(client, handle.task_id))
        states = [task async for task in client.list_tasks() if task.root_task_id == handle.task_id]
        await until(lambda: all_paused(client, [task.task_id for task in states]))
        other = await client.submit(work.WORK, work.WorkRequest(text="other"))
        await other.result(30)
        assert started == ["root", "other"]
        assert len(states) == 3
        for task in states:
            await client.cancel(task.task_id)


async def nothing() -> bool:
    return False


async def all_paused(client: Client, task_ids: list[str]) -> bool:
    return all([await paused(client, task_id) for task_id in task_ids])
