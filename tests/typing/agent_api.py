"""Agents, tools and the hot path as users type them; checked, never run.

`assert_type` holds what a type checker must infer. Each `type: ignore` stands on a line that must be refused: strict
checking reports it as unused as soon as the line is accepted.
"""

from __future__ import annotations

from pathlib import Path
from typing import assert_type

from sourcereview.v1.review_orki import (
    REVIEW_FINDINGS,
    FindingEvent,
    ReviewFileRequest,
    ReviewFileResponse,
    ReviewProgress,
    SourceReviewServiceBase,
    SourceReviewServiceSyncBase,
)
from sourcereview.v1.tools_orki import (
    MEASURE_FILE,
    READ_FILE,
    MeasureFileRequest,
    MeasureFileResponse,
    ReadFileRequest,
    ReadFileResponse,
    SourceToolServiceBase,
    SourceToolServiceClient,
    SourceToolServiceSyncBase,
    SourceToolServiceSyncClient,
)

from orki_agent import Agent, RunSettings
from orki_agent.hotpath import AsyncToolClient, SyncToolClient, ToolBridge, ToolRecord
from orki_agent.testing import run_handler, start_handler
from orki_contract import SyncTaskContext, SyncToolStub, TaskContext, Tool, ToolCall, ToolStub

# --- agents ---


class Reviewer(SourceReviewServiceBase):
    """Everything that a context gives."""

    async def review_file(self, request: ReviewFileRequest, ctx: TaskContext[ReviewProgress]) -> ReviewFileResponse:
        assert_type(ctx.task_id, str)
        assert_type(ctx.attempt, int)
        assert_type(ctx.cancelled, bool)
        ctx.usage("m", 1, 1)  # type: ignore[call-arg]
        ctx.usage(model="m", input_tokens="1", output_tokens=1)  # type: ignore[arg-type]
        ctx.tools(SourceToolServiceSyncClient)  # type: ignore[arg-type]
        ctx.fence = 7  # type: ignore[misc]
        return ReviewFileResponse()


class Listening(SourceReviewServiceBase):
    """A context's second parameter is the directive: the method has none."""

    async def review_file(
        self, request: ReviewFileRequest, ctx: TaskContext[ReviewProgress, None]
    ) -> ReviewFileResponse:
        async for directive in ctx.directives():
            assert_type(directive, None)
        return ReviewFileResponse()


class OtherProgress(SourceReviewServiceBase):
    """Another message as its progress."""

    async def review_file(  # type: ignore[override]
        self, request: ReviewFileRequest, ctx: TaskContext[FindingEvent]
    ) -> ReviewFileResponse:
        return ReviewFileResponse()


class Blocking(SourceReviewServiceSyncBase):
    """The same for a thread."""

    def review_file(self, request: ReviewFileRequest, ctx: SyncTaskContext[ReviewProgress]) -> ReviewFileResponse:
        assert_type(ctx.progress(ReviewProgress()), None)
        assert_type(ctx.tools(SourceToolServiceSyncClient), SourceToolServiceSyncClient)
        ctx.tools(SourceToolServiceClient)  # type: ignore[arg-type]
        ctx.publish(REVIEW_FINDINGS, FindingEvent())
        ctx.publish(REVIEW_FINDINGS, ReviewProgress())  # type: ignore[misc]
        ctx.raise_if_cancelled()
        return ReviewFileResponse()


class Forgetful(SourceReviewServiceBase):
    """It lacks the handler."""


class Mixed(SourceReviewServiceBase):
    """A blocking handler under the base for coroutines."""

    def review_file(  # type: ignore[override]
        self, request: ReviewFileRequest, ctx: TaskContext[ReviewProgress]
    ) -> ReviewFileResponse:
        return ReviewFileResponse()


class Tools(SourceToolServiceSyncBase):
    """Tools that block."""

    def measure_file(self, request: MeasureFileRequest, call: ToolCall) -> MeasureFileResponse:
        assert_type(call.client, str)
        return MeasureFileResponse(1, 2)

    def read_file(self, request: ReadFileRequest, call: ToolCall) -> ReadFileResponse:
        return ReadFileResponse()


class HalfTools(SourceToolServiceBase):
    """One tool of two, with the other one's request."""

    async def measure_file(  # type: ignore[override]
        self, request: ReadFileRequest, call: ToolCall
    ) -> MeasureFileResponse:
        return MeasureFileResponse(size=1, newlines=2)


