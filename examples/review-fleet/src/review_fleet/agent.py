"""The agent: one handler, and nothing in it about heartbeats, tracing, leases or Redis."""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from sourcereview.v1.review_orki import (
    REVIEW_FINDINGS,
    EmptyFile,
    FindingEvent,
    LongFunction,
    NotPython,
    ReviewFileRequest,
    ReviewFileResponse,
    ReviewProgress,
    SourceReviewServiceBase,
)
from sourcereview.v1.tools_orki import MeasureFileRequest, ReadFileRequest, SourceToolServiceClient

from orki_agent import Agent, TaskContext
from orki_contract.errors import ToolFailed
from review_fleet.measure import LARGE_BYTES, Measured, measure_source
from review_fleet.tools import MAX_PIECE_BYTES, SourceTools

__all__ = ["Reviewer", "agent"]


class Reviewer(SourceReviewServiceBase):
    """Reviews files through the tools.

    Args:
        pace: Seconds that each review waits, where a real fleet would wait for a language model.
    """

    def __init__(self, pace: float = 0.0) -> None:
        self._pace = pace

    async def review_file(self, request: ReviewFileRequest, ctx: TaskContext[ReviewProgress]) -> ReviewFileResponse:
        tools = ctx.tools(SourceToolServiceClient)
        try:
            size = await tools.measure_file(MeasureFileRequest(path=request.path))
            source = await self._read(tools, request.path)
        except ToolFailed as error:
            await self._publish(ctx, FindingEvent(path=request.path, not_python=NotPython(sentence=error.message)))
            return ReviewFileResponse(error=error.message, attempt=ctx.attempt, fence=ctx.fence)
        await ctx.progress(ReviewProgress(fraction=0.5))
        await asyncio.sleep(self._pace)
        measured = await self._measure(source)
        ctx.usage(provider="none", model="ast", input_tokens=len(source) // 4, output_tokens=measured.functions)
        for finding in self._findings(request.path, source, measured):
            await self._publish(ctx, finding)
        return ReviewFileResponse(
            lines=size.newlines,
            functions=measured.functions,
            classes=measured.classes,
            error=measured.error,
            attempt=ctx.attempt,
            fence=ctx.fence,
        )

    @staticmethod
    async def _measure(source: bytes) -> Measured:
        """Parses; a large file in a process of its own, as the parser lets no other thread run meanwhile."""
        if len(source) <= LARGE_BYTES:
            return measure_source(source)
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            return await asyncio.get_running_loop().run_in_executor(pool, measure_source, source)

    @staticmethod
    async def _read(tools: SourceToolServiceClient, path: bytes) -> bytes:
        content = bytearray()
        while True:
            piece = await tools.read_file(ReadFileRequest(path=path, offset=len(content), length=MAX_PIECE_BYTES))
            content += piece.content
            if piece.end:
                return bytes(content)

    @staticmethod
    async def _publish(ctx: TaskContext[ReviewProgress], finding: FindingEvent) -> None:
        await ctx.publish(REVIEW_FINDINGS, finding)

    @staticmethod
    def _findings(path: bytes, source: bytes, measured: Measured) -> list[FindingEvent]:
        findings = []
        if not source:
            findings.append(FindingEvent(path=path, empty=EmptyFile()))
        if measured.error:
            findings.append(FindingEvent(path=path, not_python=NotPython(sentence=measured.error)))
        for function in measured.long_functions:
            long = LongFunction(name=function.name, line=function.line, lines=function.lines)
            findings.append(FindingEvent(path=path, long_function=long))
        return findings


agent = Agent(
    "reviewer",
    Reviewer(pace=float(os.environ.get("REVIEW_PACE_SECONDS", "0"))),
    tools=SourceTools(Path(os.environ.get("REVIEW_ROOT", "."))),
    slots=4,
)
