"""SessionService: each stream from its hello to its end, and who hears of what it says."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from orki.control.v1.attempt_pb2 import Failure
from orki.control.v1.session_pb2 import ConnectRequest, Result
from orki.control.v1.session_pb2_grpc import SessionServiceServicer
from orki.errors.v1.errors_pb2 import Reason
from orki_contract.errors import (
    Draining,
    OrkiError,
    StaleFence,
    StoreUnavailable,
    TooLarge,
    error_for,
)
from orki_control import session as machine
from orki_control.session import (
    AgentDraining,
    ArrivedProgress,
    ArrivedResult,
    AttemptKey,
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
from orki_control.transport import abort
from orki_server._events import AgentEvents
from orki_server._fleet import FleetUpdates, Handshake
from orki_server._session import AgentSession, SessionRegistry, StreamContext
from orki_server._store.ids import shard_of
from orki_server._store.operations import (
    Accept,
    AcknowledgeCancel,
    ConfirmCancelled,
    Decline,
    Fail,
    Operation,
    Renew,
    ReportProgress,
    ReportReply,
    ReportStatus,
    Succeed,
)
from orki_server._store.queries import TERMINAL
from orki_server._store.store import Store

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
        roster: SessionRegistry,
        greeter: Handshake,
        reports: Reports,
        notes: FleetUpdates,
        announcer: AgentEvents,
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
        self._open: set[AgentSession] = set()
        self._draining = False

    async def Connect(  # type: ignore[override]  # the stub's context is grpc's and grpc.aio's at once
        self, request_iterator: AsyncIterator[ConnectRequest], context: StreamContext
    ) -> None:
        """One stream of one agent."""
        if self._draining:
            await abort(context, Draining("this orchestrator stops; connect again in a moment"))
        session = AgentSession(self._options, self._told)
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

    def _told(self, session: AgentSession, events: Sequence[OrchestratorEvent]) -> None:
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

    async def _greet(self, session: AgentSession, arrived: HelloArrived) -> None:
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

    def _left(self, session: AgentSession) -> None:
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


R = TypeVar("R")

_MESSAGE: Final = 4_000
"""Longest message of a failure that is kept, in characters."""
_PROGRESS_WAITING: Final = 20_000
"""Transitions in the lane above which progress is dropped: news that nobody can read yet must not push out results."""
_STALE: Final = "the attempt is not yours: it was withdrawn, has ended, or runs under a higher fence"


@dataclass(slots=True)
class ReportCounts:
    """What happened to reports since the start.

    Attributes:
        accepted: Results that were accepted.
        repeated: Results that had been accepted before.
        stale: Reports of those who did not hold the attempt.
        progress_dropped: Entries of progress that were dropped while the store was away.
    """

    accepted: int = 0
    repeated: int = 0
    stale: int = 0
    progress_dropped: int = 0


@dataclass(slots=True, kw_only=True)
class Reports:
    """The way of reports.

    Attributes:
        store: Where they go.
        progress_kept: Entries of progress that are kept of a task.
        moved: Called with a task that changed, and whether it ended.
        queued: Called with a shard that has a queued task, and the wait in milliseconds before it is.
        refused: Called with agent, task and error of a report that was refused.
        counts: What happened so far.
    """

    store: Store
    progress_kept: int
    moved: Callable[[str, bool], None]
    queued: Callable[[int, int], None]
    refused: Callable[[str, str, OrkiError], None]
    counts: ReportCounts = field(default_factory=ReportCounts)

    def accepted(self, session: AgentSession, attempts: Iterable[AttemptKey]) -> None:
        """Offers were taken."""
        for key in attempts:
            self._put(session, key, Accept(session.agent_id, key), self._judged)

    def declined(self, session: AgentSession, declines: Iterable[machine.Decline]) -> None:
        """Offers were given back; a decline that comes too late changes nothing."""
        for key, failure in declines:
            reason = failure.reason or Reason.REASON_ABANDONED
            decline = Decline(session.agent_id, key, reason, failure_text(failure.message), True)
            self._put(session, key, decline, self._returned)

    def withdrawn(self, session: AgentSession, attempts: Iterable[AttemptKey]) -> None:
        """Offers got no answer in time, or never left."""
        words = f'agent "{session.agent_id}" did not answer the offer in time'
        for key in attempts:
            decline = Decline(session.agent_id, key, Reason.REASON_OFFER_TIMEOUT, words, True)
            self._put(session, key, decline, self._returned)

    def progressed(self, session: AgentSession, progress: Iterable[ArrivedProgress]) -> None:
        """There is news."""
        for key, number, payload in progress:
            if self.store.waiting > _PROGRESS_WAITING:
                self.counts.progress_dropped += 1
                continue
            advance = ReportProgress(session.agent_id, key, self.progress_kept, number, payload)
            self._put(session, key, advance, self._judged)

    def ended(self, session: AgentSession, results: Iterable[ArrivedResult]) -> None:
        """Attempts have ended."""
        for key, result in results:
            self._put(session, key, _transition(session.agent_id, key, result), self._result_judged)

    def cancel_acknowledged(self, session: AgentSession, attempts: Iterable[AttemptKey]) -> None:
        """Cancels have arrived."""
        for key in attempts:
            # One that comes behind the attempt's end is no offence.
            self._put(session, key, AcknowledgeCancel(session.agent_id, key), self._returned)

    def beat(self, session: AgentSession, heartbeat: HeartbeatArrived) -> None:
        """Leases are to be renewed; the echo follows once they are."""
        shards: dict[int, list[AttemptKey]] = {}
        for key in heartbeat.running:
            shards.setdefault(shard_of(key.task_id), []).append(key)
        waiting = len(shards)

        def renewed(stale: list[AttemptKey]) -> None:
            nonlocal waiting
            waiting -= 1
            for key in stale:
                self._refuse(session, key)
            if waiting == 0 and self.store.up:
                session.machine.echo(heartbeat.number)

        for shard, keys in shards.items():
            renew = Renew(shard, session.agent_id, tuple(keys))
            self._hand_in(session, renew, renewed)
        if not shards or not self.store.up:
            session.machine.echo(heartbeat.number)

    def strangers(self, session: AgentSession, attempts: Iterable[AttemptKey]) -> None:
        """The session's machine refused reports about attempts that it does not know."""
        for key in attempts:
            self.counts.stale += 1
            self.refused(session.agent_id, key.task_id, StaleFence(_STALE))

    def undeliverable(self, session: AgentSession, key: AttemptKey, error: OrkiError) -> None:
        """A task that was handed out cannot be offered to its agent: it goes back, or ends where it never can be."""
        words = failure_text(error.message)
        if isinstance(error, TooLarge):
            fail = Fail(session.agent_id, key, error.reason, words, "", False)
            self._put(session, key, fail, self._returned)
        else:
            decline = Decline(session.agent_id, key, Reason.REASON_ABANDONED, words, True)
            self._put(session, key, decline, self._returned)

    # --- answers ---

    def _judged(self, session: AgentSession, key: AttemptKey, answer: ReportReply) -> None:
        if answer.verdict is ReportStatus.STALE:
            self._refuse(session, key)
        else:
            self.moved(key.task_id, answer.state in TERMINAL)

    def _returned(self, session: AgentSession, key: AttemptKey, answer: ReportReply) -> None:
        if answer.verdict is ReportStatus.ACCEPTED:
            self.moved(key.task_id, answer.state in TERMINAL)
            self._requeued(key, answer)

    def _result_judged(self, session: AgentSession, key: AttemptKey, answer: ReportReply) -> None:
        if answer.verdict is ReportStatus.STALE:
            self._refuse(session, key)
            return
        if answer.verdict is ReportStatus.ACCEPTED:
            self.counts.accepted += 1
            self.moved(key.task_id, answer.state in TERMINAL)
            self._requeued(key, answer)
        else:
            self.counts.repeated += 1
        session.machine.acknowledge(key)

    def _requeued(self, key: AttemptKey, answer: ReportReply) -> None:
        if answer.retry_ms >= 0:
            self.queued(shard_of(key.task_id), answer.retry_ms)

    def _refuse(self, session: AgentSession, key: AttemptKey) -> None:
        error = StaleFence(_STALE)
        self.counts.stale += 1
        self.refused(session.agent_id, key.task_id, error)
        session.machine.refuse(key, error)

    # --- the way there and back ---

    def _put(
        self,
        session: AgentSession,
        key: AttemptKey,
        transition: Operation[ReportReply],
        then: Callable[[AgentSession, AttemptKey, ReportReply], None],
    ) -> None:
        self._hand_in(session, transition, lambda answer: then(session, key, answer))

    def _hand_in(self, session: AgentSession, transition: Operation[R], then: Callable[[R], None]) -> None:
        try:
            future = self.store.put(transition)
        except StoreUnavailable as error:
            # The lane is full. The agent keeps what it reported, and tells it again on its next stream.
            session.end(error.message)
            return

        def answered(done: asyncio.Future[Any]) -> None:
            if done.cancelled():
                return
            error = done.exception()
            if error is None:
                then(done.result())
                session.changed()
            elif not isinstance(error, StoreUnavailable):
                _log.error("agent %s: a report could not be stored: %s", session.agent_id, error)
                session.end("a report could not be stored")

        future.add_done_callback(answered)


def _transition(agent_id: str, key: AttemptKey, result: Result) -> Operation[ReportReply]:
    if result.WhichOneof("outcome") == "response":
        return Succeed(agent_id, key, result.response)
    if result.WhichOneof("outcome") == "cancelled":
        return ConfirmCancelled(agent_id, key, result.cancelled.reason or Reason.REASON_CANCELLED)
    failure: Failure = result.failure
    reason = failure.reason or Reason.REASON_HANDLER_FAILED
    return Fail(
        agent_id,
        key,
        reason,
        failure_text(failure.message),
        failure_text(failure.error_type)[:200],
        error_for(reason, "").retryable,
    )


def failure_text(text: str) -> str:
    """Words as they are kept: bounded, without the characters that separate failures in the store."""
    return text[:_MESSAGE].replace("\x1e", " ").replace("\x1f", " ")
