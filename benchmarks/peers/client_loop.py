"""The client loop of every task benchmark: commands on standard input, one JSON object for each on standard output.

`one N` runs N cycles in turn and answers with the microseconds of each. `many W N` runs N cycles from W concurrent
waiters and answers with cycles a second. `flood N` submits N tasks in batches and answers with cycles a second.
Standard library only: each peer runs it in an environment of its own.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

_START = 20.0
"""Seconds within which the first cycle must succeed; until then the worker may still be starting."""


def _answer(**fields: object) -> None:
    print(json.dumps(fields), flush=True)


async def serve(
    cycle: Callable[[], Awaitable[object]], flood: Callable[[int], Awaitable[object]] | None = None
) -> None:
    """Run commands with coroutine functions.

    Args:
        cycle: Submits a no-op task and waits for its result.
        flood: Submits many in batches and waits for all results.
    """
    loop = asyncio.get_running_loop()
    until = time.monotonic() + _START
    while True:
        try:
            await cycle()
            break
        except Exception:
            if time.monotonic() > until:
                raise
            await asyncio.sleep(0.1)
    _answer(ready=True)
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        command, *numbers = line.split()
        if command == "one":
            taken = []
            for _ in range(int(numbers[0])):
                begun = time.perf_counter()
                await cycle()
                taken.append((time.perf_counter() - begun) * 1e6)
            _answer(values=taken)
        elif command == "flood" and flood is not None:
            begun = time.perf_counter()
            await flood(int(numbers[0]))
            _answer(values=[int(numbers[0]) / (time.perf_counter() - begun)])
        else:
            waiters, count = map(int, numbers)

            async def wait(share: int = count // waiters) -> None:
                for _ in range(share):
                    await cycle()

            begun = time.perf_counter()
            await asyncio.gather(*(wait() for _ in range(waiters)))
            _answer(values=[count // waiters * waiters / (time.perf_counter() - begun)])


def serve_blocking(cycle: Callable[[], object]) -> None:
    """Run commands with a function that blocks for one cycle; concurrent waiters are threads."""
    cycle()
    _answer(ready=True)
    for line in sys.stdin:
        command, *numbers = line.split()
        if command == "one":
            taken = []
            for _ in range(int(numbers[0])):
                begun = time.perf_counter()
                cycle()
                taken.append((time.perf_counter() - begun) * 1e6)
            _answer(values=taken)
        else:
            waiters, count = map(int, numbers)

            def wait(share: int = count // waiters) -> None:
                for _ in range(share):
                    cycle()

            with ThreadPoolExecutor(waiters) as pool:
                begun = time.perf_counter()
                for done in [pool.submit(wait) for _ in range(waiters)]:
                    done.result()
                _answer(values=[count // waiters * waiters / (time.perf_counter() - begun)])
