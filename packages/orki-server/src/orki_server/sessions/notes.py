"""What the fleet should know of our sessions, gathered and written together every now and then."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Final

from orki.control.v1.task_pb2 import AgentSnapshot
from orki_contract.errors import OrkiError
from orki_server.sessions.live import LiveSession
from orki_server.store import Store

__all__ = ["FleetNotes"]

_INTERVAL_S: Final = 0.5
_log = logging.getLogger("orki.server.sessions")


class FleetNotes:
    """Snapshots of agents on their way to the store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._changed: dict[str, LiveSession] = {}
        self._gone: list[tuple[AgentSnapshot, int]] = []
        self._wake = asyncio.Event()

    def changed(self, session: LiveSession) -> None:
        """The agent has something new to show."""
        self._changed[session.agent_id] = session
        self._wake.set()

    def gone(self, session: LiveSession) -> None:
        """The session has ended."""
        self._changed.pop(session.agent_id, None)
        self._gone.append((session.snapshot(), session.epoch))
        self._wake.set()

    async def run(self) -> None:
        """Writes until it is cancelled."""
        while True:
            await self._wake.wait()
            await self._store.wait_up()
            with contextlib.suppress(OrkiError):
                await self.flush()
            await asyncio.sleep(_INTERVAL_S)

    async def flush(self) -> None:
        """Writes what has gathered.

        Raises:
            StoreUnavailable: The store is away; what could not be written is kept.
        """
        self._wake.clear()
        changed, gone = self._changed, self._gone
        self._changed, self._gone = {}, []
        try:
            await self._store.fleet.tell(gone, alive=False)
            await self._store.fleet.tell([(each.snapshot(), each.epoch) for each in changed.values()])
        except OrkiError as error:
            _log.warning("the fleet's view of %d agents is late: %s", len(changed) + len(gone), error.message)
            self._changed = changed | self._changed
            self._gone = gone + self._gone
            self._wake.set()
            raise
