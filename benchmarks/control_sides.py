"""The programs of the control benchmarks: `python -m benchmarks.control_sides ROLE WHERE`.

`client` and `agent` use orki as an application would. `echo` and `ping` are a bare gRPC stream. The `floor-…` roles do
nothing but pass a message on: from a client to an agent and back, over two bare streams, with a script call that does
nothing before each of the two ways. So they show what gRPC and Redis cost a task at least. The `hand-…` roles are
the loop that an expert would write for the same job without orki's promises: batched scripts over Redis and one batched
gRPC stream, but no leases, fences, retries, events or traces.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import redis.asyncio as redis
from sourcereview.v1.review_orki import SourceReviewServiceBase, SourceReviewServiceClient
from sourcereview.v1.review_pb2 import ReviewFileRequest, ReviewFileResponse

from benchmarks.peers.client_loop import serve
from orki.control.v1 import session_pb2 as sb
from orki.control.v1 import task_pb2 as pb
from orki.control.v1.attempt_pb2 import AttemptRef
from orki_agent import Agent
from orki_control import Client

SLOTS = 512
BATCH = 50
REQUEST = ReviewFileRequest(path=b"x" * 200)
RESPONSE = ReviewFileResponse(error="x" * 200)
METHOD = "sourcereview.v1.SourceReviewService/ReviewFile"
_OPTIONS = [("grpc.max_receive_message_length", 4 << 20), ("grpc.so_reuseport", 0)]


def _ready(**fields: Any) -> None:
    print(json.dumps({"ready": True, **fields}), flush=True)


class NoOp(SourceReviewServiceBase):
    """Returns a response of 200 bytes."""

    async def review_file(self, request: Any, ctx: Any) -> ReviewFileResponse:
        return RESPONSE


async def agent(target: str) -> None:
    """Run an agent with a no-op handler."""
    noop = Agent("bench", NoOp(), slots=SLOTS)
    _ready()
    await noop.run(target, agent_id="bench", drain_grace=0.0)


async def client(target: str) -> None:
    """Submit no-op tasks on command and wait for each result."""
    async with Client(target) as orki:
        reviews = SourceReviewServiceClient(orki)

        async def cycle() -> None:
            await reviews.review_file(REQUEST)

        async def flood(count: int) -> None:
            handles = await reviews.review_file.submit_many([REQUEST] * count)
            await asyncio.gather(*(handle.result() for handle in handles))

        await serve(cycle, flood)


async def echo(_: str) -> None:
    """Serve a bidirectional stream that returns each message."""

    async def handler(_requests: Any, context: Any) -> None:
        while (message := await context.read()) is not grpc.aio.EOF:
            await context.write(message)

    server = grpc.aio.server(options=_OPTIONS)
    methods: dict[str, Any] = {"Echo": grpc.stream_stream_rpc_method_handler(handler)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.Echo", methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    _ready(address=f"127.0.0.1:{port}")
    await server.wait_for_termination()


async def ping(target: str) -> None:
    """Send a message over the stream of `echo` on command and wait for it to return."""
    await _ping(target, "/bench.Echo/Echo")


async def _ping(target: str, method: str) -> None:
    async with grpc.aio.insecure_channel(target, options=_OPTIONS) as channel:
        call: Any = channel.stream_stream(method)()
        message = REQUEST.SerializeToString()

        async def cycle() -> None:
            await call.write(message)
            await call.read()

        await serve(cycle)


# --- The floor: two bare streams in line, and two empty script calls. ---


async def floor_server(url: str) -> None:
    """Pass messages of one client to one agent, and its answers back."""
    nothing = redis.Redis.from_url(url).register_script("return 1")
    agents: list[Any] = []
    answers: asyncio.Queue[bytes] = asyncio.Queue()

    async def client_stream(_requests: Any, context: Any) -> None:
        while (message := await context.read()) is not grpc.aio.EOF:
            await nothing()
            await agents[0].write(message)
            answer = await answers.get()
            await nothing()
            await context.write(answer)

    async def agent_stream(_requests: Any, context: Any) -> None:
        agents.append(context)
        while (message := await context.read()) is not grpc.aio.EOF:
            answers.put_nowait(message)

    server = grpc.aio.server(options=_OPTIONS)
    methods: dict[str, Any] = {
        "Client": grpc.stream_stream_rpc_method_handler(client_stream),
        "Agent": grpc.stream_stream_rpc_method_handler(agent_stream),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.Floor", methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    _ready(address=f"127.0.0.1:{port}")
    await server.wait_for_termination()


async def floor_agent(target: str) -> None:
    """Return each message."""
    async with grpc.aio.insecure_channel(target, options=_OPTIONS) as channel:
        call: Any = channel.stream_stream("/bench.Floor/Agent")()
        await call.wait_for_connection()
        _ready()
        while (message := await call.read()) is not grpc.aio.EOF:
            await call.write(message)


async def floor_client(target: str) -> None:
    """Send a message on command and wait for its return."""
    await _ping(target, "/bench.Floor/Client")


# --- The hand-written loop. ---

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


class HandWritten:
    """Serves Submit, Results and Connect over one Redis."""

    def __init__(self, url: str) -> None:
        self._redis = redis.Redis.from_url(url)
        self._submit = self._redis.register_script(_SUBMIT)
        self._take = self._redis.register_script(_TAKE)
        self._finish = self._redis.register_script(_FINISH)
        self._free = SLOTS
        self._wake = asyncio.Event()
        self._numbers = 0
        self._results: dict[str, asyncio.Future[bytes]] = {}
        self._writing = asyncio.Lock()

    async def submit(self, request: pb.SubmitRequest, _context: Any) -> pb.SubmitResponse:
        """Store a batch with one script."""
        flat: list[Any] = []
        answer = pb.SubmitResponse()
        for submission in request.submissions:
            self._numbers += 1
            task_id = str(self._numbers)
            flat += (task_id, submission.request)
            self._results[task_id] = asyncio.get_running_loop().create_future()
            answer.outcomes.add().task.task_id = task_id
        await self._submit(args=flat)
        self._wake.set()
        return answer

    async def results(self, request: pb.SubmitResponse, _context: Any) -> pb.SubmitResponse:
        """Wait for the results of a batch."""
        answer = pb.SubmitResponse()
        for outcome in request.outcomes:
            answer.outcomes.add().task.response = await self._results[outcome.task.task_id]
            del self._results[outcome.task.task_id]
        return answer

    async def connect(self, _requests: AsyncIterator[sb.ConnectRequest], context: Any) -> None:
        """Take batches of results from the agent, and offer batches of tasks."""
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
            for message in batch.messages:
                self._results[message.result.attempt.task_id].set_result(message.result.response)
            await self._write(context, answer)
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
                await self._write(context, answer)

    async def _write(self, context: Any, answer: sb.ConnectResponse) -> None:
        async with self._writing:
            await context.write(answer)


async def hand_server(url: str) -> None:
    """Serve the hand-written loop."""
    served = HandWritten(url)
    server = grpc.aio.server(options=_OPTIONS)
    unary = grpc.unary_unary_rpc_method_handler
    submit, results = pb.SubmitRequest.FromString, pb.SubmitResponse.FromString
    handlers: dict[str, Any] = {
        "Submit": unary(served.submit, submit, pb.SubmitResponse.SerializeToString),
        "Results": unary(served.results, results, pb.SubmitResponse.SerializeToString),
        "Connect": grpc.stream_stream_rpc_method_handler(
            served.connect, sb.ConnectRequest.FromString, sb.ConnectResponse.SerializeToString
        ),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.Hand", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    _ready(address=f"127.0.0.1:{port}")
    await server.wait_for_termination()


async def hand_agent(target: str) -> None:
    """Answer each offer of the hand-written loop, in batches."""
    async with grpc.aio.insecure_channel(target, options=_OPTIONS) as channel:
        connect = channel.stream_stream(
            "/bench.Hand/Connect", sb.ConnectRequest.SerializeToString, sb.ConnectResponse.FromString
        )
        call: Any = connect()
        _ready()
        response = RESPONSE.SerializeToString()
        while (batch := await call.read()) is not grpc.aio.EOF:
            answer = sb.ConnectRequest()
            for message in batch.messages:
                if message.HasField("offer"):
                    result = answer.messages.add().result
                    result.attempt.CopyFrom(message.offer.attempt)
                    result.response = response
            if answer.messages:
                await call.write(answer)


async def hand_client(target: str) -> None:
    """Submit to the hand-written loop on command and wait for each result."""
    async with grpc.aio.insecure_channel(target, options=_OPTIONS) as channel:
        submit = channel.unary_unary(
            "/bench.Hand/Submit", pb.SubmitRequest.SerializeToString, pb.SubmitResponse.FromString
        )
        results = channel.unary_unary(
            "/bench.Hand/Results", pb.SubmitResponse.SerializeToString, pb.SubmitResponse.FromString
        )
        submission = pb.Submission(method=METHOD, request=REQUEST.SerializeToString())

        async def cycle() -> None:
            await results(await submit(pb.SubmitRequest(submissions=[submission])))

        async def flood(count: int) -> None:
            async def batch(size: int) -> None:
                await results(await submit(pb.SubmitRequest(submissions=[submission] * size)))

            await asyncio.gather(*(batch(BATCH) for _ in range(count // BATCH)))

        await serve(cycle, flood)


ROLES: dict[str, Callable[[str], Awaitable[None]]] = {
    "agent": agent,
    "client": client,
    "echo": echo,
    "ping": ping,
    "floor-server": floor_server,
    "floor-agent": floor_agent,
    "floor-client": floor_client,
    "hand-server": hand_server,
    "hand-agent": hand_agent,
    "hand-client": hand_client,
}

if __name__ == "__main__":
    asyncio.run(ROLES[sys.argv[1]](sys.argv[2]))  # type: ignore[arg-type]
