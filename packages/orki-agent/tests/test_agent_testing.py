"""`orki_agent.testing`: one handler in process, with everything around it but the session."""

from __future__ import annotations

import asyncio
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from orki_agent.testing import run_handler, start_handler
from orki_contract.errors import (
    Cancelled,
    CancelUnresponsive,
    HandlerFailed,
    InvalidArgument,
    InvalidResponse,
    InvalidSetting,
    TooLarge,
    WaitTimeout,
)
from orki_contract.trace import current_span


async def test_a_handler_runs_with_progress_usage_and_directives(work: SimpleNamespace) -> None:
    class Service(work.WorkServiceBase):  # type: ignore[misc, name-defined]
        async def work(self, request: Any, ctx: Any) -> Any:
            await ctx.progress(work.WorkProgress(number=1))
            ctx.usage(model="m", input_tokens=3, output_tokens=4, cost_micros=5)
            async for directive in ctx.directives():
                assert current_span() == ctx.span
                return work.WorkResponse(text=request.text + directive.text)

    run = await run_handler(Service().work, work.WorkRequest(text="a"), directives=[work.WorkDirective(text="b")])
    assert run.response.text == "ab"
    assert [each.number for each in run.progress] == [1]
    assert [(each.model, each.input_tokens, each.agent_id) for each in run.usage] == [("m", 3, "test-agent")]
    assert [each.stream for each in run.events] == ["usage"]


async def test_failures_and_cancels_are_what_the_submitter_would_see(work: SimpleNamespace) -> None:
    class Service(work.WorkServiceBase):  # type: ignore[misc, name-defined]
        async def work(self, request: Any, ctx: Any) -> Any:
            if request.text:
                raise KeyError(request.text)
            await asyncio.sleep(60)

    failed = await run_handler(Service().work, work.WorkRequest(text="lost"))
    with pytest.raises(HandlerFailed, match="KeyError: 'lost'"):
        _ = failed.response
    cancelled = await run_handler(Service().work, work.WorkRequest(), cancel_after=0.05)
    assert cancelled.cancelled
    with pytest.raises(Cancelled):
        _ = cancelled.response
    with pytest.raises(WaitTimeout):
        await run_handler(Service().work, work.WorkRequest(), timeout=0.1)


async def test_a_sync_handler_sees_its_cancel(work: SimpleNamespace) -> None:
    class Service(work.GrindServiceSyncBase):  # type: ignore[misc, name-defined]
        def work(self, request: Any, ctx: Any) -> Any:
            ctx.progress(work.WorkProgress(number=9))
            for directive in ctx.directives():
                assert directive.text == "go on"
            assert ctx.cancelled
            ctx.raise_if_cancelled()

    async with start_handler(Service().work, work.WorkRequest()) as running:
        running.direct(work.WorkDirective(text="go on"))
        running.cancel()
        run = await running.wait()
    assert run.cancelled
    assert [each.number for each in run.progress] == [9]


@pytest.mark.parametrize("wrong", ["model", "tokens"])
async def test_usage_is_checked(work: SimpleNamespace, wrong: str) -> None:
    class Service(work.WorkServiceBase):  # type: ignore[misc, name-defined]
        async def work(self, request: Any, ctx: Any) -> Any:
            ctx.usage(model="" if wrong == "model" else "m", input_tokens=-1, output_tokens=0)

    run = await run_handler(Service().work, work.WorkRequest())
    assert run.failure is not None
    assert "InvalidArgument" in run.failure.error_type


async def test_what_is_no_handler_is_refused(work: SimpleNamespace) -> None:
    async def stranger(request: Any, ctx: Any) -> None:
        return None

    with pytest.raises(InvalidSetting, match="bound method of a task service"):
        await run_handler(stranger, work.WorkRequest())


async def test_messages_of_another_class_are_refused(work: SimpleNamespace) -> None:
    class Service(work.WorkServiceBase):  # type: ignore[misc, name-defined]
        async def work(self, request: Any, ctx: Any) -> Any:
            async for directive in ctx.directives():
                return work.WorkResponse(text=directive.text)

    with pytest.raises(InvalidArgument, match="declares WorkRequest as its request, not WorkDirective"):
        await run_handler(Service().work, work.WorkDirective(text="x"))
    with pytest.raises(InvalidArgument, match="not NoneType"):
        await run_handler(Service().work, None)  # type: ignore[arg-type]
    async with start_handler(Service().work, work.WorkRequest()) as running:
        with pytest.raises(InvalidArgument, match="declares WorkDirective as its directive, not WorkRequest"):
            running.direct(work.WorkRequest())
        running.direct(work.WorkDirective(text="right"))
        assert (await running.wait()).response.text == "right"


async def test_results_are_judged_as_an_agent_judges_them(work: SimpleNamespace) -> None:
    class Service(work.WorkServiceBase):  # type: ignore[misc, name-defined]
        async def work(self, request: Any, ctx: Any) -> Any:
            return work.WorkResponse(blob=bytes(8 << 20)) if request.text else "text"

    run = await run_handler(Service().work, work.WorkRequest(text="much"))
    with pytest.raises(TooLarge):
        _ = run.response
    run = await run_handler(Service().work, work.WorkRequest())
    with pytest.raises(InvalidResponse, match="returned str"):
        _ = run.response
    with pytest.raises(TooLarge):
        await run_handler(Service().work, work.WorkRequest(blob=bytes(8 << 20)))


class Stubborn:
    """Ignores every cancel."""

    def __init__(self) -> None:
        self.cancels = 0
        self.over = False

    async def sleep(self) -> None:
        while not self.over:
            try:
                await asyncio.sleep(600)
            except asyncio.CancelledError:
                self.cancels += 1


@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_a_handler_that_ignores_its_cancel_ends_after_the_grace(work: SimpleNamespace, kind: str) -> None:
    stubborn = Stubborn()
    over = threading.Event()

    class Service(work.WorkServiceBase):  # type: ignore[misc, name-defined]
        async def work(self, request: Any, ctx: Any) -> Any:
            await stubborn.sleep()

    class Blocking(work.GrindServiceSyncBase):  # type: ignore[misc, name-defined]
        def work(self, request: Any, ctx: Any) -> Any:
            over.wait(60)

    service = Service() if kind == "async" else Blocking()
    task = work.WORK if kind == "async" else work.GRIND
    began = time.monotonic()
    async with start_handler(service.work, work.WorkRequest()) as running:
        running.cancel()
        run = await running.wait(timeout=30)
    took = time.monotonic() - began
    over.set()
    assert run.cancelled
    with pytest.raises(CancelUnresponsive):
        _ = run.response
    assert task.contract.cancel_grace <= took < task.contract.cancel_grace + 4
    assert len(asyncio.all_tasks()) == 1, "no handler is left in the loop"
    assert kind == "sync" or stubborn.cancels == 2


async def test_a_block_that_ends_cancels_a_handler_that_ignores_it(work: SimpleNamespace) -> None:
    class Service(work.WorkServiceBase):  # type: ignore[misc, name-defined]
        async def work(self, request: Any, ctx: Any) -> Any:
            await Stubborn().sleep()

    with pytest.raises(WaitTimeout):
        await run_handler(Service().work, work.WorkRequest(), timeout=0.1)
    assert len(asyncio.all_tasks()) == 1
