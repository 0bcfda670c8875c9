"""A large result on a slow link: cancels, heartbeats and small tasks do not wait behind it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from orki.errors.v1.errors_pb2 import Reason
from orki_agent import Agent

MIB = 1024 * 1024
RATE = 10_000_000
"""Bytes in a second in each direction."""


@asynccontextmanager
async def slow_link(port: int) -> AsyncIterator[str]:
    """A TCP proxy that carries `RATE` bytes in a second; yields its address."""
    writers: list[asyncio.StreamWriter] = []

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        free_at = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(16 * 1024):
                free_at = max(free_at, time.monotonic()) + len(data) / RATE
                await asyncio.sleep(free_at - time.monotonic())
                writer.write(data)
                await writer.drain()
        writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        out_reader, out_writer = await asyncio.open_connection("127.0.0.1", port)
        writers.extend((writer, out_writer))
        await asyncio.gather(carry(reader, out_writer), carry(out_reader, writer))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for writer in writers:
            writer.close()


async def test_cancels_and_small_tasks_pass_a_large_result(orchestrator: Any, work: SimpleNamespace) -> None:
    most = 80 * MIB
    orchestrator.options = replace(orchestrator.options, max_message_bytes=most, heartbeat_interval=2.0)
    bulk = asyncio.Event()

    class Service(work.WorkServiceBase):  # type: ignore[misc, name-defined]
        async def work(self, request: Any, ctx: Any) -> Any:
            if request.text == "bulk":
                bulk.set()
                return work.WorkResponse(blob=bytes(64 * MIB))
            if request.text == "small":
                return work.WorkResponse(text="small")
            await asyncio.sleep(60)
            return work.WorkResponse()

    async with slow_link(orchestrator.port) as address:
        agent = Agent("worker", Service(), slots=4)
        serving = asyncio.create_task(agent.run(address, agent_id="worker-1", max_message_bytes=most))
        try:
            await orchestrator.connected()
            large = await orchestrator.submit(work.WORK, work.WorkRequest(text="bulk"))
            await bulk.wait()
            began = time.monotonic()
            cancels, smalls = [], []
            while orchestrator.jobs[large].result is None and len(cancels) < 40:
                victim = await orchestrator.submit(work.WORK, work.WorkRequest(text="sleep"))
                await orchestrator.running(victim)
                await orchestrator.cancel(victim)
                await orchestrator.until(lambda victim=victim: orchestrator.jobs[victim].acknowledged_at > 0)
                cancels.append(orchestrator.jobs[victim].acknowledged_at - orchestrator.jobs[victim].cancelled_at)
                asked = time.monotonic()
                small = await orchestrator.submit(work.WORK, work.WorkRequest(text="small"))
                assert (await orchestrator.result(small)).WhichOneof("outcome") == "response"
                smalls.append(time.monotonic() - asked)
                assert (await orchestrator.result(victim)).cancelled.reason == Reason.REASON_CANCELLED
            assert len(cancels) >= 15, "the large result was not under way for long enough"
            result = await orchestrator.result(large, timeout=30)
            assert len(result.response) > 64 * MIB
            assert time.monotonic() - began > 5, "the link is not slow"
            assert sorted(cancels)[-1] < 0.1
            assert sorted(smalls)[len(smalls) // 2] < 0.3
            assert len(orchestrator.hellos) == 1
        finally:
            agent.stop_now()
            await serving
