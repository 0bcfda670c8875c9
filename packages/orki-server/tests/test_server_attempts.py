"""Which claims to attempts count, and which attempts are counted: forged claims, dying processes, drains, stops."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from redis import Redis

from orki.control.v1 import session_pb2 as sb
from orki.control.v1 import task_pb2 as pb
from orki.control.v1.attempt_pb2 import AttemptRef, TaskState
from orki.control.v1.session_pb2_grpc import SessionServiceStub
from orki.errors.v1.errors_pb2 import Reason
from orki_contract.errors import DamagedRecord, TaskAbandoned
from orki_control import Client, ClientOptions
from orki_control.session import ArrivedOffer
from orki_server._keys import ShardKeys
from orki_server._orchestrator import Orchestrator
from orki_server._store.operations import new_task_id
from orki_server.embedded import EmbeddedOptions, EmbeddedServer

DO = "servertests.v1.WorkService/Do"
ONCE = {"max_attempts": 1, "heartbeat_timeout": {"seconds": 2}}
Make = Callable[..., Any]


@pytest.fixture
async def client(orchestrator: Orchestrator) -> AsyncIterator[Client]:
    async with Client(orchestrator.address) as opened:
        yield opened


async def submit(client: Client) -> str:
    (task,) = await client.submit_raw([pb.Submission(method=DO, request=b"\n\x01q")])
    return task.task_id


async def end_of(client: Client, task_id: str, timeout: float = 40.0) -> pb.TaskSnapshot:
    async with asyncio.timeout(timeout):
        return [news async for news in client.watch(task_id)][-1].task


async def hang(offer: ArrivedOffer) -> bytes:
    await asyncio.sleep(120)
    return b""


class Forger:
    """A client that speaks the protocol by hand."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.call = SessionServiceStub(channel).Connect()

    async def say(self, **body: Any) -> None:
        await self.call.write(sb.ConnectRequest(messages=[sb.AgentMessage(**body)]))

    async def hear(self) -> sb.OrchestratorMessage:
        async with asyncio.timeout(10):
            batch: Any = await self.call.read()
        assert isinstance(batch, sb.ConnectResponse), "the stream ended"
        return batch.messages[0]

    async def hello(self, agent_id: str, held: list[sb.HeldAttempt]) -> sb.OrchestratorMessage:
        limits = {"protocol_min": 1, "protocol_max": 1, "slots": 1, "max_message_bytes": 65536}
        await self.say(hello=sb.Hello(agent_id=agent_id, instance_id="forger", held=held, **limits))
        return await self.hear()


@pytest.fixture
async def forger(orchestrator: Orchestrator) -> AsyncIterator[Forger]:
    async with grpc.aio.insecure_channel(orchestrator.address) as channel:
        made = Forger(channel)
        yield made
        made.call.cancel()


# --- claims ---


async def test_a_made_up_fence_has_no_effect(
    orchestrator: Orchestrator, client: Client, stand_in: Make, forger: Forger, redis_url: str
) -> None:
    agent = stand_in(orchestrator.address)
    await agent.ready()
    for _ in range(8):
        await end_of(client, await submit(client))
    with Redis.from_url(redis_url) as redis:
        before = [redis.get(ShardKeys(shard).fence) for shard in range(4)]
    fences = (2**63, 2**64 - 1, 10**18, 2**62, 1)
    held = [
        sb.HeldAttempt(attempt=AttemptRef(task_id=new_task_id(shard), attempt=1, fence=fence), proof=proof)
        for shard in range(4)
        for fence in fences
        for proof in (b"", bytes(16))
    ]
    welcomed = await forger.hello("forger", held)
    assert list(welcomed.welcome.keep) == []
    with Redis.from_url(redis_url) as redis:
        assert [redis.get(ShardKeys(shard).fence) for shard in range(4)] == before
    assert orchestrator._handshake.false_claims == len(held)
    for _ in range(8):
        assert (await end_of(client, await submit(client))).state == TaskState.TASK_STATE_SUCCEEDED