async def agents() -> None:
    """An agent, its settings and its run."""
    agent = Agent("reviewer", Reviewer(), slots=2, tools=Tools())
    assert_type(agent.methods, tuple[str, ...])
    assert_type(agent.settings("127.0.0.1:50051", slots=3), RunSettings)
    assert_type(await agent.run("127.0.0.1:50051"), None)
    Agent("reviewer", Tools())  # type: ignore[arg-type]
    Agent("reviewer", Reviewer)  # type: ignore[arg-type]
    Agent("reviewer", Reviewer(), tools=Reviewer())  # type: ignore[arg-type]
    Agent("reviewer", Reviewer(), slots="2")  # type: ignore[arg-type]
    Agent("reviewer", Reviewer(), workers=2)  # type: ignore[call-arg]
    Forgetful()  # type: ignore[abstract]
    HalfTools()  # type: ignore[abstract]


async def under_test() -> None:
    """A handler in a test."""
    run = await run_handler(Reviewer().review_file, ReviewFileRequest(), tools=[Tools()], timeout=5)
    assert_type(run.of(REVIEW_FINDINGS), list[FindingEvent])
    async with start_handler(Reviewer().review_file, ReviewFileRequest()) as running:
        assert_type(running.cancel(), None)
    await run_handler(Reviewer().review_file, "a.py")  # type: ignore[arg-type]


# --- frames and the hot path ---


def frames() -> None:
    """A generated frame is a frozen value whose constructor is known."""
    measured = MeasureFileResponse(size=1, newlines=2)
    assert_type(measured.size, int)
    assert_type(measured.encode(), bytes)
    assert_type(MeasureFileResponse.decode(b"", 16), MeasureFileResponse)
    measured.size = 3  # type: ignore[misc]
    MeasureFileResponse(size="1", newlines=2)  # type: ignore[arg-type]
    MeasureFileResponse(size=1)  # type: ignore[call-arg]
    MeasureFileResponse(size=1, newlines=2, lines=3)  # type: ignore[call-arg]
    print(measured.lines)  # type: ignore[attr-defined]
    assert_type(MEASURE_FILE, Tool[MeasureFileRequest, MeasureFileResponse])
    assert_type(READ_FILE, Tool[ReadFileRequest, ReadFileResponse])


def blocking_client(path: Path, token: bytes) -> None:
    """The bridge and its sync client."""
    with ToolBridge(Tools()) as bridge:
        assert_type(bridge.path, str)
        with SyncToolClient(bridge.path, bridge.token, name="a") as channel:
            assert_type(channel.call(MEASURE_FILE, MeasureFileRequest(path=b"a")), MeasureFileResponse)
            assert_type(channel.call(READ_FILE, ReadFileRequest(), timeout=0.1), ReadFileResponse)
            channel.call(MEASURE_FILE, ReadFileRequest())  # type: ignore[misc]
            tools = SourceToolServiceSyncClient(channel)
            assert_type(tools.measure_file, SyncToolStub[MeasureFileRequest, MeasureFileResponse])
            assert_type(tools.read_file(ReadFileRequest()), ReadFileResponse)
            tools.read_file(MeasureFileRequest())  # type: ignore[arg-type]
            SourceToolServiceClient(channel)  # type: ignore[arg-type]
    SyncToolClient(path, token, name="a")  # type: ignore[arg-type]
    SyncToolClient(str(path), token)  # type: ignore[call-arg]
    ToolBridge(Reviewer())  # type: ignore[arg-type]


async def async_client(path: str, token: bytes) -> None:
    """The async client, and who is told of each call."""
    seen: list[ToolRecord] = []
    async with AsyncToolClient(path, token, name="a", on_call=seen.append) as channel:
        tools = SourceToolServiceClient(channel)
        assert_type(tools.measure_file, ToolStub[MeasureFileRequest, MeasureFileResponse])
        assert_type(await tools.measure_file(MeasureFileRequest()), MeasureFileResponse)
        assert_type(await channel.call(READ_FILE, ReadFileRequest()), ReadFileResponse)
        await tools.read_file(ReadFileResponse())  # type: ignore[arg-type]
        SourceToolServiceSyncClient(channel)  # type: ignore[arg-type]
    AsyncToolClient(path, token, name="a", on_call=print_name)  # type: ignore[arg-type]


def print_name(name: str) -> None:
    """Takes no record."""
