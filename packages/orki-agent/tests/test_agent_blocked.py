"""Handlers that block: the agent still heartbeats, keeps its leases and acknowledges cancels."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from orki_agent import Agent
from orki_contract.errors import Reason

BLOCKED = 3.0


@asynccontextmanager
async def running(agent: Agent, orchestrator: Any, **changes: Any) -> AsyncIterator[None]:
    task = asyncio.create_task(agent.run(orchestrator.target, agent_id="a1", drain_grace=5.0, **changes))
    try:
        await orchestrator.connected()
        yield
    finally:
        agent.drain()
        async with asyncio.timeout(20):
            await task


def spin(seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pass


@pytest.mark.parametrize("block", [time.sleep, spin], ids=["sleeps", "spins"])
async def test_a_blocked_thread_does_not_stop_the_session(
    orchestrator: Any, work: SimpleNamespace, block: Callable[[float], None]
) -> None:
    class Service(work.GrindServiceSyncBase):  # type: ignore[misc, name-defined]
        def work(self, request: Any, ctx: Any) -> Any:
            block(BLOCKED)
            return work.WorkResponse(text="through")

    async with running(Agent("grinder", Service()), orchestrator):
        task_id = await orchestrator.submit(work.GRIND, work.WorkRequest(), lease=1.2)
        await orchestrator.running(task_id)
        before = len(orchestrator.heartbeats)
        result = await orchestrator.result(task_id)
        assert work.WorkResponse.FromString(result.response).text == "through"
        during = orchestrator.heartbeats[before:]
        assert len(during) >= 5
        gaps = [later[0] - earlier[0] for earlier, later in itertools.pairwise(during)]
        assert max(gaps) < 1.2, "the lease was kept"
        assert len(orchestrator.hellos) == 1


@pytest.mark.parametrize("block", [time.sleep, spin], ids=["sleeps", "spins"])
async def test_a_cancel_is_acknowledged_while_the_thread_is_blocked(
    orchestrator: Any, work: SimpleNamespace, block: Callable[[float], None]
) -> None:
    class Service(work.GrindServiceSyncBase):  # type: ignore[misc, name-defined]
        def work(self, request: Any, ctx: Any) -> Any:
            block(BLOCKED)
            ctx.raise_if_cancelled()

    async with running(Agent("grinder", Service(), slots=1), orchestrator):
        task_id = await orchestrator.submit(work.GRIND, work.WorkRequest())
        await orchestrator.running(task_id)
        await orchestrator.cancel(task_id, grace_ms=200)
        job = orchestrator.jobs[task_id]
        await orchestrator.until(lambda: job.acknowledged_at > 0)
        assert job.acknowledged_at - job.cancelled_at < orchestrator.options.heartbeat_interval
        result = await orchestrator.result(task_id)
        assert result.cancelled.reason == Reason.REASON_CANCEL_UNRESPONSIVE
        assert orchestrator.session.free_slots == 0, "the slot stays taken"
        await orchestrator.until(lambda: orchestrator.session.free_slots == 1)


async def test_a_spin_in_the_users_loop_does_not_stop_the_session(orchestrator: Any, work: SimpleNamespace) -> None:
    """The agent runs on a loop of its own here, as it would in a process of its own."""

    class Service(work.WorkServiceBase):  # type: ignore[misc, name-defined]
        async def work(self, request: Any, ctx: Any) -> Any:
            spin(BLOCKED)
            await asyncio.sleep(0)

    agent = Agent("spinner", Service())
    done = asyncio.get_running_loop().create_future()

    def main() -> None:
        asyncio.run(agent.run(orchestrator.target, agent_id="a1"))
        done.get_loop().call_soon_threadsafe(done.set_result, None)

    import threading

    thread = threading.Thread(target=main)
    thread.start()
    try:
        await orchestrator.connected()
        task_id = await orchestrator.submit(work.WORK, work.WorkRequest(), lease=1.2)
        await orchestrator.running(task_id)
        before = len(orchestrator.heartbeats)
        await asyncio.sleep(0.5)
        await orchestrator.cancel(task_id, grace_ms=500)
        job = orchestrator.jobs[task_id]
        await orchestrator.until(lambda: job.acknowledged_at > 0)
        assert job.acknowledged_at - job.cancelled_at < orchestrator.options.heartbeat_interval
        result = await orchestrator.result(task_id)
        assert result.cancelled.reason == Reason.REASON_CANCEL_UNRESPONSIVE
        during = [beat for _, beat in orchestrator.heartbeats[before:]]
        assert max(beat.loop_lag_us for beat in during) > 500_000
        assert all(beat.memory_bytes > 1_000_000 for beat in during)
        await orchestrator.until(lambda: orchestrator.heartbeats[-1][1].free_slots == 4)
    finally:
        agent.drain()
        await asyncio.wait_for(done, 20)
        thread.join(5)


async def test_cancels_of_a_blocked_thread_do_not_use_up_threads(orchestrator: Any, work: SimpleNamespace) -> None:
    """Cancels arrive before, at and after the return of the handler. The only slot is free again each time."""

    class Service(work.GrindServiceSyncBase):  # type: ignore[misc, name-defined]
        def work(self, request: Any, ctx: Any) -> Any:
            time.sleep(request.seconds)
            return work.WorkResponse(text="returned")

    async with running(Agent("grinder", Service(), slots=1), orchestrator):
        for delay in (0.0, 0.05, 0.09, 0.1, 0.11, 0.15):
            task_id = await orchestrator.submit(work.GRIND, work.WorkRequest(seconds=0.1))
            await orchestrator.running(task_id)
            await asyncio.sleep(delay)
            if task_id in {key.task_id for key in orchestrator.session.attempts}:
                await orchestrator.cancel(task_id, grace_ms=10)
            await orchestrator.result(task_id)
            await orchestrator.until(lambda: orchestrator.session.free_slots == 1)
        last = await orchestrator.submit(work.GRIND, work.WorkRequest())
        assert work.WorkResponse.FromString((await orchestrator.result(last)).response).text == "returned"


async def test_a_cancelled_coroutine_ends_within_its_grace(orchestrator: Any, work: SimpleNamespace) -> None:
    seen = []

    class Service(work.WorkServiceBase):  # type: ignore[misc, name-defined]
        async def work(self, request: Any, ctx: Any) -> Any:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                seen.append(ctx.cancelled)
                await asyncio.sleep(0.1)
                seen.append("tidied")
                raise

    async with running(Agent("worker", Service()), orchestrator):
        task_id = await orchestrator.submit(work.WORK, work.WorkRequest())
        await orchestrator.running(task_id)
        await orchestrator.cancel(task_id)
        result = await orchestrator.result(task_id)
        assert result.cancelled.reason == Reason.REASON_CANCELLED
        assert seen == [True, "tidied"]


async def test_a_coroutine_that_swallows_its_cancel_is_cancelled_again(
    orchestrator: Any, work: SimpleNamespace
) -> None:
    cancels = []

    class Service(work.WorkServiceBase):  # type: ignore[misc, name-defined]
        async def work(self, request: Any, ctx: Any) -> Any:
            while len(cancels) < 2:
                try:
                    await asyncio.sleep(60)
                except asyncio.CancelledError:
                    cancels.append(time.monotonic())
            raise asyncio.CancelledError

    async with running(Agent("worker", Service()), orchestrator):
        task_id = await orchestrator.submit(work.WORK, work.WorkRequest())
        await orchestrator.running(task_id)
        await orchestrator.cancel(task_id, grace_ms=300)
        result = await orchestrator.result(task_id)
        assert result.cancelled.reason == Reason.REASON_CANCELLED
        assert cancels[1] - cancels[0] >= 0.25


async def test_a_result_may_win_against_a_cancel(orchestrator: Any, work: SimpleNamespace) -> None:
    class Service(work.WorkServiceBase):  # type: ignore[misc, name-defined]
        async def work(self, request: Any, ctx: Any) -> Any:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                return work.WorkResponse(text="finished anyway")

    async with running(Agent("worker", Service()), orchestrator):
        task_id = await orchestrator.submit(work.WORK, work.WorkRequest())
        await orchestrator.running(task_id)
        await orchestrator.cancel(task_id)
        await orchestrator.cancel(task_id)
        result = await orchestrator.result(task_id)
        assert work.WorkResponse.FromString(result.response).text == "finished anyway"


async def test_cancels_before_the_start_are_harmless(orchestrator: Any, work: SimpleNamespace) -> None:
    started = []

    class Service(work.WorkServiceBase):  # type: ignore[misc, name-defined]
        async def work(self, request: Any, ctx: Any) -> Any:
            started.append(ctx.task_id)
            await asyncio.sleep(60)

    async with running(Agent("worker", Service()), orchestrator):
        task_id = await orchestrator.submit(work.WORK, work.WorkRequest())
        orchestrator.session.cancel(orchestrator.key(task_id), grace_ms=500)
        await orchestrator.flush()
        result = await orchestrator.result(task_id)
        assert result.cancelled.reason == Reason.REASON_CANCELLED
        assert len(started) <= 1


async def test_a_sync_handler_waits_for_room_and_hears_directives(orchestrator: Any, work: SimpleNamespace) -> None:
    class Service(work.GrindServiceSyncBase):  # type: ignore[misc, name-defined]
        def work(self, request: Any, ctx: Any) -> Any:
            for number in range(500):
                ctx.progress(work.WorkProgress(number=number, blob=b"x" * 300))
            directive = next(iter(ctx.directives()))
            return work.WorkResponse(text=directive.text)

    async with running(Agent("grinder", Service()), orchestrator, progress_window=4):
        task_id = await orchestrator.submit(work.GRIND, work.WorkRequest())
        await orchestrator.until(lambda: len(orchestrator.jobs[task_id].progress) == 500)
        directive = work.WorkDirective(text="enough").SerializeToString()
        orchestrator.session.direct(orchestrator.key(task_id), directive)
        await orchestrator.flush()
        result = await orchestrator.result(task_id)
        assert work.WorkResponse.FromString(result.response).text == "enough"
