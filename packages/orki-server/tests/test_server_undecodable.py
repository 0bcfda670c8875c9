"""Bytes that are no request, for every method of every service: a typed error, and the orchestrator goes on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor import MethodDescriptor

from orki.control.v1 import session_pb2, task_pb2
from orki_contract.errors import InvalidArgument
from orki_control import Client
from orki_control.transport import error_from, open_channel
from orki_server._orchestrator import SERVICES, Orchestrator

BROKEN = {
    "no message": b"\xff\xff\xff\xff",
    "a length beyond the end": b"\x0a\xff\xff\xff\x7f",
    "a cut varint": b"\x08\x80",
    "a group that does not end": b"\x0b",
    "field number 0": b"\x02\x00",
}
OTHERS = ("grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection")


def methods() -> dict[str, MethodDescriptor]:
    pool = descriptor_pool.Default()
    services = [pool.FindServiceByName(name) for name in (*SERVICES, *OTHERS)]  # type: ignore[no-untyped-call]
    return {f"/{service.full_name}/{each.name}": each for service in services for each in service.methods}


def opened(channel: grpc.aio.Channel, path: str, method: MethodDescriptor | None = None) -> Callable[..., Any]:
    kinds = ("unary", "stream")
    request, response = (method.client_streaming, method.server_streaming) if method else (False, False)
    make: Any = getattr(channel, f"{kinds[request]}_{kinds[response]}")
    multicallable = make(path, request_serializer=bytes, response_deserializer=bytes)

    async def call(*requests: bytes) -> list[bytes]:
        """Make the call, and return its responses; the stream of requests stays open."""
        if not request:
            started = multicallable(requests[0], timeout=10)
        else:
            started = multicallable(timeout=10)
            for each in requests:
                await started.write(each)
        if not response:
            return [await started]
        answers = []
        while (answer := await started.read()) is not grpc.aio.EOF:
            answers.append(answer)
        raise AssertionError(f"the call ended with {await started.code()}: {answers}")

    return call


@pytest.fixture
async def channel(orchestrator: Orchestrator) -> AsyncIterator[grpc.aio.Channel]:
    async with open_channel(orchestrator.address) as found:
        yield found


@pytest.mark.parametrize("broken", sorted(BROKEN))
@pytest.mark.parametrize("path", sorted(methods()))
async def test_undecodable_requests_get_a_typed_error(
    orchestrator: Orchestrator, channel: grpc.aio.Channel, path: str, broken: str
) -> None:
    method = methods()[path]
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await opened(channel, path, method)(BROKEN[broken])
    assert failed.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    error = error_from(failed.value, "o")
    assert type(error) is InvalidArgument
    assert path.strip("/") in error.message
    assert method.input_type.full_name in error.message
    async with Client(orchestrator.address) as client:
        assert await client.list_agents() == []


@pytest.mark.parametrize("path", [path for path, method in sorted(methods().items()) if method.client_streaming])
async def test_a_stream_that_turns_bad_gets_a_typed_error(
    orchestrator: Orchestrator, channel: grpc.aio.Channel, path: str
) -> None:
    method = methods()[path]
    first = message_factory.GetMessageClass(method.input_type)()
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await opened(channel, path, method)(first.SerializeToString(), b"\xff\xff")
    assert failed.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert isinstance(error_from(failed.value, "o"), InvalidArgument)


async def test_a_session_that_turns_bad_ends_with_a_typed_error(
    orchestrator: Orchestrator, channel: grpc.aio.Channel, work: Any
) -> None:
    hello = session_pb2.Hello(
        agent_id="a", instance_id="i", protocol_min=1, protocol_max=1, slots=1, max_message_bytes=1 << 20
    )
    hello.services.append(work())
    request = session_pb2.ConnectRequest(messages=[session_pb2.AgentMessage(hello=hello)])
    call = channel.stream_stream(
        "/orki.control.v1.SessionService/Connect", request_serializer=bytes, response_deserializer=bytes
    )(timeout=10)
    await call.write(request.SerializeToString())
    welcome = session_pb2.ConnectResponse.FromString(await call.read())
    assert welcome.messages[0].HasField("welcome")
    await call.write(b"\xff\xff")
    with suppress(grpc.aio.AioRpcError):
        while await call.read() is not grpc.aio.EOF:
            pass
    assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
    async with asyncio.timeout(10), Client(orchestrator.address) as client:
        while any(each.connected for each in await client.list_agents()):
            await asyncio.sleep(0.05)


@pytest.mark.parametrize(
    "path",
    [
        "/orki.control.v1.TaskService/Nope",
        "/orki.control.v1.TaskService/",
        "/orki.control.v1.NopeService/Submit",
        "/Submit",
        "/",
        "//",
        "/orki.control.v1.TaskService/Submit/x",
    ],
)
async def test_unknown_methods_are_unimplemented(
    orchestrator: Orchestrator, channel: grpc.aio.Channel, path: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await opened(channel, path)(task_pb2.GetRequest(task_id="t").SerializeToString())
    assert failed.value.code() is grpc.StatusCode.UNIMPLEMENTED
