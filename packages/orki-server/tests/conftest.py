"""Fixtures: a real Valkey per module, emptied between tests; a contract; a test agent; an orchestrator."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto, FileDescriptorSet
from redis import Redis

from orki.control.v1.attempt_pb2 import Failure
from orki.control.v1.session_pb2 import CancelledOutcome, ConnectRequest, ConnectResponse, ServedService
from orki.control.v1.session_pb2_grpc import SessionServiceStub
from orki.errors.v1.errors_pb2 import Reason
from orki_contract.errors import OrkiError
from orki_contract.images import image_of, service_digest
from orki_control import Credentials
from orki_control.session import (
    AgentEvent,
    AgentSession,
    AgentSessionOptions,
    ArrivedOffer,
    AttemptKey,
    AttemptsRevoked,
    CancelsArrived,
    DirectivesArrived,
    LeasesLost,
    OffersArrived,
    SessionClosed,
    SessionLost,
    SessionOpened,
)
from orki_control.transport import open_channel
from orki_server import _keys as keys
from orki_server._orchestrator import Orchestrator
from orki_server._settings import OrchestratorOptions
from orki_server._store.store import Store
from orki_server.embedded import EmbeddedServer

SERVICE = "servertests.v1.WorkService"


@pytest.fixture(scope="module")
def valkey() -> Iterator[EmbeddedServer]:
    """A server for all tests of the module."""
    with EmbeddedServer() as server:
        yield server


@pytest.fixture
def redis_url(valkey: EmbeddedServer) -> Iterator[str]:
    """URL of an empty server. Afterwards every key must be one of the table's or of the event plane."""
    with Redis.from_url(valkey.url) as redis:
        redis.flushall()
        yield valkey.url
        # Keys that do not begin with `orki:{` belong to the event plane.
        names = [name.decode() for name in redis.scan_iter(count=1000)]
        unknown = [name for name in names if name.startswith("orki:{") and not keys.match(name)]
        unknown += [name for name in names if not name.startswith("orki:")]
        assert unknown == [], "keys that keys.py does not list"


@pytest.fixture
async def store(redis_url: str) -> AsyncIterator[Store]:
    """A store of four shards on the empty server."""
    opened = Store(redis_url, shards=4, retention=60.0)
    await opened.open()
    yield opened
    await opened.close()


# --- a contract ---


def build_work(
    service: str = SERVICE,
    *,
    edit: Callable[[FileDescriptorProto], None] = lambda file: None,
    version: str = "",
    **options: Any,
) -> ServedService:
    """The contract of a service with the tasks Do (options as given) and Direct (with progress and directives).

    Args:
        service: Its full name.
        edit: Makes another version of it: gets its file.
        version: Of the package that would hold it.
        options: Of its tasks.
    """
    library = FileDescriptorSet.FromString(image_of("orki.events.v1"))
    wanted = ("google/protobuf/descriptor.proto", "google/protobuf/duration.proto", "orki/options/v1/options.proto")
    files = [file for file in library.file if file.name in wanted]
    pool = descriptor_pool.DescriptorPool()
    for file in files:
        pool.Add(file)
    task_options = message_factory.GetMessageClass(pool.FindMessageTypeByName("orki.options.v1.TaskOptions"))
    package, _, name = service.rpartition(".")
    own = FileDescriptorProto(name="servertests/v1/work.proto", package=package, syntax="proto3")
    own.dependency.append("orki/options/v1/options.proto")
    for message in ("DoRequest", "DoResponse", "News", "Order"):
        field = own.message_type.add(name=message).field.add(name="body", number=1)
        field.type, field.label = FieldDescriptorProto.TYPE_BYTES, FieldDescriptorProto.LABEL_OPTIONAL
    declared = own.service.add(name=name)
    for method, values in (("Do", options), ("Direct", {**options, "progress": "News", "directive": "Order"})):
        rpc = declared.method.add(name=method, input_type=f".{package}.DoRequest", output_type=f".{package}.DoResponse")
        encoded = task_options(**values).SerializeToString()
        # (orki.options.v1.task) is field 50831 of MethodOptions, with a length.
        rpc.options.MergeFromString(_varint(50831 << 3 | 2) + _varint(len(encoded)) + encoded)
    edit(own)
    image = FileDescriptorSet(file=[*files, own]).SerializeToString(deterministic=True)
    return ServedService(service=service, digest=service_digest(image, service), image=image, version=version)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


@pytest.fixture
def work() -> Callable[..., ServedService]:
    """Create the contract of the tests."""
    return build_work


# --- an agent ---


