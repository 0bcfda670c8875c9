"""What agents report goes to the store; what the store says to it goes back to the agents.

Nothing here waits: transitions are handed in, in the order of the reports, and each answer calls back into the
session's machine. While the store is away they wait in its lane; heartbeats are then echoed at once, as the renewals
that wait go first when the store is back, before anything there can expire.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from orki.control.v1.attempt_pb2 import Failure
from orki.control.v1.session_pb2 import Result
from orki.errors.v1.errors_pb2 import Reason
from orki_contract.errors import OrkiError, StaleFence, StoreUnavailable, TooLarge, error_for
from orki_control.attempt import AttemptKey
from orki_control.session import ArrivedProgress, ArrivedResult, Decline, HeartbeatArrived
from orki_server import store
from orki_server.sessions.live import LiveSession
from orki_server.store import TERMINAL, Answer, Store, Transition, Verdict

__all__ = ["Reports", "failure_text"]

R = TypeVar("R")

_MESSAGE: Final = 4_000
"""Longest message of a failure that is kept, in characters."""
_PROGRESS_WAITING: Final = 20_000
"""Transitions in the lane above which progress is dropped: news that nobody can read yet must not push out results."""
_STALE: Final = "the attempt is not yours: it was withdrawn, has ended, or runs under a higher fence"
_log = logging.getLogger("orki.server.sessions")


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

    def accepted(self, session: LiveSession, attempts: Iterable[AttemptKey]) -> None:
        """Offers were taken."""
        for key in attempts:
            self._put(session, key, store.Accept(session.agent_id, key), self._judged)

    def declined(self, session: LiveSession, declines: Iterable[Decline]) -> None:
        """Offers were given back; a decline that comes too late changes nothing."""
        for key, failure in declines:
            reason = failure.reason or Reason.REASON_ABANDONED
            decline = store.Decline(session.agent_id, key, reason, failure_text(failure.message), True)
            self._put(session, key, decline, self._returned)

    def withdrawn(self, session: LiveSession, attempts: Iterable[AttemptKey]) -> None:
        """Offers got no answer in time, or never left."""
        words = f'agent "{session.agent_id}" did not answer the offer in time'
        for key in attempts:
            decline = store.Decline(session.agent_id, key, Reason.REASON_OFFER_TIMEOUT, words, True)
            self._put(session, key, decline, self._returned)

    def progressed(self, session: LiveSession, progress: Iterable[ArrivedProgress]) -> None:
        """There is news."""
        for key, number, payload in progress:
            if self.store.waiting > _PROGRESS_WAITING:
                self.counts.progress_dropped += 1
                continue
            advance = store.Advance(session.agent_id, key, self.progress_kept, number, payload)
            self._put(session, key, advance, self._judged)

    def ended(self, session: LiveSession, results: Iterable[ArrivedResult]) -> None:
        """Attempts have ended."""
        for key, result in results:
            self._put(session, key, _transition(session.agent_id, key, result), self._result_judged)

    def cancel_acknowledged(self, session: LiveSession, attempts: Iterable[AttemptKey]) -> None:
        """Cancels have arrived."""
        for key in attempts:
            # One that comes behind the attempt's end is no offence.
            self._put(session, key, store.AcknowledgeCancel(session.agent_id, key), self._returned)

    def beat(self, session: LiveSession, heartbeat: HeartbeatArrived) -> None:
        """Leases are to be renewed; the echo follows once they are."""
        shards: dict[int, list[AttemptKey]] = {}
        for key in heartbeat.running:
            shards.setdefault(store.shard_of(key.task_id), []).append(key)
        waiting = len(shards)

        def renewed(stale: list[AttemptKey]) -> None:
            nonlocal waiting
            waiting -= 1
            for key in stale:
                self._refuse(session, key)
            if waiting == 0 and self.store.up:
                session.machine.echo(heartbeat.number)

        for shard, keys in shards.items():
            renew = store.Renew(shard, session.agent_id, tuple(keys))
            self._hand_in(session, renew, renewed)
        if not shards or not self.store.up:
            session.machine.echo(heartbeat.number)

    def strangers(self, session: LiveSession, attempts: Iterable[AttemptKey]) -> None:
        """The session's machine refused reports about attempts that it does not know."""
        for key in attempts:
            self.counts.stale += 1
            self.refused(session.agent_id, key.task_id, StaleFence(_STALE))

    def undeliverable(self, session: LiveSession, key: AttemptKey, error: OrkiError) -> None:
        """A task that was handed out cannot be offered to its agent: it goes back, or ends where it never can be."""
        words = failure_text(error.message)
        if isinstance(error, TooLarge):
            fail = store.Fail(session.agent_id, key, error.reason, words, "", False)
            self._put(session, key, fail, self._returned)
        else:
            decline = store.Decline(session.agent_id, key, Reason.REASON_ABANDONED, words, True)
            self._put(session, key, decline, self._returned)

    # --- answers ---

    def _judged(self, session: LiveSession, key: AttemptKey, answer: Answer) -> None:
        if answer.verdict is Verdict.STALE:
            self._refuse(session, key)
        else:
            self.moved(key.task_id, answer.state in TERMINAL)

    def _returned(self, session: LiveSession, key: AttemptKey, answer: Answer) -> None:
        if answer.verdict is Verdict.ACCEPTED:
            self.moved(key.task_id, answer.state in TERMINAL)
            self._requeued(key, answer)

    def _result_judged(self, session: LiveSession, key: AttemptKey, answer: Answer) -> None:
        if answer.verdict is Verdict.STALE:
            self._refuse(session, key)
            return
        if answer.verdict is Verdict.ACCEPTED:
            self.counts.accepted += 1
            self.moved(key.task_id, answer.state in TERMINAL)
            self._requeued(key, answer)
        else:
            self.counts.repeated += 1
        session.machine.acknowledge(key)

    def _requeued(self, key: AttemptKey, answer: Answer) -> None:
        if answer.retry_ms >= 0:
            self.queued(store.shard_of(key.task_id), answer.retry_ms)

    def _refuse(self, session: LiveSession, key: AttemptKey) -> None:
        error = StaleFence(_STALE)
        self.counts.stale += 1
        self.refused(session.agent_id, key.task_id, error)
        session.machine.refuse(key, error)

    # --- the way there and back ---

    def _put(
        self,
        session: LiveSession,
        key: AttemptKey,
        transition: Transition[Answer],
        then: Callable[[LiveSession, AttemptKey, Answer], None],
    ) -> None:
        self._hand_in(session, transition, lambda answer: then(session, key, answer))

    def _hand_in(self, session: LiveSession, transition: Transition[R], then: Callable[[R], None]) -> None:
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


def _transition(agent_id: str, key: AttemptKey, result: Result) -> Transition[Answer]:
    if result.WhichOneof("outcome") == "response":
        return store.Succeed(agent_id, key, result.response)
    if result.WhichOneof("outcome") == "cancelled":
        return store.EndCancelled(agent_id, key, result.cancelled.reason or Reason.REASON_CANCELLED)
    failure: Failure = result.failure
    reason = failure.reason or Reason.REASON_HANDLER_FAILED
    return store.Fail(
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
