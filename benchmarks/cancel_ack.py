"""How soon is a cancel acknowledged while user code blocks the agent?

One attempt blocks its agent, in a thread or in the user's event loop, by sleeping or by spinning in pure Python. The
orchestrator's end cancels it again and again at random moments, and measures from each cancel to its acknowledgement.
The baseline is a handler that blocks nothing. Agent and orchestrator are processes of their own.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from typing import Any

import grpc
from sourcereview.v1.review_orki import SourceReviewServiceBase, SourceReviewServiceSyncBase
from sourcereview.v1.review_pb2 import ReviewFileRequest, ReviewFileResponse

from benchmarks.report import Report, worst_percent
from benchmarks.sides import python, side
from orki.control.v1 import session_pb2 as pb
from orki.control.v1.session_pb2_grpc import SessionServiceServicer, add_SessionServiceServicer_to_server
from orki_agent import Agent
from orki_control import session
from orki_control.session import AttemptKey
from orki_control.transport import server_options

HEARTBEAT = 2.0
METHOD = "sourcereview.v1.SourceReviewService/ReviewFile"
ROWS = {
    "handler awaits": ("loop", "await"),
    "thread sleeps": ("thread", "sleep"),
    "thread spins": ("thread", "spin"),
    "user's loop sleeps": ("loop", "sleep"),
    "user's loop spins": ("loop", "spin"),
}


def block(how: str, seconds: float) -> None:
    """Block the calling thread."""
    if how == "sleep":
        time.sleep(seconds)
        return
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pass


class ThreadHandler(SourceReviewServiceSyncBase):
    """Blocks in a thread."""

    def review_file(self, request: Any, ctx: Any) -> ReviewFileResponse:
        how, seconds = request.path.decode().split()
        block(how, float(seconds))
        return ReviewFileResponse()


class LoopHandler(SourceReviewServiceBase):
    """Blocks the user's loop, or waits in it."""

    async def review_file(self, request: Any, ctx: Any) -> ReviewFileResponse:
        how, seconds = request.path.decode().split()
        if how != "await":
            block(how, float(seconds))
            return ReviewFileResponse()
        until = time.monotonic() + float(seconds)
        while time.monotonic() < until:
            try:
                await asyncio.sleep(until - time.monotonic())
            except asyncio.CancelledError:
                continue
        return ReviewFileResponse()


class Orchestrator(SessionServiceServicer):
    """Offers one attempt at a time and cancels it."""

    def __init__(self) -> None:
        self.opened = asyncio.Event()
        self.free = asyncio.Event()
        self.acknowledged: asyncio.Queue[float] = asyncio.Queue()
        self._words = asyncio.Event()

    async def Connect(self, request_iterator: Any, context: Any) -> None:  # type: ignore[override]
        """One stream."""
        options = session.OrchestratorSessionOptions(orchestrator_id="bench", heartbeat_interval=HEARTBEAT)
        self.machine = session.OrchestratorSession(options, time.monotonic())
        writer = asyncio.create_task(self._write(context))
        try:
            while (request := await context.read()) is not grpc.aio.EOF:
                self._take(self.machine.receive_batch(request.messages, time.monotonic()))
                self._words.set()
        finally:
            writer.cancel()

    async def _write(self, context: Any) -> None:
        while True:
            while (response := self.machine.messages_to_send()) is not None:
                await context.write(response)
            self._words.clear()
            await self._words.wait()

    def _take(self, events: list[session.OrchestratorEvent]) -> None:
        for event in events:
            match event:
                case session.HelloArrived():
                    self.machine.welcome(session_epoch=1, now=time.monotonic())
                    self.opened.set()
                case session.CancelsAcknowledged():
                    self.acknowledged.put_nowait(time.perf_counter())
                case session.ResultsArrived(results):
                    for result in results:
                        self.machine.acknowledge(result.attempt)
                    self.free.set()
                case session.HeartbeatArrived(number=number):
                    self.machine.echo(number)

    async def measure(self, number: int, how: str, cancels: int) -> list[float]:
        """Return the milliseconds to each acknowledgement."""
        seconds = cancels * 0.03 + 2.0
        key = AttemptKey(f"t{number}", 1, number)
        request = ReviewFileRequest(path=f"{how} {seconds}".encode()).SerializeToString()
        offer = pb.Offer(attempt=key.ref(), method=METHOD, request=request, lease_ms=60_000, accept_timeout_ms=10_000)
        self.free.clear()
        self.machine.offer(offer, "", time.monotonic())
        self._words.set()
        await asyncio.sleep(0.5)
        taken = []
        for _ in range(cancels):
            await asyncio.sleep(random.uniform(0.005, 0.025))
            began = time.perf_counter()
            self.machine.cancel(key, grace_ms=600_000)
            self._words.set()
            taken.append((await self.acknowledged.get() - began) * 1000)
        await self.free.wait()
        return taken


async def measure(report: Report) -> None:
    """Measure all rows."""
    cancels = 60 if report.quick else 1_000
    baseline: list[float] = []
    for kind in ("loop", "thread"):
        server = grpc.aio.server(options=server_options())
        orchestrator = Orchestrator()
        add_SessionServiceServicer_to_server(orchestrator, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with side("agent", *python("benchmarks.cancel_ack", kind, f"127.0.0.1:{port}"), ready=False):
                async with asyncio.timeout(60):
                    await orchestrator.opened.wait()
                rows = [(row, how) for row, (which, how) in ROWS.items() if which == kind]
                for number, (row, how) in enumerate(rows, 1):
                    taken = await orchestrator.measure(number, how, cancels)
                    baseline = baseline or taken
                    name = f"{row}: cancel acknowledged"
                    report.add(name, "ms", taken, baseline="handler awaits", against=baseline)
                    report.add(f"{name}, p99", "ms", [worst_percent(taken, "ms")], reach=("<", 20.0))
        finally:
            await server.stop(None)


if __name__ == "__main__":
    handler = LoopHandler() if sys.argv[1] == "loop" else ThreadHandler()
    asyncio.run(Agent("bench", handler).run(sys.argv[2], agent_id="bench", drain_grace=0.0))
