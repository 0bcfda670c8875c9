"""The streams that the fleet has registered, looked up again and again for whoever follows them all."""

from __future__ import annotations

__all__ = ["follow_registered"]

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from orki_contract.errors import OrkiError
from orki_events import Events, RegisteredStream

Use = Callable[[list[RegisteredStream]], Awaitable[None]]

_LOOK_AGAIN_S: Final = 1.0


async def follow_registered(
    events: Events,
    stopped: asyncio.Event,
    use: Callable[[list[RegisteredStream]], Awaitable[None]],
    log: logging.Logger,
) -> None:
    """Calls `use` with all registered streams, about every second, until `stopped` is set.

    An event server that does not answer is waited for; one that refuses for good ends it.

    Raises:
        OrkiError: The server refuses, for a reason that time does not mend.
    """
    silent = False
    while not stopped.is_set():
        try:
            await use(await events.registered_streams())
            if silent:
                log.info("the event server answers again")
            silent = False
        except OrkiError as error:
            if not error.retryable:
                raise
            if not silent:
                log.warning("%s; trying again until it does", error.message)
            silent = True
        try:
            await asyncio.wait_for(stopped.wait(), _LOOK_AGAIN_S)
        except TimeoutError:
            continue
