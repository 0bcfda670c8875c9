"""Assigns queued tasks to free slots, and executes tasks' timers.

`Demand` knows which methods have queued tasks, and which sessions have free slots for them. The shards of these tasks
are asked one after another, each in one operation for all of its methods. The operation joins the batch that is sent
next, also that of a submission. A slow poll finds tasks of which this orchestrator was not told.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Final

from orki.control.v1.attempt_pb2 import BudgetBalance
from orki.control.v1.session_pb2 import Offer as OfferMessage
from orki_contract.errors import OrkiError, StoreUnavailable, error_for
from orki_server._budgets import Budgets
from orki_server._demand import Demand, Request
from orki_server._session import AgentSession, SessionRegistry
from orki_server._sessions import Reports
from orki_server._store.mail import queue_lengths
from orki_server._store.operations import Assigned, OfferedAttempt, offer, shard_of
from orki_server._store.store import Store
from orki_server._store.upkeep import Expired, Swept, sweep

_STORE_SLACK: Final = 1.0
"""The store withdraws an unanswered offer later than the session does, for the case that this process has ended."""
_AGAIN: Final = 0.05
"""Wait after a request that could not be sent."""
_LOOK: Final = 0.5
"""Maximum time after which a changed interval of the polls is noticed."""
_SWEEP_LIMIT: Final = 100
_TICK: Final = 0.5
"""Maximum time between two sweeps. When none comes for twice as long, nobody could hear the agents."""
_log = logging.getLogger("orki.server.dispatch")


class Dispatcher:
    """Assigns tasks; calls `on_change` with a task that was offered, and False as it has not ended.

    `poll` returns the time between two polls; each asks for the methods that have free slots here.

    Attributes:
        demand: The queued tasks and the free slots.
        offered: Number of offers.
    """

    def __init__(
        self,
        store: Store,
        reports: Reports,
        accept_timeout: float,
        on_change: Callable[[str, bool], None],
        poll: Callable[[], float],
        budgets: Budgets,
    ) -> None:
        self._poll_after = poll
        self._budgets = budgets
        self._store = store
        self._reports = reports
        self._accept_timeout = accept_timeout
        self._on_change = on_change
        self._loop: asyncio.AbstractEventLoop | None = None
        self._defect: Exception | None = None
        self._round: deque[int] = deque()
        self._wanted = self._scheduled = self._asking = False
        self._admissions: set[asyncio.Task[None]] = set()
        self.demand = Demand(store.shards, self._wake)
        self.offered = 0
        store.on_batch(self._ask)

    async def run(self) -> None:
        self._loop = loop = asyncio.get_running_loop()
        self._wake()
        polled = loop.time()
        try:
            while self._defect is None:
                await asyncio.sleep(min(_LOOK, self._poll_after()))
                await self._store.connection.up.wait()
                if loop.time() >= polled + self._poll_after():
                    polled = loop.time()
                    with contextlib.suppress(OrkiError):
                        await self._poll()
            raise self._defect
        finally:
            self._loop = None
            for task in self._admissions:
                task.cancel()

    async def _poll(self) -> None:
        """Ask which methods have queued tasks, of those with free slots and without a known task."""
        shards = [(shard, methods) for shard in range(self._store.shards) if (methods := self.demand.unmarked(shard))]
        lengths = await asyncio.gather(
            *(self._store.apply(queue_lengths(shard, methods)) for shard, methods in shards), return_exceptions=True
        )
        for (shard, _), counts in zip(shards, lengths, strict=True):
            if isinstance(counts, BaseException):
                _log.warning("the queues of shard %d could not be read: %s", shard, counts)
                continue
            for method, count in counts.items():
                self.demand.queued(shard, method, count)

    def _wake(self) -> None:
        """Ask the shards with tasks for free slots, at the latest in the next turn of the loop."""
        self._wanted = True
        if self._loop is not None and not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._woken)

    def _woken(self) -> None:
        self._scheduled = False
        self._ask()

    def _ask(self) -> None:
        """Ask the next shard, unless one is asked already. A round asks each shard with tasks once."""
        if self._asking or self._loop is None or not self._store.up:
            return
        try:
            while self._round or self._wanted:
                if not self._round:
                    self._wanted = False
                    self._round.extend(self.demand.shards())
                elif (request := self.demand.take(self._round.popleft())) is not None:
                    self._send(request)
                    return
        except Exception as error:
            self._defect = error

    def _send(self, request: Request) -> None:
        operation = offer(request.shard, self._accept_timeout + _STORE_SLACK, request.recipients)
        try:
            assigned = self._store.offer(operation)
        except OrkiError as error:
            _log.warning("no tasks were assigned: %s", error.message)
            self._round.clear()
            asyncio.get_running_loop().call_later(_AGAIN, self.demand.give_back, request)
            return
        self._asking = True
        assigned.add_done_callback(partial(self._answered, request))

    def _answered(self, request: Request, answer: asyncio.Future[Assigned]) -> None:
        if answer.cancelled() or self._loop is None:
            self._asking = False
            return
        try:
            error = answer.exception()
            if error is None:
                self._assigned(request, answer.result())
            elif isinstance(error, StoreUnavailable):
                _log.warning("no tasks were assigned: %s", error.message)
                self._round.clear()
                self.demand.give_back(request)
            elif isinstance(error, OrkiError):
                _log.error("shard %d assigns no tasks: %s", request.shard, error.message)
            else:
                raise error
        except Exception as defect:
            self._defect = defect
        if not self._admissions:
            self._asking = False
            self._ask()

    def _assigned(self, request: Request, assigned: Assigned) -> None:
        _report_damage(request.shard, assigned.damaged)
        if any(each.accounts for each in assigned.offers):
            task = asyncio.get_running_loop().create_task(self._admit(request, assigned), name="orki budgets of offers")
            self._admissions.add(task)
            task.add_done_callback(self._admitted)
            return
        for each in assigned.offers:
            self._offer(request.sessions[each.recipient], each)
        self._settle(request, assigned)

    async def _admit(self, request: Request, assigned: Assigned) -> None:
        """Offer the tasks whose budgets are not used up."""
        admitted = await self._budgets.admit_offers(request.sessions, assigned.offers)
        for each in assigned.offers:
            if each.attempt in admitted:
                self._offer(request.sessions[each.recipient], each, admitted[each.attempt])
        self._settle(request, assigned)

    def _admitted(self, task: asyncio.Task[None]) -> None:
        self._admissions.discard(task)
        if not task.cancelled() and isinstance(error := task.exception(), Exception):
            self._defect = error
        self._asking = False
        self._ask()

    def _settle(self, request: Request, assigned: Assigned) -> None:
        self.demand.settle(request, assigned.offers)
        if assigned.again is not None:
            self.demand.wait(request)
            if assigned.again > 0:
                asyncio.get_running_loop().call_later(assigned.again, self._wake)

    def _offer(self, session: AgentSession, offered: OfferedAttempt, budgets: Sequence[BudgetBalance] = ()) -> None:
        message = OfferMessage(
            attempt=offered.attempt.ref(),
            method=offered.method,
            request=offered.request,
            lease_ms=round(offered.lease * 1000),
            accept_timeout_ms=round(self._accept_timeout * 1000),
            attempt_timeout_ms=round(offered.attempt_timeout * 1000),
            proof=self._store.proof(session.agent_id, offered.attempt),
            checkpoint=offered.checkpoint,
            answer=offered.answer,
            answer_overdue=offered.answer_overdue,
            budgets=budgets,
        )
        try:
            session.machine.offer(message, offered.traceparent, time.monotonic())
        except OrkiError as error:
            # The session ended, or its slots were taken, during the operation.
            self._reports.undeliverable(session, offered.attempt, error)
            return
        self.offered += 1
        self._on_change(offered.attempt.task_id, False)


def _report_damage(shard: int, damaged: Iterable[str]) -> None:
    for name in damaged:
        _log.error("%s on shard %d cannot be read and is left out: its record is damaged", name, shard)


class Sweeper:
    """Executes the timers of all shards.

    It sweeps a shard when a timer is due there and at every `interval`, which is at most half a second: each sweep
    advances the shard's clock. After a start, and after the store was down, it executes no timers for `pause`: agents
    must first have the chance to renew their leases. It calls `on_queued` with shard and method of a task that is
    queued again, `on_change` with a task that changed and whether it ended, `on_mail` with a shard that has mail,
    `on_orphans` with one that has children of ended parents, and `on_raised` with one whose budgets were raised.
    """

    def __init__(
        self,
        store: Store,
        sessions: SessionRegistry,
        *,
        interval: float,
        pause: float,
        on_queued: Callable[[int, str], None],
        on_change: Callable[[str, bool], None],
        on_mail: Callable[[int], None],
        on_orphans: Callable[[int], None],
        on_raised: Callable[[int], None],
    ) -> None:
        self._on_raised = on_raised
        self._on_mail = on_mail
        self._on_orphans = on_orphans
        self._store = store
        self._sessions = sessions
        self._interval = min(interval, _TICK)
        self._pause = pause
        self._on_queued = on_queued
        self._on_change = on_change
        self._wake = asyncio.Event()
        self._dues = [0.0] * store.shards
        self._paused_until = 0.0
        store.connection.on_change(self._store_changed)
        store.on_timer(self.wake_in)

    def wake_in(self, shard: int, wait: float) -> None:
        """Sweep a shard after a time, if not earlier."""
        due = asyncio.get_running_loop().time() + wait
        if due < self._dues[shard]:
            is_next = due < min(self._dues)
            self._dues[shard] = due
            if is_next:
                self._wake.set()

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        self._store_changed(up=True)
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(min(self._dues)):
                    await self._wake.wait()
            self._wake.clear()
            await self._store.connection.up.wait()
            now = loop.time()
            shards = [shard for shard, due in enumerate(self._dues) if due <= now]
            if not shards:
                continue
            for shard in shards:
                self._dues[shard] = now + self._interval
            paused = now < self._paused_until
            try:
                for shard, next_timer in await self.sweep(shards, 0 if paused else _SWEEP_LIMIT):
                    if not paused:
                        self.wake_in(shard, next_timer)
            except OrkiError as error:
                _log.warning("timers are delayed: %s", error.message)

    async def sweep(self, shards: Sequence[int], limit: int = _SWEEP_LIMIT) -> list[tuple[int, float]]:
        """Sweep shards once. Returns those that have a timer, with the time until it.

        Args:
            shards: The shards.
            limit: Maximum number of tasks of each shard; 0 only advances the clocks.

        Raises:
            StoreUnavailable: The store is down.
        """
        sweeps = await asyncio.gather(
            *(self._store.apply(sweep(shard, limit)) for shard in shards), return_exceptions=True
        )
        next_timers = []
        for shard, swept in zip(shards, sweeps, strict=True):
            if isinstance(swept, StoreUnavailable) or not isinstance(swept, Swept | OrkiError):
                raise swept
            if isinstance(swept, OrkiError):
                _log.error("the timers of shard %d are delayed: %s", shard, swept.message)
                continue
            _report_damage(shard, swept.damaged)
            if swept.has_orphans:
                self._on_orphans(shard)
            if swept.has_raised:
                self._on_raised(shard)
            if swept.has_mail:
                self._on_mail(shard)
            for expired in swept.expired:
                self._expired(expired)
            if swept.next_timer is not None:
                # The store's clock may be between two milliseconds.
                next_timers.append((shard, swept.next_timer + 0.001))
        return next_timers

    def _expired(self, expired: Expired) -> None:
        key = expired.attempt
        self._on_change(key.task_id, expired.kind == "task")
        self._on_queued(shard_of(key.task_id), expired.method)
        session = self._sessions.get(expired.agent_id)
        if expired.kind != "retry" and session is not None:
            error = error_for(expired.reason, "the attempt timed out, and the agent no longer holds it")
            session.machine.refuse(key, error)

    def _store_changed(self, up: bool) -> None:
        if up:
            self._paused_until = asyncio.get_running_loop().time() + self._pause
