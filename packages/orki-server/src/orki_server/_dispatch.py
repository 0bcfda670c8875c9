"""Queued tasks meet free slots.

A shard is *hinted* while it may have queued tasks that somebody here could take: after a submission, after an attempt
that is to be tried again, when an agent arrives. Slots that become free ask the hinted shards, one after another, all
agents with free slots in one call, which deals the tasks out one to each in turn. A slow poll finds what others queued.
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
from orki_server._store.ids import shard_of
from orki_server._store.operations import Expired, Offer, OfferedAttempt, Recipient, Sweep
from orki_server._store.store import Store

_POLL_S: Final = 0.5
_EACH: Final = 64
"""Most tasks for one agent in one call, so that a big one does not take what others could run."""
_STORE_SLACK_MS: Final = 1_000
"""The store withdraws an unanswered offer this much later than the session does: it only does so when we are gone."""
_log = logging.getLogger("orki.server.dispatch")


class Dispatcher:
    """Hands out tasks.

    Args:
        store: Where they are.
        roster: Who takes them.
        reports: Takes back what could not be offered.
        accept_timeout_ms: Time within which an agent answers.
        moved: Called with a task that changed, and whether it ended.
    """

    def __init__(
        self,
        store: Store,
        roster: SessionRegistry,
        reports: Reports,
        accept_timeout_ms: int,
        moved: Callable[[str, bool], None],
    ) -> None:
        self._store = store
        self._roster = roster
        self._reports = reports
        self._accept_timeout_ms = accept_timeout_ms
        self._moved = moved
        self._hints: dict[int, None] = {}
        self._wake = asyncio.Event()
        self._turn = 0
        self.offered = 0

    def queued(self, shard: int) -> None:
        """The shard has a queued task."""
        self._hints[shard] = None
        self._wake.set()

    def slots_changed(self) -> None:
        """Slots may have become free."""
        if self._hints:
            self._wake.set()

    def look_everywhere(self) -> None:
        """Any shard may have tasks that somebody new can take."""
        for shard in range(self._store.shards):
            self._hints[shard] = None
        self._wake.set()

    async def run(self) -> None:
        """Dispatches until it is cancelled."""
        while True:
            try:
                async with asyncio.timeout(_POLL_S):
                    await self._wake.wait()
            except TimeoutError:
                self.look_everywhere()
            await self._store.wait_up()
            self._wake.clear()
            with contextlib.suppress(OrkiError):
                await self._round()

    async def _round(self) -> None:
        """Asks each hinted shard once, as long as slots are free."""
        for shard in list(self._hints):
            sessions = self._takers()
            if not sessions:
                return
            del self._hints[shard]
            askers = tuple(
                Recipient(each.agent_id, each.instance_id, min(each.free_slots, _EACH), each.methods)
                for each in sessions
            )
            try:
                offered = await self._store.offer(Offer(shard, self._accept_timeout_ms + _STORE_SLACK_MS, askers))
            except OrkiError as error:
                _log.warning("no tasks were handed out: %s", error.message)
                self._hints[shard] = None
                raise
            if len(offered) == sum(asker.wants for asker in askers):
                # All wishes were met, so there may be more.
                self.queued(shard)
            for each in offered:
                self._offer(sessions[each.asker], each)

    def _takers(self) -> list[AgentSession]:
        """Sessions with free slots, those with more of them first, equals in turn."""
        sessions = [each for each in self._roster if each.methods and each.free_slots]
        self._turn += 1
        start = self._turn % len(sessions) if sessions else 0
        return sorted(sessions[start:] + sessions[:start], key=lambda each: -each.free_slots)

    def _offer(self, session: AgentSession, offered: OfferedAttempt) -> None:
        message = OfferMessage(
            attempt=offered.attempt.ref(),
            method=offered.method,
            request=offered.request,
            lease_ms=offered.lease_ms,
            accept_timeout_ms=self._accept_timeout_ms,
            attempt_timeout_ms=offered.attempt_timeout_ms,
        )
        try:
            session.machine.offer(message, offered.traceparent, time.monotonic())
        except OrkiError as error:
            # The session ended, or its slots went, while the store was asked.
            self._reports.undeliverable(session, offered.attempt, error)
            return
        self.offered += 1
        self._moved(offered.attempt.task_id, False)
        session.changed()


_LIMIT: Final = 100
_log = logging.getLogger("orki.server.sweep")


class Sweeper:
    """Sweeps all shards.

    Args:
        store: Where the timers are.
        roster: Who is told that an attempt was taken away.
        interval_s: Longest time between two sweeps.
        grace_s: How long it holds still after a start and after the store was away.
        queued: Called with a shard that has a queued task.
        moved: Called with a task that changed, and whether it ended.
    """

    def __init__(
        self,
        store: Store,
        roster: SessionRegistry,
        *,
        interval_s: float,
        grace_s: float,
        queued: Callable[[int], None],
        moved: Callable[[str, bool], None],
    ) -> None:
        self._store = store
        self._roster = roster
        self._interval_s = interval_s
        self._grace_s = grace_s
        self._queued = queued
        self._moved = moved
        self._wake = asyncio.Event()
        self._due = 0.0
        self._still_until = 0.0
        store.on_change(self._store_changed)

    def wake_in(self, wait_ms: int) -> None:
        """A timer is due in this time."""
        due = asyncio.get_running_loop().time() + wait_ms / 1000
        if due < self._due:
            self._due = due
            self._wake.set()

    async def run(self) -> None:
        """Sweeps until it is cancelled."""
        loop = asyncio.get_running_loop()
        self._hold_still()
        self._due = loop.time()
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(max(self._due, self._still_until)):
                    await self._wake.wait()
            self._wake.clear()
            await self._store.wait_up()
            if loop.time() < max(self._due, self._still_until):
                continue
            self._due = loop.time() + self._interval_s
            try:
                self.wake_in(await self.sweep())
            except OrkiError as error:
                _log.warning("timers are late: %s", error.message)

    async def sweep(self) -> int:
        """Sweeps once; the time until the next timer in milliseconds, an hour if there is none.

        Raises:
            StoreUnavailable: The store is away.
        """
        all_swept = await asyncio.gather(
            *(self._store.apply(Sweep(shard, _LIMIT)) for shard in range(self._store.shards))
        )
        next_ms = 3_600_000
        for swept in all_swept:
            if swept.next_ms >= 0:
                # Another millisecond, since the store's clock may be between two of them.
                next_ms = min(next_ms, swept.next_ms + 1)
            for expired in swept.expired:
                self._expired(expired)
        return next_ms

    def _expired(self, expired: Expired) -> None:
        key = expired.attempt
        self._moved(key.task_id, expired.what == "task")
        self._queued(shard_of(key.task_id))
        if expired.what == "retry":
            return
        session = self._roster.get(expired.agent_id)
        if session is not None:
            session.machine.refuse(
                key, error_for(expired.reason, "the attempt ran into a timeout, and is not yours any more")
            )
            session.changed()

    def _store_changed(self, up: bool) -> None:
        if up:
            self._hold_still()

    def _hold_still(self) -> None:
        self._still_until = asyncio.get_running_loop().time() + self._grace_s