class StandIn:
    """An agent of the tests: the real machine over a real stream, in the test's own loop.

    Attributes:
        offers: All that it was offered.
        opened: Sessions that were opened.
        revoked: Attempts that were taken away, with the reasons.
        cancels: Cancels that arrived.
        directives: Directives that arrived.
        deaf: Whether arriving messages are lost.
        closed: Why the instance must not come back, once it must not.
        failures: How streams ended that failed.
    """

    def __init__(
        self,
        target: str,
        services: list[ServedService],
        agent_id: str,
        slots: int,
        instance_id: str,
        credentials: Credentials,
        labels: dict[str, str],
    ) -> None:
        self.target = target
        self.credentials = credentials
        self.failures: list[grpc.aio.AioRpcError] = []
        self._injected: list[ConnectRequest] = []
        self.machine = AgentSession(
            AgentSessionOptions(
                agent_id=agent_id,
                instance_id=instance_id or os.urandom(4).hex(),
                services=tuple(services),
                slots=slots,
                labels=labels,
            )
        )
        self.offers: list[ArrivedOffer] = []
        self.opened: list[SessionOpened] = []
        self.revoked: list[tuple[AttemptKey, Reason.ValueType]] = []
        self.cancels: list[AttemptKey] = []
        self.directives: list[bytes] = []
        self.closed: OrkiError | None = None
        self.handler: Callable[[ArrivedOffer], Awaitable[bytes]] | None = None
        self.taking = True
        self.deaf = False
        self._changed = asyncio.Event()
        self._writable = asyncio.Event()
        self._task = asyncio.create_task(self._live())
        self._handlers: dict[AttemptKey, asyncio.Task[None]] = {}

    async def until(self, condition: Callable[[], bool], timeout: float = 20.0) -> None:
        """Wait until the condition holds."""
        async with asyncio.timeout(timeout):
            while not condition():
                self._changed.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.1):
                        await self._changed.wait()

    async def ready(self) -> None:
        """Wait for the first session."""
        await self.until(lambda: bool(self.opened))

    async def cut(self) -> None:
        """Break the stream."""
        self._call.cancel()

    async def move(self, target: str) -> None:
        """Connect to another orchestrator."""
        self.target = target
        self._call.cancel()

    def say(self) -> None:
        """The machine has messages to send."""
        self._writable.set()

    def inject(self, request: ConnectRequest) -> None:
        """Send a message that the machine would not send."""
        self._injected.append(request)
        self._writable.set()

    async def close(self) -> None:
        """End it without notice, like a killed process."""
        tasks = [self._task, *self._handlers.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _live(self) -> None:
        target = self.target
        channel = open_channel(target, credentials=self.credentials)
        try:
            while self.closed is None:
                if target != self.target:
                    await channel.close()
                    target = self.target
                    channel = open_channel(target, credentials=self.credentials)
                try:
                    if asyncio.current_task().cancelling():  # type: ignore[union-attr]
                        return
                    await self._stream(channel)
                except grpc.aio.AioRpcError as error:
                    self.failures.append(error)
                    self._changed.set()
                except asyncio.CancelledError:
                    pass
                if asyncio.current_task().cancelling():  # type: ignore[union-attr]
                    return
                await asyncio.sleep(0.05)
        finally:
            await channel.close()

    async def _stream(self, channel: grpc.aio.Channel) -> None:
        self._call = SessionServiceStub(channel).Connect(timeout=None)
        self.machine.connection_made(time.monotonic())
        writer = asyncio.create_task(self._write(self._call))
        try:
            while True:
                batch = await self._call.read()
                if batch is grpc.aio.EOF:
                    return
                assert isinstance(batch, ConnectResponse)
                if self.deaf:
                    continue
                self._take(self.machine.receive_batch(batch.messages, time.monotonic()))
        finally:
            self._call.cancel()
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)
            self._take(self.machine.connection_lost(time.monotonic()))

    async def _write(self, call: Any) -> None:
        while True:
            self._writable.clear()
            while (batch := self.machine.messages_to_send()) is not None:
                await call.write(batch)
            while self._injected:
                await call.write(self._injected.pop(0))
            due = self.machine.next_timer()
            wait = 0.5 if due is None else max(0.0, due - time.monotonic())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(wait, 0.5)):
                    await self._writable.wait()
            self._take(self.machine.handle_timer(time.monotonic()))

    def _take(self, events: list[AgentEvent]) -> None:
        for event in events:
            match event:
                case OffersArrived(offers):
                    for offer in offers:
                        self._offered(offer)
                case SessionOpened():
                    self.opened.append(event)
                case AttemptsRevoked(revocations):
                    for key, failure in revocations:
                        self.revoked.append((key, failure.reason))
                        self._stop(key)
                case LeasesLost(attempts):
                    for key in attempts:
                        self.revoked.append((key, Reason.REASON_LEASE_EXPIRED))
                        self._stop(key)
                case CancelsArrived(cancels):
                    for key, _, _ in cancels:
                        self.cancels.append(key)
                        if key in self._handlers:
                            self._handlers[key].cancel()
                case DirectivesArrived(directives):
                    self.directives += [payload for _, payload in directives]
                case SessionClosed(error):
                    self.closed = error
                case SessionLost():
                    self._call.cancel()
                case _:
                    pass
        self._changed.set()
        self._writable.set()

    def _offered(self, offer: ArrivedOffer) -> None:
        self.offers.append(offer)
        if self.taking and self.machine.accept(offer.attempt, time.monotonic()) and self.handler is not None:
            self._handlers[offer.attempt] = asyncio.create_task(self._handle(offer))

    async def _handle(self, offer: ArrivedOffer) -> None:
        assert self.handler is not None
        outcome: bytes | Failure | CancelledOutcome
        try:
            outcome = await self.handler(offer)
        except OrkiError as error:
            outcome = Failure(reason=error.reason, message=error.message, error_type=type(error).__name__)
        except asyncio.CancelledError:
            if offer.attempt not in self.cancels:
                raise
            outcome = CancelledOutcome(reason=Reason.REASON_CANCELLED)
        self._handlers.pop(offer.attempt, None)
        self.machine.report(offer.attempt, outcome, time.monotonic())
        self._writable.set()

    def _stop(self, key: AttemptKey) -> None:
        handler = self._handlers.pop(key, None)
        if handler is not None:
            handler.cancel()
        self.machine.release(key)


