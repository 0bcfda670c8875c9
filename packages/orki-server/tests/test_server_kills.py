"""Kills of the orchestrator and its store while tasks run: every acknowledged task finishes once."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]
from redis import Redis
from redis.exceptions import ResponseError

from orki.control.v1 import task_pb2 as pb
from orki.control.v1.attempt_pb2 import TaskState
from orki.events.v1.envelope_pb2 import Envelope
from orki.events.v1.task_orki import TASKS
from orki.events.v1.task_pb2 import TaskEvent
from orki_contract.errors import OrkiError, StoreFull, StoreUnavailable
from orki_control import Client, ClientOptions
from orki_control.session import ArrivedOffer
from orki_events import connect
from orki_server.embedded import EmbeddedOptions, EmbeddedServer

DO = "servertests.v1.WorkService/Do"
Make = Callable[..., Any]


def ended_tasks(redis_url: str) -> Counter[str]:
    """Return how often each task ended, by distinct events."""
    ends: dict[bytes, str] = {}
    with Redis.from_url(redis_url) as redis:
        entries: Any = redis.xrange("orki:ev:{tasks}")
    for _, fields in entries:
        event = TaskEvent.FromString(fields[b"d"])
        if event.WhichOneof("event") in ("succeeded", "failed", "cancelled"):
            ends[Envelope.FromString(fields[b"e"]).event_id] = event.task_id
    return Counter(ends.values())


async def submit_steadily(client: Client, count: int) -> list[str]:
    acknowledged = []
    for number in range(count):
        submission = pb.Submission(method=DO, request=b"\n\x03%03d" % number, idempotency_key=f"key-{number}")
        (task,) = await client.submit_raw([submission])
        acknowledged.append(task.task_id)
        await asyncio.sleep(0.005)
    return acknowledged


async def all_ended(client: Client, task_ids: list[str]) -> list[pb.TaskSnapshot]:
    async def end(task_id: str) -> pb.TaskSnapshot:
        news = [each async for each in client.watch(task_id)]
        return news[-1].task

    return await asyncio.gather(*(end(task_id) for task_id in task_ids))


async def slowly(offer: ArrivedOffer) -> bytes:
    await asyncio.sleep(0.05)
    return offer.offer.request


@pytest.mark.timeout(120)
async def test_tasks_survive_a_kill_of_the_orchestrator(served: Any, redis_url: str, stand_in: Make) -> None:
    agents = [stand_in(served.address, agent_id=f"agent-{number}", handler=slowly) for number in range(2)]
    for agent in agents:
        await agent.ready()
    async with Client(served.address, ClientOptions(patience=60.0)) as client:
        submitting = asyncio.create_task(submit_steadily(client, 150))
        for _ in range(2):
            await asyncio.sleep(0.3)
            await served.end(signal.SIGKILL)
            await served.start()
        acknowledged = await submitting
        tasks = await all_ended(client, acknowledged)
    assert [task.response for task in tasks] == [b"\n\x03%03d" % number for number in range(150)]
    assert len(set(acknowledged)) == 150
    for agent in agents:
        assert len(agent.opened) >= 2
    async with asyncio.timeout(20):
        while sum(ended_tasks(redis_url).values()) < 150:
            await asyncio.sleep(0.1)
    assert set(ended_tasks(redis_url).values()) == {1}
    offered = Counter(offer.attempt.task_id for agent in agents for offer in agent.offers)
    # A task that ran twice did so under two fences; the store took one result.
    assert set(offered) == set(acknowledged)


async def health(address: str) -> int:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest(service="orki.control.v1.TaskService"))
        return int(answer.status)


async def health_becomes(address: str, status: int) -> None:
    async with asyncio.timeout(20):
        while await health(address) != status:
            await asyncio.sleep(0.05)


@pytest.mark.timeout(120)
async def test_tasks_survive_a_kill_of_the_store_with_append_only_on(
    tmp_path: Path, options: Make, launch: Make, stand_in: Make
) -> None:
    with EmbeddedServer(EmbeddedOptions(directory=tmp_path, append_only=True)) as server:
        orchestrator = await launch(options(server.url))
        agents = [
            stand_in(orchestrator.address, agent_id=f"agent-{number}", handler=slowly, slots=2) for number in range(2)
        ]
        for agent in agents:
            await agent.ready()
        async with Client(orchestrator.address, ClientOptions(patience=60.0)) as client:
            submitting = asyncio.create_task(submit_steadily(client, 100))
            for _ in range(2):
                await asyncio.sleep(0.3)
                server.kill()
                await health_becomes(orchestrator.address, health_pb2.HealthCheckResponse.NOT_SERVING)
                await asyncio.sleep(0.5)
                server.start()
                await health_becomes(orchestrator.address, health_pb2.HealthCheckResponse.SERVING)
            acknowledged = await submitting
            tasks = await all_ended(client, acknowledged)
            # The sessions were never interrupted.
            assert [len(agent.opened) for agent in agents] == [1, 1]
        await orchestrator.stop()
        assert [task.response for task in tasks] == [b"\n\x03%03d" % number for number in range(100)]
        assert set(ended_tasks(server.url).values()) == {1}
        assert sum(ended_tasks(server.url).values()) == 100


async def test_without_its_store_an_orchestrator_refuses_requests_and_recovers(
    tmp_path: Path, options: Make, launch: Make, stand_in: Make
) -> None:
    go = asyncio.Event()

    async def handler(offer: ArrivedOffer) -> bytes:
        await go.wait()
        return b"done meanwhile"

    with EmbeddedServer(EmbeddedOptions(directory=tmp_path, append_only=True)) as server:
        orchestrator = await launch(options(server.url))
        agent = stand_in(orchestrator.address, handler=handler)
        await agent.ready()
        async with Client(orchestrator.address, ClientOptions(patience=0.0)) as client:
            submission = pb.Submission(method=DO, request=b"\n\x01q")
            (task,) = await client.submit_raw([submission])
            await agent.until(lambda: bool(agent.offers))
            server.kill()
            for _ in range(3):
                with pytest.raises(StoreUnavailable, match="does not answer"):
                    await client.submit_raw([submission])
            with pytest.raises(StoreUnavailable):
                await client.get(task.task_id)
            go.set()
            # Longer than the silence after which a peer counts as gone: heartbeats are echoed nevertheless.
            await asyncio.sleep(1.5)
            assert len(agent.opened) == 1
            server.start()
            async with asyncio.timeout(20):
                while True:
                    with contextlib.suppress(OrkiError):
                        if (await client.get(task.task_id)).state == TaskState.TASK_STATE_SUCCEEDED:
                            break
                    await asyncio.sleep(0.05)
            seen = await client.get(task.task_id)
            assert (seen.response, seen.attempt.attempt) == (b"done meanwhile", 1)
            await agent.until(lambda: not agent.machine.attempts)
        await orchestrator.stop()


async def test_a_client_waits_while_the_store_is_busy(
    tmp_path: Path, options: Make, launch: Make, stand_in: Make
) -> None:
    with EmbeddedServer(EmbeddedOptions(directory=tmp_path)) as server, Redis.from_url(server.url) as redis:
        redis.config_set("busy-reply-threshold", 100)
        orchestrator = await launch(options(server.url))
        await stand_in(orchestrator.address).ready()
        _, writer = await asyncio.open_connection("127.0.0.1", int(server.url.rpartition(":")[2].partition("/")[0]))
        writer.write(b'EVAL "while true do end" 0\r\n')
        async with Client(orchestrator.address, ClientOptions(patience=15.0)) as client:
            async with asyncio.timeout(20):
                while not _is_busy(redis):
                    await asyncio.sleep(0.02)
            submitting = asyncio.create_task(client.submit_raw([pb.Submission(method=DO, request=b"\n\x01q")]))
            await asyncio.sleep(1.0)
            assert not submitting.done(), "a busy store is retryable"
            async with Client(orchestrator.address, ClientOptions(patience=0.0)) as impatient:
                with pytest.raises(StoreUnavailable, match="is running a long script"):
                    await impatient.submit_raw([pb.Submission(method=DO, request=b"\n\x01q")])
            redis.script_kill()
            (task,) = await submitting
            assert [each async for each in client.watch(task.task_id)][-1].task.response == b"\n\x01q"
        writer.close()
        await writer.wait_closed()
        await orchestrator.stop()


def _is_busy(redis: Redis) -> bool:
    try:
        redis.set("orki:busy", "1", ex=1)
    except ResponseError as error:
        return "BUSY" in str(error).upper()
    return False


async def test_no_fence_repeats_after_the_store_lost_everything(
    tmp_path: Path, options: Make, launch: Make, stand_in: Make
) -> None:
    with EmbeddedServer(EmbeddedOptions(directory=tmp_path)) as server:
        orchestrator = await launch(options(server.url, shards=1))
        agent = stand_in(orchestrator.address)
        await agent.ready()
        async with Client(orchestrator.address, ClientOptions(patience=60.0)) as client:

            async def run_one() -> int:
                (task,) = await client.submit_raw([pb.Submission(method=DO, request=b"\n\x01q")])
                (ended,) = await all_ended(client, [task.task_id])
                return ended.attempt.fence

            first = await run_one()
            server.kill()
            await health_becomes(orchestrator.address, health_pb2.HealthCheckResponse.NOT_SERVING)
            server.start()
            await health_becomes(orchestrator.address, health_pb2.HealthCheckResponse.SERVING)
            second = await run_one()
            # The agent's next hello restored the services and the agent.
            assert len(agent.opened) == 2
            assert [each.agent_id for each in await client.list_agents()] == ["agent-1"]
            assert [each.service for each in await client.list_services()] == ["servertests.v1.WorkService"]
        await orchestrator.stop()
    assert second > first
    assert second >> 44 == (first >> 44) + 1


async def test_serve_refuses_a_taken_port(served: Any, redis_url: str) -> None:
    started = time.monotonic()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "orki_server", "serve", "--listen", served.address),
        env={**os.environ, "ORKI_REDIS_URL": redis_url, "ORKI_SHARDS": "4"},
        stderr=asyncio.subprocess.PIPE,
    )
    _, stderr = await process.communicate()
    assert process.returncode == 2
    assert b"the port is taken; choose another with --listen" in stderr
    assert b"Traceback" not in stderr
    assert time.monotonic() - started < 60


def lifecycle(redis_url: str) -> Counter[tuple[str, bytes]]:
    """Return how often each event of a task is in the stream, by task and event id."""
    with Redis.from_url(redis_url) as redis:
        entries: Any = redis.xrange("orki:ev:{tasks}")
    return Counter(
        (TaskEvent.FromString(fields[b"d"]).task_id, Envelope.FromString(fields[b"e"]).event_id)
        for _, fields in entries
    )


def _decoded(entries: Any) -> list[TaskEvent]:
    return [TaskEvent.FromString(fields[b"d"]) for _, fields in entries]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kills", [0, 3])
async def test_each_event_appears_once_with_two_orchestrators(
    served: Any, redis_url: str, options: Make, launch: Make, stand_in: Make, kills: int
) -> None:
    """Two orchestrators under load; one of them is killed again and again, also between publishing and removing."""
    other = await launch(options(redis_url))
    for number, address in enumerate((served.address, other.address)):
        await stand_in(address, agent_id=f"agent-{number}").ready()

    async def load(address: str) -> list[str]:
        async with Client(address, ClientOptions(patience=60.0)) as client:
            tasks = []
            for _ in range(30):
                tasks += await client.submit_raw([pb.Submission(method=DO, request=b"\n\x01q")] * 20)
                await asyncio.sleep(0.05)
            await all_ended(client, [task.task_id for task in tasks])
            return [task.task_id for task in tasks]

    loads = [asyncio.create_task(load(address)) for address in (served.address, other.address)]
    for _ in range(kills):
        await asyncio.sleep(0.5)
        await served.end(signal.SIGKILL)
        await served.start()
    submitted = [task_id for each in loads for task_id in await each]
    async with asyncio.timeout(30):
        while await other._outbox.outbox.length():
            await asyncio.sleep(0.1)
    events = lifecycle(redis_url)
    assert {task_id for task_id, _ in events} >= set(submitted)
    assert {key: count for key, count in events.items() if count > 1} == {}
    with Redis.from_url(redis_url) as redis:
        entries: Any = redis.xrange("orki:ev:{tasks}")
    kinds = Counter((event.task_id, event.WhichOneof("event")) for event in _decoded(entries))
    assert {kinds[task_id, kind] for task_id in submitted for kind in ("submitted", "succeeded")} == {1}
    async with connect(redis_url) as plane:
        ledger = await plane.ledger(TASKS)
    assert (ledger.published, ledger.missing, ledger.repeated) == (len(events), 0, 0)


@pytest.mark.timeout(120)
async def test_a_full_event_server_delays_neither_tasks_nor_the_stop(
    redis_url: str, tmp_path: Path, options: Make, launch: Make, stand_in: Make
) -> None:
    """The events of tasks wait in the outbox, and the next orchestrator publishes each once."""
    with EmbeddedServer(EmbeddedOptions(directory=tmp_path)) as server, Redis.from_url(server.url) as events:
        orchestrator = await launch(options(redis_url, events_url=server.url))
        agent = stand_in(orchestrator.address)
        await agent.ready()
        submission = pb.Submission(method=DO, request=b"\n\x01q")
        async with Client(orchestrator.address) as client:
            tasks = [task.task_id for task in await client.submit_raw([submission] * 20)]
            await all_ended(client, tasks)
            events.config_set("maxmemory", 1_000_000)
            started = time.monotonic()
            while time.monotonic() - started < 4.0:
                submitted = [task.task_id for task in await client.submit_raw([submission] * 10)]
                async with asyncio.timeout(4.0):
                    await all_ended(client, submitted)
                tasks += submitted
        await agent.close()
        started = time.monotonic()
        await orchestrator.stop()
        assert time.monotonic() - started < 9.0
        events.config_set("maxmemory", 0)
        heir = await launch(options(redis_url, events_url=server.url))
        async with asyncio.timeout(30):
            while await heir._outbox.outbox.length():
                await asyncio.sleep(0.1)
        published = lifecycle(server.url)
        assert set(published.values()) == {1}
        assert {task_id for task_id, _ in published} == set(tasks)
        assert len(published) == 4 * len(tasks)
        await heir.stop()


@pytest.mark.timeout(120)
async def test_acknowledged_tasks_end_while_the_store_is_full(
    tmp_path: Path, options: Make, launch: Make, stand_in: Make
) -> None:
    with EmbeddedServer(EmbeddedOptions(directory=tmp_path)) as server, Redis.from_url(server.url) as redis:
        orchestrator = await launch(options(server.url))
        first = stand_in(orchestrator.address)
        await first.ready()
        await first.close()
        async with Client(orchestrator.address, ClientOptions(patience=0.0)) as client:
            submission = pb.Submission(method=DO, request=b"\n\x01q")
            tasks = await client.submit_raw([submission] * 150)
            redis.config_set("maxmemory", 1_000_000)
            with pytest.raises(StoreFull, match="is out of memory"):
                await client.submit_raw([submission])
            # An agent that connects meanwhile is welcomed.
            await stand_in(orchestrator.address, agent_id="agent-2").ready()
            async with asyncio.timeout(60):
                ended = await all_ended(client, [task.task_id for task in tasks])
            assert {task.state for task in ended} == {TaskState.TASK_STATE_SUCCEEDED}
            assert await health(orchestrator.address) == health_pb2.HealthCheckResponse.SERVING
            redis.config_set("maxmemory", 0)
            await client.submit_raw([submission])
        await orchestrator.stop()
