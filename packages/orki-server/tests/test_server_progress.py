"""Progress end to end: every delta of a waiting handler arrives once and in order, and no gap is silent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from orki.control.v1.task_pb2 import ProgressPosition, Submission, TaskSnapshot, WatchResponse
from orki_contract import ProgressGap, ProgressPolicy
from orki_contract.errors import NotDirectable
from orki_contract.model import TaskMethod
from orki_contract.trace import new_span
from orki_control import Client
from orki_control.session import ArrivedOffer, AttemptKey
from orki_server import _sessions
from orki_server._gaps import GapFinder
from orki_server._keys import ShardKeys
from orki_server._orchestrator import Orchestrator
from orki_server._settings import OrchestratorOptions
from orki_server._store import operations
from orki_server._store.replies import ReportStatus, StoredProgress
from orki_server._store.store import Store
from orki_server.embedded import EmbeddedOptions, EmbeddedServer

SERVICE = "servertests.v1.WorkService"
WINDOW = 64

Make = Callable[..., Any]
Handler = Callable[[ArrivedOffer], Awaitable[bytes]]
Launch = Callable[[OrchestratorOptions], Awaitable[Orchestrator]]


@pytest.fixture
async def client(orchestrator: Orchestrator) -> AsyncIterator[Client]:
    async with Client(orchestrator.address) as client:
        yield client


async def submit(client: Client) -> TaskSnapshot:
    (task,) = await client.submit_raw([Submission(method=f"{SERVICE}/Direct")])
    return task


class Seen:
    """What one watcher saw of one task."""

    def __init__(self) -> None:
        self.found: list[tuple[int, int, bool]] = []
        self.last: WatchResponse | None = None

    def take(self, response: WatchResponse) -> None:
        self.last = response
        if response.HasField("progress"):
            assert response.progress.payload == b"%d" % response.progress.index
            self.found.append((response.progress.attempt, response.progress.index, True))
        elif response.HasField("gap"):
            gap = response.gap
            self.found += [(gap.attempt, index, False) for index in range(gap.first_index, gap.last_index + 1)]

    @property
    def missing(self) -> int:
        return sum(not kept for _, _, kept in self.found)

    def complete(self, count: int) -> bool:
        """Whether everything is there once and in order, as a delta or in a gap."""
        return [index for _, index, _ in self.found] == list(range(1, count + 1))


async def watch(client: Client, task_id: str) -> Seen:
    seen = Seen()
    async with aclosing(client.watch(task_id)) as responses:
        async for response in responses:
            seen.take(response)
    return seen


def sender(agent: list[Any], count: int, policy: ProgressPolicy = ProgressPolicy.BLOCK) -> Handler:
    """Return a handler that sends progress as fast as the policy lets it."""

    async def handler(offer: ArrivedOffer) -> bytes:
        machine = agent[0].machine
        for number in range(1, count + 1):
            while policy is ProgressPolicy.BLOCK and machine.unstored(offer.attempt)[0] >= WINDOW:
                await asyncio.sleep(0)
            machine.progress(offer.attempt, b"%d" % number, policy)
            agent[0].say()
            if number % 50 == 0:
                await asyncio.sleep(0)
        return b""

    return handler


@pytest.mark.parametrize("count", [3_000, 10_000])
async def test_a_watcher_sees_every_delta_of_a_waiting_handler_or_a_gap(
    orchestrator: Orchestrator, client: Client, stand_in: Make, count: int
) -> None:
    agents: list[Any] = []
    agents.append(stand_in(orchestrator.address, handler=sender(agents, count)))
    await agents[0].ready()
    task = await submit(client)
    seen = await watch(client, task.task_id)
    assert seen.complete(count)
    assert seen.missing < count // 2


@pytest.mark.parametrize("policy", [ProgressPolicy.KEEP_LATEST, ProgressPolicy.DROP])
async def test_a_watcher_sees_what_a_policy_drops_as_gaps(
    orchestrator: Orchestrator, client: Client, stand_in: Make, policy: ProgressPolicy
) -> None:
    agents: list[Any] = []
    agents.append(stand_in(orchestrator.address, handler=sender(agents, 2_000, policy)))
    await agents[0].ready()
    seen = await watch(client, (await submit(client)).task_id)
    assert seen.complete(2_000)
    assert 0 < seen.missing < 2_000
    if policy is ProgressPolicy.KEEP_LATEST:
        assert seen.found[-1][2]


async def test_a_late_watcher_sees_what_was_trimmed_as_a_gap(
    redis_url: str, launch: Launch, options: Callable[..., OrchestratorOptions], stand_in: Make
) -> None:
    orchestrator = await launch(options(redis_url, progress_kept=100))
    agents: list[Any] = []
    agents.append(stand_in(orchestrator.address, handler=sender(agents, 1_000)))
    await agents[0].ready()
    async with Client(orchestrator.address) as client:
        task = await submit(client)
        await watch(client, task.task_id)
        late = await watch(client, task.task_id)
        assert late.complete(1_000)
        assert 700 < late.missing <= 900


async def test_progress_survives_a_cut_before_it_arrives(
    orchestrator: Orchestrator, client: Client, stand_in: Make
) -> None:
    cut, go = asyncio.Event(), asyncio.Event()

    async def handler(offer: ArrivedOffer) -> bytes:
        agent.machine.progress(offer.attempt, b"1")
        agent.say()
        while agent.machine.unstored(offer.attempt)[0]:
            await asyncio.sleep(0.01)
        # These are written to a stream that ends before they arrive.
        for number in (2, 3):
            agent.machine.progress(offer.attempt, b"%d" % number)
        assert agent.machine.messages_to_send() is not None
        cut.set()
        await go.wait()
        agent.machine.progress(offer.attempt, b"4")
        return b""

    agent = stand_in(orchestrator.address, handler=handler)
    await agent.ready()
    task = await submit(client)
    await cut.wait()
    await agent.cut()
    await agent.until(lambda: len(agent.opened) == 2)
    go.set()
    seen = await watch(client, task.task_id)
    assert seen.complete(4)
    assert seen.missing == 0


@pytest.mark.parametrize("protocol", [1, 2])
async def test_an_overloaded_store_leaves_no_silent_gap(
    orchestrator: Orchestrator,
    client: Client,
    stand_in: Make,
    monkeypatch: pytest.MonkeyPatch,
    protocol: int,
) -> None:
    monkeypatch.setattr("orki_control.session._options.PROTOCOL_MAX", protocol)
    monkeypatch.setattr(_sessions, "_PROGRESS_WAITING", 10)
    agents: list[Any] = []
    agents.append(stand_in(orchestrator.address, handler=sender(agents, 500)))
    await agents[0].ready()
    seen = await watch(client, (await submit(client)).task_id)
    assert seen.complete(500)
    assert protocol == 2 or seen.missing > 0
    assert seen.missing < 500


def scripts(redis: Redis) -> int:
    """Return the number of batches that the server has executed."""
    return redis.info("commandstats")["cmdstat_evalsha"]["calls"]  # type: ignore[index, no-any-return]


@pytest.mark.parametrize("freed", [True, False], ids=["freed", "full at the end"])
@pytest.mark.parametrize("protocol", [1, 2])
async def test_a_full_store_leaves_no_silent_gap(
    tmp_path: Path,
    options: Make,
    launch: Launch,
    stand_in: Make,
    monkeypatch: pytest.MonkeyPatch,
    protocol: int,
    freed: bool,
) -> None:
    monkeypatch.setattr("orki_control.session._options.PROTOCOL_MAX", protocol)
    monkeypatch.setattr(_sessions, "_FULL_PAUSE", 0.2)
    with EmbeddedServer(EmbeddedOptions(directory=tmp_path)) as server, Redis.from_url(server.url) as redis:
        orchestrator = await launch(options(server.url, shards=1))
        stored, filled, batches = asyncio.Event(), asyncio.Event(), list[int]()

        async def handler(offer: ArrivedOffer) -> bytes:
            for number in range(1, 11):
                agent.machine.progress(offer.attempt, b"%d" % number)
                if number == 5:
                    await stored.wait()
                    redis.config_set("maxmemory", 1_000_000)
            while protocol == 2 and agent.machine.unstored(offer.attempt)[0] != 5:
                await asyncio.sleep(0.01)
            filled.set()
            calls = scripts(redis)
            await asyncio.sleep(0.5)
            batches.append(scripts(redis) - calls)
            if freed:
                redis.config_set("maxmemory", 0)
                await asyncio.sleep(0.5)
            return b""

        agent = stand_in(orchestrator.address, handler=handler)
        await agent.ready()
        async with Client(orchestrator.address) as client:
            task = await submit(client)
            watching = asyncio.create_task(watch(client, task.task_id))
            async with asyncio.timeout(10):
                while redis.xlen(ShardKeys(operations.shard_of(task.task_id)).progress(task.task_id)) < 5:  # type: ignore[operator]
                    await asyncio.sleep(0.01)
            stored.set()
            await filled.wait()
            seen = await watching
        assert seen.complete(10)
        assert seen.missing == (0 if freed and protocol == 2 else 5)
        # The agent is not asked again and again.
        assert max(batches) < 100
        redis.config_set("maxmemory", 0)
        await orchestrator.stop()


async def test_the_typed_handle_calls_back_for_a_gap_and_logs_it_otherwise(caplog: pytest.LogCaptureFixture) -> None:
    from google.protobuf.wrappers_pb2 import StringValue

    from orki_contract import Task
    from orki_control._task_handle import SubmittedTask

    class Calls:
        async def watch(self, task_id: str, *, after: str = "") -> AsyncIterator[WatchResponse]:
            yield WatchResponse(gap={"attempt": 2, "first_index": 3, "last_index": 7})
            yield WatchResponse(progress={"payload": StringValue(value="eight").SerializeToString()})

    task = Task.declare("a.v1.S/M", request=StringValue, response=StringValue, progress=StringValue)
    handle = SubmittedTask(Calls(), task, TaskSnapshot(task_id="t1"))  # type: ignore[arg-type]
    gaps: list[ProgressGap] = []
    assert [each.value async for each in handle.progress(gaps.append)] == ["eight"]
    assert (gaps, gaps[0].count) == ([ProgressGap(2, 3, 7)], 5)
    assert [each.value async for each in handle.progress()] == ["eight"]
    assert "task t1: progress 3 to 7 of attempt 2 is missing" in caplog.text


# --- gaps between entries ---


def entry(number: int, attempt: int, index: int, dropped: bool = False) -> StoredProgress:
    return StoredProgress(f"{number}-0", attempt, index, b"", number, dropped)


@pytest.mark.parametrize(
    ("after", "position", "entries", "gaps"),
    [
        ("", None, [entry(1, 1, 1), entry(2, 1, 2)], []),
        ("", None, [entry(4, 1, 4)], [(1, 1, 3, "")]),
        ("", None, [entry(1, 1, 1), entry(5, 1, 5)], [(1, 2, 4, "1-0")]),
        ("", None, [entry(1, 1, 1), entry(5, 1, 5, dropped=True)], [(1, 2, 5, "5-0")]),
        ("", None, [entry(3, 1, 3), entry(9, 2, 2)], [(1, 1, 2, ""), (1, 4, 7, "3-0"), (2, 1, 1, "3-0")]),
        ("", None, [entry(9, 3, 1)], [(1, 1, 8, "")]),
        ("7-0", None, [entry(9, 1, 9)], []),
        ("7-0", ProgressPosition(attempt=1, index=7, number=7), [entry(9, 1, 9)], [(1, 8, 8, "7-0")]),
        ("7-0", ProgressPosition(attempt=1, index=7), [entry(9, 1, 9)], []),
        ("", None, [entry(0, 1, 8), entry(0, 1, 9), entry(4, 1, 13)], []),
    ],
)
def test_gaps_are_found_by_count_and_range(
    after: str, position: ProgressPosition | None, entries: list[StoredProgress], gaps: list[tuple[int, int, int, str]]
) -> None:
    finder = GapFinder(after, position)
    found = [gap for each in entries for gap in finder.before(each)]
    assert [(gap.attempt, gap.first_index, gap.last_index, gap.cursor) for gap in found] == gaps


# --- the store ---


async def running(store: Store) -> AttemptKey:
    method = TaskMethod(service="a.v1.S", name="M", request="a.v1.Q", response="a.v1.R")
    task_id = operations.new_task_id(1)
    await store.apply(
        operations.submit(
            task_id=task_id, method=method, request=b"", digest="0" * 64, idempotency_key="", span=new_span(), actor="t"
        )
    )
    recipient = operations.Recipient("a1", "i1", 1, (method.full_name,))
    (offered,) = (await store.offer(operations.offer(1, 5.0, [recipient]))).offers
    await store.apply(operations.accept("a1", offered.attempt))
    return offered.attempt


async def test_the_store_takes_the_next_delta_or_an_explicit_gap(store: Store) -> None:
    attempt = await running(store)

    async def report(index: int, missing: int = 0, dropped: bool = False) -> tuple[str, int]:
        reply = await store.apply(operations.report_progress("a1", attempt, 1000, index, b"p", missing, dropped))
        return reply.status.value, reply.index

    assert await report(1) == ("accepted", 1)
    assert await report(1) == ("repeated", 1)
    assert await report(4) == ("gap", 1)
    assert await report(4, missing=1) == ("gap", 1)
    assert await report(4, missing=2) == ("accepted", 4)
    assert await report(5, missing=4) == ("accepted", 5)
    assert await report(7, missing=1, dropped=True) == ("accepted", 7)
    view = await store.apply(operations.read_task(attempt.task_id, 10))
    assert view is not None
    assert [(each.index, each.number, each.dropped) for each in view.progress] == [
        (1, 1, False),
        (4, 4, False),
        (5, 5, False),
        (7, 7, True),
    ]
    await store.apply(operations.succeed("a1", attempt, b""))
    assert await report(5) == ("repeated", 5)
    stranger = await store.apply(operations.report_progress("a2", attempt, 1000, 8, b"p"))
    assert stranger.status is ReportStatus.STALE


# --- directives ---


async def test_a_directive_that_a_cut_swallows_is_reported_to_its_sender(
    orchestrator: Orchestrator, client: Client, stand_in: Make
) -> None:
    go = asyncio.Event()

    async def handler(offer: ArrivedOffer) -> bytes:
        await go.wait()
        return b""

    agent = stand_in(orchestrator.address, handler=handler)
    await agent.ready()
    task = await submit(client)
    await agent.until(lambda: bool(agent.offers))
    await agent.until(lambda: agent.machine.unstored(agent.offers[0].attempt) == (0, 0))
    while not (await client.get(task.task_id)).HasField("attempt") or (await client.get(task.task_id)).state != 3:
        await asyncio.sleep(0.01)
    agent.deaf = True
    directing = asyncio.create_task(client.direct(task.task_id, b"\n\x04left"))
    await asyncio.sleep(0.2)
    assert not directing.done()
    await agent.cut()
    with pytest.raises(NotDirectable, match="ended before it acknowledged"):
        await directing
    agent.deaf = False
    await agent.until(lambda: len(agent.opened) == 2)
    await client.direct(task.task_id, b"\n\x05right")
    assert agent.directives == [b"\n\x05right"]
    go.set()
