"""Offers whose session ended without an answer, while others of them arrive."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest

from orki_control.session import AttemptKey
from orki_server._store.fleet import Fleet
from orki_server._store.store import Store
from orki_server._unanswered import UnansweredOffers


class ArrivingFleet(Fleet):
    """Lets an offer arrive while the sessions of the earlier ones are read."""

    arriving: Any = None

    async def current_sessions(
        self, agent_ids: Iterable[str], *, while_down: bool = False
    ) -> dict[str, tuple[int, str]]:
        found = await super().current_sessions(agent_ids, while_down=while_down)
        if self.arriving is not None:
            self.arriving, arriving = None, self.arriving
            arriving()
        return found


@pytest.mark.parametrize("known", [True, False])
async def test_an_offer_that_arrives_while_others_are_settled_waits_for_its_turn(store: Store, known: bool) -> None:
    def ended(agent_id: str) -> Any:
        return SimpleNamespace(agent_id=agent_id, instance_id="one", epoch=1)

    fleet = ArrivingFleet(store.connection)
    offers = UnansweredOffers(store, fleet, lambda key, reply: None)
    first, second = (AttemptKey(f"t0-{name}", 1, 1) for name in ("first", "second"))
    offers.add(ended("agent-1"), [first])
    fleet.arriving = lambda: offers.add(ended("agent-1" if known else "agent-2"), [second])
    running = asyncio.create_task(offers.run())
    done, _ = await asyncio.wait([running], timeout=1.5)
    assert not done, running.exception()
    assert fleet.arriving is None
    running.cancel()
