"""Cancels the children of tasks that failed or were cancelled, if they were submitted to end with their parent.

The store lists such a parent in the script of its end, and until all its children were cancelled. So any orchestrator
may die in between. Several may do the same work, as a repeated cancel changes nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from orki_contract.errors import DamagedRecord, OrkiError, UnknownTask
from orki_server._session import SessionRegistry
from orki_server._store import operations
from orki_server._store.family import disown, orphans
from orki_server._store.store import Store

_PARENTS: Final = 100
"""Maximum number of parents of a shard that are read at once."""
_UNBORN: Final = 15.0
"""Time after the parent's end in which a child that it knows may still be created."""
_RETRY: Final = 0.5
_ACTOR: Final = "orki"
_log = logging.getLogger("orki.server.families")


class Families:
    """The children of ended parents. Calls `on_change` with a task that changed, and whether it ended."""

    def __init__(self, store: Store, sessions: SessionRegistry, on_change: Callable[[str, bool], None]) -> None:
        self._store = store
        self._sessions = sessions
        self._on_change = on_change
        self._shards: set[int] = set()
        self._wake = asyncio.Event()

    def has_orphans(self, shard: int) -> None:
        """A shard lists ended parents."""
        self._shards.add(shard)
        self._wake.set()

    async def run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            await self._store.connection.up.wait()
            for shard in list(self._shards):
                try:
                    await self._cancel_orphans(shard)
                except OrkiError as error:
                    self._shards.add(shard)
                    self._wake.set()
                    _log.warning("the children of ended tasks on shard %d run on for now: %s", shard, error.message)
                    await asyncio.sleep(_RETRY)

    async def _cancel_orphans(self, shard: int) -> None:
        self._shards.discard(shard)
        for family in await self._store.apply(orphans(shard, _PARENTS)):
            known = await asyncio.gather(*(self._cancel(child, family.parent) for child in family.children))
            # Otherwise the next sweep lists the family again.
            if all(known) or family.age > _UNBORN:
                await self._store.apply(disown(family.parent))

    async def _cancel(self, child: str, parent: str) -> bool:
        """Cancel a child; return whether it exists."""
        message = f"its parent, task {parent}, has ended"
        try:
            reply = await self._store.apply(operations.cancel(child, message, _ACTOR))
        except (UnknownTask, DamagedRecord) as error:
            _log.warning("task %s, a child of %s, cannot be cancelled: %s", child, parent, error.message)
            return True
        # If the session is at another orchestrator, the store has sent it the cancel.
        session = self._sessions.get(reply.agent_id)
        if reply.status in ("requested", "repeated") and session is not None:
            session.machine.cancel(reply.attempt, grace_ms=round(reply.cancel_grace * 1000), message=message)
        if reply.status in ("requested", "done"):
            self._on_change(child, reply.status == "done")
        return reply.status != "unknown"
