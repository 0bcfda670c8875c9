"""Timers are obeyed: offers that nobody answered, leases, stalls, timeouts, waits before another attempt.

After a start, and after the store was away, the sweep holds still for a moment: agents that could not renew their
leases while nobody was there to take the renewals must have had the chance.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Final

from orki_contract.errors import OrkiError, error_for
from orki_server.sessions.roster import Roster
from orki_server.store import Expired, Store, Sweep, shard_of

__all__ = ["Sweeper"]

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
        roster: Roster,
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
