"""What does a task cost, from its submission to the acknowledgement of its result, beside the least that it could cost?

One at a time, against a bare gRPC stream that gives back each message. Many in flight, against a loop made by hand: the
same messages, batched scripts over the same Redis, but no leases, fences, retries, events or traces. All are processes
of their own; the sides take turns.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
from control_peers import METHOD
from events_server import Report, serve

from orki.control.v1 import task_pb2 as pb
from orki.control.v1.attempt_pb2 import TaskState
from orki.control.v1.task_pb2_grpc import TaskServiceStub
from orki_control.wire import open_channel

REQUEST = b"x" * 200
BATCH = 50
SUBMITTERS = 4


class Process:
    """A child that says one line when it is ready."""

    def __init__(self, process: asyncio.subprocess.Process, ready: str) -> None:
        self.process = process
        self.ready = ready

    async def expect(self, count: int) -> None:
        """The next line comes after so many acknowledgements more."""
        assert self.process.stdin is not None
        self.process.stdin.write(b"%d\n" % count)
        await self.process.stdin.drain()

    async def line(self) -> str:
        """The next line."""
        assert self.process.stdout is not None
        async with asyncio.timeout(300):
            return (await self.process.stdout.readline()).decode().strip()


@asynccontextmanager
async def child(*argv: str, **environment: str) -> AsyncIterator[Process]:
    """Runs one, from its first line to the end of the block."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *argv,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, **environment},
    )
    started = Process(process, "")
    try:
        started.ready = await started.line()
        yield started
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def submit_all(submit: Any, count: int) -> float:
    """Submits in batches, a few calls at once; when it began."""
    left = list(range(count // BATCH))

    async def submitter() -> None:
        while left:
            left.pop()
            submissions = [
                pb.Submission(method=METHOD, request=REQUEST, idempotency_key=uuid.uuid4().hex) for _ in range(BATCH)
            ]
            answer = await submit(pb.SubmitRequest(submissions=submissions))
            assert all(outcome.task.task_id for outcome in answer.outcomes), answer.outcomes[0]

    began = time.time()
    await asyncio.gather(*(submitter() for _ in range(SUBMITTERS)))
    return began


async def flood(submit: Any, agent: Process, count: int) -> list[float]:
    """Cycles a second, many in flight."""
    await agent.expect(count)
    began = await submit_all(submit, count)
    return [count / (float(await agent.line()) - began)]


async def cycles(tasks: Any, count: int) -> list[float]:
    """Microseconds from submit to the result in the submitter's hands, one at a time."""
    taken = []
    for _ in range(count):
        began = time.perf_counter()
        answer = await tasks.Submit(pb.SubmitRequest(submissions=[pb.Submission(method=METHOD, request=REQUEST)]))
        watch = tasks.Watch(pb.WatchRequest(task_id=answer.outcomes[0].task.task_id))
        while (await watch.read()).task.state != TaskState.TASK_STATE_SUCCEEDED:
            pass
        taken.append((time.perf_counter() - began) * 1e6)
        watch.cancel()
    return taken


async def pings(channel: grpc.aio.Channel, count: int) -> list[float]:
    """Microseconds of a message there and back on a bare stream."""
    call: Any = channel.stream_stream("/bench.Echo/Echo")()
    taken = []
    for _ in range(count):
        began = time.perf_counter()
        await call.write(REQUEST)
        await call.read()
        taken.append((time.perf_counter() - began) * 1e6)
    await call.done_writing()
    call.cancel()
    return taken


async def measure(report: Report, redis_port: int, quick: bool) -> None:
    """All rows."""
    peers = str(Path(__file__).with_name("control_peers.py"))
    url = f"redis://127.0.0.1:{redis_port}"
    count = 1_000 if quick else 5_000
    async with AsyncExitStack() as stack:
        begin = stack.enter_async_context
        serving = await begin(
            child("-m", "orki_server", "serve", "--listen", "127.0.0.1:0", "--json", ORKI_REDIS_URL=f"{url}/0")
        )
        target = json.loads(serving.ready)["address"]
        agent = await begin(child(peers, "agent", target))
        echo = await begin(child(peers, "echo", "-"))
        handmade = await begin(child(peers, "by-hand", f"{url}/1"))
        hand_target = f"127.0.0.1:{handmade.ready}"
        hand_agent = await begin(child(peers, "agent-by-hand", hand_target))
        tasks: Any = TaskServiceStub(await begin(open_channel(target)))
        bare = await begin(open_channel(f"127.0.0.1:{echo.ready}"))
        hand_channel = await begin(open_channel(hand_target))
        hand_submit = hand_channel.unary_unary(
            "/bench.ByHand/Submit", pb.SubmitRequest.SerializeToString, pb.SubmitResponse.FromString
        )
        await asyncio.sleep(1.0)
        ours, theirs = await report.turns(lambda: cycles(tasks, count // 10), lambda: pings(bare, count // 10))
        report.add("submit to result, one at a time", "us", ours, "gRPC stream, there and back", theirs, "<=", 4.0)
        ours, theirs = await report.turns(
            lambda: flood(tasks.Submit, agent, count), lambda: flood(hand_submit, hand_agent, count)
        )
        report.add(
            "durable cycles, many in flight", "tasks/s", ours, "scripts by hand, without promises", theirs, ">=", 0.5
        )


def main() -> int:
    """Runs and reports; gives 0 also where the reach is not met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    parser.add_argument("--quick", action="store_true", help="fewer tasks, for a look")
    options = parser.parse_args()
    report = Report("control_cycle", 2 if options.quick else 5)
    with serve() as port:
        asyncio.run(measure(report, port, options.quick))
    if options.json:
        Path(options.json).write_text(json.dumps(report.rows, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
