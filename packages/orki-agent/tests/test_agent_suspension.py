"""Checkpoints and suspensions of real agents: processes that are killed, and a fleet that starts again."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orki.control.v1.attempt_pb2 import TaskState
from orki.errors.v1.errors_pb2 import Reason
from orki_agent.testing import run_handler, start_handler
from orki_contract.errors import (
    AlreadyAnswered,
    InvalidArgument,
    NotSuspended,
    TaskEnded,
    TooLarge,
    UnknownMethod,
    UnknownTask,
)
from orki_control import Client, ClientOptions, JitterOptions
from orki_server.embedded import EmbeddedOptions, EmbeddedServer

SUSPENDED = TaskState.TASK_STATE_SUSPENDED
OPTIONS = ClientOptions(backoff=JitterOptions(initial=0.05, maximum=0.2), patience=20)

PROGRAM = """
import importlib.util, os, signal, sys
spec = importlib.util.spec_from_file_location("contract_of_the_tests", {conftest!r})
contract = importlib.util.module_from_spec(spec)
sys.modules["contract_of_the_tests"] = contract
spec.loader.exec_module(contract)
from orki_agent import Agent
from orki_contract.images import image_of
work = contract.make_work(image_of(contract.PACKAGE))

class Worker(work.WorkServiceBase):
    async def work(self, request, ctx):
        if request.text == "die":
            if ctx.checkpoint is None:
                await ctx.save_checkpoint(work.WorkCheckpoint(number=41))
                await ctx.save_checkpoint(work.WorkCheckpoint(number=42))
                os.kill(os.getpid(), signal.SIGKILL)
            return work.WorkResponse(text=f"from {{ctx.checkpoint.number}}")
        if ctx.answer is None and not ctx.answer_overdue:
            await ctx.save_checkpoint(work.WorkCheckpoint(number=ctx.attempt))
            await ctx.suspend("may I?", deadline=request.seconds or None)
        said = ctx.answer.text if ctx.answer else "nothing"
        return work.WorkResponse(text=f"{{said}} after {{ctx.checkpoint.number}}")

class Grinder(work.GrindServiceSyncBase):
    def work(self, request, ctx):
        if ctx.answer is None:
            ctx.save_checkpoint(b"bytes")
            ctx.suspend("blocking?")
        return work.WorkResponse(blob=ctx.checkpoint + ctx.answer)