async def test_a_forged_result_under_the_holder_s_name_is_refused(
    orchestrator: Orchestrator, client: Client, stand_in: Make, forger: Forger
) -> None:
    holder = stand_in(orchestrator.address, handler=hang)
    await holder.ready()
    task_id = await submit(client)
    await holder.until(lambda: bool(holder.offers))
    async with asyncio.timeout(10):
        while (public := await client.get(task_id)).state != TaskState.TASK_STATE_RUNNING:
            await asyncio.sleep(0.01)
    claim = sb.HeldAttempt(attempt=public.attempt, has_result=True)
    assert list((await forger.hello(public.agent_id, [claim])).welcome.keep) == []
    await forger.say(result=sb.Result(attempt=public.attempt, response=b"forged"))
    answer = await forger.hear()
    assert answer.refused.failure.reason == Reason.REASON_STALE_FENCE
    seen = await client.get(task_id)
    assert (seen.state, seen.response) == (TaskState.TASK_STATE_RUNNING, b"")


async def test_a_proof_belongs_to_one_agent_and_one_attempt(
    orchestrator: Orchestrator, client: Client, stand_in: Make
) -> None:
    holder = stand_in(orchestrator.address, handler=hang)
    await holder.ready()
    await submit(client)
    await holder.until(lambda: bool(holder.offers))
    key, proof = holder.offers[0].attempt, holder.offers[0].offer.proof
    store = orchestrator._store
    assert store.is_proven("agent-1", key, proof)
    assert len(proof) == 16
    others = (("agent-2", key), ("agent-1", key._replace(fence=key.fence + 1)), ("agent-1", key._replace(attempt=2)))
    assert not any(store.is_proven(agent, other, proof) for agent, other in others)
    assert not store.is_proven("agent-1", key, b"")


async def test_the_proof_outlives_orchestrators(
    redis_url: str, options: Make, launch: Make, stand_in: Make, work: Make
) -> None:
    go = asyncio.Event()

    async def handler(offer: ArrivedOffer) -> bytes:
        await go.wait()
        return b"done"

    first = await launch(options(redis_url))
    agent = stand_in(first.address, [work(**ONCE)], handler=handler)
    await agent.ready()
    async with Client(first.address) as client:
        task_id = await submit(client)
    await agent.until(lambda: bool(agent.offers))
    await first.stop()
    second = await launch(options(redis_url, listen=first.address, orchestrator_id="o2"))
    await agent.until(lambda: len(agent.opened) == 2)
    assert agent.opened[1].resumed == (agent.offers[0].attempt,)
    go.set()
    async with Client(second.address) as client:
        assert (await end_of(client, task_id)).response == b"done"


# --- processes that die ---


@pytest.mark.parametrize("most", [1, 2])
async def test_an_offer_to_a_process_that_dies_is_an_attempt(
    orchestrator: Orchestrator, client: Client, stand_in: Make, work: Make, most: int
) -> None:
    """Each process dies when it gets the offer, before it answers, as a handler does that kills its process."""
    contract = work(
        max_attempts=most, heartbeat_timeout={"seconds": 3}, retry_backoff={"initial": {"nanos": 1_000_000}}
    )
    executions = 0
    task_id = ""
    for life in range(most + 2):
        agent = stand_in(orchestrator.address, [contract], taking=False)
        await agent.ready()
        task_id = task_id or await submit(client)
        with contextlib.suppress(TimeoutError):
            await agent.until(lambda agent=agent: bool(agent.offers), timeout=4.0 if life < most else 2.0)
        executions += len(agent.offers)
        await agent.close()
    assert executions == most
    ended = await end_of(client, task_id)
    assert (ended.state, ended.failure.reason) == (TaskState.TASK_STATE_FAILED, Reason.REASON_LEASE_EXPIRED)


async def test_without_another_process_the_offer_is_lost_after_a_lease(
    orchestrator: Orchestrator, client: Client, stand_in: Make, work: Make
) -> None:
    agent = stand_in(orchestrator.address, [work(max_attempts=1, heartbeat_timeout={"seconds": 1})], taking=False)
    await agent.ready()
    task_id = await submit(client)
    await agent.until(lambda: bool(agent.offers))
    await agent.close()
    ended = await end_of(client, task_id)
    assert ended.failure.reason == Reason.REASON_LEASE_EXPIRED
    assert "got the offer and was not heard of again" in ended.failure.message


async def test_an_agent_that_comes_back_without_the_offer_is_not_charged(
    orchestrator: Orchestrator, client: Client, stand_in: Make, work: Make
) -> None:
    agent = stand_in(orchestrator.address, [work(**ONCE)], taking=False)
    await agent.ready()
    task_id = await submit(client)
    await agent.until(lambda: bool(agent.offers))
    agent.taking = True
    await agent.cut()
    ended = await end_of(client, task_id)
    assert (ended.state, ended.attempt.attempt) == (TaskState.TASK_STATE_SUCCEEDED, 2)


