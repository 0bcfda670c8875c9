"""The public API as users type it; checked, never run.

`assert_type` holds what a type checker must infer. Each `type: ignore` stands on a line that must be refused: strict
checking reports it as unused as soon as the line is accepted.
"""

from __future__ import annotations

from typing import Literal, assert_type

from sourcereview.v1.review_orki import (
    REVIEW_FILE,
    REVIEW_FINDINGS,
    FindingEvent,
    ReviewFileRequest,
    ReviewFileResponse,
    ReviewFindingsGroup,
    ReviewProgress,
    SourceReviewServiceBase,
    SourceReviewServiceClient,
    SourceReviewServiceSyncBase,
)
from sourcereview.v1.tools_orki import (
    MeasureFileRequest,
    MeasureFileResponse,
    ReadFileRequest,
    ReadFileResponse,
    SourceToolServiceBase,
    SourceToolServiceClient,
    SourceToolServiceSyncClient,
)

from orki.events.v1.agent_orki import AGENTS, AgentEvent
from orki_contract import SyncTaskContext, TaskContext, TaskHandle, ToolCall
from orki_control import Client
from orki_events import connect

# --- the agent author ---


class Reviewer(SourceReviewServiceBase):
    """A handler that is a coroutine."""

    async def review_file(self, request: ReviewFileRequest, ctx: TaskContext[ReviewProgress]) -> ReviewFileResponse:
        assert_type(ctx.fence, int)
        tools = ctx.tools(SourceToolServiceClient)
        assert_type(tools, SourceToolServiceClient)
        assert_type(await tools.measure_file(MeasureFileRequest(path=request.path)), MeasureFileResponse)
        assert_type(await tools.read_file(ReadFileRequest(path=request.path), timeout=0.5), ReadFileResponse)
        await ctx.progress(ReviewProgress(fraction=0.5))
        await ctx.progress(ReviewFileResponse())  # type: ignore[arg-type]
        await ctx.publish(REVIEW_FINDINGS, FindingEvent(path=request.path))
        await ctx.publish(REVIEW_FINDINGS, AgentEvent())  # type: ignore[misc]
        ctx.usage(model="m", input_tokens=1, output_tokens=1)
        again = await SourceReviewServiceClient(ctx.client).review_file(request)
        return assert_type(again, ReviewFileResponse)


class Blocking(SourceReviewServiceSyncBase):
    """A handler that blocks, and runs in a thread."""

    def review_file(self, request: ReviewFileRequest, ctx: SyncTaskContext[ReviewProgress]) -> ReviewFileResponse:
        tools = ctx.tools(SourceToolServiceSyncClient)
        measured = tools.measure_file(MeasureFileRequest(path=request.path))
        assert_type(measured, MeasureFileResponse)
        ctx.progress(ReviewProgress(fraction=1.0))
        return ReviewFileResponse(lines=measured.newlines)


class Wrong(SourceReviewServiceBase):
    """A handler whose response is another message's."""

    async def review_file(  # type: ignore[override]
        self, request: ReviewFileRequest, ctx: TaskContext[ReviewProgress]
    ) -> ReviewProgress:
        return ReviewProgress()


class Tools(SourceToolServiceBase):
    """Tools over the hot path: one takes a frame, one a message."""

    async def measure_file(self, request: MeasureFileRequest, call: ToolCall) -> MeasureFileResponse:
        assert_type(request.path, bytes)
        return MeasureFileResponse(size=len(request.path), newlines=0)

    async def read_file(self, request: ReadFileRequest, call: ToolCall) -> ReadFileResponse:
        return ReadFileResponse()


# --- who submits ---


async def submit(orki: Client) -> None:
    """Run a task, or hold it."""
    reviews = SourceReviewServiceClient(orki)
    assert_type(await reviews.review_file(ReviewFileRequest(path=b"a.py")), ReviewFileResponse)
    task = await reviews.review_file.submit(ReviewFileRequest(path=b"a.py"), idempotency_key="a.py@9f2c")
    assert_type(task, TaskHandle[ReviewFileResponse, ReviewProgress, None])
    async for news in task.progress():
        assert_type(news, ReviewProgress)
    assert_type(await task.result(timeout=60), ReviewFileResponse)
    assert_type(await orki.handle(REVIEW_FILE, task.task_id).result(), ReviewFileResponse)
    await reviews.review_file(ReviewProgress())  # type: ignore[arg-type]


# --- who publishes and listens ---


async def publish() -> None:
    """Publish one event, and several."""
    async with connect("redis://127.0.0.1:6379/0") as events:
        assert_type(await events.publish(REVIEW_FINDINGS, FindingEvent(path=b"a.py")), bytes)
        assert_type(await events.publish_many(AGENTS, [AgentEvent()]), list[bytes])
        await events.publish(REVIEW_FINDINGS, AgentEvent())  # type: ignore[misc]


def groups() -> tuple[ReviewFindingsGroup, ...]:
    """The groups of a stream are a closed set of names."""
    declared: Literal["audit", "report"] = "report"
    unknown: ReviewFindingsGroup = "triage"  # type: ignore[assignment]
    return declared, unknown
