"""What a heartbeat says about the process: how late the user's loop is, and how much memory is in use."""

from __future__ import annotations

import asyncio
import math
import os
import resource
import sys
import time
from collections import deque
from typing import Final

__all__ = ["LoopProbe", "resident_bytes"]

_INTERVAL: Final = 0.1
_REMEMBERED: Final = 30
_STATM: Final = "/proc/self/statm"
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")


class LoopProbe:
    """Measures how late an event loop runs what is due; read from another thread, also while the loop is blocked."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lags: deque[float] = deque(maxlen=_REMEMBERED)
        self._due = math.inf
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begins; call it in the loop."""
        self._due = time.monotonic() + _INTERVAL
        self._timer = self._loop.call_later(_INTERVAL, self._tick)

    def stop(self) -> None:
        """Ends; call it in the loop."""
        if self._timer is not None:
            self._timer.cancel()

    def worst_lag_us(self) -> int:
        """The worst lag of the last seconds, in microseconds; a tick that is overdue counts as far as it is."""
        worst = max(time.monotonic() - self._due, 0.0, *tuple(self._lags))
        return round(worst * 1_000_000)

    def _tick(self) -> None:
        now = time.monotonic()
        self._lags.append(now - self._due)
        self._due = now + _INTERVAL
        self._timer = self._loop.call_later(_INTERVAL, self._tick)


def resident_bytes() -> int:
    """Resident memory of this process; where the system does not tell the present, the most it has been."""
    try:
        with open(_STATM, "rb") as statm:
            return int(statm.read().split()[1]) * _PAGE
    except (OSError, IndexError, ValueError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
