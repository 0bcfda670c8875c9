"""Delivered offers whose session ended without an answer.

Whether the handler ran is unknown then. The agent has the time of a lease to come back with the attempt. Its next
session tells what became of it: if the same process comes back without the attempt, it never got the offer, which costs
nothing. If another process comes, the attempt is lost and counts, because it may have run.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

from orki.errors.v1.errors_pb2 import Reason
from orki_contract.errors import OrkiError
from orki_control.session import AttemptKey
from orki_server._session import AgentSession
from orki_server._store import operations
from orki_server._store.fleet import Fleet
from orki_server._store.replies import ReportReply, ReportStatus
from orki_server._store.store import Store

_POLL: Final = 0.5
_PATIENCE: Final = 600.0
"""Time after which the store's timer has decided."""
_log = logging.getLogger("orki.server.sessions")


class _Offer(NamedTuple):
    attempt: AttemptKey
    agent_id: str
    instance_id: str
    epoch: int
    since: float


class UnansweredOffers:
    """Settles unanswered offers; calls `on_settled` with each attempt that ended, and the store's reply."""

    def __init__(self, store: Store, fleet: Fleet, on_settled: Callable[[AttemptKey, ReportReply], None]) -> None:
        self._store = store
        self._fleet = fleet
        self._on_settled = on_settled
        self._offers: list[_Offer] = []
        self._wake = asyncio.Event()

    def add(self, session: AgentSession, attempts: Iterable[AttemptKey]) -> None:
        """The session ended without an answer to these offers."""
        now = time.monotonic()
        for key in attempts:
            self._offers.append(_Offer(key, session.agent_id, session.instance_id, session.epoch, now))
            self._wake.set()

    async def run(self) -> None:
        while True:
            await self._wake.wait()
            await self._store.connection.up.wait()
            with contextlib.suppress(OrkiError):
                await self._settle()
            if not self._offers:
                self._wake.clear()
            await asyncio.sleep(_POLL)

    async def _settle(self) -> None:
        offers = list(self._offers)
        current = await self._fleet.current_sessions({each.agent_id for each in offers})
        now = time.monotonic()
        kept = []
        for each in offers:
            epoch, instance_id = current[each.agent_id]
            if epoch <= each.epoch:
                if now - each.since < _PATIENCE:
                    kept.append(each)
                continue
            if instance_id == each.instance_id:
                message = f'agent "{each.agent_id}" came back without the offer'
                operation = operations.decline(each.agent_id, each.attempt, Reason.REASON_ABANDONED, message, True)
            else:
                message = f'agent "{each.agent_id}" got the offer and is now another process'
                operation = operations.lose(each.agent_id, each.attempt, message)
            reply = await self._store.apply(operation)
            if reply.status is ReportStatus.ACCEPTED:
                _log.info("%s: %s", each.attempt, message)
                self._on_settled(each.attempt, reply)
        # Others may have come meanwhile.
        self._offers = kept + self._offers[len(offers) :]
