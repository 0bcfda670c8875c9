"""One run of an agent: the user's loop, the I/O thread, and their start and end in order."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from orki.control.v1.attempt_pb2 import Budget
from orki.control.v1.session_pb2 import ServedService
from orki.events.v1.agent_orki import AGENTS
from orki.events.v1.agent_pb2 import AgentEvent, AgentSpawned, AgentStopped
from orki_agent._channel import SessionChannel
from orki_agent._checkpoints import store_blocking
from orki_agent._children import ChildTasks
from orki_agent._events import AgentEvents
from orki_agent._runner import Runner
from orki_agent._services import Handler, OnStored
from orki_agent._settings import RunSettings, ToolsAt
from orki_agent._subprocess import ChildPool
from orki_agent._threads import IoThread, LoopProbe, Mailbox, cross, in_thread, resident_bytes, send
from orki_agent._tools import ToolAccess, ToolServices
from orki_contract import (
    EventStream,
    SyncToolChannel,
    TaskChannel,
    ToolChannel,
)
from orki_contract.errors import OrkiError
from orki_contract.trace import Span, new_span
from orki_control import Client, ClientOptions, session
from orki_control.session import AttemptKey

E = TypeVar("E", bound=Message)
Q = TypeVar("Q", bound=Message)
R = TypeVar("R", bound=Message)
P = TypeVar("P")
D = TypeVar("D")

_log = logging.getLogger("orki.agent")

_LAST_ACKNOWLEDGEMENTS: Final = 5.0
"""Seconds for the orchestrator to acknowledge abandoned attempts."""
_HANDLERS_END_WITHIN: Final = 2.0
"""Seconds for handlers to end after the session."""


class Runtime:
    """One run of an agent; implements `AgentServices`.

    Args:
        settings: Settings of the run.
        handlers: Handlers by `package.Service/Method`.
        services: Contracts for the hello.
        tools: The agent's own tool services.
        on_over: Called on the I/O thread when the session has ended, with the error if it was closed for good.
    """

    def __init__(
        self,
        settings: RunSettings,
        handlers: Mapping[str, Handler],
        services: tuple[ServedService, ...],
        tools: tuple[ToolServices, ...],
        on_over: Callable[[OrkiError | None], None],
    ) -> None:
        self._settings = settings
        self._handlers = handlers
        self._services = services
        self._instance_id = uuid.uuid4().hex
        self._span = new_span()
        self._began_at = time.monotonic()
        self._on_over = on_over
        self._io = IoThread(self._serve)
        self._tools = ToolAccess(tools, settings.tools, settings.agent_id, self._collect_tool)
        self._children = ChildPool(settings.agent_id)
        self._closed_by: OrkiError | None = None
        self._session = session.AgentSession(
            session.AgentSessionOptions(
                agent_id=settings.agent_id,
                instance_id=self._instance_id,
                services=services,
                slots=settings.slots,
                labels=settings.labels,
                max_message_bytes=settings.max_message_bytes,
                progress_window=settings.progress_window,
            )
        )
        self._orchestrator_id = ""
        self._draining = False
        self._drained = False
        self._early: list[Callable[[], None]] = []
        self._opening: asyncio.Task[None] | None = None

    # --- The user's loop. ---

    async def run(self) -> None:
        """Serve until the agent has drained.

        Raises:
            Replaced: A newer instance has the session.
            ContractMismatch, ProtocolVersion, OrkiError: The orchestrator closed the session for good.
            SocketUnsafe: The tool bridge could not be opened.
            InvalidSetting: A child process cannot load its service.
        """
        await in_thread(lambda: self._children.check(list(self._handlers.values())))
        loop = asyncio.get_running_loop()
        self._user = Mailbox(loop)
        self._probe = LoopProbe(loop)
        interval = sys.getswitchinterval()
        if self._settings.switch_interval:
            sys.setswitchinterval(self._settings.switch_interval)
        self._probe.start()
        try:
            self._io.done.add_done_callback(lambda _: self._on_over(self._closed_by))
            self._io.start()
            self._tools.start(self._post)
            await asyncio.shield(asyncio.wrap_future(self._io.done))
        finally:
            self.stop_now()
            await in_thread(lambda: self._io.join(2 * _LAST_ACKNOWLEDGEMENTS))
            await self._tools.close()
            await in_thread(self._children.close)
            self._probe.stop()
            sys.setswitchinterval(interval)
        if self._closed_by is not None:
            raise self._closed_by

    # --- From any thread. ---

    def drain(self) -> None:
        """Accept no more offers; running attempts have the drain grace to end."""
        self._ask(self._drain)

    def stop_now(self) -> None:
        """Give running attempts back to the orchestrator and end."""
        self._ask(self._abandon)

    @property
    def agent_id(self) -> str:
        """The agent's name in the fleet."""
        return self._settings.agent_id

    @property
    def max_payload_bytes(self) -> int:
        """Maximum payload size that the orchestrator accepts."""
        return self._session.max_payload_bytes

    def send_progress(self, attempt: AttemptKey, payload: bytes) -> None:
        """Queue progress."""
        self._runner.send_progress(attempt, payload)

    def report_usage(self, attempt: AttemptKey, total: Budget) -> None:
        """Report the usage of an attempt in all."""
        self._runner.report_usage(attempt, total)

    def save_checkpoint(self, attempt: AttemptKey, payload: bytes, on_stored: OnStored) -> None:
        """Send a checkpoint."""
        self._runner.save_checkpoint(attempt, payload, on_stored)

    def store_checkpoint(self, attempt: AttemptKey, payload: bytes) -> None:
        """Send a checkpoint, and block the calling thread until it is stored."""
        store_blocking(self.save_checkpoint, attempt, payload)

    def collect(self, stream: EventStream[E, Any], event: E, span: Span) -> None:
        """Publish soon."""
        self._post(self._events.collect, stream, event, span)

    async def publish(self, stream: EventStream[E, Any], event: E, span: Span) -> None:
        """Publish and return once the server has the event."""
        await cross(self._io.loop, self._events.publish(stream, event, span))

    def publish_blocking(self, stream: EventStream[E, Any], event: E, span: Span) -> None:
        """Publish, and block the calling thread until the server has the event."""
        send(self._io.loop, self._events.publish(stream, event, span)).result()

    def tools_at(self) -> ToolsAt:
        """Return the tool bridge."""
        return self._tools.tools_at()

    def tool_channel(self) -> ToolChannel:
        """Return the channel for async tool calls."""
        return self._tools.async_channel()

    def sync_tool_channel(self) -> SyncToolChannel:
        """Return the channel for blocking tool calls."""
        return self._tools.sync_channel()

    def task_channel(self) -> TaskChannel:
        """Return the channel for submitting tasks."""
        return ChildTasks(self._client, self._io.loop)

    def _ask(self, call: Callable[[], None]) -> None:
        if self._io.mailbox is None:
            self._early.append(call)
        else:
            self._io.mailbox.post(call)

    def _post(self, call: Callable[..., object], *arguments: Any) -> None:
        if self._io.mailbox is not None:
            self._io.mailbox.post(call, *arguments)

    # --- The I/O loop. ---

    async def _serve(self) -> None:
        settings = self._settings
        self._events = AgentEvents(f"{settings.agent_id}@{self._instance_id[:12]}", settings.events_url)
        self._channel = SessionChannel(self._session, settings, self._report_load)
        self._runner = Runner(
            self._session,
            self._handlers,
            self,
            self._user,
            self._io.mailbox or Mailbox(asyncio.get_running_loop()),
            settings.progress_window,
            self._children,
        )
        self._runner.on_other = self._on_event
        self._channel.on_events, self._channel.on_sent = self._runner.handle, self._runner.grant
        options = ClientOptions(
            max_message_bytes=settings.max_message_bytes,
            insecure=settings.insecure,
            credentials=settings.credentials,
        )
        async with Client(settings.orchestrator, options) as self._client:
            for call in self._early:
                call()
            self._publish_spawned()
            if settings.events_url:
                await self._events.open("")
            try:
                await self._channel.run()
                await self._end_handlers()
            finally:
                lifetime = Duration()
                lifetime.FromNanoseconds(int((time.monotonic() - self._began_at) * 1e9))
                self._publish_lifecycle(AgentEvent(stopped=AgentStopped(lifetime=lifetime)))
                self._tools.flush()
                await self._events.close()

    async def _end_handlers(self) -> None:
        self._runner.cancel_all()
        try:
            async with asyncio.timeout(_HANDLERS_END_WITHIN):
                await self._runner.idle()
        except TimeoutError:
            _log.error("some handlers do not end; the agent ends without them")
        self._runner.close(0.0)

    def _on_event(self, event: session.AgentEvent) -> None:
        match event:
            case session.SessionOpened():
                self._opened(event)
            case session.SessionLost() if self._drained:
                _log.info("agent %s left %s after draining", self.agent_id, self._orchestrator_id)
            case session.SessionLost(cause=cause):
                _log.info("agent %s lost its session with %s: %s", self.agent_id, self._orchestrator_id, cause)
            case session.OrchestratorDraining(grace_ms=grace_ms):
                _log.info("orchestrator %s stops within %d ms", self._orchestrator_id, grace_ms)
            case session.SessionClosed(error=error):
                self._closed_by = error
            case session.DrainCompleted():
                self._drained = True
                self._channel.stop()

    def _report_load(self) -> None:
        self._session.set_load(loop_lag_us=self._probe.worst_lag_us(), memory_bytes=resident_bytes())

    def _opened(self, event: session.SessionOpened) -> None:
        self._orchestrator_id = event.orchestrator_id
        _log.info(
            "agent %s has session %d with %s; %d attempts resumed",
            self.agent_id,
            event.session_epoch,
            event.orchestrator_id,
            len(event.resumed),
        )
        self._opening = asyncio.get_running_loop().create_task(self._events.open(event.events_url))

    def _drain(self) -> None:
        if self._draining:
            return
        self._draining = True
        _log.info(
            "agent %s drains: no more offers, %.0f s for running attempts", self.agent_id, self._settings.drain_grace
        )
        asyncio.get_running_loop().call_later(self._settings.drain_grace, self._abandon)
        self._channel.take(self._session.drain(asyncio.get_running_loop().time()))

    def _abandon(self) -> None:
        loop = asyncio.get_running_loop()
        self._draining = True
        self._runner.abandon("the agent stops")
        loop.call_later(_LAST_ACKNOWLEDGEMENTS, self._channel.stop)
        self._channel.take(self._session.drain(loop.time()))

    def _collect_tool(self, stream: EventStream[E, Any], event: E, span: Span) -> None:
        self._events.collect(stream, event, span)

    # --- Lifecycle events. ---

    def _publish_spawned(self) -> None:
        spawned = AgentSpawned(
            pid=os.getpid(),
            host=socket.gethostname(),
            slots=self._settings.slots,
            services=[each.service for each in self._services],
        )
        self._publish_lifecycle(AgentEvent(spawned=spawned))

    def _publish_lifecycle(self, event: AgentEvent) -> None:
        event.agent_id, event.instance_id = self.agent_id, self._instance_id
        self._events.collect(AGENTS, event, self._span if event.HasField("spawned") else self._span.child())