agent = Agent("worker", Worker(), Grinder(), slots=1)
"""


@pytest.fixture
async def agents(work_path: Path, tmp_path: Path) -> AsyncIterator[Callable[[str], Awaitable[Any]]]:
    """Starts agent processes at an address; kills what is left of them."""
    (tmp_path / "an_agent.py").write_text(PROGRAM.format(conftest=str(Path(__file__).with_name("conftest.py"))))
    started = []

    async def start(address: str) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "orki_agent", "run", "an_agent:agent"),
            cwd=tmp_path,
            env={"PYTHONPATH": str(work_path), "ORKI_ORCHESTRATOR": address},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def submitted(client: Client, task: Any, request: Any) -> Any:
    async with asyncio.timeout(30):
        while True:
            try:
                return await client.submit(task, request)
            except UnknownMethod:
                await asyncio.sleep(0.05)


async def suspended(client: Client, task_id: str, number: int = 1) -> Any:
    async with asyncio.timeout(30):
        while True:
            task = await client.get(task_id)
            if task.state == SUSPENDED and task.suspension.number == number:
                return task
            await asyncio.sleep(0.02)


@pytest.mark.timeout(120)
async def test_the_attempt_after_a_killed_agent_begins_at_the_last_checkpoint(
    serve: Any, agents: Any, work: SimpleNamespace
) -> None:
    served = await serve()
    first = await agents(served.address)
    async with Client(served.address, OPTIONS) as client:
        handle = await submitted(client, work.WORK, work.WorkRequest(text="die"))
        async with asyncio.timeout(30):
            assert await first.wait() == -signal.SIGKILL
        await agents(served.address)
        assert (await handle.result(60)).text == "from 42"
        assert (await client.get(handle.task_id)).attempt.attempt == 2


@pytest.mark.timeout(120)
async def test_a_suspended_task_holds_no_slot_and_goes_on_with_its_answer(
    serve: Any, agents: Any, work: SimpleNamespace
) -> None:
    first, second = await serve(), await serve()
    await agents(first.address)
    async with Client(first.address, OPTIONS) as client, Client(second.address, OPTIONS) as other:
        handle = await submitted(client, work.WORK, work.WorkRequest())
        task = await suspended(other, handle.task_id)
        assert (task.suspension.question, task.suspension.deadline_ms) == ("may I?", 0)
        # The agent has one slot.
        blocking = await submitted(client, work.GRIND, work.WorkRequest())
        await suspended(client, blocking.task_id)
        assert [each.task_id async for each in client.list_tasks(states=[SUSPENDED], method=task.method)] == [
            handle.task_id
        ]
        with pytest.raises(NotSuspended):
            await other.answer(handle.task_id, work.WorkAnswer(text="yes"), suspension=2)
        with pytest.raises(InvalidArgument, match="WorkAnswer"):
            await handle.answer(b"yes")
        with pytest.raises(InvalidArgument, match="not a agentwork"):
            await other.answer(handle.task_id, b"\xff")
        with pytest.raises(TooLarge):
            await other.answer(handle.task_id, bytes(1 << 18))
        with pytest.raises(UnknownTask):
            await other.answer(handle.task_id[:-1] + ("1" if handle.task_id[-1] == "0" else "0"), b"")
        # Through the other orchestrator than the agent's.
        await other.answer(handle.task_id, work.WorkAnswer(text="yes"))
        await blocking.answer(b" and answer")
        await other.answer(handle.task_id, work.WorkAnswer(text="yes"), suspension=1)
        with pytest.raises((AlreadyAnswered, TaskEnded)):
            await other.answer(handle.task_id, work.WorkAnswer(text="no"), suspension=1)
        assert (await handle.result(30)).text == "yes after 1"
        assert (await blocking.result(30)).blob == b"bytes and answer"
        await other.answer(handle.task_id, work.WorkAnswer(text="yes"))
        with pytest.raises(TaskEnded):
            await other.answer(handle.task_id, work.WorkAnswer(text="no"))


async def orki(*arguments: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "orki_server", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


@pytest.mark.timeout(120)
async def test_the_command_shows_the_question_and_answers_it(serve: Any, agents: Any, work: SimpleNamespace) -> None:
    served = await serve()
    await agents(served.address)
    at = ("--orchestrator", served.address)
    async with Client(served.address, OPTIONS) as client:
        handle = await submitted(client, work.WORK, work.WorkRequest())
        await suspended(client, handle.task_id)
        blocking = await submitted(client, work.GRIND, work.WorkRequest())
        await suspended(client, blocking.task_id)
        shown = (await orki("tasks", handle.task_id, *at))[1]
        assert "suspended" in shown
        assert "may I?" in shown
        code, _, errors = await orki("answer", handle.task_id, '{"txet": "yes"}', *at)
        assert (code, "txet" in errors) == (1, True)
        assert (await orki("answer", handle.task_id, '{"text": "yes"}', *at))[0] == 0
        assert (await orki("answer", blocking.task_id, " text", *at))[0] == 0
        assert (await handle.result(30)).text == "yes after 1"
        assert (await blocking.result(30)).blob == b"bytes text"
        code, _, errors = await orki("answer", handle.task_id, '{"text": "no"}', *at)
        assert (code, "has ended" in errors) == (1, True)


@pytest.mark.timeout(120)
async def test_a_deadline_and_a_cancel_end_a_suspension(serve: Any, agents: Any, work: SimpleNamespace) -> None:
    served = await serve()
    await agents(served.address)
    async with Client(served.address, OPTIONS) as client:
        late = await submitted(client, work.WORK, work.WorkRequest(seconds=0.5))
        stopped = await submitted(client, work.WORK, work.WorkRequest())
        await suspended(client, stopped.task_id)
        assert (await client.cancel(stopped.task_id)).state == TaskState.TASK_STATE_CANCELLED
        assert (await late.result(30)).text == "nothing after 1"


@pytest.mark.timeout(120)
async def test_a_suspension_survives_a_restart_of_everything(
    serve: Any, agents: Any, work: SimpleNamespace, tmp_path: Path
) -> None:
    options = EmbeddedOptions(directory=tmp_path, append_only=True)
    with EmbeddedServer(options) as server:
        served = await serve(redis=server.url)
        agent = await agents(served.address)
        async with Client(served.address, OPTIONS) as client:
            handle = await submitted(client, work.WORK, work.WorkRequest())
            await suspended(client, handle.task_id)
        await served.end(signal.SIGKILL)
        agent.kill()
        await agent.wait()
    with EmbeddedServer(options) as server:
        served = await serve(redis=server.url)
        async with Client(served.address, OPTIONS) as client:
            await suspended(client, handle.task_id)
            await client.answer(handle.task_id, work.WorkAnswer(text="go on"))
            await agents(served.address)
            again = client.handle(work.WORK, handle.task_id)
            assert (await again.result(30)).text == "go on after 1"


# --- The test kit. ---


def service(work: SimpleNamespace, handler: Callable[[Any, Any], Any]) -> Any:
    class Service(work.WorkServiceBase):  # type: ignore[misc, name-defined]
        async def work(self, request: Any, ctx: Any) -> Any:
            return await handler(request, ctx)

    return Service().work


async def test_the_kit_keeps_checkpoints_and_gives_them_to_the_handler(work: SimpleNamespace) -> None:
    seen = []

    async def handler(request: Any, ctx: Any) -> Any:
        seen.append(ctx.checkpoint)
        await ctx.save_checkpoint(work.WorkCheckpoint(number=2))
        seen.append(ctx.checkpoint)
        with pytest.raises(InvalidArgument, match="WorkCheckpoint"):
            await ctx.save_checkpoint(b"bytes")
        with pytest.raises(TooLarge):
            await ctx.save_checkpoint(work.WorkCheckpoint(blob=bytes(1 << 18)))
        return work.WorkResponse()

    run = await run_handler(service(work, handler), work.WorkRequest(), checkpoint=work.WorkCheckpoint(number=1))
    assert run.response is not None
    assert [each.number for each in seen] == [1, 2]
    assert [each.number for each in run.checkpoints] == [2]
    with pytest.raises(InvalidArgument, match="WorkCheckpoint"):
        await run_handler(service(work, handler), work.WorkRequest(), checkpoint=b"bytes")


async def test_the_kit_shows_a_suspension_and_gives_the_answer(work: SimpleNamespace) -> None:
    async def ask(ctx: Any) -> None:
        try:
            await ctx.suspend("may I?", deadline=1.5)
        except Exception:
            pytest.fail("a suspension is no error")

    async def handler(request: Any, ctx: Any) -> Any:
        if ctx.answer is None:
            if request.text == "group":
                async with asyncio.TaskGroup() as group:
                    group.create_task(ask(ctx))
            await ask(ctx)
        return work.WorkResponse(text=ctx.answer.text)

    for text in ("", "group"):
        run = await run_handler(service(work, handler), work.WorkRequest(text=text))
        assert run.suspended is not None
        assert (run.suspended.question, run.suspended.deadline_ms) == ("may I?", 1500)
        with pytest.raises(InvalidArgument, match="suspended"):
            _ = run.response
    run = await run_handler(service(work, handler), work.WorkRequest(), answer=work.WorkAnswer(text="yes"))
    assert run.response.text == "yes"
    with pytest.raises(InvalidArgument, match="WorkAnswer"):
        await run_handler(service(work, handler), work.WorkRequest(), answer=b"yes")


@pytest.mark.parametrize("wrong", [{"deadline": 0}, {"deadline": "soon"}, {"deadline": True}, {"question": "x" * 4001}])
async def test_a_wrong_suspension_is_refused(work: SimpleNamespace, wrong: dict[str, Any]) -> None:
    async def handler(request: Any, ctx: Any) -> Any:
        with pytest.raises(InvalidArgument, match="suspend"):
            await ctx.suspend(**wrong)
        return work.WorkResponse()

    run = await run_handler(service(work, handler), work.WorkRequest())
    assert run.failure is None


async def test_a_cancel_wins_over_a_checkpoint_that_waits(work: SimpleNamespace) -> None:
    class Service(work.GrindServiceSyncBase):  # type: ignore[misc, name-defined]
        def work(self, request: Any, ctx: Any) -> Any:
            while True:
                ctx.save_checkpoint(b"again")

    async with start_handler(Service().work, work.WorkRequest()) as running:
        running.cancel()
        run = await running.wait()
    assert run.cancelled
    assert run.failure is None or run.failure.reason == Reason.REASON_UNSPECIFIED
