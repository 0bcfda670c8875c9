"""A simulated fleet: the product's orchestrators, agents and clients, over a simulated network and server."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any, Final
from unittest import mock

from chaos.history import Record
from orki.control.v1 import session_pb2_grpc, submitter_pb2_grpc, task_pb2_grpc
from orki.control.v1.attempt_pb2 import Budget, TaskState
from orki.events.v1.task_pb2 import TaskEvent
from orki_agent import _channel
from orki_agent._channel import SessionChannel
from orki_agent._runner import Runner
from orki_agent._services import Handler
from orki_agent._settings import RunSettings
from orki_agent._threads import Mailbox
from orki_contract import Budget as Limit
from orki_contract import SubmitSettings
from orki_contract.backoff import JitterOptions
from orki_contract.errors import OrkiError, UnknownMethod, UnknownTask, WaitTimeout
from orki_contract.images import message_class, service_digest
from orki_contract.read import read_image
from orki_control import Client, ClientOptions, _links
from orki_control.session import (
    AgentEvent,
    AgentSession,
    AgentSessionOptions,
    AttemptKey,
    ResultsAcknowledged,
    SessionClosed,
)
from orki_server import _admission, _orchestrator, _registry, _wakeups
from orki_server._orchestrator import Orchestrator
from orki_server._settings import OrchestratorOptions
from orki_server._store import server as store_server
from simulator.contract import contract
from simulator.network import Network
from simulator.planes import REDIS, EventPlane, StoreLink
from simulator.redis import Server
from simulator.world import Process, World

_SMALL: Final = Limit(tokens=25)
_LARGE: Final = Limit(tokens=1_000_000)
_QUICK: Final = JitterOptions(initial=0.05, maximum=0.5, stable=1.0)
_TERMINAL: Final = frozenset(
    {TaskState.TASK_STATE_SUCCEEDED, TaskState.TASK_STATE_FAILED, TaskState.TASK_STATE_CANCELLED}
)


_READ, _DIGEST, _CLASS = cache(read_image), cache(service_digest), cache(message_class)


class Fleet:
    """Processes of one run, and the history that they write.

    Attributes:
        world: The clock and the processes.
        network: Their connections.
        history: Records for the checker; see `chaos.checker.check_control`.
        redis: The server with the store.
        redis_up: Whether it answers.
        skew: How far the clock of its host is ahead, in seconds.
        events: Ids of the published lifecycle events, with their task and kind.
        processes: Running processes by name.
        snapshots: Copies of the server's data, by the time of the fault that restores them.
        lost_tail: Whether the server has lost its newest writes.
        outbox: Whether the event plane is on a server of its own, so that events take the way through the outbox.
    """

    def __init__(self, world: World, *, outbox: bool, orchestrators: int = 2, agents: int = 2) -> None:
        self.world = world
        self.network = Network(world)
        self.history: list[Record] = []
        self.skew = 0.0
        self.redis = Server(lambda: world.now + 1_700_000_000.0 + self.skew)
        self.redis.published = self._published
        self.redis_up = True
        self.lose_replies = 0.0
        self.connections: list[StoreLink] = []
        self.events: dict[bytes, tuple[str, str]] = {}
        self.doubles = 0
        self.processes: dict[str, Process] = {}
        self.snapshots: dict[float, Any] = {}
        self.lost_tail = False
        self.addresses = [f"127.0.0.1:{5000 + number}" for number in range(1, orchestrators + 1)]
        self.outbox = outbox
        self._agents = agents
        self._starts = 0

    def add(self, event: str, **fields: Any) -> None:
        """Append a record to the history."""
        actor = self.world.current.name if self.world.current else "driver"
        self.history.append({"t": self.world.now, "actor": actor, "event": event, **fields})

    @contextmanager
    def product(self) -> Iterator[None]:
        """Replace the product's sockets by those of the simulation."""
        with ExitStack() as stack:
            for module, name, value in (
                (store_server, "Connection", lambda address, **_: StoreLink(self, address)),
                (_wakeups, "Connection", lambda address, **_: StoreLink(self, address)),
                (_orchestrator, "connect", lambda *_, **__: EventPlane(self)),
                (_channel, "open_channel", self.network.channel),
                (_links, "open_channel", self.network.channel),
                # Pure functions of the one contract, which take most of an agent's hello.
                (_admission, "read_image", _READ),
                (_admission, "service_digest", _DIGEST),
                (_registry, "message_class", _CLASS),
            ):
                stack.enter_context(mock.patch.object(module, name, value))
            stack.enter_context(self.world.clock())
            logging.disable(logging.WARNING)
            stack.callback(logging.disable, logging.NOTSET)
            yield

    def start(self) -> None:
        """Start all orchestrators and agents."""
        for number in range(1, len(self.addresses) + 1):
            self.start_orchestrator(f"orchestrator-{number}")
        for number in range(1, self._agents + 1):
            self.start_agent(f"agent-{number}")

    def _process(self, name: str) -> Process:
        process = self.processes[name] = self.world.process(name)
        return process

    def start_orchestrator(self, name: str) -> None:
        """Start an orchestrator, also after it was killed."""
        process = self._process(name)
        self._starts += 1
        process.start(_serve(self, process, self.addresses[int(name[-1]) - 1], f"{name}@{self._starts}"))

    def start_agent(self, name: str) -> None:
        """Start an agent, also after it was killed."""
        process = self._process(name)
        self._starts += 1
        process.start(SimulatedAgent(self, name, f"instance-{self._starts}").run())

    def start_client(self, name: str, main: Callable[[Client], Any], first: int = 0, *, alone: bool = False) -> Process:
        """Start a client; `first` is the orchestrator that it tries first, or the only one that it knows."""
        process = self._process(name)
        targets = self.addresses[first:] + self.addresses[:first]
        if alone:
            targets = targets[:1]

        async def run() -> None:
            options = ClientOptions(patience=120.0, call_timeout=3.0, backoff=_QUICK)
            async with Client(targets, options) as client:
                await main(client)

        process.start(run())
        return process

    @staticmethod
    def outcome(task: Any) -> Record:
        """Return a snapshot's outcome as the checker reads it."""
        response = contract().WorkResponse.FromString(task.response)
        state = TaskState.Name(task.state).removeprefix("TASK_STATE_")
        return {"state": state, "attempt": response.attempt, "fence": response.fence, "lines": response.lines}

    def kill(self, name: str) -> None:
        """Kill a process with all that it knows."""
        self.processes[name].kill()
        self.network.cut(name)

    def stop_redis(self) -> None:
        """Stop the server; its connections break."""
        self.redis_up = False
        for link in self.connections:
            link.broken()

    def _published(self, channel: bytes, message: bytes) -> None:
        for link in self.connections:
            if link.channel == channel and not self.network.is_blocked(link.process.name, REDIS):
                arrives = self.world.now + self.network.delay(link.process.name, REDIS) / 4
                self.world.call_at(arrives, link.process.call, link.receive, message)

    def lifecycle(self) -> list[tuple[str, str]]:
        """Return task and kind of each published event."""
        stream = self.redis.execute(("XRANGE", "orki:ev:{tasks}", "-", "+"))
        written = [
            TaskEvent.FromString(dict(zip(fields[::2], fields[1::2], strict=True))[b"d"]) for _, fields in stream
        ]
        return [*self.events.values(), *((each.task_id, each.WhichOneof("event") or "") for each in written)]

    def cut_store(self, name: str) -> None:
        """Break the connections of an orchestrator to the store."""
        for link in self.connections:
            if link.process.name == name:
                link.broken()


