"""An agent and its orchestrator over real gRPC: offers, progress, results, cuts, drains and refusals."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from orki.control.v1 import session_pb2 as pb
from orki_agent import Agent
from orki_contract import TaskStub
from orki_contract.errors import (
    Cancelled,
    ChildFailed,
    ContractMismatch,
    HandlerRejected,
    OrkiError,
    Reason,
    Replaced,
    WaitTimeout,
)
from orki_contract.trace import current_span
from orki_control import JitterOptions

QUICK = JitterOptions(initial=0.05, maximum=0.1)


@asynccontextmanager
async def running(agent: Agent, orchestrator: Any, **changes: Any) -> AsyncIterator[asyncio.Task[None]]:
    """The agent, connected; drained at the end unless it has ended before."""
    changes = {"agent_id": "a1", "backoff": QUICK, "drain_grace": 5.0, **changes}
    task = asyncio.create_task(agent.run(orchestrator.target, **changes))
    try:
        await orchestrator.connected()
        yield task
    finally:
        agent.drain()
        async with asyncio.timeout(20):
            await asyncio.gather(task, return_exceptions=True)


def service(work: SimpleNamespace, handler: Callable[[Any, Any], Any]) -> Any:
    """An async service with this handler."""

    class Service(work.WorkServiceBase):  # type: ignore[misc, name-defined]
        async def work(self, request: Any, ctx: Any) -> Any:
            return await handler(request, ctx)

    return Service()


async def test_a_task_runs_and_its_result_is_acknowledged(orchestrator: Any, work: SimpleNamespace) -> None:
    seen = []

    async def handler(request: Any, ctx: Any) -> Any:
        seen.append((ctx.task_id, ctx.attempt, ctx.fence, current_span(), ctx.span))
        await ctx.progress(work.WorkProgress(number=7))
        return work.WorkResponse(text=request.text.upper())

    async with running(Agent("worker", service(work, handler)), orchestrator) as task:
        task_id = await orchestrator.submit(work.WORK, work.WorkRequest(text="hello"))
        result = await orchestrator.result(task_id)
        assert work.WorkResponse.FromString(result.response).text == "HELLO"
    assert task.done()
    assert task.exception() is None
    job = orchestrator.jobs[task_id]
    assert seen[0][:3] == (task_id, 1, job.fence)
    assert seen[0][3] is seen[0][4]
    assert seen[0][4].trace_id in job.traceparent
    assert seen[0][4].parent_id in job.traceparent
    assert [work.WorkProgress.FromString(each.payload).number for each in job.progress] == [7]
    for kind in ("accepted", "progress", "result"):
        assert (kind, job.traceparent) in orchestrator.traceparents
    assert orchestrator.drained
    hello = orchestrator.hellos[0]
    assert [each.service for each in hello.services] == ["agentwork.v1.WorkService"]
    assert hello.services[0].digest.startswith("sha256:")
    assert hello.services[0].image


async def test_directives_reach_the_handler_while_it_runs(orchestrator: Any, work: SimpleNamespace) -> None:
    async def handler(request: Any, ctx: Any) -> Any:
        texts = []
        async for directive in ctx.directives():
            texts.append(directive.text)
            if directive.text == "end":
                break
        return work.WorkResponse(text=" ".join(texts))

    async with running(Agent("worker", service(work, handler)), orchestrator):
        task_id = await orchestrator.submit(work.WORK, work.WorkRequest())
        await orchestrator.running(task_id)
        for text in ("go", "on", "end"):
            orchestrator.session.direct(orchestrator.key(task_id), work.WorkDirective(text=text).SerializeToString())
        await orchestrator.flush()
        result = await orchestrator.result(task_id)
        assert work.WorkResponse.FromString(result.response).text == "go on end"


@pytest.mark.parametrize(
    ("raised", "reason", "error_type"),
    [
        (ValueError("odd"), Reason.REASON_HANDLER_FAILED, "ValueError"),
        (HandlerRejected("never"), Reason.REASON_HANDLER_REJECTED, "orki_contract.errors.HandlerRejected"),
        (asyncio.CancelledError(), Reason.REASON_HANDLER_FAILED, "asyncio.exceptions.CancelledError"),
        (SystemExit(3), Reason.REASON_HANDLER_FAILED, "orki_contract.errors.HandlerFailed"),
    ],
)
async def test_errors_of_handlers_become_failures(
    orchestrator: Any, work: SimpleNamespace, raised: BaseException, reason: int, error_type: str
) -> None:
    async def handler(request: Any, ctx: Any) -> Any:
        raise raised

    async with running(Agent("worker", service(work, handler)), orchestrator):
        result = await orchestrator.result(await orchestrator.submit(work.WORK, work.WorkRequest()))
        assert result.failure.reason == reason
        assert result.failure.error_type == error_type
        again = await orchestrator.submit(work.WORK, work.WorkRequest())
        assert (await orchestrator.result(again)).failure.reason == reason


async def test_what_is_no_response_is_said_to_be_none(orchestrator: Any, work: SimpleNamespace) -> None:
    async def handler(request: Any, ctx: Any) -> Any:
        return "text"

    async with running(Agent("worker", service(work, handler)), orchestrator):
        result = await orchestrator.result(await orchestrator.submit(work.WORK, work.WorkRequest()))
        assert result.failure.reason == Reason.REASON_INVALID_RESPONSE
        assert "returned str" in result.failure.message
        assert "WorkResponse" in result.failure.message


async def test_a_request_that_is_none_fails_for_good(orchestrator: Any, work: SimpleNamespace) -> None:
    async def handler(request: Any, ctx: Any) -> Any:
        return work.WorkResponse()

    async with running(Agent("worker", service(work, handler)), orchestrator):
        result = await orchestrator.result(await orchestrator.submit(work.WORK, b"\xff\xff\xff"))
        assert result.failure.reason == Reason.REASON_INVALID_ARGUMENT


async def test_an_oversize_response_fails_and_the_session_goes_on(orchestrator: Any, work: SimpleNamespace) -> None:
    async def handler(request: Any, ctx: Any) -> Any:
        return work.WorkResponse(blob=b"x" * int(request.seconds))

    async with running(Agent("worker", service(work, handler)), orchestrator):
        large = await orchestrator.submit(work.WORK, work.WorkRequest(seconds=5_000_000))
        assert (await orchestrator.result(large)).failure.reason == Reason.REASON_TOO_LARGE
        fitting = await orchestrator.submit(work.WORK, work.WorkRequest(seconds=3_000_000))
        assert len((await orchestrator.result(fitting)).response) > 3_000_000
        assert len(orchestrator.hellos) == 1


async def test_progress_that_is_wrong_is_the_handlers_error(orchestrator: Any, work: SimpleNamespace) -> None:
    errors = []

    async def handler(request: Any, ctx: Any) -> Any:
        for wrong in (work.WorkResponse(), None, work.WorkProgress(blob=b"x" * 5_000_000)):
            try:
                await ctx.progress(wrong)
            except OrkiError as error:
                errors.append(type(error).__name__)
        return work.WorkResponse()

    async with running(Agent("worker", service(work, handler)), orchestrator):
        await orchestrator.result(await orchestrator.submit(work.WORK, work.WorkRequest()))
        assert errors == ["InvalidArgument", "InvalidArgument", "TooLarge"]


async def test_much_progress_arrives_in_order_and_is_bounded(orchestrator: Any, work: SimpleNamespace) -> None:
    async def handler(request: Any, ctx: Any) -> Any:
        for number in range(1000):
            await ctx.progress(work.WorkProgress(number=number, blob=b"x" * 500))
        return work.WorkResponse()

    async with running(Agent("worker", service(work, handler)), orchestrator, progress_window=8):
        task_id = await orchestrator.submit(work.WORK, work.WorkRequest())
        await orchestrator.result(task_id)
        numbers = [work.WorkProgress.FromString(each.payload).number for each in orchestrator.jobs[task_id].progress]
        assert numbers == list(range(1000))


async def test_unknown_methods_are_declined(orchestrator: Any, work: SimpleNamespace) -> None:
    async def handler(request: Any, ctx: Any) -> Any:
        return work.WorkResponse()

    async with running(Agent("worker", service(work, handler)), orchestrator):
        task_id = await orchestrator.submit(work.GRIND, work.WorkRequest())
        await orchestrator.until(lambda: orchestrator.jobs[task_id].state == "declined")
        assert orchestrator.jobs[task_id].declined[0].failure.reason == Reason.REASON_UNKNOWN_METHOD


async def test_a_cut_stream_loses_and_doubles_nothing(orchestrator: Any, work: SimpleNamespace) -> None:
    gate = asyncio.Event()
    started = []

    async def handler(request: Any, ctx: Any) -> Any:
        started.append(ctx.fence)
        await ctx.progress(work.WorkProgress(number=1))
        await gate.wait()
        await ctx.progress(work.WorkProgress(number=2))
        return work.WorkResponse(text=request.text)

    async with running(Agent("worker", service(work, handler)), orchestrator):
        task_ids = [await orchestrator.submit(work.WORK, work.WorkRequest(text=str(n))) for n in range(4)]
        for task_id in task_ids:
            await orchestrator.running(task_id)
        for _ in range(3):
            await orchestrator.cut()
            await orchestrator.connected()
        await orchestrator.cut()
        gate.set()
        for number, task_id in enumerate(task_ids):
            result = await orchestrator.result(task_id)
            assert work.WorkResponse.FromString(result.response).text == str(number)
        assert len(started) == 4
        assert len(orchestrator.hellos[-1].held) == 4


async def test_no_end_of_a_stream_ends_the_agent(orchestrator: Any, work: SimpleNamespace) -> None:
    """It connects again, as often as needed and over few connections, and the attempt goes on."""
    gate = asyncio.Event()
    started = []

    async def handler(request: Any, ctx: Any) -> Any:
        started.append(ctx.fence)
        await gate.wait()
        return work.WorkResponse(text="still here")

    def connections() -> int:
        port, established = f":{orchestrator.port:04X}", "01"
        texts = [Path(f"/proc/self/net/{each}").read_text() for each in ("tcp", "tcp6")]
        lines = [line.split() for text in texts for line in text.splitlines()]
        return sum(line[2].endswith(port) and line[3] == established for line in lines)

    status = grpc.StatusCode
    async with running(Agent("worker", service(work, handler)), orchestrator) as agent:
        task_id = await orchestrator.submit(work.WORK, work.WorkRequest())
        await orchestrator.running(task_id)
        for number in range(20):
            await orchestrator.cut([status.OK, status.CANCELLED, status.UNAVAILABLE, status.INTERNAL][number % 4])
            await orchestrator.connected()
        assert not agent.done()
        assert 1 <= connections() <= 2
        gate.set()
        for each in (task_id, await orchestrator.submit(work.WORK, work.WorkRequest())):
            result = await orchestrator.result(each)
            assert work.WorkResponse.FromString(result.response).text == "still here"
    assert len(started) == 2


async def test_a_result_is_sent_again_until_it_is_acknowledged(orchestrator: Any, work: SimpleNamespace) -> None:
    async def handler(request: Any, ctx: Any) -> Any:
        return work.WorkResponse(text="once")

    async with running(Agent("worker", service(work, handler)), orchestrator):
        orchestrator.acknowledging = False
        task_id = await orchestrator.submit(work.WORK, work.WorkRequest())
        await orchestrator.result(task_id)
        orchestrator.acknowledging = True
        await orchestrator.cut()
        await orchestrator.until(lambda: orchestrator.jobs[task_id].results == 2)
        assert orchestrator.hellos[-1].held[0].has_result
        await orchestrator.until(lambda: not orchestrator.session.attempts)


async def test_an_orchestrator_that_is_away_comes_back(orchestrator: Any, work: SimpleNamespace) -> None:
    gate = asyncio.Event()

    async def handler(request: Any, ctx: Any) -> Any:
        await gate.wait()
        return work.WorkResponse(text="still here")

    async with running(Agent("worker", service(work, handler)), orchestrator):
        task_id = await orchestrator.submit(work.WORK, work.WorkRequest())
        await orchestrator.running(task_id)
        await orchestrator.stop()
        gate.set()
        await asyncio.sleep(0.5)
        await orchestrator.start()
        result = await orchestrator.result(task_id)
        assert work.WorkResponse.FromString(result.response).text == "still here"


async def test_a_refused_contract_is_fatal_and_named(
    orchestrator: Any, work: SimpleNamespace, mismatch: OrkiError
) -> None:
    async def handler(request: Any, ctx: Any) -> Any:
        return work.WorkResponse()

    orchestrator.refuse_with = mismatch
    agent = Agent("worker", service(work, handler))
    with pytest.raises(ContractMismatch, match="WorkService is live with another contract"):
        async with asyncio.timeout(20):
            await agent.run(orchestrator.target, agent_id="a1")


async def test_a_newer_instance_replaces_the_older(orchestrator: Any, work: SimpleNamespace) -> None:
    ended = []

    async def handler(request: Any, ctx: Any) -> Any:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(ctx.fence)

    async with running(Agent("worker", service(work, handler)), orchestrator) as older:
        task_id = await orchestrator.submit(work.WORK, work.WorkRequest())
        await orchestrator.running(task_id)
        async with running(Agent("worker", service(work, handler)), orchestrator) as newer:
            with pytest.raises(Replaced, match="its own agent id"):
                await asyncio.wait_for(older, 15)
            assert ended == [orchestrator.jobs[task_id].fence]
            assert not newer.done()


async def test_a_lease_that_is_not_renewed_stops_the_handler_in_time(orchestrator: Any, work: SimpleNamespace) -> None:
    lost = []

    async def handler(request: Any, ctx: Any) -> Any:
        began = asyncio.get_running_loop().time()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            lost.append(asyncio.get_running_loop().time() - began)
            raise

    async with running(Agent("worker", service(work, handler)), orchestrator):
        orchestrator.echoing = False
        task_id = await orchestrator.submit(work.WORK, work.WorkRequest(), lease=3.0)
        await orchestrator.running(task_id)
        await orchestrator.stop()
        async with asyncio.timeout(10):
            while not lost:
                await asyncio.sleep(0.02)
        assert lost[0] < 3.0
        assert orchestrator.jobs[task_id].results == 0


async def test_drain_lets_what_runs_end(orchestrator: Any, work: SimpleNamespace) -> None:
    gate = asyncio.Event()

    async def handler(request: Any, ctx: Any) -> Any:
        await gate.wait()
        return work.WorkResponse(text="done")

    agent = Agent("worker", service(work, handler))
    async with running(agent, orchestrator) as task:
        task_id = await orchestrator.submit(work.WORK, work.WorkRequest())
        await orchestrator.running(task_id)
        agent.drain()
        await orchestrator.until(lambda: orchestrator.drained)
        assert orchestrator.session.free_slots == 0
        before = len(orchestrator.heartbeats)
        await orchestrator.until(lambda: len(orchestrator.heartbeats) > before)
        assert not task.done()
        gate.set()
        await asyncio.wait_for(task, 15)
        assert orchestrator.jobs[task_id].result is not None
        assert agent.served.is_set()


async def test_what_outlasts_the_drain_is_given_back(orchestrator: Any, work: SimpleNamespace) -> None:
    async def handler(request: Any, ctx: Any) -> Any:
        await asyncio.sleep(60)

    agent = Agent("worker", service(work, handler))
    async with running(agent, orchestrator, drain_grace=0.2) as task:
        task_id = await orchestrator.submit(work.WORK, work.WorkRequest())
        await orchestrator.running(task_id)
        agent.drain()
        await asyncio.wait_for(task, 15)
        result = orchestrator.jobs[task_id].result
        assert result.failure.reason == Reason.REASON_ABANDONED
        assert "had started" in result.failure.message


async def test_a_handler_hands_work_on_in_its_own_trace(orchestrator: Any, work: SimpleNamespace) -> None:
    told = []

    class Grinder(work.GrindServiceSyncBase):  # type: ignore[misc, name-defined]
        def work(self, request: Any, ctx: Any) -> Any:
            ctx.progress(work.WorkProgress(number=1))
            directive = next(iter(ctx.directives()), None)
            ctx.raise_if_cancelled()
            return work.WorkResponse(text=f"{request.text} {directive.text}")

    async def handler(request: Any, ctx: Any) -> Any:
        grind = TaskStub(ctx.client, work.GRIND)
        first, second = await grind.submit_many([work.WorkRequest(text=each) for each in ("first", "second")])
        async for delta in first.progress():
            told.append(delta.number)
            await first.direct(work.WorkDirective(text="directed"))
        await second.cancel("not needed")
        with pytest.raises(ChildFailed) as failed:
            await second.result(10)
        assert isinstance(failed.value.failure, Cancelled)
        with pytest.raises(WaitTimeout):
            await (await grind.submit(work.WorkRequest())).result(0.1)
        return await first.result(10)

    async with running(Agent("worker", service(work, handler), Grinder()), orchestrator):
        task_id = await orchestrator.submit(work.WORK, work.WorkRequest())
        result = await orchestrator.result(task_id)
        assert work.WorkResponse.FromString(result.response).text == "first directed"
        assert told == [1]
        assert len({job.traceparent.split("-")[1] for job in orchestrator.jobs.values()}) == 1
        await orchestrator.cancel("t4")


async def test_an_orchestrator_that_breaks_the_protocol_is_left_and_work_goes_on(
    orchestrator: Any, work: SimpleNamespace
) -> None:
    gate = asyncio.Event()

    async def handler(request: Any, ctx: Any) -> Any:
        await gate.wait()
        return work.WorkResponse(text="unharmed")

    async with running(Agent("worker", service(work, handler)), orchestrator):
        task_id = await orchestrator.submit(work.WORK, work.WorkRequest())
        await orchestrator.running(task_id)
        for number, wrong in enumerate(
            [
                pb.OrchestratorMessage(heartbeat_echo=pb.HeartbeatEcho(number=10**6)),
                pb.OrchestratorMessage(offer=pb.Offer()),
                pb.OrchestratorMessage(welcome=pb.Welcome()),
            ],
            2,
        ):
            await orchestrator.say(pb.OrchestratorMessage(), wrong)
            await orchestrator.until(lambda number=number: len(orchestrator.hellos) == number)
            await orchestrator.connected()
        gate.set()
        result = await orchestrator.result(task_id)
        assert work.WorkResponse.FromString(result.response).text == "unharmed"


async def test_the_switch_interval_is_the_runs_own(orchestrator: Any, work: SimpleNamespace) -> None:
    seen = []

    async def handler(request: Any, ctx: Any) -> Any:
        seen.append(sys.getswitchinterval())
        return work.WorkResponse()

    before = sys.getswitchinterval()
    async with running(Agent("worker", service(work, handler)), orchestrator):
        await orchestrator.result(await orchestrator.submit(work.WORK, work.WorkRequest()))
    assert seen == [pytest.approx(0.0005)]
    assert sys.getswitchinterval() == before
