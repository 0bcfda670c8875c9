"""Invalid input on gRPC: every invalid field, size and protocol violation gets a typed error, without side effects."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (  # type: ignore[import-untyped]
    ProtoReflectionDescriptorDatabase,
)

from orki.control.v1 import session_pb2 as sb
from orki.control.v1 import task_pb2 as pb
from orki.control.v1.attempt_pb2 import AttemptRef
from orki.control.v1.session_pb2_grpc import SessionServiceStub
from orki.control.v1.task_pb2_grpc import TaskServiceStub
from orki.errors.v1.errors_pb2 import Reason
from orki_control import Client
from orki_server._orchestrator import SERVICES, Orchestrator
from orki_server._store.operations import new_task_id

DO = "servertests.v1.WorkService/Do"
Make = Callable[..., Any]
UNKNOWN = "t1-" + "0" * (len(new_task_id(1)) - 3)
"""A well-formed id of no task. It is constant because it is part of test names."""


@pytest.fixture
async def channel(orchestrator: Orchestrator) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(
        orchestrator.address, options=[("grpc.max_send_message_length", 64 << 20)]
    ) as opened:
        yield opened


async def refused(call: Any) -> tuple[grpc.StatusCode, str, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    reasons = [value for key, value in caught.value.trailing_metadata() or () if key == "orki-reason"]
    return caught.value.code(), str(reasons[0]) if reasons else "", caught.value.details() or ""


NOT_FOUND = (grpc.StatusCode.NOT_FOUND, "REASON_UNKNOWN_TASK")
INVALID = (grpc.StatusCode.INVALID_ARGUMENT, "REASON_INVALID_ARGUMENT")


@pytest.mark.parametrize(
    ("method", "request_message", "expected"),
    [
        ("Get", pb.GetRequest(), NOT_FOUND),
        ("Get", pb.GetRequest(task_id=UNKNOWN), NOT_FOUND),
        ("Get", pb.GetRequest(task_id="t999-" + UNKNOWN[3:]), NOT_FOUND),
        ("Get", pb.GetRequest(task_id="'; DROP"), NOT_FOUND),
        ("Cancel", pb.CancelRequest(task_id=UNKNOWN), NOT_FOUND),
        ("Cancel", pb.CancelRequest(task_id=UNKNOWN, message="x" * 1001), INVALID),
        ("Direct", pb.DirectRequest(task_id=UNKNOWN), NOT_FOUND),
        ("Direct", pb.DirectRequest(task_id="x"), NOT_FOUND),
        ("List", pb.ListRequest(page_size=1001), INVALID),
        ("List", pb.ListRequest(states=[99]), INVALID),  # type: ignore[list-item]
        ("List", pb.ListRequest(states=[0]), INVALID),  # type: ignore[list-item]
        ("List", pb.ListRequest(method="x"), INVALID),
        ("List", pb.ListRequest(agent_id="a b"), INVALID),
        ("List", pb.ListRequest(page_token="x"), INVALID),
        ("Submit", pb.SubmitRequest(), INVALID),
        ("Submit", pb.SubmitRequest(submissions=[pb.Submission()] * 1001), INVALID),
    ],
)
async def test_a_call_with_an_invalid_field_is_refused(
    channel: grpc.aio.Channel, method: str, request_message: Any, expected: tuple[grpc.StatusCode, str]
) -> None:
    code, reason, details = await refused(getattr(TaskServiceStub(channel), method)(request_message))
    assert (code, reason) == expected
    assert details


@pytest.mark.parametrize(
    ("task_id", "after", "expected"),
    [(UNKNOWN, "", NOT_FOUND), ("x", "", NOT_FOUND), (UNKNOWN, "x", INVALID), (UNKNOWN, "1-" + "9" * 30, INVALID)],
)
async def test_a_watch_with_an_invalid_field_is_refused(
    channel: grpc.aio.Channel, task_id: str, after: str, expected: tuple[grpc.StatusCode, str]
) -> None:
    call = TaskServiceStub(channel).Watch(pb.WatchRequest(task_id=task_id, after=after))
    code, reason, _ = await refused(call.read())
    assert (code, reason) == expected


@pytest.mark.parametrize(
    ("submission", "reason"),
    [
        (pb.Submission(), Reason.REASON_INVALID_ARGUMENT),
        (pb.Submission(method="a/b/c"), Reason.REASON_INVALID_ARGUMENT),
        (pb.Submission(method="no slash"), Reason.REASON_INVALID_ARGUMENT),
        (pb.Submission(method="unknown.v1.Service/Do"), Reason.REASON_UNKNOWN_METHOD),
        (pb.Submission(method=DO + "x"), Reason.REASON_UNKNOWN_METHOD),
        (pb.Submission(method=DO, idempotency_key="k" * 257), Reason.REASON_INVALID_ARGUMENT),
        (pb.Submission(method=DO, request=b"x" * ((4 << 20) - 65_000)), Reason.REASON_TOO_LARGE),
        (pb.Submission(method=DO, request=b"q"), Reason.REASON_INVALID_ARGUMENT),
        (pb.Submission(method=DO, request=b"\n\x05four"), Reason.REASON_INVALID_ARGUMENT),
    ],
)
async def test_each_submission_has_its_own_outcome(
    orchestrator: Orchestrator, channel: grpc.aio.Channel, stand_in: Make, submission: pb.Submission, reason: int
) -> None:
    await stand_in(orchestrator.address).ready()
    good = pb.Submission(method=DO, request=b"\n\x04good", traceparent="not one")
    answer = await TaskServiceStub(channel).Submit(pb.SubmitRequest(submissions=[good, submission]))
    assert answer.outcomes[0].task.traceparent
    assert answer.outcomes[1].failure.reason == reason
    assert answer.outcomes[1].failure.message


async def test_a_message_beyond_the_limit_is_refused_and_other_calls_continue(
    orchestrator: Orchestrator, channel: grpc.aio.Channel, stand_in: Make
) -> None:
    await stand_in(orchestrator.address).ready()
    huge = pb.SubmitRequest(submissions=[pb.Submission(method=DO, request=b"x" * (5 << 20))])
    code, _, _ = await refused(TaskServiceStub(channel).Submit(huge))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    answer = await TaskServiceStub(channel).Submit(
        pb.SubmitRequest(submissions=[pb.Submission(method=DO, request=b"x" * (3 << 20))])
    )
    async with Client(orchestrator.address) as client:
        news = [each async for each in client.watch(answer.outcomes[0].task.task_id)]
    assert len(news[-1].task.response) == 3 << 20


@pytest.mark.parametrize("raw", [b"\xff", b"\x0a\xff\xff\xff\xff\x7f", b"\x0a\x05abc"])
async def test_malformed_bytes_break_one_call_only(
    orchestrator: Orchestrator, channel: grpc.aio.Channel, raw: bytes
) -> None:
    call: Any = channel.unary_unary("/orki.control.v1.TaskService/Get", request_serializer=lambda value: value)
    with pytest.raises(grpc.aio.AioRpcError):
        await call(raw)
    code, _, _ = await refused(TaskServiceStub(channel).Get(pb.GetRequest(task_id=UNKNOWN)))
    assert code is grpc.StatusCode.NOT_FOUND


# --- sessions ---


async def last_messages(channel: grpc.aio.Channel, *batches: sb.ConnectRequest) -> list[sb.OrchestratorMessage]:
    call = SessionServiceStub(channel).Connect()
    messages: list[sb.OrchestratorMessage] = []
    try:
        async with asyncio.timeout(20):
            for batch in batches:
                await call.write(batch)
            while (answer := await call.read()) is not grpc.aio.EOF:
                assert isinstance(answer, sb.ConnectResponse)
                messages.extend(answer.messages)
    except grpc.aio.AioRpcError:
        pass
    finally:
        call.cancel()
    return messages


def hello(**values: Any) -> sb.ConnectRequest:
    fields: dict[str, Any] = {
        "agent_id": "a",
        "instance_id": "i",
        "protocol_min": 1,
        "protocol_max": 1,
        "slots": 1,
        "max_message_bytes": 4096,
    }
    return sb.ConnectRequest(messages=[sb.AgentMessage(hello=sb.Hello(**(fields | values)))])


def said(**body: Any) -> sb.ConnectRequest:
    return sb.ConnectRequest(messages=[sb.AgentMessage(**body)])


@pytest.mark.parametrize(
    ("batches", "reason"),
    [
        ([said(heartbeat=sb.Heartbeat(number=1))], Reason.REASON_PROTOCOL_VIOLATION),
        ([hello(agent_id="a b")], Reason.REASON_PROTOCOL_VIOLATION),
        ([hello(slots=0)], Reason.REASON_PROTOCOL_VIOLATION),
        ([hello(protocol_min=9, protocol_max=9)], Reason.REASON_PROTOCOL_VERSION),
        ([hello(), hello()], Reason.REASON_PROTOCOL_VIOLATION),
        (
            [hello(services=[sb.ServedService(service="s.v1.S", digest="sha256:" + "0" * 64, image=b"x")])],
            Reason.REASON_INVALID_CONTRACT,
        ),
    ],
)
async def test_a_protocol_violation_ends_the_session_with_its_reason(
    channel: grpc.aio.Channel, batches: list[sb.ConnectRequest], reason: int
) -> None:
    messages = await last_messages(channel, *batches)
    assert messages[-1].refused.failure.reason == reason
    assert messages[-1].refused.failure.message
    assert not messages[-1].refused.HasField("attempt")


async def test_a_stream_without_hello_ends_with_its_reason(redis_url: str, options: Make, launch: Make) -> None:
    orchestrator = await launch(options(redis_url, hello_timeout=0.1))
    async with grpc.aio.insecure_channel(orchestrator.address) as channel:
        (message,) = await last_messages(channel)
    assert message.refused.failure.reason == Reason.REASON_HELLO_TIMEOUT


async def test_reports_about_attempts_of_other_agents_are_refused_and_change_nothing(
    orchestrator: Orchestrator, channel: grpc.aio.Channel, stand_in: Make
) -> None:
    holder = stand_in(orchestrator.address, handler=None)
    await holder.ready()
    async with Client(orchestrator.address) as client:
        (task,) = await client.submit_raw([pb.Submission(method=DO, request=b"\n\x01q")])
        await holder.until(lambda: bool(holder.offers))
        ref = holder.offers[0].attempt.ref()
        stranger = SessionServiceStub(channel).Connect()
        await stranger.write(hello(agent_id="stranger"))
        reports = [
            sb.AgentMessage(result=sb.Result(attempt=ref, response=b"stolen")),
            sb.AgentMessage(accepted=sb.Accepted(attempt=ref)),
            sb.AgentMessage(progress=sb.Progress(attempt=ref, index=1)),
            sb.AgentMessage(result=sb.Result(attempt=AttemptRef(task_id=UNKNOWN, attempt=1, fence=9), response=b"x")),
        ]
        welcome = await stranger.read()
        assert isinstance(welcome, sb.ConnectResponse)
        assert welcome.messages[0].HasField("welcome")
        await stranger.write(sb.ConnectRequest(messages=reports))
        answers: list[sb.OrchestratorMessage] = []
        async with asyncio.timeout(20):
            while len(answers) < 4:
                batch = await stranger.read()
                assert isinstance(batch, sb.ConnectResponse)
                answers += batch.messages
        stranger.cancel()
        assert {each.refused.failure.reason for each in answers} == {Reason.REASON_STALE_FENCE}
        # An attempt of another agent and an unknown one get the same error.
        assert len({each.refused.failure.message for each in answers}) == 1
        seen = await client.get(task.task_id)
        assert seen.agent_id == "agent-1"
        assert not seen.response


async def test_a_hello_cannot_claim_attempts_of_other_agents(
    orchestrator: Orchestrator, channel: grpc.aio.Channel, stand_in: Make
) -> None:
    holder = stand_in(orchestrator.address, handler=None)
    await holder.ready()
    async with Client(orchestrator.address) as client:
        await client.submit_raw([pb.Submission(method=DO, request=b"\n\x01q")])
    await holder.until(lambda: bool(holder.offers))
    ref = holder.offers[0].attempt.ref()
    held = [
        sb.HeldAttempt(attempt=ref),
        sb.HeldAttempt(attempt=AttemptRef(task_id="nonsense", attempt=1, fence=1)),
        sb.HeldAttempt(attempt=AttemptRef(task_id="t999-" + UNKNOWN[3:], attempt=1, fence=1)),
    ]
    thief = SessionServiceStub(channel).Connect()
    await thief.write(hello(agent_id="thief", held=held))
    answer = await thief.read()
    thief.cancel()
    assert isinstance(answer, sb.ConnectResponse)
    assert list(answer.messages[0].welcome.keep) == []


async def test_the_number_of_sessions_is_limited(redis_url: str, options: Make, launch: Make, stand_in: Make) -> None:
    orchestrator = await launch(options(redis_url, max_sessions=1))
    first = stand_in(orchestrator.address)
    await first.ready()
    async with grpc.aio.insecure_channel(orchestrator.address) as channel:
        (message,) = await last_messages(channel, hello(agent_id="second"))
    assert message.refused.failure.reason == Reason.REASON_OVERLOADED


def test_reflection_lists_and_describes_the_services_off_the_loop(redis_url: str, options: Make) -> None:
    async def serve() -> tuple[set[str], set[str]]:
        orchestrator = Orchestrator(options(redis_url))
        await orchestrator.start()
        try:
            return await asyncio.to_thread(_reflect, orchestrator.address)
        finally:
            await orchestrator.stop()

    services, methods = asyncio.run(serve())
    assert set(SERVICES) <= services
    assert {"Submit", "Get", "Watch", "Cancel", "Direct", "List"} <= methods


def _reflect(address: str) -> tuple[set[str], set[str]]:
    with grpc.insecure_channel(address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        services = set(database.get_services())
        file = database.FindFileContainingSymbol("orki.control.v1.TaskService")
        return services, {method.name for service in file.service for method in service.method}
