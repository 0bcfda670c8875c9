"""The orchestrator: connects its parts, starts and stops them, and ends when one of them fails."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine
from functools import partial
from typing import Any, Final

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc  # type: ignore[import-untyped]
from grpc_reflection.v1alpha import reflection  # type: ignore[import-untyped]

from orki.control.v1 import (
    schedule_pb2,
    schedule_pb2_grpc,
    session_pb2,
    session_pb2_grpc,
    submitter_pb2,
    submitter_pb2_grpc,
    task_pb2,
    task_pb2_grpc,
)
from orki.events.v1.agent_orki import AGENTS
from orki.events.v1.audit_orki import AUDIT
from orki.events.v1.task_orki import TASKS
from orki_contract.errors import ContractMismatch, InvalidSetting, OrkiError
from orki_control.session import OrchestratorSessionOptions
from orki_control.submitter import ServingOptions
from orki_control.transport import server_options
from orki_events import EventOptions, Events, connect
from orki_server._budgets import Budgets
from orki_server._connections import Connections, connection_limits
from orki_server._dispatch import Dispatcher, Sweeper
from orki_server._events import AgentEvents, OutboxPublisher
from orki_server._explain import Explainer
from orki_server._families import Families
from orki_server._files import WatchedFiles, server_credentials, watch_certificates, watch_files
from orki_server._fleet import FleetServicer, FleetUpdates, Handshake
from orki_server._health.loop import HealthLoop
from orki_server._health.probe import ServerProbe
from orki_server._identity import Gate
from orki_server._registry import ContractRegistry, PayloadCheck
from orki_server._relay import Relay
from orki_server._requests import TypedRequests
from orki_server._schedules import Scheduler, Schedules, ScheduleServicer
from orki_server._session import SessionRegistry, idle_interval
from orki_server._sessions import Reports, SessionServicer
from orki_server._settings import OrchestratorOptions, parse_listen
from orki_server._store.contracts import Contracts
from orki_server._store.fleet import Fleet
from orki_server._store.store import Store
from orki_server._submitters import Services, SubmitterServicer
from orki_server._tasks import RequestRules, TaskServicer, Watchers
from orki_server._unanswered import UnansweredOffers
from orki_server._wakeups import Announced, Wakeups

SERVICES: Final = tuple(
    file.services_by_name[name].full_name
    for file in (session_pb2.DESCRIPTOR, submitter_pb2.DESCRIPTOR, task_pb2.DESCRIPTOR, schedule_pb2.DESCRIPTOR)
    for name in sorted(file.services_by_name)
)
"""Full names of the orchestrator's gRPC services."""

EVENTS_SERVICE: Final = "orki.events"
"""Name under which the health service reports the event plane."""

_STOP_TIMEOUT: Final = 1.0
_PUBLISH_TIMEOUT: Final = 1.0
"""Maximum time for the events that are left at the end."""
_FLUSH_TIMEOUT: Final = 1.5
"""Maximum time for all that the store is told at the end."""
_PROBE_TIMEOUT: Final = 2.0
_STREAMS_PER_CONNECTION: Final = 1_000
_log = logging.getLogger("orki.server")


