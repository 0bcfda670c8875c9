"""A payload that is not a message of the declared class is refused at submission and costs no attempt."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto

from orki.control.v1.attempt_pb2 import TaskState
from orki.control.v1.task_pb2 import Submission, TaskSnapshot
from orki_contract.errors import InvalidArgument
from orki_contract.model import TaskMethod
from orki_control import Client
from orki_control.session import ArrivedOffer
from orki_server._orchestrator import Orchestrator
from orki_server._registry import ContractRegistry, PayloadCheck
from orki_server._store.contracts import Contracts
from orki_server._store.fleet import Fleet
from orki_server._store.store import Store

DO = "servertests.v1.WorkService/Do"
DIRECT = "servertests.v1.WorkService/Direct"
Make = Callable[..., Any]


@pytest.fixture
async def client(orchestrator: Orchestrator) -> AsyncIterator[Client]:
    async with Client(orchestrator.address) as opened:
        yield opened


async def submit(client: Client, request: bytes, method: str = DO, key: str = "") -> TaskSnapshot:
    (task,) = await client.submit_raw([Submission(method=method, request=request, idempotency_key=key)])
    return task


@pytest.mark.parametrize(
    "request_bytes",
    [b"s3cret", b"\n\x05four", b"\n", b"\xff" * 12, b'{"body": "s3cret"}', b"\n\x01q\x0c"],
    ids=["text", "truncated", "half a field", "endless number", "json", "group that never began"],
)
async def test_a_malformed_request_is_refused(
    orchestrator: Orchestrator, client: Client, stand_in: Make, request_bytes: bytes
) -> None:
    agent = stand_in(orchestrator.address)
    await agent.ready()
    with pytest.raises(InvalidArgument) as caught:
        await submit(client, request_bytes, key="k")
    said = caught.value.message
    assert f"request: {len(request_bytes)} bytes that are not a servertests.v1.DoRequest, which {DO} takes" in said
    assert "s3cret" not in said
    # It left no task and no attempt, and the key is free.
    assert [task async for task in client.list_tasks()] == []
    task = await submit(client, b"\n\x04good", key="k")
    last = [each async for each in client.watch(task.task_id)][-1].task
    assert last.state == TaskState.TASK_STATE_SUCCEEDED
    assert [each.offer.request for each in agent.offers] == [b"\n\x04good"]


@pytest.mark.parametrize("request_bytes", [b"", b"\n\x00", b"\x92\x03\x01x"], ids=["empty", "default", "unknown field"])
async def test_a_request_that_protobuf_can_parse_is_accepted(
    orchestrator: Orchestrator, client: Client, stand_in: Make, request_bytes: bytes
) -> None:
    await stand_in(orchestrator.address).ready()
    task = await submit(client, request_bytes)
    last = [each async for each in client.watch(task.task_id)][-1].task
    assert last.response == request_bytes


async def test_a_malformed_directive_is_refused(orchestrator: Orchestrator, client: Client, stand_in: Make) -> None:
    go = asyncio.Event()

    async def handler(offer: ArrivedOffer) -> bytes:
        await go.wait()
        return b""

    agent = stand_in(orchestrator.address, handler=handler)
    await agent.ready()
    task = await submit(client, b"", DIRECT)
    async with asyncio.timeout(20):
        while (await client.get(task.task_id)).state != TaskState.TASK_STATE_RUNNING:
            await asyncio.sleep(0.01)
    with pytest.raises(InvalidArgument, match=r"payload: 4 bytes that are not a servertests\.v1\.Order"):
        await client.direct(task.task_id, b"left")
    await client.direct(task.task_id, b"\n\x04left")
    await agent.until(lambda: agent.directives == [b"\n\x04left"])
    go.set()
    assert [each async for each in client.watch(task.task_id)][-1].task.state == TaskState.TASK_STATE_SUCCEEDED


async def test_payloads_are_checked_by_the_leading_contract(
    orchestrator: Orchestrator, client: Client, stand_in: Make, work: Make
) -> None:
    def edit(file: FileDescriptorProto) -> None:
        field = file.message_type[0].field.add(name="note", number=2)
        field.type, field.label = FieldDescriptorProto.TYPE_STRING, FieldDescriptorProto.LABEL_OPTIONAL

    no_utf8 = b"\x12\x01\xff"
    await stand_in(orchestrator.address, [work(version="1.0.0")], agent_id="older").ready()
    task = await submit(client, no_utf8)
    assert [each async for each in client.watch(task.task_id)][-1].task.response == no_utf8
    await stand_in(orchestrator.address, [work(version="1.1.0", edit=edit)], agent_id="newer").ready()
    with pytest.raises(InvalidArgument, match="3 bytes that are not a"):
        await submit(client, no_utf8)


async def test_without_a_contract_the_agent_checks_the_payload(store: Store) -> None:
    async def flush() -> None:
        pass

    contracts = Contracts(store.connection, store.shards)
    registry = ContractRegistry(store.connection, contracts, Fleet(store.connection), 1.0, flush)
    check = PayloadCheck(contracts, registry)
    method = TaskMethod(service="s.v1.S", name="Do", request="s.v1.Q", response="s.v1.R")
    await check.request(method, b"\xff")
    assert await contracts.registered(["s.v1.S"]) == {"s.v1.S": []}
