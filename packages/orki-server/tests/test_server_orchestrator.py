"""The orchestrator in process: real gRPC, a real store, and test agents."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from orki.control.v1 import task_pb2 as pb
from orki.control.v1.attempt_pb2 import TaskState
from orki.errors.v1.errors_pb2 import Reason
from orki_contract.errors import (
    HandlerFailed,
    HandlerRejected,
    IdempotencyConflict,
    InvalidContract,
    NotDirectable,
    Replaced,
    UnknownMethod,
)
from orki_contract.trace import new_span
from orki_control import Client
from orki_control.session import ArrivedOffer
from orki_server._orchestrator import Orchestrator

DO = "servertests.v1.WorkService/Do"
DIRECT = "servertests.v1.WorkService/Direct"

Make = Callable[..., Any]


@pytest.fixture
async def client(orchestrator: Orchestrator) -> AsyncIterator[Client]:
    async with Client(orchestrator.address) as opened:
        yield opened


async def submit(client: Client, request: bytes = b"\n\x01q", method: str = DO, key: str = "") -> pb.TaskSnapshot:
    submission = pb.Submission(method=method, request=request, idempotency_key=key, traceparent=new_span().traceparent)
    (task,) = await client.submit_raw([submission])
    return task


async def watch(client: Client, task_id: str) -> list[pb.WatchResponse]:
    return [news async for news in client.watch(task_id)]


async def end_of(client: Client, task_id: str) -> pb.TaskSnapshot:
    async with asyncio.timeout(30):
        return (await watch(client, task_id))[-1].task


async def test_a_task_is_run_by_an_agent(orchestrator: Orchestrator, client: Client, stand_in: Make) -> None:
    agent = stand_in(orchestrator.address)
    await agent.ready()
    task = await submit(client, b"\n\x03hey")
    assert task.state == TaskState.TASK_STATE_QUEUED
    ended = await end_of(client, task.task_id)
    assert (ended.state, ended.response) == (TaskState.TASK_STATE_SUCCEEDED, b"\n\x03hey")
    assert ended.traceparent == task.traceparent
    (offer,) = agent.offers
    assert offer.traceparent.split("-")[1] == task.traceparent.split("-")[1]
    assert offer.traceparent != task.traceparent


async def test_many_tasks_are_run_once_each(orchestrator: Orchestrator, client: Client, stand_in: Make) -> None:
    agents = [stand_in(orchestrator.address, agent_id=f"agent-{number}") for number in range(3)]
    for agent in agents:
        await agent.ready()
    submissions = [pb.Submission(method=DO, request=b"\n\x03%03d" % number) for number in range(200)]
    tasks = await client.submit_raw(submissions)
    ended = await asyncio.gather(*(end_of(client, task.task_id) for task in tasks))
    assert [task.response for task in ended] == [each.request for each in submissions]
    offered = [offer.attempt.task_id for agent in agents for offer in agent.offers]
    assert sorted(offered) == sorted(task.task_id for task in tasks)
    assert all(len(agent.offers) > 20 for agent in agents)


async def test_a_method_is_unknown_until_an_agent_serves_it(
    orchestrator: Orchestrator, client: Client, stand_in: Make
) -> None:
    with pytest.raises(UnknownMethod, match="no agent has registered"):
        await submit(client)
    agent = stand_in(orchestrator.address)
    await agent.ready()
    with pytest.raises(UnknownMethod, match="has no task"):
        await submit(client, method="servertests.v1.WorkService/Other")
    (service,) = await client.list_services()
    assert (service.service, list(service.agent_ids)) == ("servertests.v1.WorkService", ["agent-1"])
    assert service.digest.startswith("sha256:")
    assert service.image


async def test_tasks_wait_while_no_agent_is_connected(
    orchestrator: Orchestrator, client: Client, stand_in: Make
) -> None:
    first = stand_in(orchestrator.address, slots=1)
    await first.ready()
    await first.close()
    task = await submit(client, b"\n\x05later")
    second = stand_in(orchestrator.address)
    await second.ready()
    assert (await end_of(client, task.task_id)).response == b"\n\x05later"


async def test_a_failed_attempt_is_retried(
    orchestrator: Orchestrator, client: Client, stand_in: Make, work: Make
) -> None:
    async def handler(offer: ArrivedOffer) -> bytes:
        if offer.attempt.attempt == 1:
            raise HandlerFailed("not yet")
        return b"now"

    contract = work(retry_backoff={"initial": {"nanos": 10_000_000}})
    agent = stand_in(orchestrator.address, [contract], handler=handler)
    await agent.ready()
    ended = await end_of(client, (await submit(client)).task_id)
    assert (ended.response, ended.attempt.attempt) == (b"now", 2)
    assert [each.message for each in ended.earlier_failures] == ["not yet"]


async def test_a_rejected_task_fails_at_once(orchestrator: Orchestrator, client: Client, stand_in: Make) -> None:
    async def handler(offer: ArrivedOffer) -> bytes:
        raise HandlerRejected("never")

    agent = stand_in(orchestrator.address, handler=handler)
    await agent.ready()
    ended = await end_of(client, (await submit(client)).task_id)
    assert (ended.state, ended.failure.reason) == (TaskState.TASK_STATE_FAILED, Reason.REASON_HANDLER_REJECTED)
    assert ended.attempt.attempt == 1


async def test_the_same_key_gives_the_same_task(orchestrator: Orchestrator, client: Client, stand_in: Make) -> None:
    await stand_in(orchestrator.address).ready()
    first = await submit(client, key="k")
    assert (await submit(client, key="k")).task_id == first.task_id
    with pytest.raises(IdempotencyConflict):
        await submit(client, b"\n\x05other", key="k")


async def test_watchers_see_progress_in_order_and_the_end_last(
    orchestrator: Orchestrator, client: Client, stand_in: Make
) -> None:
    async def handler(offer: ArrivedOffer) -> bytes:
        for number in range(50):
            agent.machine.progress(offer.attempt, b"%d" % number)
            agent.say()
            await asyncio.sleep(0.001)
        return b""

    agent = stand_in(orchestrator.address, handler=handler)
    await agent.ready()
    task = await submit(client, method=DIRECT)
    news = await watch(client, task.task_id)
    assert news[0].HasField("task")
    assert news[-1].task.state == TaskState.TASK_STATE_SUCCEEDED
    progress = [each.progress for each in news if each.HasField("progress")]
    assert [each.payload for each in progress] == [b"%d" % number for number in range(50)]
    again = [each async for each in client.watch(task.task_id, after=progress[29].cursor)]
    assert [each.progress.payload for each in again[:-1]] == [b"%d" % number for number in range(30, 50)]


async def test_a_running_task_is_cancelled(orchestrator: Orchestrator, client: Client, stand_in: Make) -> None:
    async def handler(offer: ArrivedOffer) -> bytes:
        await asyncio.sleep(60)
        return b""

    agent = stand_in(orchestrator.address, handler=handler)
    await agent.ready()
    task = await submit(client)
    await agent.until(lambda: bool(agent.offers))
    await client.cancel(task.task_id, "enough")
    await client.cancel(task.task_id, "enough")
    ended = await end_of(client, task.task_id)
    assert ended.state == TaskState.TASK_STATE_CANCELLED
    assert (await client.cancel(task.task_id)).state == TaskState.TASK_STATE_CANCELLED
    assert set(agent.cancels) == {agent.offers[0].attempt}


async def test_directives_reach_the_running_attempt(orchestrator: Orchestrator, client: Client, stand_in: Make) -> None:
    go = asyncio.Event()

    async def handler(offer: ArrivedOffer) -> bytes:
        await go.wait()
        return b""

    agent = stand_in(orchestrator.address, handler=handler)
    await agent.ready()
    plain, task = await submit(client), await submit(client, method=DIRECT)
    async with asyncio.timeout(20):
        while (await client.get(task.task_id)).state != TaskState.TASK_STATE_RUNNING:
            await asyncio.sleep(0.01)
    reference = await client.direct(task.task_id, b"\n\x04left")
    assert reference.attempt == 1
    await agent.until(lambda: agent.directives == [b"\n\x04left"])
    with pytest.raises(NotDirectable, match="declares no directive"):
        await client.direct(plain.task_id, b"\n\x04left")
    go.set()
    await end_of(client, task.task_id)
    with pytest.raises(NotDirectable, match="succeeded"):
        await client.direct(task.task_id, b"\n\x05right")


async def test_an_agent_that_reconnects_continues_its_attempts(
    orchestrator: Orchestrator, client: Client, stand_in: Make
) -> None:
    go = asyncio.Event()

    async def handler(offer: ArrivedOffer) -> bytes:
        await go.wait()
        return b"once"

    agent = stand_in(orchestrator.address, handler=handler)
    await agent.ready()
    task = await submit(client)
    await agent.until(lambda: bool(agent.offers))
    await agent.cut()
    await agent.until(lambda: len(agent.opened) == 2)
    assert [key.task_id for key in agent.opened[1].resumed] == [task.task_id]
    assert agent.opened[1].session_epoch > agent.opened[0].session_epoch
    go.set()
    ended = await end_of(client, task.task_id)
    assert (ended.response, ended.attempt.attempt, len(agent.offers)) == (b"once", 1, 1)


async def test_a_result_reported_without_a_stream_is_accepted_after_reconnecting(
    orchestrator: Orchestrator, client: Client, stand_in: Make
) -> None:
    go = asyncio.Event()

    async def handler(offer: ArrivedOffer) -> bytes:
        await agent.cut()
        return b"kept"

    agent = stand_in(orchestrator.address, handler=handler)
    await agent.ready()
    task = await submit(client)
    assert (await end_of(client, task.task_id)).response == b"kept"
    go.set()
    await agent.until(lambda: not agent.machine.attempts)


async def test_the_newest_instance_wins(orchestrator: Orchestrator, client: Client, stand_in: Make) -> None:
    older = stand_in(orchestrator.address)
    await older.ready()
    newer = stand_in(orchestrator.address)
    await newer.ready()
    await older.until(lambda: older.closed is not None)
    assert isinstance(older.closed, Replaced)
    assert (await end_of(client, (await submit(client, b"\n\x03new")).task_id)).response == b"\n\x03new"
    assert len(newer.offers) == 1
    (agent,) = await client.list_agents()
    assert (agent.connected, agent.slots) == (True, 4)


async def test_a_dead_agent_s_task_is_taken_over_under_a_higher_fence(
    orchestrator: Orchestrator, client: Client, stand_in: Make, work: Make
) -> None:
    async def hang(offer: ArrivedOffer) -> bytes:
        await asyncio.sleep(60)
        return b""

    contract = work(heartbeat_timeout={"nanos": 600_000_000}, retry_backoff={"initial": {"nanos": 1_000_000}})
    doomed = stand_in(orchestrator.address, [contract], handler=hang)
    await doomed.ready()
    task = await submit(client)
    await doomed.until(lambda: bool(doomed.offers))
    await doomed.close()
    heir = stand_in(orchestrator.address, [contract], agent_id="agent-2")
    await heir.ready()
    ended = await end_of(client, task.task_id)
    assert (ended.agent_id, ended.attempt.attempt) == ("agent-2", 2)
    assert ended.attempt.fence > doomed.offers[0].attempt.fence
    assert ended.earlier_failures[0].reason == Reason.REASON_LEASE_EXPIRED
    assert "agent-1" in ended.earlier_failures[0].message


async def test_an_unanswered_offer_goes_to_another_agent(
    orchestrator: Orchestrator, client: Client, stand_in: Make
) -> None:
    mute = stand_in(orchestrator.address, taking=False, slots=1)
    await mute.ready()
    task = await submit(client)
    await mute.until(lambda: bool(mute.offers))
    willing = stand_in(orchestrator.address, agent_id="agent-2")
    ended = await end_of(client, task.task_id)
    assert ended.agent_id == "agent-2"
    assert ended.attempt.fence > mute.offers[0].attempt.fence
    assert mute.revoked[0] == (mute.offers[0].attempt, Reason.REASON_OFFER_TIMEOUT)
    assert len(willing.offers) == 1


async def test_no_more_tasks_are_offered_than_slots_are_free(
    orchestrator: Orchestrator, client: Client, stand_in: Make
) -> None:
    go = asyncio.Event()

    async def handler(offer: ArrivedOffer) -> bytes:
        await go.wait()
        return b""

    agent = stand_in(orchestrator.address, slots=2, handler=handler)
    await agent.ready()
    tasks = [await submit(client) for _ in range(5)]
    await agent.until(lambda: len(agent.offers) == 2)
    await asyncio.sleep(0.2)
    assert len(agent.offers) == 2
    go.set()
    assert all([(await end_of(client, task.task_id)).state == TaskState.TASK_STATE_SUCCEEDED for task in tasks])


@pytest.mark.parametrize("image", [b"", b"\xff\xff", b"\x0a\x00"])
async def test_a_malformed_image_is_refused(
    orchestrator: Orchestrator, stand_in: Make, work: Make, image: bytes
) -> None:
    contract = work()
    contract.image = image
    agent = stand_in(orchestrator.address, [contract])
    await agent.until(lambda: agent.closed is not None)
    assert isinstance(agent.closed, InvalidContract)


async def test_a_wrong_digest_is_refused(orchestrator: Orchestrator, stand_in: Make, work: Make) -> None:
    contract = work()
    contract.digest = "sha256:" + "0" * 64
    agent = stand_in(orchestrator.address, [contract])
    await agent.until(lambda: agent.closed is not None)
    assert isinstance(agent.closed, InvalidContract)
    assert "generate the package again" in agent.closed.message


async def test_agents_are_drained_before_the_stop(redis_url: str, options: Make, launch: Make, stand_in: Make) -> None:
    orchestrator = await launch(options(redis_url, drain_grace=5.0))

    async def handler(offer: ArrivedOffer) -> bytes:
        await asyncio.sleep(0.3)
        return b"in time"

    agent = stand_in(orchestrator.address, handler=handler)
    await agent.ready()
    async with Client(orchestrator.address) as client:
        task = await submit(client)
        await agent.until(lambda: bool(agent.offers))
        await orchestrator.stop()
    again = await launch(options(redis_url, orchestrator_id="o2"))
    async with Client(again.address) as client:
        ended = await client.get(task.task_id)
        assert (ended.state, ended.response) == (TaskState.TASK_STATE_SUCCEEDED, b"in time")