class Orchestrator:
    """One orchestrator in this event loop: call `start()`, then `serve()` or other work, then `stop()`.

    Attributes:
        options: Its options.
        address: HOST:PORT, once it has started.
    """

    def __init__(self, options: OrchestratorOptions) -> None:
        self.options = options
        self.address = ""
        self._store = Store(
            options.redis_url,
            shards=options.shards,
            retention=options.retention,
            caller=options.orchestrator_id,
            durability=options.store_durability,
        )
        self._events: Events = connect(
            options.events_at,
            producer=options.orchestrator_id,
            options=EventOptions(drain_timeout=_PUBLISH_TIMEOUT),
        )
        self._tasks: list[asyncio.Task[None]] = []
        self._failed = asyncio.Event()
        self._health = health.aio.HealthServicer()
        self._health_changed = asyncio.Event()
        self._watch = HealthLoop(_probes(options), self._health_changed.set)
        limits = connection_limits(
            wanted=options.max_connections,
            per_address=options.max_connections_per_address,
            handshakes=options.max_handshakes,
            timeout=options.handshake_timeout,
        )
        self._connections = Connections(limits)
        self._gate = Gate(
            certificates=bool(options.client_ca),
            tokens_file=options.tokens_file,
            policy_file=options.policy_file,
            on_caller=self._connections.established,
        )
        self._files: list[WatchedFiles[Any]] = self._gate.files
        self._connect_parts()

    def _connect_parts(self) -> None:
        options, store = self.options, self._store
        fleet, contracts = Fleet(store.connection), Contracts(store.connection, store.shards)
        # A silent agent's orchestrator may need a moment to store its last heartbeat.
        silence_timeout = 3 * options.heartbeat_interval + 2.0
        sessions = SessionRegistry()
        self._updates = FleetUpdates(store, fleet)
        self._registry = ContractRegistry(store.connection, contracts, fleet, silence_timeout, self._updates.flush)
        self._outbox = OutboxPublisher(store, self._events, same_server=not options.events_url)
        announced = Announced(
            queued=lambda shard, method, count: self._dispatcher.demand.queued(shard, method, count),
            mail=lambda shard: self._relay.has_mail(shard),
            changed=self._task_announced,
            resumed=lambda: self._dispatcher.demand.all_queued(),
            missed=self._announcements_missed,
        )
        self._wakeups = Wakeups(store, announced)
        watchers = self._watchers = Watchers(store, self._outbox.wake.set, lambda: self._wakeups.poll)
        agent_events = AgentEvents(self._events, options.orchestrator_id)
        self._budgets = Budgets(
            store, sessions, lambda shard, method: self._dispatcher.demand.queued(shard, method), watchers.changed
        )
        reports = Reports(
            store=store,
            progress_kept=options.progress_kept,
            on_change=watchers.changed,
            on_queued=self._task_queued,
            on_refused=agent_events.refused,
            on_unanswered=lambda session, attempts: self._unanswered.add(session, attempts),
            idle_interval=lambda: idle_interval(len(sessions), options.heartbeat_interval),
            budgets=self._budgets,
        )
        self._unanswered = UnansweredOffers(store, fleet, reports.settled)
        self._dispatcher = Dispatcher(
            store, reports, options.accept_timeout, watchers.changed, lambda: self._wakeups.poll, self._budgets
        )
        demand = self._dispatcher.demand
        self._relay = Relay(store, sessions, self._registry)
        self._families = Families(store, sessions, watchers.changed)
        self._sweeper = Sweeper(
            store,
            sessions,
            interval=options.sweep_interval,
            pause=2 * options.heartbeat_interval,
            on_queued=demand.queued,
            on_change=watchers.changed,
            on_mail=self._relay.has_mail,
            on_orphans=self._families.has_orphans,
            on_raised=self._budgets.were_raised,
        )
        self._make_agent_services(fleet, contracts, sessions, reports, agent_events, silence_timeout)
        self._make_submitter_services(contracts, sessions)
        store.connection.on_change(self._store_changed)
        store.on_loss(self._store_lost)
        store.connection.on_recovery(partial(self._check_sessions, fleet, sessions))

    def _make_agent_services(
        self,
        fleet: Fleet,
        contracts: Contracts,
        sessions: SessionRegistry,
        reports: Reports,
        agent_events: AgentEvents,
        silence_timeout: float,
    ) -> None:
        options, store, demand = self.options, self._store, self._dispatcher.demand
        session_options = OrchestratorSessionOptions(
            orchestrator_id=options.orchestrator_id,
            heartbeat_interval=options.heartbeat_interval,
            hello_timeout=options.hello_timeout,
            max_message_bytes=options.max_message_bytes,
            events_url=options.events_address.url,
        )
        handshake = self._handshake = Handshake(store, fleet, self._registry, sessions, options.max_sessions)
        self._sessions = SessionServicer(
            session_options, sessions, handshake, reports, self._updates, agent_events, demand
        )
        self._fleet = FleetServicer(store, fleet, contracts, sessions, silence_timeout, demand.all_queued)

    def _make_submitter_services(self, contracts: Contracts, sessions: SessionRegistry) -> None:
        options, store, watchers = self.options, self._store, self._watchers
        self._submitters = TaskServicer(
            store,
            self._registry,
            PayloadCheck(contracts, self._registry),
            sessions,
            watchers,
            RequestRules(options.max_payload_bytes),
            self._dispatcher.demand,
            self._relay,
            Explainer(store, self._registry, lambda: self._fleet.agents_now(), self._budgets.balances),
            self._budgets,
        )
        self._results = watchers.results
        self._submitter_sessions = SubmitterServicer(
            ServingOptions(
                orchestrator_id=options.orchestrator_id,
                max_message_bytes=options.max_message_bytes,
                hello_timeout=options.hello_timeout,
            ),
            Services(store, self._submitters, self._submitters.submissions, watchers, watchers.results),
            options.max_sessions,
        )
        schedules = Schedules(store.connection)
        self._scheduler = Scheduler(schedules, store.connection.up, self._submitters.submit)
        self._schedules = ScheduleServicer(schedules, self._submitters.submissions.check)

    def _task_queued(self, shard: int, method: str, wait: float) -> None:
        if wait > 0:
            self._sweeper.wake_in(shard, wait)
        else:
            self._dispatcher.demand.queued(shard, method)

    def _task_announced(self, task_id: str, ended: bool) -> None:
        self._watchers.announced(task_id, ended)

    def _announcements_missed(self) -> None:
        self._dispatcher.demand.all_queued()
        self._watchers.all_changed()
        for shard in range(self._store.shards):
            self._relay.has_mail(shard)

    def _store_changed(self, up: bool) -> None:
        shown = self._store.connection.address.shown
        if up:
            _log.info("%s is up again", shown)
            self._dispatcher.demand.all_queued()
        elif self.address:  # before it listens, `start` raises the error
            _log.error("%s is down; agents continue, new requests are refused", shown)
        self._health_changed.set()

    async def _check_sessions(self, fleet: Fleet, sessions: SessionRegistry) -> None:
        """Detect that the store has lost sessions of agents, and with them perhaps the contracts of their services."""
        epochs = {agent_id: session.epoch for agent_id, session in sessions.items()}
        stored = await fleet.current_sessions(epochs, while_down=True)
        if any(stored[agent_id][0] < epoch for agent_id, epoch in epochs.items()):
            self._store_lost()

    def _store_lost(self) -> None:
        """Ask all agents to connect again: their hellos restore services, agents and held attempts."""
        _log.error("%s has lost data; all agents connect again", self._store.connection.address.shown)
        self._registry.invalidate_all()
        self._sessions.end_all("the store lost data")

    async def start(self) -> None:
        """Connect to the store and start to listen.

        Raises:
            StoreUnavailable: The store is down.
            InvalidSetting: The port is taken, the store has another layout, or a server evicts keys.
            ContractMismatch: A stream that it publishes is registered by an incompatible contract.
        """
        try:
            await self._store.open()
            await self._watch.refuse_evicting()
            await self._events.__aenter__()
            await self._prepare_streams()
            await self._registry.refresh()
            self._server = self._build_server()
            self.address = self._listen(self._server)
        except BaseException:
            await self._close_connections()
            raise
        await self._server.start()
        self._health_changed.set()
        self._dispatcher.demand.all_queued()
        for name, work in (
            ("dispatcher", self._dispatcher.run()),
            ("sweeper", self._sweeper.run()),
            ("outbox publisher", self._outbox.run()),
            ("families", self._families.run()),
            ("budgets", self._budgets.run()),
            ("fleet updates", self._updates.run()),
            ("unanswered offers", self._unanswered.run()),
            ("contract registry", self._registry.run()),
            ("result watches", self._results.run()),
            ("wake-ups", self._wakeups.run()),
            ("scheduler", self._scheduler.run()),
            ("health", self._report_health()),
            ("health loop", self._watch.run()),
            ("files", watch_files(self._files)),
            ("connections", self._connections.run(int(self.address.rpartition(":")[2]))),
        ):
            self._spawn(name, work)
        _log.info("listening on %s, %s", self.address, self._store.connection.address.shown)

    async def _prepare_streams(self) -> None:
        """Register the streams that it publishes, so that an incompatible orchestrator does not start."""
        try:
            for stream in (TASKS, AGENTS, AUDIT):
                await self._events.prepare(stream)
            self._events.keep_trimmed()
            await self._outbox.maintain()
        except ContractMismatch:
            raise
        except OrkiError as error:
            # Tasks work without the event plane. Its streams are registered with the first event.
            _log.warning("the streams of the orchestrator cannot be registered now: %s", error.message)

    async def serve(self, stopped: asyncio.Event) -> None:
        """Wait until `stopped` is set.

        Raises:
            Exception: A part of the orchestrator failed: a defect.
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
        """Drain the agents and stop. Attempts that do not end in time keep their leases.

        Does nothing if it has not started or has stopped.
        """
        if not self._tasks:
            return
        self._submitters.draining = True
        self._submitter_sessions.drain()
        await self._health.enter_graceful_shutdown()
        await self._sessions.drain(self.options.drain_grace)
        await self._submitter_sessions.end_all("the orchestrator is stopping")
        await self._relay.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        await self._server.stop(_STOP_TIMEOUT)
        if self._store.up:
            # A store that hangs may still count as up.
            with contextlib.suppress(OrkiError, TimeoutError):
                async with asyncio.timeout(_FLUSH_TIMEOUT):
                    await self._updates.flush()
                    # An event server that is full or down must not keep the next orchestrator from starting. The outbox
                    # keeps the records.
                    with contextlib.suppress(OrkiError, TimeoutError):
                        async with asyncio.timeout(_PUBLISH_TIMEOUT):
                            await self._outbox.publish_all()
                    await self._outbox.release()
        await self._close_connections()

    async def _close_connections(self) -> None:
        await self._watch.close()
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

    def _build_server(self) -> grpc.aio.Server:
        options = [
            *server_options(self.options.max_message_bytes),
            ("grpc.max_concurrent_streams", _STREAMS_PER_CONNECTION),
            ("grpc.max_allowed_incoming_connections", self._connections.limits.total),
            ("grpc.server_handshake_timeout_ms", round(self.options.handshake_timeout * 1000)),
            ("grpc.http2.settings_timeout", round(self.options.handshake_timeout * 1000)),
        ]
        server = grpc.aio.server(
            options=options, interceptors=(TypedRequests(self._gate),), compression=grpc.Compression.NoCompression
        )
        session_pb2_grpc.add_SessionServiceServicer_to_server(self._sessions, server)
        task_pb2_grpc.add_TaskServiceServicer_to_server(self._submitters, server)
        submitter_pb2_grpc.add_SubmitterServiceServicer_to_server(self._submitter_sessions, server)
        task_pb2_grpc.add_FleetServiceServicer_to_server(self._fleet, server)
        schedule_pb2_grpc.add_ScheduleServiceServicer_to_server(self._schedules, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection((*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        return server

    def _listen(self, server: grpc.aio.Server) -> str:
        options = self.options
        host, _ = parse_listen(options.listen)
        try:
            if options.server_certificate:
                certificates = watch_certificates(options.server_certificate, options.server_key, options.client_ca)
                self._files.append(certificates)
                credentials = server_credentials(certificates, ask_clients=bool(options.client_ca))
                port = server.add_secure_port(options.listen, credentials)
            else:
                port = server.add_insecure_port(options.listen)
        except RuntimeError as error:
            raise InvalidSetting(
                f"cannot listen on {self.options.listen}: the port is taken; choose another with --listen HOST:PORT "
                "(port 0 takes a free one)"
            ) from error
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    async def _report_health(self) -> None:
        """Keep `grpc.health.v1` up to date: NOT_SERVING while the store is down, or in a state that loses work."""
        status = health_pb2.HealthCheckResponse
        events = "events_server" if self.options.events_url else "store"
        while True:
            await self._health_changed.wait()
            self._health_changed.clear()
            store = self._store.up and self._watch.serving("store")
            for service in ("", *SERVICES):
                await self._health.set(service, status.SERVING if store else status.NOT_SERVING)
            serving = self._watch.serving(events)
            await self._health.set(EVENTS_SERVICE, status.SERVING if serving else status.NOT_SERVING)


def _probes(options: OrchestratorOptions) -> list[ServerProbe]:
    addresses = {"store": options.store_address}
    if options.events_url:
        addresses["events_server"] = options.events_address
    return [ServerProbe(address, server=name, timeout=_PROBE_TIMEOUT) for name, address in addresses.items()]
