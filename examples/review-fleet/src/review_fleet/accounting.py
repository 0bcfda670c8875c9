"""The ledger: what was published, and what became of it in every group."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from orki_events import Events

__all__ = ["balance", "drained_ledger"]

_DRAIN_SECONDS = 60.0
_LOOK_SECONDS = 0.1
_SETTLED = ("processed", "dead_lettered", "declared_lost", "before_start")

Ledger = dict[str, dict[str, Any]]


def balance(ledger: Ledger) -> list[str]:
    """Return the imbalances: published = processed + dead-lettered + declared lost must hold for every group."""
    wrong = []
    for stream, row in ledger.items():
        for group, counts in row["groups"].items():
            total = sum(counts.get(name, 0) for name in _SETTLED)
            if total != row["published"]:
                wrong.append(f'stream "{stream}": {row["published"]} published, group "{group}" accounts for {total}')
    return wrong


async def drained_ledger(events: Events, told: Callable[[str], None]) -> Ledger:
    """The ledger of all streams, read once every group has accounted for everything, or the wait is over.

    Publishers must have stopped: a stream that still grows is never drained.
    """
    limit = asyncio.get_running_loop().time() + _DRAIN_SECONDS
    while True:
        ledger = await _read(events)
        wrong = balance(ledger)
        if not wrong or asyncio.get_running_loop().time() > limit:
            return ledger
        told(wrong[0])
        await asyncio.sleep(_LOOK_SECONDS)


async def _read(events: Events) -> Ledger:
    ledger: Ledger = {}
    for registered in await events.registered_streams():
        ledger[registered.contract.name] = (await events.ledger(registered.contract)).dump()
    return ledger
