"""Explain: what a task waits for and who has it, the same through any orchestrator."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto

from orki.control.v1 import task_pb2 as pb
from orki.control.v1.attempt_pb2 import TaskState
from orki.control.v1.session_pb2 import SuspendedOutcome
from orki_contract.errors import HandlerFailed, UnknownTask
from orki_control import Client
from orki_control.session import ArrivedOffer
from orki_server._orchestrator import Orchestrator

SERVICE = "servertests.v1.WorkService"
DO = f"{SERVICE}/Do"
Make = Callable[..., Any]


@pytest.fixture
async def pair(redis_url: str, options: Make, launch: Make) -> tuple[Orchestrator, Orchestrator]:
    """Two orchestrators. Agents connect to the first, unless a test says otherwise."""
    return await launch(options(redis_url, orchestrator_id="o1")), await launch(
        options(redis_url, orchestrator_id="o2")
    )


@pytest.fixture
async def clients(pair: tuple[Orchestrator, Orchestrator]) -> AsyncIterator[tuple[Client, Client]]:
    async with Client(pair[0].address) as first, Client(pair[1].address) as second:
        yield first, second


async def forever(offer: ArrivedOffer) -> bytes:
    await asyncio.Event().wait()
    return b""


async def submit(client: Client, **fields: Any) -> str:
    (task,) = await client.submit_raw([pb.Submission(method=DO, **fields)])
    return task.task_id


async def explained(client: Client, task_id: str, *causes: pb.Cause.ValueType) -> pb.ExplainResponse:
    """Wait until a task has these causes: snapshots of agents are up to half a second old."""
    async with asyncio.timeout(10):
        while True:
            answer = await client.explain(task_id)
            if tuple(each.cause for each in answer.explanations) == causes:
                return answer
            await asyncio.sleep(0.05)


async def explained_by_all(clients: Any, task_id: str, *causes: pb.Cause.ValueType) -> list[pb.ExplainResponse]:
    answers = [await explained(client, task_id, *causes) for client in clients]
    assert all(each.task.task_id == task_id for each in answers)
    assert all(explanation.detail for each in answers for explanation in each.explanations)
    for one, other in zip(answers[0].explanations, answers[1].explanations, strict=True):
        assert (one.cause, one.agent_id, one.orchestrator_id) == (other.cause, other.agent_id, other.orchestrator_id)
    return answers


async def test_no_agent_serves_the_method(pair: Any, clients: Any, stand_in: Make) -> None:
    agent = stand_in(pair[0].address)
    await agent.ready()
    await agent.close()
    task_id = await submit(clients[0])
    await explained_by_all(clients, task_id, pb.CAUSE_NO_AGENT)


async def test_no_slot_is_free_and_the_lease_is_held(pair: Any, clients: Any, stand_in: Make) -> None:
    agent = stand_in(pair[0].address, slots=1, handler=forever)
    await agent.ready()
    held, waiting = await submit(clients[1]), await submit(clients[1])
    await agent.until(lambda: bool(agent.offers))
    if agent.offers[0].attempt.task_id == waiting:
        held, waiting = waiting, held
    for answer in await explained_by_all(clients, waiting, pb.CAUSE_NO_FREE_SLOT):
        assert answer.explanations[0].agent_id == "agent-1"
        assert answer.explanations[0].orchestrator_id == "o1"
    for answer in await explained_by_all(clients, held, pb.CAUSE_LEASE_HELD):
        assert answer.task.state == TaskState.TASK_STATE_RUNNING
        assert (answer.explanations[0].agent_id, answer.explanations[0].orchestrator_id) == ("agent-1", "o1")
        assert 0 < answer.explanations[0].until_us / 1e6 - time.time() < 11


async def test_the_agent_of_a_lease_is_gone(pair: Any, clients: Any, stand_in: Make) -> None:
    agent = stand_in(pair[0].address, handler=forever)
    await agent.ready()
    task_id = await submit(clients[1])
    await explained_by_all(clients, task_id, pb.CAUSE_LEASE_HELD)
    await agent.close()
    async with asyncio.timeout(10):
        while (await clients[1].explain(task_id)).explanations[0].orchestrator_id:
            await asyncio.sleep(0.05)
    (explanation,) = (await clients[1].explain(task_id)).explanations
    assert (explanation.cause, explanation.agent_id) == (pb.CAUSE_LEASE_HELD, "agent-1")
    assert "no session" in explanation.detail


async def test_an_offer_waits_for_its_answer(pair: Any, clients: Any, stand_in: Make) -> None:
    agent = stand_in(pair[0].address, taking=False)
    await agent.ready()
    task_id = await submit(clients[1])
    for answer in await explained_by_all(clients, task_id, pb.CAUSE_OFFERED):
        assert answer.explanations[0].agent_id == "agent-1"
        assert answer.explanations[0].until_us / 1e6 - time.time() < 3


async def test_a_retry_a_start_and_an_end(pair: Any, clients: Any, stand_in: Make) -> None:
    async def fail(offer: ArrivedOffer) -> bytes:
        raise HandlerFailed("no")

    agent = stand_in(pair[0].address, handler=fail)
    await agent.ready()
    task_id = await submit(clients[1])
    await explained(clients[1], task_id, pb.CAUSE_RETRY)
    await clients[1].cancel(task_id)
    await explained_by_all(clients, task_id, pb.CAUSE_ENDED)
    delayed = await submit(clients[1], delay_ms=60_000)
    for answer in await explained_by_all(clients, delayed, pb.CAUSE_DELAYED):
        assert 50 < answer.explanations[0].until_us / 1e6 - time.time() < 61
    with pytest.raises(UnknownTask):
        await clients[0].explain("t0-" + "0" * 26)


async def test_a_question(pair: Any, clients: Any, stand_in: Make) -> None:
    async def ask(offer: ArrivedOffer) -> Any:
        return SuspendedOutcome(question="may it?", deadline_ms=60_000)

    agent = stand_in(pair[0].address, handler=ask)
    await agent.ready()
    for answer in await explained_by_all(clients, await submit(clients[1]), pb.CAUSE_SUSPENDED):
        assert "may it?" in answer.explanations[0].detail
        assert 50 < answer.explanations[0].until_us / 1e6 - time.time() < 61


async def test_a_pause(pair: Any, clients: Any, stand_in: Make) -> None:
    agent = stand_in(pair[0].address)
    await agent.ready()
    await clients[0].pause(SERVICE)
    task_id = await submit(clients[1])
    await explained_by_all(clients, task_id, pb.CAUSE_PAUSED)
    await clients[1].resume(SERVICE)
    # The other orchestrator has the agent, and learns of the resume at once.
    async with asyncio.timeout(2):
        await clients[1].wait_end(task_id)


async def test_labels_and_limits(pair: Any, clients: Any, stand_in: Make) -> None:
    agent = stand_in(pair[0].address, handler=forever)
    await agent.ready()
    elsewhere = await submit(clients[1], labels={"gpu": "a100"})
    for answer in await explained_by_all(clients, elsewhere, pb.CAUSE_LABELS):
        assert "gpu=a100" in answer.explanations[0].detail
    await clients[1].set_limit("model", concurrency=1)
    first, second = await submit(clients[1], limits=["model"]), await submit(clients[1], limits=["model"])
    await agent.until(lambda: bool(agent.offers))
    waiting = second if agent.offers[0].attempt.task_id == first else first
    await explained_by_all(clients, waiting, pb.CAUSE_LIMIT)


async def test_an_agent_serves_an_older_contract(pair: Any, clients: Any, stand_in: Make, work: Make) -> None:
    def without(file: FileDescriptorProto) -> None:
        file.service[0].method[1].name = "Direct"
        del file.service[0].method[0]

    old = stand_in(pair[0].address, [work(edit=without)], agent_id="old")
    await old.ready()
    new = stand_in(pair[1].address, [work()], agent_id="new", slots=1, handler=forever)
    await new.ready()
    first, second = await submit(clients[0]), await submit(clients[0])
    await new.until(lambda: bool(new.offers))
    waiting = second if new.offers[0].attempt.task_id == first else first
    answers = await explained_by_all(clients, waiting, pb.CAUSE_NO_FREE_SLOT, pb.CAUSE_CONTRACT_MISMATCH)
    assert [each.agent_id for each in answers[0].explanations] == ["new", "old"]
    assert [each.orchestrator_id for each in answers[0].explanations] == ["o2", "o1"]


async def test_explain_goes_on_when_the_agent_s_orchestrator_is_killed(
    served: Any, redis_url: str, tmp_path: Path, stand_in: Make
) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    other = type(served)(redis_url, folder)
    await other.start()
    agent = stand_in(served.address, handler=forever)
    await agent.ready()
    async with Client(other.address) as client:
        task_id = await submit(client)
        (before,) = (await explained(client, task_id, pb.CAUSE_LEASE_HELD)).explanations
        await served.end(signal.SIGKILL)
        async with asyncio.timeout(10):
            while (await client.explain(task_id)).explanations[0].orchestrator_id:
                await asyncio.sleep(0.1)
        await agent.move(other.address)
        await agent.until(lambda: len(agent.opened) == 2)
        (after,) = (await explained(client, task_id, pb.CAUSE_LEASE_HELD)).explanations
        assert after.agent_id == "agent-1"
        assert after.orchestrator_id not in ("", before.orchestrator_id)
    await served.start()
    await other.end(signal.SIGTERM)
