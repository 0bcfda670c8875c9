"""A store on a cluster and behind sentinels, of real processes. A primary is killed under load; the ledger is exact."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import RedisError

from orki.control.v1 import task_pb2 as pb
from orki.control.v1.attempt_pb2 import TaskState
from orki.events.v1.usage_pb2 import UsageEvent
from orki_contract import EventStream
from orki_contract.errors import InvalidSetting, OrkiError, StoreUnavailable, UnknownTask
from orki_contract.model import Group, Retention, Stream
from orki_contract.trace import new_span
from orki_control import Client, ClientOptions
from orki_control.session import ArrivedOffer
from orki_events import Events, connect
from orki_events.connection import Connection, parse_address
from orki_events.losses import read_gaps
from orki_server._keys import FleetKeys, ShardKeys
from orki_server._store import operations
from orki_server._store.cluster import slot_of
from orki_server._store.operations import new_task_id
from orki_server._store.server import Durability
from orki_server._store.store import Store
from orki_server.embedded import EmbeddedServer, server_binary

DO = "servertests.v1.WorkService/Do"
Make = Callable[..., Any]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(condition: Callable[[], bool], timeout: float = 30.0) -> None:
    end = time.monotonic() + timeout
    while True:
        with contextlib.suppress(RedisError):
            if condition():
                return
        assert time.monotonic() < end, "not in time"
        time.sleep(0.05)


async def in_thread(work: Callable[..., None], *arguments: Any) -> None:
    with ThreadPoolExecutor(1) as pool:
        await asyncio.get_running_loop().run_in_executor(pool, work, *arguments)


class Node:
    """One server process: a node of a cluster, a primary, a replica or a sentinel."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.port = free_port()
        self.folder = folder / str(self.port)
        self.folder.mkdir()
        self.arguments = list(arguments)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Node:
        common = ["--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(self.folder), "--save", ""]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [str(server_binary()), *self.arguments, *common], stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        until(lambda: bool(self.redis.ping()))
        return self

    @property
    def redis(self) -> Redis:
        return Redis(port=self.port, socket_timeout=2.0)

    def call(self, *command: Any) -> Any:
        with self.redis as redis:
            return redis.execute_command(*command)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    @property
    def is_primary(self) -> bool:
        with contextlib.suppress(RedisError):
            return bool(self.call("ROLE")[0] == b"master")
        return False


@contextlib.contextmanager
def running(nodes: list[Node]) -> Iterator[None]:
    try:
        for node in nodes:
            node.start()
        yield
    finally:
        for node in nodes:
            if node.process is not None:
                node.kill()


class ClusterSetup:
    """A cluster of three primaries with a replica each."""

    def __init__(self, folder: Path) -> None:
        options = (
            "--cluster-enabled",
            "yes",
            "--cluster-node-timeout",
            "1000",
            "--cluster-replica-validity-factor",
            "0",
        )
        self.nodes = [Node(folder, *options, "--cluster-port", str(free_port())) for _ in range(6)]
        self.url = f"redis+cluster://{','.join(f'127.0.0.1:{node.port}' for node in self.nodes[:2])}"

    def form(self) -> None:
        first, ids = self.nodes[0], [node.call("CLUSTER", "MYID").decode() for node in self.nodes]
        for number, node in enumerate(self.nodes):
            node.call("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        for number, node in enumerate(self.nodes[:3]):
            node.call("CLUSTER", "ADDSLOTSRANGE", 5462 * number, min(5462 * (number + 1), 16_384) - 1)
        for node in self.nodes[1:]:
            node.call("CLUSTER", "MEET", "127.0.0.1", first.port, node.arguments[-1])
            first.call("CLUSTER", "MEET", "127.0.0.1", node.port, node.arguments[-1])
        until(lambda: all(len(node.call("CLUSTER", "NODES").splitlines()) == 6 for node in self.nodes))
        for number, node in enumerate(self.nodes[3:]):
            until(lambda node=node, number=number: node.call("CLUSTER", "REPLICATE", ids[number]) == b"OK")  # type: ignore[misc]
        self.settle()

    def settle(self) -> None:
        """Wait until all slots are served and each primary has its replica."""
        until(lambda: all(b"cluster_state:ok" in node.call("CLUSTER", "INFO") for node in self.nodes))
        until(lambda: sorted(node.call("ROLE")[0] for node in self.nodes) == [b"master"] * 3 + [b"slave"] * 3)
        until(lambda: all(node.call("ROLE")[2] for node in self.nodes if node.is_primary))

    def primary_of(self, key: str) -> Node:
        for low, high, (_, port, *_), *_ in self.nodes[0].call("CLUSTER", "SLOTS"):
            if low <= slot_of(key) <= high:
                return next(node for node in self.nodes if node.port == port)
        raise AssertionError(key)

    def crash(self, victim: Node) -> None:
        """Kill a primary, wait for its replica, and start it again."""
        victim.kill()
        others = [node for node in self.nodes if node is not victim]
        until(lambda: sum(node.is_primary for node in others) == 3)
        until(lambda: all(b"cluster_state:ok" in node.call("CLUSTER", "INFO") for node in others))
        victim.start()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[ClusterSetup]:
    setup = ClusterSetup(tmp_path)
    with running(setup.nodes):
        setup.form()
        yield setup


class SentinelSetup:
    """A primary, two replicas and three sentinels.

    A primary without a replica refuses writes. Otherwise, a killed primary that starts again before it is demoted
    accepts writes that nobody keeps.
    """

    OPTIONS = ("--min-replicas-to-write", "1")

    def __init__(self, folder: Path) -> None:
        self.nodes = [Node(folder, *self.OPTIONS) for _ in range(3)]
        self.sentinels = []
        for node in self.nodes[1:]:
            node.arguments += ["--replicaof", "127.0.0.1", str(self.nodes[0].port)]
        for _ in range(3):
            sentinel = Node(folder)
            configuration = sentinel.folder / "sentinel.conf"
            configuration.write_text(
                f"sentinel monitor orki 127.0.0.1 {self.nodes[0].port} 2\n"
                "sentinel down-after-milliseconds orki 700\nsentinel failover-timeout orki 4000\n"
            )
            sentinel.arguments = [str(configuration), "--sentinel"]
            self.sentinels.append(sentinel)
        self.url = f"redis+sentinel://{','.join(f'127.0.0.1:{node.port}' for node in self.sentinels)}/orki"

    def settle(self) -> None:
        until(lambda: sorted(node.call("ROLE")[0] for node in self.nodes) == [b"master", b"slave", b"slave"])
        until(lambda: any(node.is_primary and len(node.call("ROLE")[2]) == 2 for node in self.nodes))

        def known(sentinel: Node) -> bool:
            reply = sentinel.call("SENTINEL", "MASTER", "orki")
            fields = reply if isinstance(reply, dict) else dict(zip(reply[::2], reply[1::2], strict=True))
            facts = {str(k, "ascii") if isinstance(k, bytes) else k: v for k, v in fields.items()}
            return int(facts["num-slaves"]) == 2 and int(facts["num-other-sentinels"]) == 2

        until(lambda: all(map(known, self.sentinels)))

    def crash(self) -> None:
        """Kill the primary, wait for another one, and start it again."""
        victim = next(node for node in self.nodes if node.is_primary)
        victim.kill()
        others = [node for node in self.nodes if node is not victim]
        until(lambda: sum(node.is_primary for node in others) == 1)
        victim.arguments = list(self.OPTIONS)
        victim.start()


@pytest.fixture
def sentinels(tmp_path: Path) -> Iterator[SentinelSetup]:
    setup = SentinelSetup(tmp_path)
    with running([*setup.nodes, *setup.sentinels]):
        setup.settle()
        yield setup


@pytest.fixture
def events() -> Iterator[str]:
    """URL of a server for the event plane."""
    with EmbeddedServer() as server:
        yield server.url


# --- the ledger ---


class Ledger:
    """What was acknowledged, and what ran."""

    def __init__(self) -> None:
        self.requests: dict[str, bytes] = {}
        self.results: dict[str, bytes] = {}
        self.fences: dict[int, list[int]] = defaultdict(list)
        self.offered: list[tuple[str, int]] = []
        self.untyped: list[BaseException] = []

    async def handle(self, offer: ArrivedOffer) -> bytes:
        self.fences[int(offer.attempt.task_id[1 : offer.attempt.task_id.index("-")])].append(offer.attempt.fence)
        self.offered.append((offer.attempt.task_id, offer.attempt.fence))
        await asyncio.sleep(0.02)
        return offer.offer.request

    async def submit(self, client: Client, first: int, over: asyncio.Event) -> None:
        async with asyncio.TaskGroup() as waits:
            number = first
            while not over.is_set():
                request = b"\n\x06%06d" % number
                submission = pb.Submission(method=DO, request=request, idempotency_key=f"key-{number}")
                number += 1
                try:
                    (task,) = await client.submit_raw([submission])
                except OrkiError as error:
                    if not isinstance(error, StoreUnavailable):
                        self.untyped.append(error)
                    continue
                self.requests[task.task_id] = request
                waits.create_task(self._wait(client, task.task_id))
                await asyncio.sleep(0.01)

    async def _wait(self, client: Client, task_id: str) -> None:
        with contextlib.suppress(UnknownTask):
            async for news in client.watch(task_id):
                if news.task.state == TaskState.TASK_STATE_SUCCEEDED:
                    assert task_id not in self.results, "ended twice"
                    self.results[task_id] = news.task.response

    async def check(self, client: Client) -> None:
        assert self.untyped == []
        assert self.results == self.requests
        for task_id, request in self.requests.items():
            task = await client.get(task_id)
            assert (task.state, task.response) == (TaskState.TASK_STATE_SUCCEEDED, request)
        assert len(set(self.offered)) == len(self.offered), "a fence was used twice"
        for fences in self.fences.values():
            assert len(set(fences)) == len(fences)


@contextlib.asynccontextmanager
async def load(
    url: str, events_url: str, options: Make, launch: Make, stand_in: Make, work: Make, **more: Any
) -> AsyncIterator[tuple[Ledger, Any]]:
    """Run tasks with two orchestrators, and check the ledger in the end."""
    ledger, over = Ledger(), asyncio.Event()
    running = [
        await launch(options(url, events_url=events_url, orchestrator_id=f"o{number}", durability="replicas:1", **more))
        for number in range(2)
    ]
    contract = work(heartbeat_timeout={"seconds": 3}, max_attempts=50)
    for number, orchestrator in enumerate(running):
        agent = stand_in(orchestrator.address, [contract], agent_id=f"agent-{number}", slots=8, handler=ledger.handle)
        await agent.ready()
    async with contextlib.AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(Client(orchestrator.address, ClientOptions(patience=60.0)))
            for orchestrator in running
        ]
        submitting = [
            asyncio.create_task(ledger.submit(client, 100_000 * number, over)) for number, client in enumerate(clients)
        ]
        await asyncio.sleep(1.5)
        yield ledger, running
        await asyncio.sleep(1.0)
        over.set()
        async with asyncio.timeout(60):
            await asyncio.gather(*submitting)
        assert len(ledger.requests) > 50
        await ledger.check(clients[0])
        await ledger.check(clients[1])
    for orchestrator in running:
        await orchestrator.stop()


@pytest.mark.timeout(180)
async def test_a_fleet_on_a_cluster_survives_the_loss_of_a_primary(
    cluster: ClusterSetup, events: str, options: Make, launch: Make, stand_in: Make, work: Make
) -> None:
    async with load(cluster.url, events, options, launch, stand_in, work) as (ledger, _):
        for key in (ShardKeys(0).base, FleetKeys.BASE):
            before = len(ledger.results)
            await in_thread(cluster.crash, cluster.primary_of(key))
            await in_thread(cluster.settle)
            async with asyncio.timeout(30):
                while len(ledger.results) < before + 30:
                    await asyncio.sleep(0.1)


@pytest.mark.timeout(180)
async def test_a_fleet_behind_sentinels_survives_the_loss_of_the_primary(
    sentinels: SentinelSetup, events: str, options: Make, launch: Make, stand_in: Make, work: Make
) -> None:
    async with load(sentinels.url, events, options, launch, stand_in, work) as (ledger, _):
        for _ in range(2):
            before = len(ledger.results)
            await in_thread(sentinels.crash)
            await in_thread(sentinels.settle)
            async with asyncio.timeout(30):
                while len(ledger.results) < before + 30:
                    await asyncio.sleep(0.1)


# --- streams ---


class StreamLedger:
    """What was published and handled, by key."""

    def __init__(self) -> None:
        self.published: dict[str, set[int]] = defaultdict(set)
        self.handled: dict[str, list[int]] = defaultdict(list)
        self.tried = 0
        self.untyped: list[BaseException] = []

    async def publish(self, events: Events, key: str, over: asyncio.Event) -> None:
        """Publish numbered events of one key, each after the one before."""
        number = 0
        while not over.is_set():
            number += 1
            self.tried += 1
            try:
                await events.publish(ORDERED, UsageEvent(agent_id=key, input_tokens=number))
            except OrkiError:
                continue
            except Exception as error:
                self.untyped.append(error)
            else:
                self.published[key].add(number)

    async def consume(self, events: Events) -> None:
        async with events.deliveries(ORDERED, group="work") as deliveries:
            async for delivery in deliveries:
                async with delivery as event:
                    self.handled[event.agent_id].append(event.input_tokens)

    @property
    def missing(self) -> int:
        return sum(len(numbers - set(self.handled[key])) for key, numbers in self.published.items())


ORDERED: EventStream[UsageEvent, Any] = EventStream(
    UsageEvent,
    Stream(
        name="ordered",
        message="orki.events.v1.UsageEvent",
        retention=Retention(max_entries=1_000_000),
        partitions=2,
        partition_key="agent_id",
        groups=(Group(name="work", ack_deadline=3.0),),
    ),
)


@pytest.mark.timeout(180)
async def test_streams_behind_sentinels_keep_their_order_and_declare_what_a_failover_loses(
    sentinels: SentinelSetup,
) -> None:
    ledger, over = StreamLedger(), asyncio.Event()
    async with connect(sentinels.url, producer="publisher") as publishing, connect(sentinels.url) as consuming:
        consumer = asyncio.create_task(ledger.consume(consuming))
        async with asyncio.TaskGroup() as publishers:
            for key in "abcd":
                publishers.create_task(ledger.publish(publishing, key, over))
            for _ in range(2):
                await asyncio.sleep(1.0)
                before = ledger.tried
                await in_thread(sentinels.crash)
                await in_thread(sentinels.settle)
                async with asyncio.timeout(30):
                    while ledger.tried < before + 100:
                        await asyncio.sleep(0.05)
            over.set()
        link = Connection(parse_address(sentinels.url), name="test", connect_timeout=5.0, answer_timeout=5.0)
        async with asyncio.timeout(60):
            while True:
                gaps = [each.gap for each in await read_gaps(link, ORDERED.contract) if each.gap.group == "work"]
                found = (await consuming.ledger(ORDERED)).groups["work"]
                if found.pending == found.unread == 0 and ledger.missing <= sum(gap.count or 0 for gap in gaps):
                    break
                await asyncio.sleep(0.2)
        consumer.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await consumer
        await link.close()
    assert ledger.untyped == []
    assert found.unaccounted == 0
    for key, numbers in ledger.handled.items():
        first = list(dict.fromkeys(numbers))
        assert first == sorted(first), f"key {key} was handled out of its order"
        assert len(first) > 50


# --- redirections ---


def submission(shard: int) -> Any:
    method = operations.TaskMethod(service="acme.v1.WorkService", name="Do", request="q", response="r")
    return operations.submit(
        task_id=new_task_id(shard),
        method=method,
        request=b"q",
        digest="0" * 64,
        idempotency_key="",
        span=new_span(),
        actor="t",
    )


@pytest.mark.timeout(120)
async def test_a_slot_that_moves_is_not_served_by_halves(cluster: ClusterSetup) -> None:
    """While a slot moves, its store waits; then it is used on the other node, with all of its tasks."""
    store = Store(cluster.url, shards=4)
    await store.open()
    tasks = [(await store.apply(submission(shard))).task_id for shard in range(4)]
    source = cluster.primary_of(ShardKeys(0).base)
    target = next(node for node in cluster.nodes if node.is_primary and node is not source)
    slot, ids = slot_of(ShardKeys(0).base), [node.call("CLUSTER", "MYID").decode() for node in (source, target)]
    target.call("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[0])
    source.call("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[1])
    for _ in range(3):
        with pytest.raises(StoreUnavailable, match="moving this key's slot|redis\\+cluster"):
            await store.apply(submission(0))
        await asyncio.sleep(0.1)
    while keys := source.call("CLUSTER", "GETKEYSINSLOT", slot, 100):
        source.call("MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "KEYS", *keys)
    for node in (target, source):
        node.call("CLUSTER", "SETSLOT", slot, "NODE", ids[1])
    async with asyncio.timeout(30):
        while True:
            with contextlib.suppress(StoreUnavailable):
                view = await store.apply(operations.read_task(tasks[0]))
                break
            await asyncio.sleep(0.05)
    assert view is not None
    assert view.task.state == TaskState.TASK_STATE_QUEUED
    assert (await store.apply(submission(0))).status == "new"
    assert target.call("EXISTS", ShardKeys(0).task(tasks[0])) == 1
    await store.close()


@pytest.mark.timeout(120)
async def test_the_epoch_rises_when_the_promoted_replica_lacks_the_newest_fences(cluster: ClusterSetup) -> None:
    store = Store(cluster.url, shards=1)
    await store.open()
    lost: list[bool] = []
    store.on_loss(lambda: lost.append(True))
    primary = cluster.primary_of(ShardKeys(0).base)
    replica = next(node for node in cluster.nodes if not node.is_primary and node.call("ROLE")[2] == primary.port)
    recipient = operations.Recipient("a1", "i1", 1, ("acme.v1.WorkService/Do",))

    async def fence() -> int:
        await store.apply(submission(0))
        (offer,) = (await store.offer(operations.offer(0, 60.0, (recipient,)))).offers
        return offer.attempt.fence

    first = await fence()
    with replica.redis as reader:
        reader.execute_command("READONLY")
        until(lambda: reader.get(ShardKeys(0).fence) == str(first).encode())
        # The replica cannot come back, as if the network were cut a moment before the crash.
        primary.call("CONFIG", "SET", "requirepass", "other")
        Redis(port=primary.port, password="other").execute_command("CLIENT", "KILL", "TYPE", "replica")
        second = await fence()
        assert reader.get(ShardKeys(0).fence) == str(first).encode()
    await in_thread(cluster.crash, primary)
    async with asyncio.timeout(30):
        while True:
            with contextlib.suppress(StoreUnavailable):
                third = await fence()
                break
            await asyncio.sleep(0.05)
    assert first < second < third
    assert third >> 44 == (second >> 44) + 1
    assert lost
    await store.close()


# --- addresses ---


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("redis+cluster://127.0.0.1:7000/1", "a cluster has only database 0"),
        ("redis+cluster://", "cannot be read|localhost"),
        ("redis+sentinel://127.0.0.1:26379", "must name the service"),
        ("redis+sentinel://127.0.0.1:26379/orki/x", "the number of a database"),
        ("redis+cluster://127.0.0.1:70000", "cannot be read"),
        ("redis+cluster://u:p@h:7000?ssl_ca_certs=/x", "requires rediss"),
    ],
)
def test_malformed_urls_of_several_servers_are_refused(url: str, message: str) -> None:
    if url == "redis+cluster://":
        assert parse_address(url, role="store").seeds == (("localhost", 6379),)
        return
    with pytest.raises(InvalidSetting, match=message):
        parse_address(url, role="store")


def test_urls_of_several_servers_hide_the_password() -> None:
    address = parse_address("rediss+sentinel://u:p%40w@h1,h2:7000/orki/2?ssl_cert_reqs=none", role="store")
    assert address.seeds == (("h1", 26379), ("h2", 7000))
    assert (address.service, address.tls, address.settings["db"], address.settings["password"]) == (
        "orki",
        True,
        2,
        "p@w",
    )
    assert address.url == "rediss+sentinel://h1:26379,h2:7000/orki/2"
    assert "p@w" not in repr(address)


def test_the_event_plane_is_not_on_a_cluster(options: Make) -> None:
    with pytest.raises(InvalidSetting, match="the event plane needs a single server: give it one with --events"):
        options("redis+cluster://127.0.0.1:7000")
    assert options("redis+cluster://127.0.0.1:7000", events_url="redis://127.0.0.1:6379/0").store_address.is_cluster


async def test_a_single_server_is_no_cluster() -> None:
    with EmbeddedServer() as server:
        store = Store(server.url.replace("redis://", "redis+cluster://"), shards=1, durability=Durability())
        with pytest.raises(OrkiError, match="cluster support disabled"):
            await store.open()
        await store.close()
