"""SessionService: dispatches the events of agents' sessions, applies their reports to the store and sends the replies.

Reports do not wait: operations are enqueued in the order of the reports, and each reply calls back into the session's
machine. While the store is down, reports wait in memory and heartbeats are echoed at once: no lease expires because the
store was down.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, TypeVar

from orki.control.v1.session_pb2 import ConnectRequest, Result
from orki.control.v1.session_pb2_grpc import SessionServiceServicer
from orki.errors.v1.errors_pb2 import Reason
from orki_contract.errors import (
    DamagedRecord,
    Draining,
    HelloTimeout,
    OrkiError,
    Overloaded,
    StaleFence,
    StoreFull,
    StoreUnavailable,
    TooLarge,
)
from orki_control.session import (
    AgentDraining,
    ArrivedCheckpoint,
    ArrivedProgress,
    ArrivedResult,
    AttemptKey,
    CancelsAcknowledged,
    CheckpointsArrived,
    DirectivesAcknowledged,
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
    UsageArrived,
)
from orki_control.session import Decline as ArrivedDecline
from orki_control.transport import abort
from orki_server._budgets import Budgets
from orki_server._charges import Charges
from orki_server._demand import Demand
from orki_server._events import AgentEvents
from orki_server._fleet import CANCEL_REQUESTED, FleetUpdates, Handshake
from orki_server._results import ReportCounts, TaskEnd, end_of, result_report, starts_attempt
from orki_server._session import AgentSession, SessionRegistry, StreamContext
from orki_server._store import operations
from orki_server._store.lifecycle import TERMINAL
from orki_server._store.operations import Operation, failure_text, shard_of
from orki_server._store.replies import ProgressReply, Renewed, ReportReply, ReportStatus
from orki_server._store.store import Store
from orki_server._store.suspension import save_checkpoint

R = TypeVar("R")

_HELLOS: Final = 4_096
"""Maximum number of streams without a hello."""
HELLOS_PER_CONNECTION: Final = 16
"""Maximum number of streams of one connection without a hello."""
_END_TIMEOUT: Final = 3.0
"""Maximum wait for the streams to end."""
_PROGRESS_WAITING: Final = 20_000
"""Number of waiting operations above which no progress is taken, to leave room for results."""
_FULL_PAUSE: Final = 1.0
"""Minimum wait before agents send progress again that a full store has refused."""
_STALE: Final = "the agent does not hold this attempt: it was withdrawn, has ended, or runs under a higher fence"
_log = logging.getLogger("orki.server.sessions")


@dataclass(slots=True, kw_only=True)
class Reports:
    """Applies reports to the store.

    Attributes:
        store: The store.
        progress_kept: Number of progress entries kept per task.
        on_change: Called with a task that changed, whether it ended, and its end if the report holds all of it.
        on_queued: Called with shard and method of a task that is queued again, and the wait before it is.
        on_refused: Called with agent, task and error of a refused report.
        on_unanswered: Called with a session that ended and the offers that it did not answer.
        idle_interval: Returns the time between heartbeats of agents without attempts.
        budgets: The budgets that attempts are charged to.
        counts: Numbers of reports.
        charges: Charges usage.
    """

    store: Store
    progress_kept: int
    on_change: Callable[[str, bool, TaskEnd | None], None]
    on_queued: Callable[[int, str, float], None]
    on_refused: Callable[[str, str, OrkiError], None]
    on_unanswered: Callable[[AgentSession, Iterable[AttemptKey]], None]
    budgets: Budgets
    idle_interval: Callable[[], float] = lambda: 0.0
    counts: ReportCounts = field(default_factory=ReportCounts)
    charges: Charges = field(init=False)
    _postponed: set[AgentSession] = field(default_factory=set, init=False)
    _postponed_until: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self.charges = Charges(self.budgets, self._enqueue, self._accept_result, self._refuse)

    def accepted(self, session: AgentSession, attempts: Iterable[AttemptKey], events: Iterable[Any]) -> None:
        """The agent accepted offers. A result that arrived with them, among `events`, starts its attempt itself."""
        results = [result for event in events if isinstance(event, ResultsArrived) for result in event.results]
        started = {attempt for attempt, result in results if starts_attempt(result)}
        for key in attempts:
            if key not in started:
                self._put(session, key, self._handle_report, operations.accept)

    def declined(self, session: AgentSession, declines: Iterable[ArrivedDecline]) -> None:
        """The agent declined offers. A late decline changes nothing."""
        for key, failure in declines:
            reason = failure.reason or Reason.REASON_ABANDONED
            self._decline(session, key, reason, failure_text(failure.message))

    def withdrawn(self, session: AgentSession, attempts: Iterable[AttemptKey]) -> None:
        """Offers were not answered in time, or were never sent."""
        message = f'agent "{session.agent_id}" did not answer the offer in time'
        for key in attempts:
            self._decline(session, key, Reason.REASON_OFFER_TIMEOUT, message)

    def unanswered(self, session: AgentSession, ended: SessionEnded) -> None:
        """The session ended before offers were answered, or even sent."""
        for key in ended.unsent:
            self._decline(session, key, Reason.REASON_ABANDONED, "the session ended before the offer was sent")
        for key in ended.unanswered:
            self._put(session, key, self._handle_returned, operations.suspect)
        self.on_unanswered(session, ended.unanswered)

    def progressed(self, session: AgentSession, progress: Iterable[ArrivedProgress]) -> None:
        """Store progress. If the store cannot take it, the agent sends it again later; an older agent's is dropped."""
        for key, number, payload, missing in progress:
            if self.store.waiting > _PROGRESS_WAITING:
                self._set_aside(session, key, number)
                continue
            session.skipped.pop(key, None)
            details = (self.progress_kept, number, payload, missing)
            build = partial(operations.report_progress, session.agent_id, key, *details)
            handle = partial(self._handle_progress, session, key)
            self._enqueue(session, build, handle, key, partial(self._refuse_as_full, session, key, number))

    def checkpointed(self, session: AgentSession, checkpoints: Iterable[ArrivedCheckpoint]) -> None:
        """Store checkpoints. One that a full store refuses is refused to its handler."""
        for key, number, payload in checkpoints:
            build = partial(save_checkpoint, session.agent_id, key, number, payload)
            full = StoreFull("the orchestrator's store is out of memory, and the checkpoint was not stored")
            refuse = partial(session.machine.acknowledge_checkpoint, key, number, full)
            self._enqueue(session, build, partial(self._handle_checkpoint, session, key, number), key, refuse)

    def ended(self, session: AgentSession, results: Iterable[ArrivedResult]) -> None:
        for key, result in results:
            if last := max(session.skipped.pop(key, 0), result.progress):
                # If the last progress is not stored, watchers see a gap.
                details = (self.progress_kept, last, b"", last - 1, True)
                self._put(session, key, self._handle_progress, operations.report_progress, *details)
            if result.HasField("usage") or result.suspended.over_budget:
                self.charges.settle(session, key, result)
            else:
                self._put(session, key, partial(self._handle_result, result), result_report, result)

    def cancel_acknowledged(self, session: AgentSession, attempts: Iterable[AttemptKey]) -> None:
        """The agent received cancels. An acknowledgement after the attempt's end is legal."""
        for key in attempts:
            self._put(session, key, self._handle_returned, operations.acknowledge_cancel)

    def heartbeat(self, session: AgentSession, heartbeat: HeartbeatArrived) -> None:
        """Renew the agent's leases, then echo the heartbeat."""
        if not self.store.up:
            session.machine.echo(heartbeat.number, self.idle_interval())
            return
        shards: dict[int, list[AttemptKey]] = {}
        for key in heartbeat.running:
            shards.setdefault(shard_of(key.task_id), []).append(key)
        pending = len(shards)

        def renewed(reply: Renewed) -> None:
            nonlocal pending
            pending -= 1
            for key in reply.stale:
                self._refuse(session, key)
            for key, grace in reply.cancelling:
                # The cancel came through another orchestrator, and was lost.
                session.machine.cancel(key, grace_ms=round(grace * 1000), message=CANCEL_REQUESTED)
            if pending == 0:
                session.machine.echo(heartbeat.number, self.idle_interval())

        for shard, keys in shards.items():
            self._enqueue(session, partial(operations.renew, shard, session.agent_id, keys), renewed)
        if not shards:
            session.machine.echo(heartbeat.number, self.idle_interval())

    def unknown(self, session: AgentSession, attempts: Iterable[AttemptKey]) -> None:
        """The session's machine refused reports about attempts that it does not know."""
        for key in attempts:
            self.counts.stale += 1
            self.on_refused(session.agent_id, key.task_id, StaleFence(_STALE))

    def undeliverable(self, session: AgentSession, key: AttemptKey, error: OrkiError) -> None:
        """An assigned task cannot be offered to its agent: queue it again, or fail it if it never can be."""
        message = failure_text(error.message)
        if isinstance(error, TooLarge):
            self._put(session, key, self._handle_returned, operations.fail, error.reason, message, "", False)
        else:
            self._decline(session, key, Reason.REASON_ABANDONED, message)

    def _decline(self, session: AgentSession, key: AttemptKey, reason: Reason.ValueType, message: str) -> None:
        self._put(session, key, self._handle_returned, operations.decline, reason, message, True)

    def _handle_report(self, session: AgentSession, key: AttemptKey, reply: ReportReply) -> None:
        if reply.status is ReportStatus.STALE:
            self._refuse(session, key)
        else:
            self.on_change(key.task_id, reply.state in TERMINAL, None)

    def _handle_progress(self, session: AgentSession, key: AttemptKey, reply: ProgressReply) -> None:
        if reply.status is ReportStatus.STALE:
            self._refuse(session, key)
        elif reply.status is ReportStatus.GAP:
            if key not in session.postponed:  # Otherwise the agent is asked once the store may take it.
                session.machine.replay_progress(key, reply.index)
        else:
            session.machine.acknowledge_progress(key, reply.index)
            self.on_change(key.task_id, reply.state in TERMINAL, None)

    def _handle_checkpoint(self, session: AgentSession, key: AttemptKey, number: int, reply: ReportReply) -> None:
        if reply.status is ReportStatus.STALE:
            self._refuse(session, key)
        else:
            session.machine.acknowledge_checkpoint(key, number)

    def _refuse_as_full(self, session: AgentSession, key: AttemptKey, number: int) -> None:
        self._set_aside(session, key, number)
        self._postponed_until = time.monotonic() + _FULL_PAUSE

    def _set_aside(self, session: AgentSession, key: AttemptKey, number: int) -> None:
        if session.machine.acknowledges:
            session.postponed.add(key)
            self._postponed.add(session)
        else:
            session.skipped[key] = number
            self.counts.progress_dropped += 1

    def _take_postponed(self) -> None:
        """Ask for the progress that was set aside, if the store may take it again."""
        if self.store.waiting >= _PROGRESS_WAITING // 2 or time.monotonic() < self._postponed_until:
            return
        sessions, self._postponed = self._postponed, set()
        for session in sessions:
            for key in session.postponed:
                session.machine.replay_progress(key)
            session.postponed.clear()

    def _handle_returned(self, session: AgentSession, key: AttemptKey, reply: ReportReply) -> None:
        if reply.status is ReportStatus.ACCEPTED:
            self.settled(key, reply)

    def _accept_result(
        self, session: AgentSession, key: AttemptKey, result: Result, report: Callable[..., Operation[ReportReply]]
    ) -> None:
        self._put(session, key, partial(self._handle_result, result), report)

    def _handle_result(self, result: Result, session: AgentSession, key: AttemptKey, reply: ReportReply) -> None:
        if reply.status is ReportStatus.STALE:
            self._refuse(session, key)
            return
        if reply.status is ReportStatus.ACCEPTED:
            self.counts.accepted += 1
            self.settled(key, reply, end_of(session.agent_id, key, result, reply))
        else:
            self.counts.repeated += 1
        session.machine.acknowledge(key)

    def settled(self, key: AttemptKey, reply: ReportReply, end: TaskEnd | None = None) -> None:
        """An attempt ended; `end` is the task's end if the report holds all of it."""
        self.on_change(key.task_id, reply.state in TERMINAL, end)
        if reply.retry_after is not None:
            self.on_queued(shard_of(key.task_id), reply.method, reply.retry_after)

    def _refuse(self, session: AgentSession, key: AttemptKey) -> None:
        error = StaleFence(_STALE)
        self.counts.stale += 1
        self.on_refused(session.agent_id, key.task_id, error)
        session.machine.refuse(key, error)

    def _put(
        self,
        session: AgentSession,
        key: AttemptKey,
        handle: Callable[[AgentSession, AttemptKey, R], None],
        report: Callable[..., Operation[R]],
        *details: Any,
    ) -> None:
        """Apply `report(agent id, key, *details)`, and pass the reply to `handle`."""
        build = partial(report, session.agent_id, key, *details)
        self._enqueue(session, build, lambda reply: handle(session, key, reply), key)

    def _enqueue(
        self,
        session: AgentSession,
        build: Callable[[], Operation[R]],
        handle: Callable[[R], None],
        key: AttemptKey | None = None,
        refused_as_full: Callable[[], None] | None = None,
    ) -> None:
        try:
            future = self.store.apply(build())
        except StoreUnavailable as error:
            # Too many operations wait. The agent keeps its reports and sends them again on its next stream.
            session.end(error.message)
            return

        def done(outcome: asyncio.Future[Any]) -> None:
            if outcome.cancelled():
                return
            error = outcome.exception()
            if error is None:
                handle(outcome.result())
                if self._postponed:
                    self._take_postponed()
            elif isinstance(error, DamagedRecord) and key is not None:
                # The agent would send it again for ever.
                self._refuse(session, key)
            elif isinstance(error, StoreFull) and refused_as_full is not None:
                refused_as_full()
            elif not isinstance(error, StoreUnavailable):
                _log.error("agent %s: a report could not be stored: %s", session.agent_id, error)
                session.end("a report could not be stored")

        future.add_done_callback(done)


