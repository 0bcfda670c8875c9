"""Tests of submitters' sessions: real orchestrators, agents and streams."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest
from google.protobuf.wrappers_pb2 import BytesValue
from redis import Redis

from orki.control.v1 import submitter_pb2 as sb
from orki.control.v1 import task_pb2 as pb
from orki.control.v1.attempt_pb2 import TaskState
from orki.control.v1.submitter_pb2_grpc import SubmitterServiceStub
from orki.errors.v1.errors_pb2 import Reason
from orki_contract import Task, TaskStub
from orki_contract.errors import HandlerFailed, HandlerRejected, NotDirectable, OrkiError, TooLarge, UnknownTask
from orki_control import Client, ClientOptions, JitterOptions
from orki_control.session import ArrivedOffer
from orki_control.submitter import ServingOptions
from orki_server import _submitters
from orki_server._orchestrator import Orchestrator
from orki_server._store.operations import new_task_id

Make = Callable[..., Any]
# The requests of the test service have one field of bytes with number 1, as this wrapper has.
DO: Task[Any, Any, Any, Any] = Task.declare("servertests.v1.WorkService/Do", request=BytesValue, response=BytesValue)
DIRECT: Task[Any, Any, Any, Any] = Task.declare(
    "servertests.v1.WorkService/Direct",
    request=BytesValue,
    response=BytesValue,
    progress=BytesValue,
    directive=BytesValue,
)
OPTIONS = ClientOptions(patience=10.0, backoff=JitterOptions(initial=0.02, maximum=0.2))


def submit(number: int, body: bytes = b"x", **fields: Any) -> sb.SubmitterMessage:
    options = {name: fields.pop(name) for name in ("repeated", "watch", "credit", "submission_id") if name in fields}
    submission = pb.Submission(
        method=fields.pop("method", DO.contract.full_name), request=BytesValue(value=body).SerializeToString(), **fields
    )
    options.setdefault("submission_id", bytes([number]) * 16)
    return sb.SubmitterMessage(request=number, submit=sb.TaskSubmit(submission=submission, **options))


class RawClient:
    """A client that writes messages by hand."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.call: Any = SubmitterServiceStub(channel).Open()
        self.replies: list[sb.SubmitterReply] = []

    async def hello(self, **fields: Any) -> RawClient:
        hello = {"protocol_min": 1, "protocol_max": 1, "max_message_bytes": 4 << 20, **fields}
        await self.say(sb.SubmitterMessage(hello=sb.SubmitterHello(**hello)))
        assert (await self.next()).HasField("welcome")
        return self

    async def say(self, *messages: sb.SubmitterMessage) -> None:
        await self.call.write(sb.OpenRequest(messages=messages))

    async def next(self) -> sb.SubmitterReply:
        async with asyncio.timeout(10):
            while not self.replies:
                batch = await self.call.read()
                assert batch is not grpc.aio.EOF, "the stream ended"
                self.replies += batch.messages
        return self.replies.pop(0)

    async def to_end(self) -> None:
        """Read to the end of the stream; raises its error."""
        async with asyncio.timeout(10):
            while (await self.call.read()) is not grpc.aio.EOF:
                pass

    async def quiet(self, wait: float = 0.3) -> bool:
        """Return whether nothing arrives for a while; the stream is of no use afterwards."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait):
                self.replies += (await self.call.read()).messages
        return not self.replies


@pytest.fixture
async def raw(orchestrator: Orchestrator) -> AsyncIterator[Callable[..., Awaitable[RawClient]]]:
    async with grpc.aio.insecure_channel(orchestrator.address) as channel:

        async def make(**hello: Any) -> RawClient:
            return await RawClient(channel).hello(**hello)

        yield make


@pytest.fixture
async def client(orchestrator: Orchestrator) -> AsyncIterator[Client]:
    async with Client(orchestrator.address, OPTIONS) as opened:
        yield opened


@pytest.fixture
def reads(orchestrator: Orchestrator) -> list[str]:
    """The tasks that the orchestrator has read from its store."""
    found: list[str] = []
    apply = orchestrator._store.apply

    def counting(operation: Any) -> Any:
        if operation.op == "read":
            found.append(operation.arguments[0])
        return apply(operation)

    orchestrator._store.apply = counting
    return found


def body(text: bytes = b"x") -> BytesValue:
    return BytesValue(value=text)


async def test_waiting_for_results_reads_nothing_from_the_store(
    orchestrator: Orchestrator, client: Client, stand_in: Make, reads: list[str]
) -> None:
    await stand_in(orchestrator.address, slots=16).ready()

    async def wait(number: int) -> bytes:
        response = await client.call(DO, body(b"%d" % number))
        return bytes(response.value)

    assert await asyncio.gather(*map(wait, range(100))) == [b"%d" % number for number in range(100)]
    handles = await client.submit_many(DO, [body(b"%d" % number) for number in range(100)])
    results = await asyncio.gather(*(handle.result(20) for handle in handles))
    assert [each.value for each in results] == [b"%d" % number for number in range(100)]
    assert (await TaskStub(client, DO)(body(b"stub"))).value == b"stub"
    assert reads == []


async def test_a_pushed_end_is_what_the_store_has(
    orchestrator: Orchestrator, client: Client, stand_in: Make, reads: list[str]
) -> None:
    async def handler(offer: ArrivedOffer) -> bytes:
        if offer.offer.request.endswith(b"bad"):
            raise HandlerRejected("it is bad")
        return offer.offer.request

    await stand_in(orchestrator.address, handler=handler).ready()
    for text in (b"good", b"bad"):
        handle = await client.submit(DO, body(text))
        with contextlib.suppress(OrkiError):
            await handle.result(10)
        assert reads == []
        assert handle.snapshot == await client.get(handle.task_id)
        reads.clear()


async def test_a_later_attempt_is_read_with_its_earlier_failures(
    orchestrator: Orchestrator, client: Client, stand_in: Make, work: Make
) -> None:
    tries: list[int] = []

    async def handler(offer: ArrivedOffer) -> bytes:
        tries.append(offer.attempt.attempt)
        if len(tries) < 2:
            raise HandlerFailed("once")
        return offer.offer.request

    await stand_in(orchestrator.address, [work(max_attempts=3)], handler=handler).ready()
    handle = await client.submit(DO, body())
    await handle.result(20)
    assert [each.message for each in handle.snapshot.earlier_failures] == ["once"]
    assert handle.snapshot == await client.get(handle.task_id)


async def test_one_bad_submission_hurts_only_itself(orchestrator: Orchestrator, raw: Make, stand_in: Make) -> None:
    await stand_in(orchestrator.address).ready()
    stream = await raw()
    await stream.say(
        submit(1, method="no slash"),
        submit(2, method="unknown.v1.Service/Do"),
        submit(3, submission_id=b"short"),
        submit(4, idempotency_key="k" * 257),
        sb.SubmitterMessage(request=5, watch=sb.TaskWatch(task_id=new_task_id(1), mode=sb.WATCH_MODE_RESULT)),
        sb.SubmitterMessage(request=6, watch=sb.TaskWatch(task_id="x", mode=sb.WATCH_MODE_ALL)),
        sb.SubmitterMessage(request=7, watch=sb.TaskWatch(task_id=new_task_id(1))),
        sb.SubmitterMessage(request=8, watch=sb.TaskWatch(task_id="x", after="y", mode=sb.WATCH_MODE_STATES)),
        sb.SubmitterMessage(request=9, cancel=pb.CancelRequest(task_id=new_task_id(1))),
        sb.SubmitterMessage(request=10, direct=pb.DirectRequest(task_id="x")),
        submit(11, watch=sb.WATCH_MODE_RESULT),
    )
    replies: dict[int, list[sb.SubmitterReply]] = {}
    while len(replies) < 11 or len(replies[11]) < 2:
        reply = await stream.next()
        replies.setdefault(reply.request, []).append(reply)
    reasons = {number: found[0].failure.reason for number, found in replies.items() if number < 11}
    invalid, unknown = Reason.REASON_INVALID_ARGUMENT, Reason.REASON_UNKNOWN_TASK
    assert reasons == {
        **dict.fromkeys((1, 3, 4, 7, 8), invalid),
        2: Reason.REASON_UNKNOWN_METHOD,
        **dict.fromkeys((5, 6, 9, 10), unknown),
    }
    assert replies[11][1].update.task.state == TaskState.TASK_STATE_SUCCEEDED


async def test_a_repeated_submission_finds_its_task_and_another_request_does_not(
    orchestrator: Orchestrator, raw: Make, stand_in: Make, client: Client
) -> None:
    await stand_in(orchestrator.address).ready()
    first = await raw()
    await first.say(submit(1, watch=sb.WATCH_MODE_RESULT))
    task_id = (await first.next()).accepted.task_id
    await first.next()
    first.call.cancel()
    second = await raw()
    await second.say(submit(1, repeated=True, watch=sb.WATCH_MODE_RESULT))
    accepted, update = await second.next(), await second.next()
    assert accepted.accepted.task_id == update.update.task.task_id == task_id
    assert update.update.task.state == TaskState.TASK_STATE_SUCCEEDED
    assert update.update.task == await client.get(task_id)
    await second.say(submit(2, b"another", submission_id=b"\x01" * 16, repeated=True))
    assert (await second.next()).accepted.task_id != task_id
    assert len([each async for each in client.list_tasks()]) == 2


async def test_an_idempotency_key_works_across_sessions_and_calls(
    orchestrator: Orchestrator, raw: Make, stand_in: Make, client: Client
) -> None:
    await stand_in(orchestrator.address).ready()
    handle = await client.submit(DO, body(), idempotency_key="k")
    await handle.result(10)
    stream = await raw()
    await stream.say(submit(1, idempotency_key="k"), submit(2, b"another", idempotency_key="k"))
    found = {reply.request: reply for reply in [await stream.next(), await stream.next()]}
    assert found[1].accepted.task_id == handle.task_id
    assert found[2].failure.reason == Reason.REASON_IDEMPOTENCY_CONFLICT


async def test_no_key_is_stored_for_a_submission_without_one(
    orchestrator: Orchestrator, stand_in: Make, client: Client, redis_url: str
) -> None:
    await stand_in(orchestrator.address).ready()
    await client.call(DO, body())
    with Redis.from_url(redis_url) as redis:
        assert [name for name in redis.scan_iter() if b"idempotency" in name or b":key:" in name] == []
    await client.call(DO, body(), idempotency_key="k")
    with Redis.from_url(redis_url) as redis:
        assert len([name for name in redis.scan_iter() if b"idempotency" in name or b":key:" in name]) == 1


@pytest.mark.parametrize("mode", [sb.WATCH_MODE_RESULT, sb.WATCH_MODE_STATES, sb.WATCH_MODE_ALL])
async def test_a_watch_receives_what_its_mode_asks_for(
    orchestrator: Orchestrator, raw: Make, stand_in: Make, mode: sb.WatchMode.ValueType
) -> None:
    agent = stand_in(orchestrator.address, handler=None)
    await agent.ready()
    stream = await raw()
    await stream.say(submit(1, method=DIRECT.contract.full_name, watch=mode, credit=9))
    task_id = (await stream.next()).accepted.task_id
    await agent.until(lambda: bool(agent.offers))
    key = agent.offers[0].attempt
    for number in range(3):
        agent.machine.progress(key, b"%d" % number)
        agent.say()
    await asyncio.sleep(0.3)
    agent.machine.report(key, b"", 0.0)
    agent.say()
    states: list[int] = []
    progress = 0
    while TaskState.TASK_STATE_SUCCEEDED not in states:
        update = (await stream.next()).update
        if update.WhichOneof("news") == "task":
            assert update.task.task_id == task_id
            states.append(update.task.state)
        else:
            progress += 1
    assert progress == (3 if mode == sb.WATCH_MODE_ALL else 0)
    assert (len(states) > 1) == (mode != sb.WATCH_MODE_RESULT)


async def test_progress_waits_for_credit(orchestrator: Orchestrator, raw: Make, stand_in: Make) -> None:
    agent = stand_in(orchestrator.address, handler=None)
    await agent.ready()
    stream = await raw()
    await stream.say(submit(1, method=DIRECT.contract.full_name))
    task_id = (await stream.next()).accepted.task_id
    await agent.until(lambda: bool(agent.offers))
    for number in range(10):
        agent.machine.progress(agent.offers[0].attempt, b"%d" % number)
    agent.say()
    await asyncio.sleep(0.3)
    await stream.say(
        sb.SubmitterMessage(request=2, watch=sb.TaskWatch(task_id=task_id, mode=sb.WATCH_MODE_ALL, credit=3))
    )
    got: list[bytes] = []
    while len(got) < 3:
        reply = await stream.next()
        if reply.update.HasField("progress"):
            got.append(reply.update.progress.payload)
    await stream.say(sb.SubmitterMessage(ping=sb.SubmitterPing()))
    while (reply := await stream.next()).WhichOneof("body") != "pong":
        assert not reply.update.HasField("progress")
    await stream.say(sb.SubmitterMessage(request=2, credit=sb.ProgressCredit(messages=4)))
    while len(got) < 7:
        got.append((await stream.next()).update.progress.payload)
    assert got == [b"%d" % number for number in range(7)]
    assert await stream.quiet()


async def test_all_progress_arrives_at_a_client_over_lost_streams(
    orchestrator: Orchestrator, stand_in: Make, client: Client
) -> None:
    agent = stand_in(orchestrator.address, handler=None)
    await agent.ready()
    handle = await client.submit(DIRECT, body())
    await agent.until(lambda: bool(agent.offers))
    got: list[bytes] = []

    async def collect() -> None:
        async for delta in handle.progress():
            got.append(delta.value)

    collecting = asyncio.create_task(collect())
    for number in range(600):
        payload = body(b"%d" % number).SerializeToString()
        while agent.machine.unstored(agent.offers[0].attempt)[0] >= 64:
            await asyncio.sleep(0.01)
        agent.machine.progress(agent.offers[0].attempt, payload)
        agent.say()
        if number % 100 == 50:
            for stream in list(orchestrator._submitter_sessions._open):
                stream.end("the test cuts it")
            await asyncio.sleep(0.05)
    agent.machine.report(agent.offers[0].attempt, b"", 0.0)
    agent.say()
    async with asyncio.timeout(20):
        await collecting
    assert got == [b"%d" % number for number in range(600)]


async def test_submissions_and_waits_survive_lost_streams(
    orchestrator: Orchestrator, stand_in: Make, client: Client
) -> None:
    await stand_in(orchestrator.address, slots=8).ready()
    done = 0

    async def wait(number: int) -> None:
        nonlocal done
        for turn in range(10):
            response = await client.call(DO, body(b"%d.%d" % (number, turn)))
            assert response.value == b"%d.%d" % (number, turn)
            done += 1

    async def cut() -> None:
        while True:
            await asyncio.sleep(0.05)
            for stream in list(orchestrator._submitter_sessions._open):
                stream.end("the test cuts it")

    cutting = asyncio.create_task(cut())
    async with asyncio.timeout(60):
        await asyncio.gather(*map(wait, range(20)))
    cutting.cancel()
    assert done == 200
    assert len([each async for each in client.list_tasks(page_size=1000)]) == 200


async def test_a_result_arrives_through_another_orchestrator(
    orchestrator: Orchestrator, redis_url: str, options: Make, launch: Make, stand_in: Make
) -> None:
    other = await launch(options(redis_url, orchestrator_id="other"))
    await stand_in(orchestrator.address).ready()
    async with Client(other.address, OPTIONS) as client:
        assert (await client.call(DO, body(b"far"), timeout=10)).value == b"far"


async def test_a_watch_of_a_lost_task_ends_with_its_reason(
    orchestrator: Orchestrator, stand_in: Make, client: Client, redis_url: str
) -> None:
    await stand_in(orchestrator.address, handler=None).ready()
    handle = await client.submit(DO, body())
    waiting = asyncio.create_task(handle.result(20))
    await asyncio.sleep(0.2)
    with Redis.from_url(redis_url) as redis:
        redis.flushall()
    with pytest.raises(UnknownTask):
        await waiting


async def test_a_result_that_the_client_cannot_take_is_a_typed_error(
    orchestrator: Orchestrator, stand_in: Make
) -> None:
    await stand_in(orchestrator.address).ready()
    small = ClientOptions(patience=10.0, max_message_bytes=200_000)
    async with Client(orchestrator.address, OPTIONS) as client, Client(orchestrator.address, small) as other:
        handle = await client.submit(DO, body(b"x" * 300_000))
        await handle.result(10)
        with pytest.raises(TooLarge):
            await other.handle(DO, handle.task_id).result(10)
        assert (await other.call(DO, body(b"small"), timeout=10)).value == b"small"


async def test_cancels_and_directives_go_through_the_session(
    orchestrator: Orchestrator, stand_in: Make, client: Client
) -> None:
    async def handler(offer: ArrivedOffer) -> bytes:
        await asyncio.sleep(60)
        return b""

    agent = stand_in(orchestrator.address, handler=handler)
    await agent.ready()
    handle = await client.submit(DIRECT, body())
    await agent.until(lambda: bool(agent.offers))
    async with asyncio.timeout(10):
        while True:
            with contextlib.suppress(NotDirectable):
                await handle.direct(body(b"left"))
                break
            await asyncio.sleep(0.02)
        await agent.until(lambda: bool(agent.directives))
        await handle.cancel("enough")
    with pytest.raises(OrkiError) as caught:
        await handle.result(10)
    assert caught.value.reason == Reason.REASON_CANCELLED
    with pytest.raises(NotDirectable):
        await handle.direct(body())


async def test_a_client_that_does_not_read_fills_no_memory_and_misses_nothing(
    orchestrator: Orchestrator, stand_in: Make, raw: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_submitters, "_BACKLOG_BYTES", 100_000)
    await stand_in(orchestrator.address, slots=16).ready()
    stream = await raw()
    count, size = 120, 50_000
    await stream.say(*(submit(number, bytes([number]) * size, watch=sb.WATCH_MODE_RESULT) for number in range(1, 41)))
    await stream.say(*(submit(number, bytes([number]) * size, watch=sb.WATCH_MODE_RESULT) for number in range(41, 81)))
    await stream.say(*(submit(number, bytes([number]) * size, watch=sb.WATCH_MODE_RESULT) for number in range(81, 121)))
    (served,) = orchestrator._submitter_sessions._open
    most = 0
    for _ in range(60):
        await asyncio.sleep(0.05)
        most = max(most, served.machine.waiting_bytes)
    assert most < 1_000_000
    results: set[int] = set()
    while len(results) < count:
        reply = await stream.next()
        if reply.HasField("update"):
            assert len(reply.update.task.response) > size
            results.add(reply.request)


HELLO = sb.SubmitterMessage(hello=sb.SubmitterHello(protocol_min=1, protocol_max=1, max_message_bytes=4096))
FUTURE = sb.SubmitterMessage(hello=sb.SubmitterHello(protocol_min=5, protocol_max=5, max_message_bytes=4096))


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([submit(1)], "REASON_PROTOCOL_VIOLATION"),
        ([FUTURE], "REASON_PROTOCOL_VERSION"),
        ([HELLO, HELLO], "REASON_PROTOCOL_VIOLATION"),
        ([HELLO, submit(1), submit(1)], "REASON_PROTOCOL_VIOLATION"),
    ],
)
async def test_a_protocol_violation_ends_its_stream_with_its_reason(
    orchestrator: Orchestrator, client: Client, stand_in: Make, messages: list[sb.SubmitterMessage], reason: str
) -> None:
    await stand_in(orchestrator.address).ready()
    async with grpc.aio.insecure_channel(orchestrator.address) as channel:
        stream = RawClient(channel)
        await stream.say(*messages)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stream.to_end()
    assert ("orki-reason", reason) in [tuple(each) for each in caught.value.trailing_metadata() or ()]
    await client.call(DO, body(), timeout=10)


async def test_a_stream_without_hello_ends(orchestrator: Orchestrator) -> None:
    orchestrator._submitter_sessions._options = ServingOptions(orchestrator_id="o", hello_timeout=0.2)
    async with grpc.aio.insecure_channel(orchestrator.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError, match="no hello in time"):
            await RawClient(channel).to_end()
    assert orchestrator._submitter_sessions._open == set()


async def test_a_draining_orchestrator_refuses_submissions_and_serves_watches(
    redis_url: str, options: Make, launch: Make, stand_in: Make
) -> None:
    orchestrator = await launch(options(redis_url, drain_grace=10.0))
    agent = stand_in(orchestrator.address, handler=None)
    await agent.ready()
    async with grpc.aio.insecure_channel(orchestrator.address) as channel:
        stream = await RawClient(channel).hello()
        await stream.say(submit(1, watch=sb.WATCH_MODE_RESULT))
        await stream.next()
        await agent.until(lambda: bool(agent.offers))
        stopping = asyncio.create_task(orchestrator.stop())
        assert (await stream.next()).HasField("drain")
        await stream.say(submit(2))
        assert (await stream.next()).failure.reason == Reason.REASON_DRAINING
        agent.machine.report(agent.offers[0].attempt, b"", 0.0)
        agent.say()
        assert (await stream.next()).update.task.state == TaskState.TASK_STATE_SUCCEEDED
        await stopping
