"""Tasks that handlers submit: what a child's failure does to its parent."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orki.control.v1.attempt_pb2 import TaskState
from orki.errors.v1.errors_pb2 import Reason
from orki_agent import Agent
from orki_contract.errors import Cancelled, ChildFailed, HandlerFailed, InvalidArgument, UnknownMethod, WaitTimeout
from orki_control import Client, ClientOptions, JitterOptions

QUICK = JitterOptions(initial=0.05, maximum=0.2)


async def submitted(client: Client, task: Any, request: Any) -> Any:
    async with asyncio.timeout(30):
        while True:
            try:
                return await client.submit(task, request)
            except UnknownMethod:
                await asyncio.sleep(0.05)


@pytest.mark.timeout(120)
async def test_a_failed_child_fails_its_parent_without_further_attempts(serve: Any, work: SimpleNamespace) -> None:
    attempts: list[str] = []
    seen: list[ChildFailed] = []

    class Parent(work.WorkServiceBase):  # type: ignore[misc, name-defined]
        async def work(self, request: Any, ctx: Any) -> Any:
            attempts.append(request.text)
            child = work.WorkRequest(text="fail")
            if request.text == "call":
                await ctx.client.call(work.GRIND, child)
            elif request.text == "group":
                async with asyncio.TaskGroup() as group:
                    group.create_task(ctx.client.call(work.GRIND, child))
                    group.create_task(ctx.client.call(work.GRIND, child))
            elif request.text == "again":
                try:
                    await ctx.client.call(work.GRIND, child)
                except ChildFailed as error:
                    raise RuntimeError("another attempt may help") from error
            elif request.text == "cancelled":
                handle = await ctx.client.submit(work.GRIND, work.WorkRequest(text="wait"))
                with pytest.raises(WaitTimeout):
                    await handle.result(0.2)
                await handle.cancel()
                await handle.result()
            elif request.text == "caught":
                try:
                    await ctx.client.call(work.GRIND, child)
                except ChildFailed as error:
                    seen.append(error)
                return await ctx.client.call(work.GRIND, work.WorkRequest(text="fine"))

    class Child(work.GrindServiceSyncBase):  # type: ignore[misc, name-defined]
        def work(self, request: Any, ctx: Any) -> Any:
            if request.text == "fail":
                attempts.append("child")
                raise ValueError("the child is broken")
            while request.text == "wait":
                ctx.raise_if_cancelled()
            return work.WorkResponse(text=request.text)

    served = await serve()
    agent = Agent("family", Parent(), Child(), slots=8)
    running = asyncio.create_task(agent.run(served.address, backoff=QUICK, drain_grace=5.0))
    try:
        async with Client(served.address, ClientOptions(backoff=QUICK, patience=20)) as client:
            for text in ("call", "group", "cancelled"):
                handle = await submitted(client, work.WORK, work.WorkRequest(text=text))
                with pytest.raises(ChildFailed):
                    await handle.result(60)
                task = await client.get(handle.task_id)
                assert (task.state, task.attempt.attempt) == (TaskState.TASK_STATE_FAILED, 1)
                assert task.failure.reason == Reason.REASON_CHILD_FAILED
                assert attempts.count(text) == 1
            again = await submitted(client, work.WORK, work.WorkRequest(text="again"))
            with pytest.raises(HandlerFailed, match="another attempt"):
                await again.result(60)
            assert attempts.count("again") == 3
            caught = await submitted(client, work.WORK, work.WorkRequest(text="caught"))
            assert (await caught.result(60)).text == "fine"
    finally:
        agent.drain()
        async with asyncio.timeout(20):
            await asyncio.gather(running, return_exceptions=True)
    (error,) = seen
    assert isinstance(error.failure, HandlerFailed)
    assert not isinstance(error.failure, Cancelled)
    assert error.task_id in error.message
    assert "the child is broken" in error.message


PROGRAM = """
import asyncio, importlib.util, sys
spec = importlib.util.spec_from_file_location("contract_of_the_tests", {conftest!r})
contract = importlib.util.module_from_spec(spec)
sys.modules["contract_of_the_tests"] = contract
spec.loader.exec_module(contract)
from orki_agent import Agent
from orki_contract.images import image_of
work = contract.make_work(image_of(contract.PACKAGE))

class Parent(work.WorkServiceBase):
    async def work(self, request, ctx):
        child = await ctx.client.submit(work.GRIND, work.WorkRequest(text="wait"), on_parent_end=request.text)
        await ctx.progress(work.WorkProgress(blob=child.task_id.encode()))
        await asyncio.sleep(60)

agent = Agent("parent", Parent())
"""


@pytest.mark.timeout(120)
@pytest.mark.parametrize("killed", [False, True], ids=["agent lives", "agent is killed"])
async def test_children_end_with_a_parent_that_is_cancelled_through_another_orchestrator(
    serve: Any, work: SimpleNamespace, work_path: Path, tmp_path: Path, killed: bool
) -> None:
    class Child(work.GrindServiceSyncBase):  # type: ignore[misc, name-defined]
        def work(self, request: Any, ctx: Any) -> Any:
            while True:
                ctx.raise_if_cancelled()
                time.sleep(0.01)

    first, second = await serve(), await serve()
    (tmp_path / "an_agent.py").write_text(PROGRAM.format(conftest=str(Path(__file__).with_name("conftest.py"))))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "orki_agent", "run", "an_agent:agent"),
        cwd=tmp_path,
        env={"PYTHONPATH": str(work_path), "ORKI_ORCHESTRATOR": first.address},
    )
    agent = Agent("child", Child(), slots=8)
    running = asyncio.create_task(agent.run(first.address, backoff=QUICK, drain_grace=5.0))
    try:
        async with Client(second.address, ClientOptions(backoff=QUICK, patience=20)) as client:
            children: dict[str, str] = {}
            parents: dict[str, Any] = {}
            for policy in ("cancel", "leave"):
                handle = parents[policy] = await submitted(client, work.WORK, work.WorkRequest(text=policy))
                delta = await anext(aiter(handle.progress()))
                children[policy] = delta.blob.decode()
                async with asyncio.timeout(20):
                    while (await client.get(children[policy])).state != TaskState.TASK_STATE_RUNNING:
                        await asyncio.sleep(0.02)
            if killed:
                process.kill()
                await process.wait()
            for handle in parents.values():
                await handle.cancel()
            async with asyncio.timeout(40):
                ended = await client.wait_end(children["cancel"])
            assert ended.state == TaskState.TASK_STATE_CANCELLED
            await client.wait_end(parents["leave"].task_id)
            assert (await client.get(children["leave"])).state == TaskState.TASK_STATE_RUNNING
            await client.cancel(children["leave"])
            with pytest.raises(InvalidArgument, match="parent"):
                await client.submit(work.GRIND, work.WorkRequest(), on_parent_end="cancel")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        agent.drain()
        async with asyncio.timeout(20):
            await asyncio.gather(running, return_exceptions=True)
