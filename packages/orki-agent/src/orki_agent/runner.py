"""Runs attempts: what the session says becomes handlers at work, and what they come to becomes reports.

Everything here happens on the I/O thread, so a cancel is answered, a grace runs out and an unresponsive handler is
given up whatever user code does.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from orki.control.v1.attempt_pb2 import Failure
from orki_agent.async_handlers import AsyncExecution
from orki_agent.catalog import Handler
from orki_agent.crossing import Mailbox
from orki_agent.execution import Execution
from orki_agent.hotpath._thread_pool import ThreadPool
from orki_agent.outcomes import cancelled_outcome
from orki_agent.surroundings import Offered, Surroundings
from orki_agent.sync_handlers import SyncExecution
from orki_contract.errors import OrkiError, Overloaded, Reason, UnknownMethod
from orki_contract.trace import new_span, parse_traceparent
from orki_control.session import AgentSession, ArrivedCancel, ArrivedDirective, ArrivedOffer, AttemptKey, Outcome

__all__ = ["Runner"]

_log = logging.getLogger("orki.agent")

_LAST_CHANCE: Final = 0.25
"""Seconds between the second cancellation and the report that the handler does not respond."""


class _Running:
    __slots__ = ("execution", "given_up", "timers")

    def __init__(self, execution: Execution) -> None:
        self.execution = execution
        self.given_up = False
        self.timers: list[asyncio.TimerHandle] = []


class Runner:
    """The attempts of one agent.

    Args:
        session: Takes the reports.
        handlers: By `package.Service/Method`.
        surroundings: The agent, for contexts.
        user: Mailbox of the user's loop.
        io: Mailbox of the I/O loop.
        window: Progress of one attempt that may be on its way.
        changed: Called after the session was told something.
    """

    def __init__(
        self,
        session: AgentSession,
        handlers: Mapping[str, Handler],
        surroundings: Surroundings,
        user: Mailbox,
        io: Mailbox,
        window: int,
        changed: Callable[[], None],
    ) -> None:
        self._session = session
        self._handlers = handlers
        self._surroundings = surroundings
        self._user = user
        self._io = io
        self._window = window
        self._changed = changed
        self._crew = ThreadPool("orki-handler")
        self._running: dict[AttemptKey, _Running] = {}
        self._one_less = asyncio.Event()
        self._on_their_way: Counter[AttemptKey] = Counter()

    @property
    def busy(self) -> bool:
        """Whether any handler is at work."""
        return bool(self._running)

    async def idle(self) -> None:
        """Returns once no handler is at work."""
        while self._running:
            self._one_less.clear()
            await self._one_less.wait()

    # --- what the session says ---

    def offers(self, offers: Iterable[ArrivedOffer]) -> None:
        """Answers offers; what is accepted begins."""
        loop = asyncio.get_running_loop()
        for attempt, offer, traceparent in offers:
            handler = self._handlers.get(offer.method)
            if handler is None:
                known = ", ".join(sorted(self._handlers))
                self._session.decline(attempt, UnknownMethod(f"{offer.method} is not served here (served: {known})"))
                continue
            parent = parse_traceparent(traceparent)
            offered = Offered(attempt, offer.request, parent.child() if parent else new_span())
            running = _Running(self._execution(offered, handler))
            if not self._session.accept(attempt, loop.time()):
                continue
            self._running[attempt] = running
            if offer.attempt_timeout_ms:
                running.timers.append(loop.call_later(offer.attempt_timeout_ms / 1000, self._timed_out, attempt))
            self._start(attempt, running)

    def cancels(self, cancels: Iterable[ArrivedCancel]) -> None:
        """Ends attempts: at once for those that listen, after the grace harder."""
        loop = asyncio.get_running_loop()
        for attempt, grace_ms, message in cancels:
            running = self._running.get(attempt)
            if running is None or running.execution.cancelled:
                continue
            _log.info("%s is cancelled%s", attempt, f": {message}" if message else "")
            running.execution.cancel()
            running.timers.append(loop.call_later(grace_ms / 1000, self._grace_over, attempt))

    def directives(self, directives: Iterable[ArrivedDirective]) -> None:
        """Hands directives to their handlers."""
        for attempt, payload in directives:
            running = self._running.get(attempt)
            if running is not None:
                running.execution.direct(payload)

    def revoke(self, attempt: AttemptKey, why: str) -> None:
        """Stops an attempt that is no longer ours; nothing is reported."""
        running = self._running.get(attempt)
        if running is None:
            return
        _log.warning("%s is stopped: %s", attempt, why)
        running.given_up = True
        running.execution.cancel()
        grace = running.execution.handler.task.contract.cancel_grace
        running.timers.append(asyncio.get_running_loop().call_later(grace, running.execution.cancel))

    def abandon(self, why: str) -> None:
        """Gives every running attempt back, with the truth: its handler had started."""
        for attempt, running in self._running.items():
            if not running.given_up:
                failure = Failure(reason=Reason.REASON_ABANDONED, message=f"{why}; the handler had started")
                self._give_up(attempt, running, failure)
            running.execution.cancel()
        self._changed()

    def cancel_all(self) -> None:
        """Asks every handler for its end."""
        for running in self._running.values():
            running.execution.cancel()

    # --- what handlers do; from any thread ---

    def send_progress(self, attempt: AttemptKey, payload: bytes) -> None:
        """Queues progress of a handler."""
        self._io.post(self._progress, attempt, payload)

    # --- the window of progress ---

    def sent(self) -> None:
        """Something has left: opens the windows of those whose progress it was."""
        for attempt in list(self._on_their_way):
            left = self._on_their_way[attempt] - self._session.backlog(attempt)
            if left > 0:
                self._on_their_way[attempt] -= left
                if not self._on_their_way[attempt]:
                    del self._on_their_way[attempt]
                running = self._running.get(attempt)
                if running is not None:
                    running.execution.grant(left)

    def close(self, seconds: float) -> bool:
        """Lets the handlers' threads go; whether all had ended."""
        return self._crew.close(seconds)

    # --- inner ---

    def _execution(self, offered: Offered, handler: Handler) -> Execution:
        attempt = offered.attempt

        def ended(outcome: Outcome) -> None:
            self._io.post(self._ended, attempt, outcome)

        if handler.is_async:
            return AsyncExecution(offered, handler, self._surroundings, ended, self._user, self._window)
        return SyncExecution(offered, handler, self._surroundings, ended, self._crew, self._window)

    def _start(self, attempt: AttemptKey, running: _Running) -> None:
        try:
            running.execution.start()
        except RuntimeError as error:
            overloaded = Overloaded(f"no further thread can be started: {error}")
            self._ended(attempt, Failure(reason=overloaded.reason, message=overloaded.message))

    def _progress(self, attempt: AttemptKey, payload: bytes) -> None:
        running = self._running.get(attempt)
        if running is None or running.given_up:
            return
        try:
            if self._session.progress(attempt, payload):
                self._on_their_way[attempt] += 1
        except OrkiError as error:
            _log.warning("%s: progress was dropped: %s", attempt, error.message)
            running.execution.grant(1)
        self._changed()

    def _ended(self, attempt: AttemptKey, outcome: Outcome) -> None:
        running = self._running.pop(attempt)
        self._one_less.set()
        for timer in running.timers:
            timer.cancel()
        if running.given_up:
            self._session.release(attempt)
        else:
            self._session.report(attempt, outcome, asyncio.get_running_loop().time())
        self._changed()

    def _timed_out(self, attempt: AttemptKey) -> None:
        running = self._running[attempt]
        if not running.given_up:
            failure = Failure(reason=Reason.REASON_ATTEMPT_TIMEOUT, message="the attempt timeout has passed")
            self._give_up(attempt, running, failure)
        running.execution.cancel()

    def _grace_over(self, attempt: AttemptKey) -> None:
        running = self._running[attempt]
        running.execution.cancel()
        timer = asyncio.get_running_loop().call_later(_LAST_CHANCE, self._unresponsive, attempt)
        running.timers.append(timer)

    def _unresponsive(self, attempt: AttemptKey) -> None:
        running = self._running[attempt]
        if not running.given_up:
            _log.error(
                "%s does not end after its cancel and is left behind; its slot stays taken until it does", attempt
            )
            self._give_up(attempt, running, cancelled_outcome(Reason.REASON_CANCEL_UNRESPONSIVE))

    def _give_up(self, attempt: AttemptKey, running: _Running, outcome: Outcome) -> None:
        running.given_up = True
        self._session.report(attempt, outcome, asyncio.get_running_loop().time(), still_running=True)
        self._changed()
