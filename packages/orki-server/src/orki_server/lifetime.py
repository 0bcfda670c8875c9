"""How a process of ours ends: the first SIGINT or SIGTERM in good order, the second at once."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Awaitable, Callable

__all__ = ["run_until_stopped"]


def run_until_stopped(main: Callable[[asyncio.Event], Awaitable[None]]) -> None:
    """Runs `main` on an event loop; SIGTERM and SIGINT set its event, upon which it ends by itself."""
    asyncio.run(_run(main))


async def _run(main: Callable[[asyncio.Event], Awaitable[None]]) -> None:
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    signals = (signal.SIGTERM, signal.SIGINT)

    def stop(received: signal.Signals) -> None:
        stopped.set()
        for number in signals:
            loop.remove_signal_handler(number)
        if received is signal.SIGINT:
            print("stopping; once more to stop at once", file=sys.stderr, flush=True)

    for number in signals:
        loop.add_signal_handler(number, stop, number)
    try:
        await main(stopped)
    finally:
        for number in signals:
            loop.remove_signal_handler(number)
