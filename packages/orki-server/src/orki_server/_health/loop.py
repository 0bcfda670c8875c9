"""The health loop of the orchestrator: looks at its servers and streams, and reports what changes."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Final

from orki_contract.errors import OrkiError
from orki_events.registry import StreamRegistry
from orki_events.scripts import load_scripts
from orki_server._health.findings import Check, Health
from orki_server._health.probe import ServerProbe, check_streams, refuse_evicting

INTERVAL: Final = 1.0
"""Seconds between two looks at the servers."""
_ROUNDS_PER_STREAMS: Final = 5
"""Looks at the servers for each look at the streams, which costs more."""
_LEVELS: Final = {Health.WARN: logging.WARNING, Health.BAD: logging.ERROR}
_log = logging.getLogger("orki.server.health")


class HealthLoop:
    """Checks servers every second and streams every five seconds, and logs each state once, when it changes.

    Attributes:
        checks: The latest result of each check, by its name.
    """

    def __init__(self, probes: Sequence[ServerProbe], on_change: Callable[[], None]) -> None:
        """Create the loop.

        Args:
            probes: The servers; the last one has the streams.
            on_change: Called when a state has changed.
        """
        self._probes = probes
        self._on_change = on_change
        self._registry = StreamRegistry()
        self._streams: list[Check] = []
        self.checks: dict[str, Check] = {}

    def serving(self, server: str) -> bool:
        """Return whether everything about a server allows the health service to report SERVING."""
        return all(check.serves for check in self.checks.values() if check.name.startswith(f"{server}."))

    async def refuse_evicting(self) -> None:
        """Raise InvalidSetting for a server that may delete streams."""
        await refuse_evicting(self._probes)

    async def run(self) -> None:
        """Look until cancelled."""
        for round_number in range(1 << 62):
            await self.look(streams=round_number % _ROUNDS_PER_STREAMS == 0)
            await asyncio.sleep(INTERVAL)

    async def look(self, *, streams: bool = True) -> None:
        """Check once, and report what has changed."""
        found = await asyncio.gather(*(each.checks() for each in self._probes))
        if streams:
            # The server's own checks say why it does not answer; the streams keep their last result.
            with contextlib.suppress(OrkiError):
                # A server that was restarted has no scripts, and its other users may not be allowed to load them.
                await load_scripts(self._probes[-1].link)
            with contextlib.suppress(OrkiError):
                self._streams = await check_streams(self._probes[-1].link, self._registry)
        new = {check.name: check for check in (*itertools.chain(*found), *self._streams)}
        for name, check in self.checks.items():
            # A server that does not answer says nothing about its other states.
            reachable = new.get(f"{name.partition('.')[0]}.reachable")
            if name not in new and reachable is not None and reachable.state != "ok":
                new[name] = check
        self._report(new)

    def _report(self, found: dict[str, Check]) -> None:
        before, self.checks = self.checks, found
        changed = False
        for name in sorted(before.keys() | found.keys()):
            old, new = before.get(name), found.get(name)
            if (old.state if old else "ok") == (new.state if new else "ok"):
                continue
            changed = True
            if new is None or new.state == "ok":
                _log.warning("%s is ok again: %s", name, new.figure if new else "nothing to report")
            else:
                # For development, servers without persistence are usual.
                level = logging.INFO if new.state == "not-persistent" else _LEVELS[new.verdict]
                _log.log(level, "%s is %s: %s. %s %s", name, new.state, new.figure, new.cause, new.next_step)
        if changed:
            self._on_change()

    async def close(self) -> None:
        for probe in self._probes:
            await probe.close()