# --- Orchestrators. ---


class _Server:
    """Stands in for `grpc.aio.Server`."""

    def __init__(self, fleet: Fleet, process: Process, address: str, orchestrator: SimulatedOrchestrator) -> None:
        self._fleet, self._process, self._address = fleet, process, address
        self._orchestrator = orchestrator

    async def start(self) -> None:
        self._fleet.network.listen(self._address, self._process, self._find)

    async def stop(self, grace: float) -> None:
        self._fleet.network.cut(self._process.name)

    def _find(self, path: str) -> Any:
        _, service, name = path.split("/")
        method = getattr(self._orchestrator.servicers[service], name)

        async def handle(context: Any) -> None:
            self._orchestrator._gate.enter(context)
            if service in _UNARY:
                await context.write(await method(await context.read(), context))
            else:
                await method(None, context)

        return handle


_SESSIONS: Final = "orki.control.v1.SessionService"
_SUBMITTERS: Final = "orki.control.v1.SubmitterService"
_TASKS: Final = "orki.control.v1.TaskService"
_FLEET: Final = "orki.control.v1.FleetService"
_UNARY: Final = frozenset({_TASKS, _FLEET})
_STUBS: Final = (session_pb2_grpc, submitter_pb2_grpc, task_pb2_grpc)


class SimulatedOrchestrator(Orchestrator):
    """The product's orchestrator, without sockets."""

    server: Callable[[], Any]
    address_for_agents: str

    @property
    def servicers(self) -> dict[str, Any]:
        """The servicers by the name of their service."""
        return {
            _SESSIONS: self._sessions,
            _SUBMITTERS: self._submitter_sessions,
            _TASKS: self._submitters,
            _FLEET: self._fleet,
        }

    def _build_server(self) -> Any:
        self._connections.run = _for_ever  # type: ignore[assignment, method-assign]
        return self.server()

    async def start(self) -> None:
        # The simulated server has no other states than those that the store's connection notices.
        self._watch.run = _for_ever  # type: ignore[method-assign]
        self._watch.refuse_evicting = _nothing  # type: ignore[method-assign]
        await super().start()

    def _listen(self, server: Any) -> str:
        return self.address_for_agents