# --- attempts that did not fail ---


async def test_abandoned_attempts_are_not_counted(
    orchestrator: Orchestrator, client: Client, stand_in: Make, work: Make
) -> None:
    lives = 0

    async def handler(offer: ArrivedOffer) -> bytes:
        nonlocal lives
        lives += 1
        if lives <= 3:
            raise TaskAbandoned("the agent stops; the handler had started")
        return b"done"

    agent = stand_in(orchestrator.address, [work(**ONCE)], handler=handler)
    await agent.ready()
    ended = await end_of(client, await submit(client))
    assert (ended.state, ended.attempt.attempt) == (TaskState.TASK_STATE_SUCCEEDED, 4)
    assert [each.reason for each in ended.earlier_failures] == [Reason.REASON_ABANDONED] * 3


# --- stopped processes ---


@pytest.mark.timeout(120)
@pytest.mark.parametrize("gives_up", [False, True])
async def test_a_stopped_orchestrator_charges_nothing(served: Any, stand_in: Make, work: Make, gives_up: bool) -> None:
    """The orchestrator's process is stopped for longer than the lease; the task has one attempt."""
    executions = 0

    async def handler(offer: ArrivedOffer) -> bytes:
        nonlocal executions
        executions += 1
        await asyncio.sleep(9)
        return b"done"

    lease = {"seconds": 2 if gives_up else 30}
    agent = stand_in(served.address, [work(max_attempts=1, heartbeat_timeout=lease)], handler=handler)
    await agent.ready()
    async with Client(served.address, ClientOptions(patience=60.0)) as client:
        task_id = await submit(client)
        await agent.until(lambda: bool(agent.offers))
        await asyncio.sleep(1)
        os.kill(served.process.pid, signal.SIGSTOP)
        await asyncio.sleep(5)
        os.kill(served.process.pid, signal.SIGCONT)
        ended = await end_of(client, task_id, timeout=60)
    assert ended.state == TaskState.TASK_STATE_SUCCEEDED, str(ended)
    assert ended.attempt.attempt == executions == (2 if gives_up else 1)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("gives_up", [False, True])
async def test_a_stopped_store_charges_nothing(
    tmp_path: Path, options: Make, launch: Make, stand_in: Make, work: Make, gives_up: bool
) -> None:
    with EmbeddedServer(EmbeddedOptions(directory=tmp_path)) as server:
        orchestrator = await launch(options(server.url))

        async def handler(offer: ArrivedOffer) -> bytes:
            await asyncio.sleep(10)
            return b"done"

        lease = {"seconds": 2 if gives_up else 30}
        agent = stand_in(orchestrator.address, [work(max_attempts=1, heartbeat_timeout=lease)], handler=handler)
        await agent.ready()
        async with Client(orchestrator.address, ClientOptions(patience=60.0)) as client:
            task_id = await submit(client)
            await agent.until(lambda: bool(agent.offers))
            await asyncio.sleep(1)
            os.kill(server.pid, signal.SIGSTOP)
            await asyncio.sleep(7)
            os.kill(server.pid, signal.SIGCONT)
            ended = await end_of(client, task_id, timeout=60)
        assert ended.state == TaskState.TASK_STATE_SUCCEEDED
        assert ended.attempt.attempt == (2 if gives_up else 1)
        await orchestrator.stop()


# --- damaged records ---


@pytest.mark.parametrize("damage", ["type", "field"])
async def test_a_damaged_record_is_one_typed_error_and_the_fleet_goes_on(
    orchestrator: Orchestrator, client: Client, stand_in: Make, redis_url: str, damage: str
) -> None:
    agent = stand_in(orchestrator.address)
    await agent.ready()
    task_id = await submit(client)
    await end_of(client, task_id)
    with Redis.from_url(redis_url) as redis:
        key = ShardKeys(int(task_id[1])).task(task_id)
        if damage == "type":
            redis.delete(key)
            redis.rpush(key, "x")
        else:
            redis.hset(key, "state", "nonsense")
    with pytest.raises(DamagedRecord):
        await client.get(task_id)
    with pytest.raises(DamagedRecord):
        await end_of(client, task_id)
    assert (await end_of(client, await submit(client))).state == TaskState.TASK_STATE_SUCCEEDED
    assert orchestrator._store.up
