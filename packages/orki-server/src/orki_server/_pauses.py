"""Pauses of services and methods: their queued tasks are not offered.

Each shard enforces a pause itself. So after a reply no orchestrator offers a task of the service, and a pause survives
all of them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from orki.control.v1.task_pb2 import Pause
from orki_server._keys import FleetKeys
from orki_server._store.fleet import read_pauses
from orki_server._store.store import Store
from orki_server._store.upkeep import pause

_log = logging.getLogger("orki.server.dispatch")


class Pauses:
    """What is paused. Calls `on_resume` when queued tasks may be offered again."""

    def __init__(self, store: Store, on_resume: Callable[[], None]) -> None:
        self._store = store
        self._on_resume = on_resume

    async def pause(self, target: str, message: str, actor: str) -> Pause:
        """Pause a service or a method. If an error is raised, some shards may be paused already.

        Raises:
            StoreUnavailable: The store is down.
        """
        made = Pause(target=target, message=message, actor=actor, paused_us=time.time_ns() // 1000)
        # Listed first, so that a pause that only some shards know is never hidden.
        await self._store.connection.call("HSET", FleetKeys.PAUSES, target, made.SerializeToString())
        await self._apply(target, paused=True)
        _log.warning("%s is paused by %s: %s", target, actor, message or "no reason given")
        return made

    async def resume(self, target: str, actor: str) -> bool:
        """End a pause. Returns whether there was one.

        Raises:
            StoreUnavailable: The store is down.
        """
        changed = await self._apply(target, paused=False)
        listed = await self._store.connection.call("HDEL", FleetKeys.PAUSES, target)
        self._on_resume()
        _log.warning("%s is resumed by %s", target, actor)
        return changed or listed > 0

    async def list(self) -> list[Pause]:
        """Return the pauses, by target.

        Raises:
            StoreUnavailable: The store is down.
            DamagedRecord: The list cannot be read.
        """
        return read_pauses(await self._store.connection.call("HVALS", FleetKeys.PAUSES))

    async def _apply(self, target: str, *, paused: bool) -> bool:
        operations = [self._store.apply(pause(shard, target, paused)) for shard in range(self._store.shards)]
        return any(await asyncio.gather(*operations))