async def _nothing() -> None: ...


async def _for_ever(*_: object) -> None:
    await asyncio.Event().wait()


async def _serve(fleet: Fleet, process: Process, address: str, name: str) -> None:
    while True:
        options = OrchestratorOptions(
            listen=address,
            redis_url="redis://127.0.0.1:6379/0",
            events_url="redis://127.0.0.1:6380/0" if fleet.outbox else "",
            orchestrator_id=name,
            shards=1,
            heartbeat_interval=0.5,
            hello_timeout=2.0,
            accept_timeout=1.0,
            sweep_interval=0.5,
        )
        orchestrator = SimulatedOrchestrator(options)
        orchestrator.address_for_agents = address
        orchestrator.server = lambda: _Server(fleet, process, address, orchestrator)  # noqa: B023
        try:
            await orchestrator.start()
            break
        except OrkiError:
            # A supervisor starts it again.
            await asyncio.sleep(0.5)
    await orchestrator.serve(asyncio.Event())


# --- Agents. ---


class SimulatedAgent:
    """The product's session, channel and runner in one loop; its handlers do what the request says.

    A plan is a list of steps, separated by spaces: `sleep:SECONDS`, `progress:COUNT`, `use:TOKENS` of its budget,
    `fail` at each attempt, `flaky` at the first, and `stubborn`, which ignores a cancel.
    """

    def __init__(self, fleet: Fleet, agent_id: str, instance_id: str) -> None:
        self.agent_id = agent_id
        self.max_payload_bytes = 1 << 20
        self._fleet = fleet
        self._instance_id = instance_id

    async def run(self) -> None:
        """Keep a session until the process is killed."""
        loop = asyncio.get_running_loop()
        served = contract()
        options = AgentSessionOptions(
            agent_id=self.agent_id, instance_id=self._instance_id, services=(served.served,), slots=2
        )
        session = AgentSession(options)
        addresses = self._fleet.addresses[:]
        self._fleet.world.chance.shuffle(addresses)
        settings = RunSettings(orchestrator=",".join(addresses), agent_id=self.agent_id, backoff=_QUICK)
        channel = SessionChannel(session, settings, lambda: None)
        mailbox = Mailbox(loop)
        handler = Handler(served.task, served.task.contract.full_name, self._work, True)
        services: Any = self
        runner = self._runner = Runner(session, {handler.name: handler}, services, mailbox, mailbox, 64)
        runner.on_other = self._other

        def handle(events: Sequence[AgentEvent]) -> None:
            for event in events:
                if isinstance(event, ResultsAcknowledged):
                    for key in event.attempts:
                        self._fleet.add("acknowledged", task=key.task_id, fence=key.fence)
            runner.handle(events)

        channel.on_events, channel.on_sent = handle, runner.grant
        await channel.run()

    def _other(self, event: Any) -> None:
        if isinstance(event, SessionClosed):
            self._fleet.world.failed(f"{self.agent_id} was refused: {event.error}", event.error)

    def send_progress(self, attempt: AttemptKey, payload: bytes) -> None:
        """Queue progress."""
        self._runner.send_progress(attempt, payload)

    def report_usage(self, attempt: AttemptKey, total: Budget) -> None:
        """Report usage."""
        self._runner.report_usage(attempt, total)

    def collect(self, *_: object) -> None:
        """Publish nothing: the events of agents are not part of a run."""

    async def _work(self, request: Any, ctx: Any) -> Any:
        fleet, served = self._fleet, contract()
        key = {"task": ctx.task_id, "attempt": ctx.attempt, "fence": ctx.fence}
        fleet.add("started", **key)
        sent = used = 0
        for step in request.plan.split():
            name, _, value = step.partition(":")
            match name:
                case "sleep":
                    await asyncio.sleep(float(value))
                case "progress":
                    for _ in range(int(value)):
                        sent += 1
                        await ctx.progress(served.WorkProgress(number=sent))
                case "use":
                    used += int(value)
                    fleet.add("used", task=ctx.task_id, fence=ctx.fence, tokens=used)
                    ctx.usage(model="m", input_tokens=int(value), output_tokens=0)
                case "flaky" if ctx.attempt == 1:
                    raise ValueError("the first attempt fails by intent")
                case "fail":
                    raise ValueError("the attempt fails by intent")
                case "stubborn":
                    with contextlib.suppress(asyncio.CancelledError):
                        await asyncio.sleep(1.0)
                    await asyncio.sleep(0.5)
        fleet.add("finished", **key)
        return served.WorkResponse(attempt=ctx.attempt, fence=ctx.fence, lines=len(request.plan))


