"""Durability: what was acknowledged survives kills of the server, as far as it was declared.

The kernel keeps what a killed process has written. So the tests stall the server's disk first: they stop the thread
that flushes its append-only file. The server then replies for up to two seconds before it writes.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Self

import pytest
from redis import Redis

from orki.control.v1 import task_pb2 as pb
from orki.control.v1.attempt_pb2 import TaskState
from orki_contract.errors import InvalidArgument, InvalidSetting, NotDurable, OrkiError, StoreUnavailable, UnknownTask
from orki_control import Client, ClientOptions
from orki_control.session import ArrivedOffer, AttemptKey
from orki_events.connection import parse_address
from orki_server._store.server import Durability, StoreServer
from orki_server._store.store import Store
from orki_server.embedded import EmbeddedOptions, EmbeddedServer

DO = "servertests.v1.WorkService/Do"
Make = Callable[..., Any]
PTRACE_ATTACH = 16
WALL = 0x40000000


class StalledDisk:
    """Stops the thread of a server that flushes its file, as a disk does that does not answer."""

    def __init__(self, server: EmbeddedServer) -> None:
        self._server = server
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._thread = 0

    def __enter__(self) -> Self:
        self.stall()
        return self

    def __exit__(self, *_: object) -> None:
        self.crash()

    def stall(self) -> None:
        for each in Path(f"/proc/{self._server.pid}/task").iterdir():
            if (each / "comm").read_text().strip() == "bio_aof":
                self._thread = int(each.name)
        if self._libc.ptrace(PTRACE_ATTACH, self._thread, None, None):
            pytest.skip(f"threads cannot be stopped here: {os.strerror(ctypes.get_errno())}")
        os.waitpid(self._thread, WALL)

    def crash(self) -> None:
        """Kill the server with what it has not written, and start it again; only once."""
        if not self._thread:
            return
        os.kill(self._server.pid, signal.SIGKILL)
        # The killed thread is a child of its tracer.
        os.waitpid(self._thread, WALL)
        self._thread = 0
        self._server.kill()
        self._server.start()


class Ledger:
    """What was acknowledged: tasks to their submitters, results to the agent and to those who wait for them."""

    def __init__(self, agent: Any) -> None:
        self.agent = agent
        self.tasks: set[str] = set()
        self.results: dict[str, bytes] = {}
        self.reported: set[AttemptKey] = set()
        self._acknowledged: set[AttemptKey] = set()
        agent.handler = self._handle

    async def _handle(self, offer: ArrivedOffer) -> bytes:
        self.reported.add(offer.attempt)
        return offer.offer.request

    @property
    def acknowledged(self) -> set[AttemptKey]:
        """The attempts whose result the agent no longer keeps."""
        kept = set(self.agent.machine.attempts)
        revoked = {key for key, _ in self.agent.revoked}
        self._acknowledged |= {key for key in self.reported if key not in kept and key not in revoked}
        return self._acknowledged

    async def submit_steadily(self, client: Client, first: int, until: asyncio.Event) -> None:
        async with asyncio.TaskGroup() as waits:
            number = first
            while not until.is_set():
                submissions = [pb.Submission(method=DO, request=b"\n\x06%06d" % (number + each)) for each in range(5)]
                number += 5
                with contextlib.suppress(OrkiError):
                    for task in await client.submit_raw(submissions):
                        self.tasks.add(task.task_id)
                        waits.create_task(self._wait(client, task.task_id))
                await asyncio.sleep(0.02)

    async def _wait(self, client: Client, task_id: str) -> None:
        try:
            async for news in client.watch(task_id):
                if news.task.state == TaskState.TASK_STATE_SUCCEEDED:
                    self.results[task_id] = news.task.response
        except UnknownTask:
            pass

    async def lost(self, client: Client) -> tuple[set[str], set[str]]:
        """Return the tasks that are gone, and those whose result is."""
        fences: dict[str, int] = {}
        for key in self.acknowledged:
            fences[key.task_id] = max(key.fence, fences.get(key.task_id, 0))
        gone, forgotten = set(), set()

        few = asyncio.Semaphore(50)

        async def compare(task_id: str) -> None:
            try:
                async with few:
                    task = await client.get(task_id)
            except UnknownTask:
                gone.add(task_id)
                return
            same = task.state == TaskState.TASK_STATE_SUCCEEDED and task.response == self.results.get(task_id)
            if not same or task.attempt.fence < fences.get(task_id, 0):
                forgotten.add(task_id)

        await asyncio.gather(*map(compare, self.tasks))
        return gone, forgotten


@contextlib.asynccontextmanager
async def crashes(
    folder: Path, durability: str, options: Make, launch: Make, stand_in: Make, work: Make
) -> AsyncIterator[tuple[Ledger, Client]]:
    """Run tasks while the server crashes three times with a stalled disk."""
    with EmbeddedServer(EmbeddedOptions(directory=folder, append_only=True)) as server:
        orchestrator = await launch(options(server.url, durability=durability))
        agent = stand_in(orchestrator.address, [work(heartbeat_timeout={"seconds": 2})], slots=64)
        await agent.ready()
        async with Client(orchestrator.address, ClientOptions(patience=60.0)) as client:
            ledger, over = Ledger(agent), asyncio.Event()
            submitters = 1 if durability == "memory" else 10
            steadily = (ledger.submit_steadily(client, 10_000 * number, over) for number in range(submitters))
            load = asyncio.gather(*steadily)
            for _ in range(3):
                await asyncio.sleep(4.0)
                with StalledDisk(server):
                    await asyncio.sleep(1.2)
                    assert ledger.acknowledged, "no load"
            await asyncio.sleep(1.0)
            over.set()
            await load
            yield ledger, client
        await orchestrator.stop()


linux = pytest.mark.skipif(sys.platform != "linux", reason="stops a thread of the server by ptrace")


@linux
@pytest.mark.timeout(120)
async def test_what_was_acknowledged_with_fsync_survives_crashes(
    tmp_path: Path, options: Make, launch: Make, stand_in: Make, work: Make
) -> None:
    async with crashes(tmp_path, "fsync", options, launch, stand_in, work) as (ledger, client):
        assert len(ledger.tasks) > 50
        assert await ledger.lost(client) == (set(), set())
        assert set(ledger.results) == ledger.tasks


@linux
@pytest.mark.timeout(120)
async def test_what_was_acknowledged_in_memory_may_be_lost(
    tmp_path: Path, options: Make, launch: Make, stand_in: Make, work: Make
) -> None:
    """The documented loss. It also shows that the crashes of these tests lose something."""
    async with crashes(tmp_path, "memory", options, launch, stand_in, work) as (ledger, client):
        gone, _ = await ledger.lost(client)
        assert gone


# --- the wait ---


@linux
async def test_a_wait_for_the_disk_does_not_delay_other_operations(
    tmp_path: Path, options: Make, launch: Make, stand_in: Make
) -> None:
    with EmbeddedServer(EmbeddedOptions(directory=tmp_path, append_only=True)) as server:
        orchestrator = await launch(options(server.url, durability="fsync"))
        agent = stand_in(orchestrator.address, taking=False)
        await agent.ready()
        async with Client(orchestrator.address, ClientOptions(patience=10.0)) as client:
            (task,) = await client.submit_raw([pb.Submission(method=DO, request=b"\n\x01q")])
            await asyncio.sleep(1.2)
            with StalledDisk(server):
                submitting = asyncio.create_task(client.submit_raw([pb.Submission(method=DO, request=b"\n\x01q")] * 20))
                loop = asyncio.get_running_loop()
                longest, until = 0.0, loop.time() + 1.0
                while loop.time() < until:
                    asked = loop.time()
                    assert (await client.get(task.task_id)).state != TaskState.TASK_STATE_SUCCEEDED
                    longest = max(longest, loop.time() - asked)
                assert not submitting.done()
                assert longest < 0.5
            assert len(await submitting) == 20
        await orchestrator.stop()


async def test_one_wait_covers_many_batches(tmp_path: Path, options: Make, launch: Make, stand_in: Make) -> None:
    with EmbeddedServer(EmbeddedOptions(directory=tmp_path, append_only=True)) as server:
        orchestrator = await launch(options(server.url, durability="fsync"))
        await stand_in(orchestrator.address).ready()
        async with Client(orchestrator.address, ClientOptions(patience=10.0)) as client:
            with Redis.from_url(server.url) as redis:
                submissions = [pb.Submission(method=DO, request=b"\n\x01q")]
                await asyncio.gather(*(client.submit_raw(submissions * 10) for _ in range(20)))
                calls: Any = redis.info("commandstats")
            assert calls["cmdstat_waitaof"]["calls"] < 40
        await orchestrator.stop()


# --- a server that cannot give it ---


async def test_a_wait_after_which_nothing_was_written_needs_no_other_flush(tmp_path: Path) -> None:
    def asked(redis: Redis) -> int:
        statistics: Any = redis.info("commandstats")
        return int(statistics["cmdstat_info"]["calls"])

    with EmbeddedServer(EmbeddedOptions(directory=tmp_path, append_only=True)) as server:
        store = StoreServer(parse_address(server.url), Durability(fsync=True))
        await store.open([("PING",)], starting=True)
        with Redis.from_url(server.url) as redis:
            redis.set("written", 1)
            for _ in range(2):  # The server may delete the key of the probe meanwhile, which is a write.
                lane, _ = await store.operate([("PING",)], bulk=False)
                await store.settle(lane)
            before = asked(redis)
            lane, _ = await store.operate([("PING",)], bulk=False)
            await store.settle(lane)
            assert asked(redis) - before <= 2  # One by the test, and one by the wait.
            redis.set("written", 2)
            before = asked(redis)
            lane, _ = await store.operate([("PING",)], bulk=False)
            await store.settle(lane)
            assert asked(redis) - before > 3
        await store.close()


@pytest.mark.parametrize("text", ["disk", "replicas", "replicas:0", "replicas:10", "Memory", ""])
def test_an_unknown_durability_is_refused(options: Make, text: str) -> None:
    with pytest.raises(InvalidSetting, match="durability .*: use memory, fsync, or replicas:N"):
        options("redis://127.0.0.1:6379/0", durability=text)


async def test_fsync_is_refused_at_the_start_without_a_file() -> None:
    with EmbeddedServer() as server:
        store = Store(server.url, shards=1, durability=Durability.parse("fsync"))
        with pytest.raises(InvalidSetting, match="durability fsync needs appendonly, and Redis or Valkey 7.2"):
            await store.open()
        await store.close()


async def test_replicas_are_refused_at_the_start_if_there_are_too_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orki_server._store.server._DURABLE_TIMEOUT", 0.2)
    with EmbeddedServer() as server:
        store = Store(server.url, shards=1, durability=Durability.parse("replicas:1"))
        with pytest.raises(StoreUnavailable, match="cannot make writes durable: 0 of 1 replicas confirmed"):
            await store.open()
        await store.close()


async def test_a_server_that_stops_to_keep_its_file_takes_no_more_submissions(
    tmp_path: Path, options: Make, launch: Make, stand_in: Make
) -> None:
    with EmbeddedServer(EmbeddedOptions(directory=tmp_path, append_only=True)) as server:
        orchestrator = await launch(options(server.url, durability="fsync"))
        await stand_in(orchestrator.address).ready()
        submission = pb.Submission(method=DO, request=b"\n\x01q")
        with Redis.from_url(server.url) as redis:
            async with Client(orchestrator.address, ClientOptions(patience=0.0)) as client:
                await client.submit_raw([submission])
                redis.config_set("appendonly", "no")
                for _ in range(2):
                    with pytest.raises(StoreUnavailable, match="appendonly"):
                        await client.submit_raw([submission])
                redis.config_set("appendonly", "yes")
            async with Client(orchestrator.address, ClientOptions(patience=20.0)) as client:
                await client.submit_raw([submission])
        await orchestrator.stop()


async def test_a_cancelled_caller_does_not_take_the_store_down(redis_url: str) -> None:
    store = Store(redis_url, shards=1)
    await store.open()
    changes: list[bool] = []
    store.connection.on_change(changes.append)
    with Redis.from_url(redis_url) as redis:
        for _ in range(20):
            redis.client_pause(50)
            caller = asyncio.create_task(store.connection.call("GET", "orki:{of}:probe"))
            await asyncio.sleep(0.01)
            caller.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await caller
            assert await store.connection.call("GET", "orki:{of}:probe") is None
    assert changes == []
    await store.close()


# --- durability of a single submission ---


@linux
@pytest.mark.timeout(120)
async def test_a_submission_may_wait_for_the_disk_at_an_orchestrator_that_does_not(
    tmp_path: Path, options: Make, launch: Make, stand_in: Make
) -> None:
    with EmbeddedServer(EmbeddedOptions(directory=tmp_path, append_only=True)) as server:
        orchestrator = await launch(options(server.url, durability="memory"))
        agent = stand_in(orchestrator.address, taking=False)
        await agent.ready()
        asked = [pb.Submission(method=DO, request=b"\n\x01q", durability="fsync")]
        async with Client(orchestrator.address, ClientOptions(patience=60.0)) as client:
            kept = [(await client.submit_raw(asked))[0].task_id for _ in range(3)]
            with StalledDisk(server):
                # The server writes what the stall keeps from the disk only after a second or two.
                waiting = asyncio.create_task(client.submit_raw(asked * 5))
                await client.submit_raw([pb.Submission(method=DO, request=b"\n\x01q")])
                await asyncio.sleep(1.5)
                assert not waiting.done()
            kept += [each.task_id for each in await waiting]
            server.kill()
            server.start()
            for task_id in kept:
                assert (await client.get(task_id)).task_id == task_id
        await orchestrator.stop()


@pytest.mark.parametrize(
    ("durability", "says"), [("fsync", "appendonly"), ("replicas:2", "0 connected replicas, not 2")]
)
async def test_a_durability_that_the_store_cannot_keep_is_refused_and_nothing_is_stored(
    options: Make, launch: Make, stand_in: Make, durability: str, says: str
) -> None:
    with EmbeddedServer() as server:
        orchestrator = await launch(options(server.url))
        agent = stand_in(orchestrator.address, taking=False)
        await agent.ready()
        async with Client(orchestrator.address, ClientOptions(patience=2.0)) as client:
            with pytest.raises(NotDurable, match=f"durability {durability}.*{says}"):
                await client.submit_raw([pb.Submission(method=DO, durability=durability)])
            with pytest.raises(InvalidArgument, match="durability 'disk': use memory"):
                await client.submit_raw([pb.Submission(method=DO, durability="disk")])
            assert [task async for task in client.list_tasks()] == []
            (task,) = await client.submit_raw([pb.Submission(method=DO, durability="memory")])
            assert task.task_id
        await orchestrator.stop()


async def test_a_method_declares_the_durability_of_submissions_that_name_none(
    options: Make, launch: Make, stand_in: Make, work: Make
) -> None:
    with EmbeddedServer() as server:
        orchestrator = await launch(options(server.url))
        agent = stand_in(orchestrator.address, [work(durability="replicas:1")], taking=False)
        await agent.ready()
        async with Client(orchestrator.address, ClientOptions(patience=2.0)) as client:
            with pytest.raises(NotDurable, match="0 connected replicas, not 1"):
                await client.submit_raw([pb.Submission(method=DO)])
            (task,) = await client.submit_raw([pb.Submission(method=DO, durability="memory")])
            assert task.task_id
        await orchestrator.stop()


async def test_a_submission_waits_for_replicas_and_learns_that_they_are_gone(
    options: Make, launch: Make, stand_in: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orki_server._store.server._DURABLE_TIMEOUT", 1.0)
    with EmbeddedServer() as server, EmbeddedServer() as replica:
        host, port = server.url.removeprefix("redis://").partition("/")[0].split(":")
        with Redis.from_url(replica.url) as redis, Redis.from_url(server.url) as master:
            redis.execute_command("REPLICAOF", host, port)
            async with asyncio.timeout(30):
                while master.info("replication").get("slave0", {}).get("state") != "online":
                    await asyncio.sleep(0.1)
            orchestrator = await launch(options(server.url))
            agent = stand_in(orchestrator.address, taking=False)
            await agent.ready()
            asked = pb.Submission(method=DO, durability="replicas:1", idempotency_key="k")
            async with Client(orchestrator.address, ClientOptions(patience=20.0)) as client:
                (task,) = await client.submit_raw([asked])
                assert any(task.task_id.encode() in name for name in redis.keys("orki:*:task:*"))
                # The same key finds the task, and waits as well.
                assert (await client.submit_raw([asked]))[0].task_id == task.task_id
                redis.execute_command("REPLICAOF", "NO", "ONE")
                with pytest.raises((NotDurable, StoreUnavailable), match="replicas"):
                    await client.submit_raw([pb.Submission(method=DO, durability="replicas:1")])
                # Others are not held up.
                await client.submit_raw([pb.Submission(method=DO)])
            await orchestrator.stop()
