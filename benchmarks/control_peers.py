"""The processes beside the orchestrator in `control_cycle.py`: an agent, a bare echo, and a loop made by hand."""

from __future__ import annotations

__all__ = ["METHOD", "main"]

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import redis.asyncio as redis

from orki.control.v1 import session_pb2 as sb
from orki.control.v1 import task_pb2 as pb
from orki.control.v1.attempt_pb2 import AttemptRef
from orki.control.v1.session_pb2 import ServedService
from orki.control.v1.session_pb2_grpc import SessionServiceStub
from orki_contract.images import image_of, service_digest
from orki_control.session import AgentSession, AgentSessionOptions, OffersArrived, ResultsAcknowledged
from orki_control.wire import open_channel, server_options

SERVICE = "sourcereview.v1.SourceReviewService"
METHOD = f"{SERVICE}/ReviewFile"
SLOTS = 256


class Counter:
    """Prints the time whenever as many results were acknowledged as were awaited."""

    def __init__(self) -> None:
        self.done = 0
        self.wanted = 0

    async def listen(self) -> None:
        """Reads from standard input how many are awaited next."""
        loop = asyncio.get_running_loop()
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            self.wanted += int(line)
        os._exit(0)

    def add(self, count: int) -> None:
        """So many more."""
        self.done += count
        if self.done == self.wanted:
            print(time.time(), flush=True)


async def agent(target: str) -> None:
    """An agent that answers each offer at once, on its I/O thread: what is measured is the control plane."""
    image = image_of("sourcereview.v1")
    served = ServedService(service=SERVICE, digest=service_digest(image, SERVICE), image=image)
    machine = AgentSession(AgentSessionOptions(agent_id="bench", instance_id="1", services=(served,), slots=SLOTS))
    counter, words = Counter(), asyncio.Event()
    listening = asyncio.create_task(counter.listen())
    async with open_channel(target) as channel:
        call = SessionServiceStub(channel).Connect()
        machine.connection_made(time.monotonic())

        async def write() -> None:
            while True:
                words.clear()
                while (batch := machine.messages_to_send()) is not None:
                    await call.write(batch)
                due = machine.next_timer() or time.monotonic() + 1
                try:
                    async with asyncio.timeout(max(0.0, due - time.monotonic())):
                        await words.wait()
                except TimeoutError:
                    machine.handle_timer(time.monotonic())

        writing = asyncio.create_task(write())
        print("ready", flush=True)
        while (batch := await call.read()) is not grpc.aio.EOF:
            now = time.monotonic()
            for event in machine.receive_batch(batch.messages, now):  # type: ignore[attr-defined]
                if isinstance(event, OffersArrived):
                    for offer in event.offers:
                        machine.accept(offer.attempt, now)
                        machine.report(offer.attempt, offer.offer.request, now)
                elif isinstance(event, ResultsAcknowledged):
                    counter.add(len(event.attempts))
            words.set()
        writing.cancel()
        listening.cancel()


