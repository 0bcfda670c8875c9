"""`orki_agent.testing`: one handler in process, with everything around it but the session."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from orki_agent.testing import run_handler, start_handler
from orki_contract.errors import Cancelled, HandlerFailed, InvalidSetting, WaitTimeout
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