# --- Submitters. ---


def submit(
    fleet: Fleet, key: str, plan: str, expect: list[str], cancel_after: float | None = None
) -> Callable[[Client], Any]:
    """Return a client's work: submit a task, follow it to its end, and cancel it after a time."""

    async def main(client: Client) -> None:
        served = contract()
        while True:
            with contextlib.suppress(UnknownMethod):  # No agent has connected yet.
                settings: SubmitSettings = {"budget": _SMALL} if "use:" in plan else {}
                request = served.WorkRequest(plan=plan)
                handle = await client.submit(served.task, request, idempotency_key=key, **settings)
                break
            await asyncio.sleep(0.2)
        fleet.add("submitted", key=key, task=handle.task_id, lines=len(plan), expect=expect)
        follower = asyncio.create_task(_follow(fleet, handle)) if "progress" in plan else None
        try:
            if cancel_after is not None:
                await asyncio.sleep(cancel_after)
                await client.cancel(handle.task_id)
            task = await _ended(client, handle)
        except UnknownTask:
            fleet.add("forgotten", task=handle.task_id)
            if not fleet.lost_tail:
                raise
            return
        fleet.add("result", task=handle.task_id, **fleet.outcome(task), message=task.failure.message)
        if follower is not None:
            await asyncio.wait([follower], timeout=30.0)
            fleet.add("followed", task=handle.task_id, ended=follower.done())
            follower.cancel()

    return main


async def _ended(client: Client, handle: Any) -> Any:
    """Return the snapshot of an ended task; wait by the client's session."""
    while True:
        try:
            with contextlib.suppress(WaitTimeout, OrkiError):
                await handle.result(5.0)
            task = await client.get(handle.task_id)
            if task.state in _TERMINAL:
                return task
            if task.over_budget:
                await client.raise_budget(handle.task_id, _LARGE)
        except OrkiError as error:
            if not error.retryable:
                raise


async def _follow(fleet: Fleet, handle: Any) -> None:
    with contextlib.suppress(OrkiError):  # The server may have lost the task, or the client is closed.
        await _deltas(fleet, handle)


async def _deltas(fleet: Fleet, handle: Any) -> None:
    async for delta in handle.progress(lambda gap: fleet.add("gap", task=handle.task_id, count=gap.count)):
        fleet.add("delta", task=handle.task_id, number=delta.number)