async def echo(_: str) -> None:
    """A bidirectional stream that gives back each message: gRPC itself, and nothing else."""

    async def handler(requests: Any, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        while (message := await context.read()) is not grpc.aio.EOF:
            await context.write(message)

    server = grpc.aio.server(options=server_options())
    methods = {"Echo": grpc.stream_stream_rpc_method_handler(handler)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.Echo", methods),))
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    await server.wait_for_termination()


# --- by hand: batched scripts over the same store, one batched stream; no leases, fences, retries, events, traces ---

_SUBMIT = """
for at = 1, #ARGV, 2 do
  redis.call('HSET', 't:' .. ARGV[at], 'q', ARGV[at + 1], 's', 'queued')
  redis.call('RPUSH', 'queue', ARGV[at])
end
"""
_TAKE = """
local out = {}
for _, id in ipairs(redis.call('LPOP', 'queue', ARGV[1]) or {}) do
  redis.call('HSET', 't:' .. id, 's', 'running')
  out[#out + 1] = id
  out[#out + 1] = redis.call('HGET', 't:' .. id, 'q')
end
return out
"""
_FINISH = """
for at = 1, #ARGV, 2 do
  redis.call('HSET', 't:' .. ARGV[at], 'r', ARGV[at + 1], 's', 'done')
  redis.call('EXPIRE', 't:' .. ARGV[at], 3600)
end
"""


class ByHand:
    """What one writes in an afternoon."""

    def __init__(self, url: str) -> None:
        self._redis = redis.Redis.from_url(url)
        self._submit = self._redis.register_script(_SUBMIT)
        self._take = self._redis.register_script(_TAKE)
        self._finish = self._redis.register_script(_FINISH)
        self._free = SLOTS
        self._wake = asyncio.Event()
        self._numbers = 0

    async def submit(self, request: pb.SubmitRequest, context: Any) -> pb.SubmitResponse:
        """One script for the whole call."""
        flat: list[Any] = []
        answer = pb.SubmitResponse()
        for submission in request.submissions:
            self._numbers += 1
            flat += (str(self._numbers), submission.request)
            answer.outcomes.add().task.task_id = str(self._numbers)
        await self._submit(args=flat)
        self._wake.set()
        return answer

    async def connect(self, requests: AsyncIterator[sb.ConnectRequest], context: Any) -> None:
        """Batches out, batches in."""
        offering = asyncio.create_task(self._offer(context))
        while (batch := await context.read()) is not grpc.aio.EOF:
            flat: list[Any] = []
            answer = sb.ConnectResponse()
            for message in batch.messages:
                flat += (message.result.attempt.task_id, message.result.response)
                answer.messages.add().result_acknowledged.attempt.CopyFrom(message.result.attempt)
            self._free += len(batch.messages)
            self._wake.set()
            await self._finish(args=flat)
            await self._say(context, answer)
        offering.cancel()

    async def _offer(self, context: Any) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._free and (taken := await self._take(args=[self._free])):
                answer = sb.ConnectResponse()
                for task_id, request in zip(taken[::2], taken[1::2], strict=True):
                    offer = answer.messages.add().offer
                    offer.attempt.CopyFrom(AttemptRef(task_id=task_id.decode(), attempt=1, fence=1))
                    offer.method, offer.request = METHOD, request
                self._free -= len(answer.messages)
                await self._say(context, answer)

    async def _say(self, context: Any, answer: sb.ConnectResponse) -> None:
        async with self._lock:
            await context.write(answer)

    _lock = asyncio.Lock()


async def by_hand(url: str) -> None:
    """Serves it."""
    served = ByHand(url)
    server = grpc.aio.server(options=server_options())
    handlers = {
        "Submit": grpc.unary_unary_rpc_method_handler(
            served.submit, pb.SubmitRequest.FromString, pb.SubmitResponse.SerializeToString
        ),
        "Connect": grpc.stream_stream_rpc_method_handler(
            served.connect, sb.ConnectRequest.FromString, sb.ConnectResponse.SerializeToString
        ),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.ByHand", handlers),))
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    await server.wait_for_termination()


async def agent_by_hand(target: str) -> None:
    """Its agent."""
    counter = Counter()
    listening = asyncio.create_task(counter.listen())
    async with open_channel(target) as channel:
        connect = channel.stream_stream(
            "/bench.ByHand/Connect", sb.ConnectRequest.SerializeToString, sb.ConnectResponse.FromString
        )
        call = connect()
        print("ready", flush=True)
        while (batch := await call.read()) is not grpc.aio.EOF:
            answer = sb.ConnectRequest()
            for message in batch.messages:
                if message.HasField("offer"):
                    result = answer.messages.add().result
                    result.attempt.CopyFrom(message.offer.attempt)
                    result.response = message.offer.request
            counter.add(sum(message.HasField("result_acknowledged") for message in batch.messages))
            if answer.messages:
                await call.write(answer)
    listening.cancel()


ROLES: dict[str, Callable[[str], Any]] = {
    "agent": agent,
    "echo": echo,
    "by-hand": by_hand,
    "agent-by-hand": agent_by_hand,
}


def main() -> None:
    """Plays one role: `ROLE WHERE`."""
    asyncio.run(ROLES[sys.argv[1]](sys.argv[2]))


if __name__ == "__main__":
    main()
