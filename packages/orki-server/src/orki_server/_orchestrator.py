"""The orchestrator: the parts, wired; their start, their end in good order, and what happens when one fails."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine
from typing import Any, Final

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc  # type: ignore[import-untyped]
from grpc_reflection.v1alpha import reflection  # type: ignore[import-untyped]

from orki.control.v1 import session_pb2, session_pb2_grpc, task_pb2, task_pb2_grpc
from orki.events.v1.agent_orki import AGENTS
from orki.events.v1.audit_orki import AUDIT
from orki.events.v1.task_orki import TASKS
from orki_contract.errors import ContractMismatch, InvalidSetting, OrkiError
from orki_control.session import OrchestratorSessionOptions
from orki_control.transport import server_options
from orki_events import Events, connect
from orki_server._dispatch import Dispatcher, Sweeper
from orki_server._events import AgentEvents, OutboxPublisher
from orki_server._fleet import FleetServicer, FleetUpdates, Handshake, silence_us
from orki_server._registry import ContractRegistry
from orki_server._requests import RequestRules
from orki_server._session import SessionRegistry
from orki_server._sessions import Reports, SessionServicer
from orki_server._settings import OrchestratorOptions, parse_listen
from orki_server._store.connection import without_credentials
from orki_server._store.store import Store
from orki_server._tasks import TaskServicer, Watchers

SERVICES: Final = tuple(
    file.services_by_name[name].full_name
    for file in (session_pb2.DESCRIPTOR, task_pb2.DESCRIPTOR)
    for name in sorted(file.services_by_name)
)
"""Full names of the services that an orchestrator offers."""

_STOP_S: Final = 1.0
_STREAMS_PER_CONNECTION: Final = 1_000
_log = logging.getLogger("orki.server")


class Orchestrator:
    """One orchestrator in this event loop: `start()`, then `serve()` or one's own work, then `stop()`."""

    def __init__(self, options: OrchestratorOptions) -> None:
        self.options = options
        self._address = ""
        self._store = Store(options.redis_url, shards=options.shards, retention_ms=options.retention_ms)
        self._events: Events = connect(options.events_at, producer=options.orchestrator_id)
        self._tasks: list[asyncio.Task[None]] = []
        self._failed = asyncio.Event()
        self._health = health.aio.HealthServicer()
        self._healthy = asyncio.Event()
        self._wire()

    def _wire(self) -> None:
        options, store = self.options, self._store
        self._roster = SessionRegistry()
        self._notes = FleetUpdates(store)
        self._registry = ContractRegistry(store, silence_us(options.heartbeat_interval_ms), self._notes.flush)
        self._watchers = Watchers(store)
        self._drain = OutboxPublisher(store, self._events)
        self._announcer = AgentEvents(self._events, options.orchestrator_id)
        self._reports = Reports(
            store=store,
            progress_kept=options.progress_kept,
            moved=self._moved,
            queued=self._queued,
            refused=self._announcer.refused,
        )
        self._dispatcher = Dispatcher(store, self._roster, self._reports, options.accept_timeout_ms, self._moved)
        self._sweeper = Sweeper(
            store,
            self._roster,
            interval_s=options.sweep_interval_ms / 1000,
            grace_s=2 * options.heartbeat_interval_ms / 1000,
            queued=self._dispatcher.queued,
            moved=self._moved,
        )
        session_options = OrchestratorSessionOptions(
            orchestrator_id=options.orchestrator_id,
            heartbeat_interval=options.heartbeat_interval_ms / 1000,
            hello_timeout=options.hello_timeout_ms / 1000,
            max_message_bytes=options.max_message_bytes,
            events_url=without_credentials(options.events_at),
        )
        greeter = Handshake(store, self._registry, self._roster, options.max_sessions)
        self._sessions = SessionServicer(
            session_options,
            self._roster,
            greeter,
            self._reports,
            self._notes,
            self._announcer,
            self._slots_changed,
        )
        rules = RequestRules(options.max_payload_bytes, options.shards)
        self._submitters = TaskServicer(
            store, self._registry, self._roster, self._watchers, rules, self._dispatcher.queued, self._moved
        )
        self._fleet = FleetServicer(store, self._roster, options.heartbeat_interval_ms)
        store.on_change(self._store_changed)
        store.on_loss(self._store_lost)

    # --- what parts tell each other ---

    def _moved(self, task_id: str, ended: bool) -> None:
        self._watchers.moved(task_id, ended)
        self._drain.wake()

    def _queued(self, shard: int, wait_ms: int) -> None:
        if wait_ms > 0:
            self._sweeper.wake_in(wait_ms)
        else:
            self._dispatcher.queued(shard)

    def _slots_changed(self, new_methods: bool) -> None:
        if new_methods:
            self._dispatcher.look_everywhere()
        else:
            self._dispatcher.slots_changed()

    def _store_changed(self, up: bool) -> None:
        if up:
            _log.info("the store at %s is back", self._store.address)
            self._dispatcher.look_everywhere()
        elif self._address:  # before it listens, `start` fails and says why
            _log.error("the store at %s is away; agents go on, nothing new is taken", self._store.address)
        self._healthy.set()

    def _store_lost(self) -> None:
        """The store came back without what it had. Hellos bring it again: services, agents, attempts that are held."""
        _log.error("the store at %s has lost data; all agents are asked to connect again", self._store.address)
        self._registry.forget()
        self._sessions.end_all("the store lost data")

    # --- life ---

    @property
    def address(self) -> str:
        """HOST:PORT, once it has started."""
        return self._address

    async def start(self) -> None:
        """Connects to the store and begins to listen.

        Raises:
            StoreUnavailable: The store does not answer.
            InvalidSetting: The port is taken, or the store was laid out otherwise.
            ContractMismatch: A stream that it publishes is registered by a contract with which its own one breaks.
        """
        try:
            await self._store.open()
            await self._events.__aenter__()
            await self._prepare_streams()
            await self._registry.refresh()
            self._server = self._build_server()
            self._address = self._listen(self._server)
        except BaseException:
            await self._close_stores()
            raise
        await self._server.start()
        self._healthy.set()
        self._dispatcher.look_everywhere()
        for name, work in (
            ("dispatch", self._dispatcher.run()),
            ("sweep", self._sweeper.run()),
            ("outbox drain", self._drain.run()),
            ("fleet notes", self._notes.run()),
            ("registry", self._registry.run()),
            ("health", self._tell_health()),
        ):
            self._spawn(name, work)
        _log.info("listening on %s, store at %s", self._address, self._store.address)

    async def _prepare_streams(self) -> None:
        """Registers what it publishes, so that an orchestrator whose contracts do not fit is refused at its start."""
        try:
            for stream in (TASKS, AGENTS, AUDIT):
                await self._events.prepare(stream)
        except ContractMismatch:
            raise
        except OrkiError as error:
            # Tasks go on without the event plane; it is asked again with the first event.
            _log.warning("the event plane does not take the orchestrator's streams now: %s", error.message)

    async def serve(self, stopped: asyncio.Event) -> None:
        """Waits until `stopped` is set.

        Raises:
            LocalProtocolError: A part of the orchestrator failed: a defect.
        """
        waits = [asyncio.create_task(each.wait()) for each in (stopped, self._failed)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in waits:
                each.cancel()
            await asyncio.gather(*waits, return_exceptions=True)
        for task in self._tasks:
            if task.done() and not task.cancelled() and (error := task.exception()):
                raise error

    async def stop(self) -> None:
        """Says Drain, waits for what runs as long as the grace allows, and ends; leases go on in the store.

        Harmless when it has not started, or has stopped.
        """
        if not self._tasks:
            return
        self._submitters.draining = True
        await self._health.enter_graceful_shutdown()
        await self._sessions.drain(self.options.drain_grace_ms)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        if self._store.up:
            with contextlib.suppress(OrkiError):
                await self._notes.flush()
                await self._drain.empty()
        await self._server.stop(_STOP_S)
        await self._close_stores()

    async def _close_stores(self) -> None:
        await self._events.close()
        await self._store.close()

    def _spawn(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name=f"orki {name}")
        task.add_done_callback(self._part_ended)
        self._tasks.append(task)

    def _part_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.critical("%s failed: a defect; the orchestrator stops", task.get_name(), exc_info=error)
            self._failed.set()

    # --- gRPC ---

    def _build_server(self) -> grpc.aio.Server:
        options = [
            *server_options(self.options.max_message_bytes),
            ("grpc.max_concurrent_streams", _STREAMS_PER_CONNECTION),
        ]
        server = grpc.aio.server(options=options, compression=grpc.Compression.NoCompression)
        session_pb2_grpc.add_SessionServiceServicer_to_server(self._sessions, server)
        task_pb2_grpc.add_TaskServiceServicer_to_server(self._submitters, server)
        task_pb2_grpc.add_FleetServiceServicer_to_server(self._fleet, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection((*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        return server

    def _listen(self, server: grpc.aio.Server) -> str:
        host, _ = parse_listen(self.options.listen)
        try:
            port = server.add_insecure_port(self.options.listen)
        except RuntimeError as error:
            raise InvalidSetting(
                f"cannot listen on {self.options.listen}: the port is taken; choose another with --listen HOST:PORT "
                "(port 0 takes a free one)"
            ) from error
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    async def _tell_health(self) -> None:
        """Keeps `grpc.health.v1` true: NOT_SERVING while the store is away."""
        status = health_pb2.HealthCheckResponse
        while True:
            await self._healthy.wait()
            self._healthy.clear()
            state = status.SERVING if self._store.up else status.NOT_SERVING
            for service in ("", *SERVICES):
                await self._health.set(service, state)