async def echo(offer: ArrivedOffer) -> bytes:
    """A handler that returns its request."""
    return offer.offer.request


@pytest.fixture
async def stand_in() -> AsyncIterator[Callable[..., StandIn]]:
    """Create agents, and end them after the test."""
    made: list[StandIn] = []

    def make(
        target: str,
        services: list[ServedService] | None = None,
        *,
        agent_id: str = "agent-1",
        slots: int = 4,
        instance_id: str = "",
        credentials: Credentials = Credentials(),  # noqa: B008
        handler: Callable[[ArrivedOffer], Awaitable[bytes]] | None = echo,
        taking: bool = True,
        labels: dict[str, str] | None = None,
    ) -> StandIn:
        served = services or [build_work()]
        agent = StandIn(target, served, agent_id, slots, instance_id, credentials, labels or {})
        agent.handler, agent.taking = handler, taking
        made.append(agent)
        return agent

    yield make
    for agent in made:
        await agent.close()


# --- an orchestrator ---


class Served:
    """`orki serve` as a child process."""

    def __init__(self, redis_url: str, folder: Path) -> None:
        self._url = redis_url
        self._ready = folder / "ready.json"
        self._listen = "127.0.0.1:0"
        self.process: asyncio.subprocess.Process | None = None
        self.address = ""

    async def start(self) -> None:
        self._ready.unlink(missing_ok=True)
        arguments = ["--listen", self._listen, "--ready-file", str(self._ready), "--heartbeat-interval-ms", "300"]
        self.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "orki_server", "serve", *arguments),
            env={**os.environ, "ORKI_REDIS_URL": self._url, "ORKI_SHARDS": "4", "ORKI_DRAIN_GRACE_MS": "100"},
            stdout=asyncio.subprocess.DEVNULL,
        )
        async with asyncio.timeout(40):
            while not self._ready.exists():
                assert self.process.returncode is None, "orki serve ended before it was ready"
                await asyncio.sleep(0.02)
        self.address = json.loads(self._ready.read_text())["address"]
        self._listen = self.address

    async def end(self, number: signal.Signals) -> None:
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)
        await self.process.wait()
        self.process._transport.close()  # type: ignore[attr-defined]


@pytest.fixture
async def served(redis_url: str, tmp_path: Path) -> AsyncIterator[Served]:
    process = Served(redis_url, tmp_path)
    await process.start()
    yield process
    await process.end(signal.SIGTERM)


def options_for(redis_url: str, **more: Any) -> OrchestratorOptions:
    """Return options of an orchestrator with short timeouts on a free port."""
    values: dict[str, Any] = {
        "listen": "127.0.0.1:0",
        "redis_url": redis_url,
        "orchestrator_id": "o1",
        "shards": 4,
        "heartbeat_interval": 0.2,
        "accept_timeout": 1.0,
        "drain_grace": 0.2,
        "sweep_interval": 0.02,
    }
    return OrchestratorOptions(**(values | more))


@pytest.fixture
async def orchestrator(redis_url: str) -> AsyncIterator[Orchestrator]:
    """An orchestrator in this event loop on the empty server."""
    running = Orchestrator(options_for(redis_url))
    await running.start()
    yield running
    await running.stop()


@pytest.fixture
async def launch() -> AsyncIterator[Callable[[OrchestratorOptions], Awaitable[Orchestrator]]]:
    """Start orchestrators, and stop them after the test."""
    launched: list[Orchestrator] = []

    async def start(options: OrchestratorOptions) -> Orchestrator:
        orchestrator = Orchestrator(options)
        await orchestrator.start()
        launched.append(orchestrator)
        return orchestrator

    yield start
    for orchestrator in launched:
        await orchestrator.stop()


@pytest.fixture
def options() -> Callable[..., OrchestratorOptions]:
    """Create options of an orchestrator with short timeouts."""
    return options_for
