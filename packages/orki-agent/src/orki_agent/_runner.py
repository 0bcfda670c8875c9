"""Runs attempts: offers start handlers, and the ends of handlers become results.

Everything here happens on the I/O thread. A cancel is acknowledged, a grace ends and an unresponsive handler is left
behind, whatever user code does.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence

from orki.control.v1.attempt_pb2 import Budget, Failure
from orki.control.v1.session_pb2 import CancelledOutcome
from orki_agent._checkpoints import CheckpointWaits, not_held
from orki_agent._execution import Execution
from orki_agent._handlers import AsyncExecution, SyncExecution
from orki_agent._services import AgentServices, Handler, Offered, OnStored
from orki_agent._subprocess import ChildPool, ProcessExecution
from orki_agent._threads import Mailbox
from orki_agent.hotpath._thread_pool import ThreadPool
from orki_contract import ProgressPolicy
from orki_contract.errors import OrkiError, Overloaded, Reason, UnknownMethod
from orki_contract.trace import new_span, parse_traceparent
from orki_control import session
from orki_control.session import AttemptKey, Outcome

_log = logging.getLogger("orki.agent")


class _Running:
    __slots__ = ("execution", "left_behind", "timers")

    def __init__(self, execution: Execution) -> None:
        self.execution = execution
        self.left_behind = False
        self.timers: list[asyncio.TimerHandle] = []


class Runner:
    """The attempts of one agent.

    Args:
        machine: Session machine that receives the reports.
        handlers: Handlers by `package.Service/Method`.
        agent: The agent, for contexts.
        user: Mailbox of the user's loop.
        io: Mailbox of the I/O loop.
        window: Maximum number of progress messages of one attempt that are not stored.
        children: Child processes; None if no handler needs them.

    Attributes:
        on_other: Receives the events that are not about attempts. Set it before the session starts.
    """

    on_other: Callable[[session.AgentEvent], None]

    def __init__(
        self,
        machine: session.AgentSession,
        handlers: Mapping[str, Handler],
        agent: AgentServices,
        user: Mailbox,
        io: Mailbox,
        window: int,
        children: ChildPool | None = None,
    ) -> None:
        self._machine = machine
        self._handlers = handlers
        self._agent = agent
        self._user = user
        self._io = io
        self._window = window
        self._pool = ThreadPool("orki-handler")
        self._children = children
        self._running: dict[AttemptKey, _Running] = {}
        self._handler_ended = asyncio.Event()
        self._unstored: dict[AttemptKey, tuple[int, int]] = {}
        self._checkpoints = CheckpointWaits(machine)

    async def idle(self) -> None:
        """Wait until no handler runs."""
        while self._running:
            self._handler_ended.clear()
            await self._handler_ended.wait()

    # --- Events of the session. ---

    def handle(self, events: Sequence[session.AgentEvent]) -> None:
        """Handle the events about attempts and pass the others on."""
        for event in events:
            match event:
                case session.OffersArrived(offers):
                    self._offers(offers)
                case session.CancelsArrived(cancels):
                    self._cancels(cancels)
                case session.DirectivesArrived(directives):
                    for attempt, payload in directives:
                        if (running := self._running.get(attempt)) is not None:
                            running.execution.direct(payload)
                case session.AttemptsRevoked(revocations):
                    for revocation in revocations:
                        self._revoke(revocation.attempt, revocation.failure.message)
                case session.LeasesLost(attempts):
                    for attempt in attempts:
                        self._revoke(attempt, "its lease could not be renewed")
                case session.ProgressAcknowledged():
                    self.grant()
                case session.CheckpointsStored(checkpoints):
                    for checkpoint in checkpoints:
                        self._checkpoints.stored(checkpoint)
                case session.BudgetsChanged(updates):
                    for attempt, update in updates:
                        if (running := self._running.get(attempt)) is not None:
                            running.execution.update_budgets(update)
                case session.ResultsAcknowledged():
                    pass
                case _:
                    self.on_other(event)

    def _offers(self, offers: Iterable[session.ArrivedOffer]) -> None:
        loop = asyncio.get_running_loop()
        for attempt, offer, traceparent in offers:
            handler = self._handlers.get(offer.method)
            if handler is None:
                known = ", ".join(sorted(self._handlers))
                error = UnknownMethod(f"this agent does not serve {offer.method} (it serves: {known})")
                self._machine.decline(attempt, error)
                continue
            parent = parse_traceparent(traceparent)
            offered = Offered(
                attempt,
                offer.request,
                parent.child() if parent else new_span(),
                offer.checkpoint if offer.HasField("checkpoint") else None,
                offer.answer if offer.HasField("answer") else None,
                offer.answer_overdue,
                tuple(offer.budgets),
            )
            running = _Running(self._execution(offered, handler))
            if not self._machine.accept(attempt, loop.time()):
                continue
            self._running[attempt] = running
            if offer.attempt_timeout_ms:
                running.timers.append(loop.call_later(offer.attempt_timeout_ms / 1000, self._timed_out, attempt))
            try:
                running.execution.start()
            except RuntimeError as error:
                overloaded = Overloaded(f"no further thread can be started: {error}")
                self._ended(attempt, Failure(reason=overloaded.reason, message=overloaded.message))

    def _execution(self, offered: Offered, handler: Handler) -> Execution:
        attempt = offered.attempt

        def ended(outcome: Outcome) -> None:
            self._io.post(self._ended, attempt, outcome)

        if handler.is_async:
            return AsyncExecution(offered, handler, self._agent, ended, self._user, self._window)
        if handler.subprocess is not None:
            assert self._children is not None
            return ProcessExecution(offered, handler, self._agent, ended, self._pool, self._children, self._window)
        return SyncExecution(offered, handler, self._agent, ended, self._pool, self._window)

    def _cancels(self, cancels: Iterable[session.ArrivedCancel]) -> None:
        loop = asyncio.get_running_loop()
        for attempt, grace_ms, message in cancels:
            running = self._running.get(attempt)
            if running is None or running.execution.cancelled:
                continue
            _log.info("%s is cancelled%s", attempt, f": {message}" if message else "")
            running.execution.cancel()
            running.timers.append(loop.call_later(grace_ms / 1000, self._grace_over, attempt))

    def _revoke(self, attempt: AttemptKey, why: str) -> None:
        """Stop an attempt that the agent no longer holds; nothing is reported."""
        running = self._running.get(attempt)
        if running is None:
            return
        _log.warning("%s is stopped: %s", attempt, why)
        running.left_behind = True
        self._checkpoints.give_up(attempt)
        running.execution.cancel()
        grace = running.execution.handler.task.contract.cancel_grace
        running.timers.append(asyncio.get_running_loop().call_later(grace, running.execution.stop))

    # --- The end of the agent. ---

    def abandon(self, why: str) -> None:
        """Give every running attempt back, and report that its handler had started."""
        for attempt, running in self._running.items():
            if not running.left_behind:
                failure = Failure(reason=Reason.REASON_ABANDONED, message=f"{why}; the handler had started")
                self._leave_behind(attempt, running, failure)
            running.execution.cancel()

    def cancel_all(self) -> None:
        """Cancel every handler."""
        for running in self._running.values():
            running.execution.cancel()

    def close(self, timeout: float) -> bool:
        """End the threads and processes of handlers; return whether all threads ended within `timeout` seconds."""
        if self._children is not None:
            self._children.close()
        return self._pool.close(timeout)

    # --- Progress and checkpoints. ---

    def save_checkpoint(self, attempt: AttemptKey, payload: bytes, on_stored: OnStored) -> None:
        """Send a checkpoint of a handler; call it from any thread."""
        self._io.post(self._checkpoint, attempt, payload, on_stored)

    def _checkpoint(self, attempt: AttemptKey, payload: bytes, on_stored: OnStored) -> None:
        running = self._running.get(attempt)
        if running is None or running.left_behind:
            on_stored(not_held(attempt))
        else:
            self._checkpoints.save(attempt, payload, on_stored)

    def report_usage(self, attempt: AttemptKey, total: Budget) -> None:
        """Report the usage of a handler; call it from any thread."""
        self._io.post(self._use, attempt, total)

    def _use(self, attempt: AttemptKey, total: Budget) -> None:
        running = self._running.get(attempt)
        if running is not None and not running.left_behind:
            self._machine.use(attempt, total)

    def send_progress(self, attempt: AttemptKey, payload: bytes) -> None:
        """Queue progress of a handler; call it from any thread."""
        self._io.post(self._progress, attempt, payload)

    def grant(self) -> None:
        """Return credits to handlers whose progress was stored, or sent to an orchestrator with protocol 1."""
        for attempt, (count, size) in list(self._unstored.items()):
            left, left_size = self._machine.unstored(attempt)
            if left == count:
                continue
            running = self._running.get(attempt)
            if running is not None:
                running.execution.grant(count - left, size - left_size)
            if left:
                self._unstored[attempt] = left, left_size
            else:
                del self._unstored[attempt]

    def _progress(self, attempt: AttemptKey, payload: bytes) -> None:
        running = self._running.get(attempt)
        if running is None or running.left_behind:
            return
        policy = running.execution.handler.task.contract.progress_policy
        try:
            kept = self._machine.progress(attempt, payload, policy) and policy is ProgressPolicy.BLOCK
        except OrkiError as error:
            _log.warning("%s: progress was dropped: %s", attempt, error.message)
            kept = False
        if kept:
            count, size = self._unstored.get(attempt, (0, 0))
            self._unstored[attempt] = count + 1, size + len(payload)
        else:
            # Only the policy `BLOCK` waits for the store.
            running.execution.grant(1, len(payload))

    # --- Ends of attempts. ---

    def _ended(self, attempt: AttemptKey, outcome: Outcome) -> None:
        running = self._running.pop(attempt)
        self._checkpoints.give_up(attempt)
        self._handler_ended.set()
        for timer in running.timers:
            timer.cancel()
        if running.left_behind:
            self._machine.release(attempt)
        else:
            self._machine.report(attempt, outcome, asyncio.get_running_loop().time())

    def _timed_out(self, attempt: AttemptKey) -> None:
        running = self._running[attempt]
        if not running.left_behind:
            failure = Failure(reason=Reason.REASON_ATTEMPT_TIMEOUT, message="the attempt timeout has passed")
            self._leave_behind(attempt, running, failure)
        running.execution.cancel()
        grace = running.execution.handler.task.contract.cancel_grace
        running.timers.append(asyncio.get_running_loop().call_later(grace, running.execution.stop))

    def _grace_over(self, attempt: AttemptKey) -> None:
        running = self._running[attempt]
        running.execution.stop()
        timer = asyncio.get_running_loop().call_later(running.execution.ends_within, self._unresponsive, attempt)
        running.timers.append(timer)

    def _unresponsive(self, attempt: AttemptKey) -> None:
        running = self._running[attempt]
        if not running.left_behind:
            _log.error("%s does not end after its cancel; its slot stays occupied until the handler ends", attempt)
            self._leave_behind(attempt, running, CancelledOutcome(reason=Reason.REASON_CANCEL_UNRESPONSIVE))

    def _leave_behind(self, attempt: AttemptKey, running: _Running, outcome: Outcome) -> None:
        """Report the end of an attempt whose handler still runs."""
        running.left_behind = True
        self._machine.report(attempt, outcome, asyncio.get_running_loop().time(), still_running=True)
