"""Work of some length that needs a processor alone, in a thread that ends with it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

__all__ = ["off_loop"]

T = TypeVar("T")


async def off_loop(work: Callable[[], T]) -> T:
    """Runs `work` while the event loop goes on; reading and comparing large contracts takes a second and more.

    Raises:
        Exception: What `work` raises.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="orki off loop") as pool:
        return await asyncio.get_running_loop().run_in_executor(pool, work)
