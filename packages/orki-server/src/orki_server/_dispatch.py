"""Assigns queued tasks to free slots, and executes tasks' timers.

A shard is *marked* while it may have queued tasks for agents of this orchestrator: after a submission, after an
attempt that is retried, when an agent connects. When slots become free, the marked shards are asked one after another,
for all agents with free slots in one operation. A slow poll finds tasks that other orchestrators queued.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import Final

from orki.control.v1.session_pb2 import Offer as OfferMessage
from orki_contract.errors import OrkiError, error_for
from orki_server._session import AgentSession, SessionRegistry
from orki_server._sessions import Reports
from orki_server._store.operations import Expired, OfferedAttempt, Recipient, offer, shard_of, sweep
from orki_server._store.store import Store

_POLL: Final = 0.5
_OFFERS: Final = 64
"""Maximum number of tasks for one agent in one operation, so that an agent with many slots does not take all."""
_STORE_SLACK: Final = 1.0
"""The store withdraws an unanswered offer later than the session does, for the case that this process has ended."""
_SWEEP_LIMIT: Final = 100
_log = logging.getLogger("orki.server.dispatch")


class Dispatcher:
    """Assigns tasks; calls `on_change` with a task that was offered, and False as it has not ended."""

    def __init__(
        self,
        store: Store,
        sessions: SessionRegistry,
        reports: Reports,
        accept_timeout: float,
        on_change: Callable[[str, bool], None],
    ) -> None:
        self._store = store
        self._sessions = sessions
        self._reports = reports
        self._accept_timeout = accept_timeout
        self._on_change = on_change
        self._marked: dict[int, None] = {}
        self._wake = asyncio.Event()
        self._turn = 0
        self.offered = 0

    def queued(self, shard: int) -> None:
        self._marked[shard] = None
        self._wake.set()

    def slots_changed(self, new_methods: bool) -> None:
        """Slots may have become free, perhaps for other methods than before."""
        if new_methods:
            self.mark_all()
        elif self._marked:
            self._wake.set()

    def mark_all(self) -> None:
        """Any shard may have tasks that an agent can take."""
        for shard in range(self._store.shards):
            self._marked[shard] = None
        self._wake.set()

    async def run(self) -> None:
        while True:
            try:
                async with asyncio.timeout(_POLL):
                    await self._wake.wait()
            except TimeoutError:
                self.mark_all()
            await self._store.connection.up.wait()
            self._wake.clear()
            with contextlib.suppress(OrkiError):
                await self._round()

    async def _round(self) -> None:
        """Ask each marked shard once, as long as slots are free."""
        for shard in list(self._marked):
            sessions = self._free_sessions()
            if not sessions:
                return
            del self._marked[shard]
            recipients = tuple(
                Recipient(each.agent_id, each.instance_id, min(slots, _OFFERS), each.methods)
                for slots, each in sessions
            )
            try:
                offered = await self._store.offer(offer(shard, self._accept_timeout + _STORE_SLACK, recipients))
            except OrkiError as error:
                _log.warning("no tasks were assigned: %s", error.message)
                self._marked[shard] = None
                raise
            if len(offered) == sum(each.slots for each in recipients):
                # Every slot was filled, so the shard may have more tasks.
                self.queued(shard)
            for each in offered:
                self._offer(sessions[each.recipient][1], each)

    def _free_sessions(self) -> list[tuple[int, AgentSession]]:
        """Return sessions with their numbers of free slots: those with more slots first, equal ones in turn."""
        sessions = [
            (slots, each) for each in self._sessions.values() if each.methods and (slots := each.machine.free_slots)
        ]
        self._turn += 1
        start = self._turn % len(sessions) if sessions else 0
        return sorted(sessions[start:] + sessions[:start], key=lambda pair: -pair[0])

    def _offer(self, session: AgentSession, offered: OfferedAttempt) -> None:
        message = OfferMessage(
            attempt=offered.attempt.ref(),
            method=offered.method,
            request=offered.request,
            lease_ms=round(offered.lease * 1000),
            accept_timeout_ms=round(self._accept_timeout * 1000),
            attempt_timeout_ms=round(offered.attempt_timeout * 1000),
        )
        try:
            session.machine.offer(message, offered.traceparent, time.monotonic())
        except OrkiError as error:
            # The session ended, or its slots were taken, during the operation.
            self._reports.undeliverable(session, offered.attempt, error)
            return
        self.offered += 1
        self._on_change(offered.attempt.task_id, False)


class Sweeper:
    """Executes the timers of all shards.

    It sweeps when a timer is due and at every `interval`. After a start, and after the store was down, it waits for
    `pause`: agents must first have the chance to renew their leases. It calls `on_queued` with a shard that has a
    queued task, and `on_change` with a task that changed and whether it ended.
    """

    def __init__(
        self,
        store: Store,
        sessions: SessionRegistry,
        *,
        interval: float,
        pause: float,
        on_queued: Callable[[int], None],
        on_change: Callable[[str, bool], None],
    ) -> None:
        self._store = store
        self._sessions = sessions
        self._interval = interval
        self._pause = pause
        self._on_queued = on_queued
        self._on_change = on_change
        self._wake = asyncio.Event()
        self._due = 0.0
        self._paused_until = 0.0
        store.connection.on_change(self._store_changed)

    def wake_in(self, wait: float) -> None:
        due = asyncio.get_running_loop().time() + wait
        if due < self._due:
            self._due = due
            self._wake.set()

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        self._store_changed(up=True)
        self._due = loop.time()
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(max(self._due, self._paused_until)):
                    await self._wake.wait()
            self._wake.clear()
            await self._store.connection.up.wait()
            if loop.time() < max(self._due, self._paused_until):
                continue
            self._due = loop.time() + self._interval
            try:
                next_timer = await self.sweep()
                if next_timer is not None:
                    self.wake_in(next_timer)
            except OrkiError as error:
                _log.warning("timers are delayed: %s", error.message)

    async def sweep(self) -> float | None:
        """Sweep once. Returns the time until the next timer, or None if there is none.

        Raises:
            StoreUnavailable: The store is down.
        """
        sweeps = await asyncio.gather(
            *(self._store.apply(sweep(shard, _SWEEP_LIMIT)) for shard in range(self._store.shards))
        )
        for swept in sweeps:
            for expired in swept.expired:
                self._expired(expired)
        # The store's clock may be between two milliseconds, so one more is added.
        return min((swept.next_timer + 0.001 for swept in sweeps if swept.next_timer is not None), default=None)

    def _expired(self, expired: Expired) -> None:
        key = expired.attempt
        self._on_change(key.task_id, expired.kind == "task")
        self._on_queued(shard_of(key.task_id))
        session = self._sessions.get(expired.agent_id)
        if expired.kind != "retry" and session is not None:
            error = error_for(expired.reason, "the attempt timed out, and the agent no longer holds it")
            session.machine.refuse(key, error)

    def _store_changed(self, up: bool) -> None:
        if up:
            self._paused_until = asyncio.get_running_loop().time() + self._pause
