"""SessionService: each stream from its hello to its end, and who hears of what it says."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, Final

from orki.control.v1.session_pb2 import ConnectRequest
from orki.control.v1.session_pb2_grpc import SessionServiceServicer
from orki_contract.errors import Draining, OrkiError
from orki_control.session import (
    AgentDraining,
    CancelsAcknowledged,
    HeartbeatArrived,
    HelloArrived,
    OffersAccepted,
    OffersDeclined,
    OffersExpired,
    OrchestratorEvent,
    OrchestratorSessionOptions,
    ProgressArrived,
    ReportsRefused,
    ResultsArrived,
    SessionEnded,
)
from orki_control.statuses import abort
from orki_server.announcing import Announcer
from orki_server.sessions.greeting import Greeter
from orki_server.sessions.live import LiveSession, StreamContext
from orki_server.sessions.notes import FleetNotes
from orki_server.sessions.reports import Reports
from orki_server.sessions.roster import Roster

__all__ = ["SessionServicer"]

_END_S: Final = 3.0
"""Longest wait for the streams to end."""
_log = logging.getLogger("orki.server.sessions")


class SessionServicer(SessionServiceServicer):
    """Serves agents.

    Args:
        options: Of every session.
        roster: Who is connected.
        greeter: Judges hellos.
        reports: Takes what agents report.
        notes: Takes what the fleet should know.
        announcer: Publishes what happened to agents.
        slots_changed: Called when slots may have become free; with True when an agent may serve other methods.
    """

    def __init__(  # one parameter for each neighbour
        self,
        options: OrchestratorSessionOptions,
        roster: Roster,
        greeter: Greeter,
        reports: Reports,
        notes: FleetNotes,
        announcer: Announcer,
        slots_changed: Callable[[bool], None],
    ) -> None:
        self._options = options
        self._roster = roster
        self._greeter = greeter
        self._reports = reports
        self._notes = notes
        self._announcer = announcer
        self._slots_changed = slots_changed
        self._judging: set[asyncio.Task[None]] = set()
        self._open: set[LiveSession] = set()
        self._draining = False

    async def Connect(  # type: ignore[override]  # the stub's context is grpc's and grpc.aio's at once
        self, request_iterator: AsyncIterator[ConnectRequest], context: StreamContext
    ) -> None:
        """One stream of one agent."""
        if self._draining:
            await abort(context, Draining("this orchestrator stops; connect again in a moment"))
        session = LiveSession(self._options, self._told)
        self._open.add(session)
        try:
            await session.run(context)
        finally:
            self._open.discard(session)
            self._left(session)

    def end_all(self, cause: str) -> None:
        """Ends all streams; the agents come back with a hello."""
        for session in list(self._open):
            session.end(cause)

    async def drain(self, grace_ms: int) -> None:
        """Says Drain to all, gives what runs the time to end, then ends all streams."""
        self._draining = True
        for session in self._roster:
            unsent = session.machine.drain(grace_ms)
            self._reports.withdrawn(session, unsent)
            session.changed()
        await _until(lambda: not any(session.machine.attempts for session in self._roster), grace_ms / 1000)
        self.end_all("the orchestrator stops")
        await _until(lambda: not self._open, _END_S)
        for task in list(self._judging):
            task.cancel()

    # --- what sessions tell ---

    def _told(self, session: LiveSession, events: Sequence[OrchestratorEvent]) -> None:
        for event in events:
            match event:
                case OffersAccepted(attempts):
                    self._reports.accepted(session, attempts)
                case ProgressArrived(progress):
                    self._reports.progressed(session, progress)
                case ResultsArrived(results):
                    self._reports.ended(session, results)
                    self._slots_changed(False)
                case HeartbeatArrived():
                    session.heard(event)
                    self._reports.beat(session, event)
                    self._notes.changed(session)
                    self._slots_changed(False)
                case OffersDeclined(declines):
                    self._reports.declined(session, declines)
                    self._slots_changed(False)
                case OffersExpired(attempts):
                    self._reports.withdrawn(session, attempts)
                    self._slots_changed(False)
                case CancelsAcknowledged(attempts):
                    self._reports.cancel_acknowledged(session, attempts)
                case HelloArrived():
                    self._spawn(self._greet(session, event))
                case ReportsRefused(attempts):
                    self._reports.strangers(session, attempts)
                case AgentDraining():
                    self._notes.changed(session)
                case SessionEnded(cause):
                    session.end(cause)

    async def _greet(self, session: LiveSession, arrived: HelloArrived) -> None:
        hello = arrived.hello
        try:
            greeted = await self._greeter.greet(session, arrived)
        except OrkiError as error:
            _log.warning("agent %s was refused: %s", hello.agent_id, error.message)
            self._announcer.refused(hello.agent_id, hello.agent_id, error)
            return
        if greeted is None:
            return
        if greeted.replaced:
            self._announcer.replaced(session, greeted.replaced)
        self._announcer.connected(session, greeted.resumed)
        self._notes.changed(session)
        self._slots_changed(True)
        _log.info("agent %s connected, session %d, %d attempts resumed", hello.agent_id, session.epoch, greeted.resumed)

    def _left(self, session: LiveSession) -> None:
        if not self._roster.leave(session):
            return
        self._notes.gone(session)
        self._announcer.disconnected(session)
        if session.left:
            _log.info("agent %s left after draining", session.agent_id)
        else:
            _log.info("agent %s disconnected: %s", session.agent_id, session.cause)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name="orki hello")
        self._judging.add(task)
        task.add_done_callback(self._judged)

    def _judged(self, task: asyncio.Task[None]) -> None:
        self._judging.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("a hello could not be judged: a defect", exc_info=error)


async def _until(done: Callable[[], bool], seconds: float) -> None:
    """Waits until something is so, or the time is over."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while not done():  # noqa: ASYNC110 - machines tell nobody that they are empty
                await asyncio.sleep(0.01)