class SessionServicer(SessionServiceServicer):
    """Serves agents. Tells `demand` when their slots may have become free."""

    def __init__(
        self,
        options: OrchestratorSessionOptions,
        sessions: SessionRegistry,
        handshake: Handshake,
        reports: Reports,
        updates: FleetUpdates,
        events: AgentEvents,
        demand: Demand,
    ) -> None:
        self._options = options
        self._sessions = sessions
        self._handshake = handshake
        self._reports = reports
        self._updates = updates
        self._events = events
        self._demand = demand
        self._handshakes: set[asyncio.Task[None]] = set()
        self._open: set[AgentSession] = set()
        # Streams without a hello, the oldest first, and their connections.
        self._silent: dict[AgentSession, str] = {}
        self._draining = False

    async def Connect(  # type: ignore[override]  # the stub's context is grpc's and grpc.aio's at once
        self, request_iterator: AsyncIterator[ConnectRequest], context: StreamContext
    ) -> None:
        if self._draining:
            await abort(context, Draining("this orchestrator is stopping; connect again in a moment"))
        peer = context.peer()
        if sum(each == peer for each in self._silent.values()) >= HELLOS_PER_CONNECTION:
            await abort(context, Overloaded(f"{HELLOS_PER_CONNECTION} streams of this connection await their hello"))
        session = AgentSession(self._options, self._handle)
        self._open.add(session)
        self._silent[session] = peer
        try:
            self._bound_hellos()
            await session.run(context)
            if session.refusal is not None:
                await abort(context, session.refusal)
        finally:
            self._silent.pop(session, None)
            self._open.discard(session)
            self._ended(session)

    def _bound_hellos(self) -> None:
        """End the stream that has awaited its hello for longest if there are too many of them."""
        if len(self._silent) > _HELLOS:
            oldest = next(iter(self._silent))
            del self._silent[oldest]
            oldest.refuse(HelloTimeout(f"{_HELLOS} newer streams await their hello"))

    def end_all(self, cause: str) -> None:
        """End all streams. The agents connect again."""
        for session in list(self._open):
            session.end(cause)

    async def drain(self, grace: float) -> None:
        """Send Drain to all agents, wait for running attempts for at most `grace`, then end all streams."""
        self._draining = True
        for session in list(self._sessions.values()):
            unsent = session.machine.drain(round(grace * 1000))
            self._reports.withdrawn(session, unsent)
        await _until(lambda: not any(session.machine.attempts for session in self._sessions.values()), grace)
        self.end_all("the orchestrator is stopping")
        await _until(lambda: not self._open, _END_TIMEOUT)
        for task in list(self._handshakes):
            task.cancel()

    def _handle(self, session: AgentSession, events: Sequence[OrchestratorEvent]) -> None:
        for event in events:
            match event:
                case OffersAccepted(attempts):
                    self._reports.accepted(session, attempts, events)
                case ProgressArrived(progress):
                    self._reports.progressed(session, progress)
                case CheckpointsArrived(checkpoints):
                    self._reports.checkpointed(session, checkpoints)
                case UsageArrived(usages):
                    self._reports.charges.used(session, usages)
                case ResultsArrived(results):
                    self._reports.ended(session, results)
                    self._demand.slots_changed(session)
                case HeartbeatArrived():
                    session.record_heartbeat(event)
                    self._reports.heartbeat(session, event)
                    self._updates.changed(session)
                    self._demand.slots_changed(session)
                case OffersDeclined(declines):
                    self._reports.declined(session, declines)
                    self._demand.slots_changed(session)
                case OffersExpired(attempts):
                    self._reports.withdrawn(session, attempts)
                    self._demand.slots_changed(session)
                case DirectivesAcknowledged(answers):
                    session.directive_acknowledged(answers)
                case CancelsAcknowledged(attempts):
                    self._reports.cancel_acknowledged(session, attempts)
                case HelloArrived():
                    self._silent.pop(session, None)
                    task = asyncio.create_task(self._shake_hands(session, event), name="orki hello")
                    self._handshakes.add(task)
                    task.add_done_callback(self._handshake_done)
                case ReportsRefused(attempts):
                    self._reports.unknown(session, attempts)
                case AgentDraining():
                    self._updates.changed(session)
                case SessionEnded(cause):
                    session.end(cause)
                    self._reports.unanswered(session, event)

    async def _shake_hands(self, session: AgentSession, arrived: HelloArrived) -> None:
        agent_id = arrived.hello.agent_id
        try:
            welcomed = await self._handshake.run(session, arrived)
        except OrkiError as error:
            _log.warning("agent %s was refused: %s", agent_id, error.message)
            self._events.refused(agent_id, agent_id, error)
            return
        if welcomed is None:
            return
        resumed, replaced = welcomed
        if replaced:
            self._events.replaced(session, replaced)
        self._events.connected(session, resumed)
        self._updates.changed(session)
        self._demand.opened(session)
        _log.info("agent %s connected: session %d, %d attempts resumed", agent_id, session.epoch, resumed)

    def _handshake_done(self, task: asyncio.Task[None]) -> None:
        self._handshakes.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("a handshake failed: a defect", exc_info=error)

    def _ended(self, session: AgentSession) -> None:
        self._demand.ended(session)
        if not self._sessions.remove(session):
            return
        self._updates.ended(session)
        self._events.disconnected(session)
        how = "left after draining" if session.left else f"disconnected: {session.cause}"
        _log.info("agent %s %s", session.agent_id, how)


async def _until(condition: Callable[[], bool], timeout: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout):
            while not condition():  # noqa: ASYNC110 - machines send no event when they become empty
                await asyncio.sleep(0.01)
