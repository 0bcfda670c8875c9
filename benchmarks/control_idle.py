"""What do 1,000 idle sessions cost an orchestrator, and a task beside them?

As a program, it holds the sessions: `python -m benchmarks.control_idle TARGET COUNT`. Each session takes any task and
returns the response of the other control benchmarks at once.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from contextlib import AsyncExitStack
from typing import Any

import grpc
from sourcereview.v1 import review_orki as _review_orki  # noqa: F401 - registers the contract

from benchmarks.control_sides import METHOD, RESPONSE
from benchmarks.report import Report
from benchmarks.sides import Side, in_turns, python, redis_server, side
from orki.control.v1.session_pb2 import ServedService
from orki.control.v1.session_pb2_grpc import SessionServiceStub
from orki_contract.images import image_of, service_digest
from orki_control.session import AgentSession, AgentSessionOptions, OffersArrived, SessionOpened
from orki_control.transport import channel_options

IDLE = 1_000
_STREAMS = 250
"""Sessions of one connection."""
_HELLOS = 8
_ROUND = 4.0
"""Seconds: two intervals of heartbeats."""
_SIDES = "benchmarks.control_sides"


class Sessions:
    """Idle sessions of one process."""

    def __init__(self, count: int) -> None:
        service = METHOD.partition("/")[0]
        image = image_of(service.rpartition(".")[0])
        self._served = ServedService(service=service, digest=service_digest(image, service), image=image)
        self._response = RESPONSE.SerializeToString()
        self._count = count
        self._opened = 0
        self.all_opened = asyncio.Event()

    async def hold(self, number: int, channel: grpc.aio.Channel, hellos: asyncio.Semaphore) -> None:
        """Hold one session. `hellos` bounds the streams of the connection that await their welcome."""
        await hellos.acquire()
        machine = AgentSession(
            AgentSessionOptions(agent_id=f"idle-{number}", instance_id="1", services=(self._served,), slots=1)
        )
        call: Any = SessionServiceStub(channel).Connect(timeout=None)
        writable = asyncio.Event()
        machine.connection_made(time.monotonic())
        writer = asyncio.create_task(self._write(machine, call, writable))
        try:
            while (batch := await call.read()) is not grpc.aio.EOF:
                for event in machine.receive_batch(batch.messages, time.monotonic()):
                    if isinstance(event, SessionOpened):
                        hellos.release()
                        self._opened += 1
                        if self._opened == self._count:
                            self.all_opened.set()
                    elif isinstance(event, OffersArrived):
                        for offer in event.offers:
                            if machine.accept(offer.attempt, time.monotonic()):
                                machine.report(offer.attempt, self._response, time.monotonic())
                writable.set()
        finally:
            writer.cancel()

    @staticmethod
    async def _write(machine: AgentSession, call: Any, writable: asyncio.Event) -> None:
        loop = asyncio.get_running_loop()
        while True:
            writable.clear()
            while (batch := machine.messages_to_send()) is not None:
                await call.write(batch)
            due = machine.next_timer()
            timer = None if due is None else loop.call_at(due, writable.set)
            await writable.wait()
            if timer is not None:
                timer.cancel()
            machine.handle_timer(time.monotonic())


async def hold_all(target: str, count: int) -> None:
    """Hold `count` sessions; say so once all are open."""
    sessions = Sessions(count)
    options = [*channel_options(4 << 20), ("grpc.use_local_subchannel_pool", 1)]
    connections = range((count + _STREAMS - 1) // _STREAMS)
    channels = [grpc.aio.insecure_channel(target, options=options) for _ in connections]
    gates = [asyncio.Semaphore(_HELLOS) for _ in connections]
    places = [number // _STREAMS for number in range(count)]
    held: asyncio.Future[Any] = asyncio.gather(
        *(sessions.hold(number, channels[at], gates[at]) for number, at in enumerate(places))
    )
    opened: asyncio.Future[Any] = asyncio.ensure_future(sessions.all_opened.wait())
    await asyncio.wait({held, opened}, return_when=asyncio.FIRST_COMPLETED)
    print(json.dumps({"ready": True}), flush=True)
    await held


async def percent_of_a_core(orchestrator: Side, rounds: int) -> list[float]:
    """Return the orchestrator's CPU time in each round of an idle fleet, in per cent of a core."""
    found = []
    for _ in range(rounds):
        before, started = orchestrator.cpu(), time.monotonic()
        await asyncio.sleep(_ROUND)
        found.append((orchestrator.cpu() - before) / (time.monotonic() - started) * 100)
    return found


async def measure(report: Report) -> None:
    """Measure all rows: one fleet of one session and one of 1,000, each with its own orchestrator and store."""
    rounds, tasks = (2, 50) if report.quick else (5, 200)
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        fleets = []
        for count in (1, IDLE):
            port, _ = stack.enter_context(redis_server())
            serve = python("orki_server", "serve", "--listen", "127.0.0.1:0", "--json")
            url = f"redis://127.0.0.1:{port}/0"
            server = await enter(side("orchestrator", *serve, ready=False, ORKI_REDIS_URL=url))
            target = str((await server.answer())["address"])
            await enter(side(f"{count} sessions", *python("benchmarks.control_idle", target, str(count))))
            fleets.append((server, await enter(side("client", *python(_SIDES, "client", target)))))
        (small, small_client), (large, large_client) = fleets
        await asyncio.sleep(_ROUND)
        report.add(
            f"orchestrator with {IDLE:,} idle sessions, CPU",
            "% of a core",
            await percent_of_a_core(large, rounds),
            reach=("<", 5.0),
        )
        report.add("orchestrator with one idle session, CPU", "% of a core", await percent_of_a_core(small, rounds))
        ours, theirs = await in_turns(rounds, (large_client, f"one {tasks}"), (small_client, f"one {tasks}"))
        report.add(
            f"submit to result beside {IDLE:,} idle sessions",
            "us",
            ours,
            baseline="beside one",
            against=theirs,
            reach=("<=", 1.3),
        )


if __name__ == "__main__":
    asyncio.run(hold_all(sys.argv[1], int(sys.argv[2])))
