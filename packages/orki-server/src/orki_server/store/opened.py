"""A fleet's contracts and agents for a command, which is no orchestrator and lays out no store."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from orki_server.store.contracts import Contracts
from orki_server.store.fleet import Fleet
from orki_server.store.link import Link

__all__ = ["open_fleet"]


@asynccontextmanager
async def open_fleet(redis_url: str) -> AsyncIterator[tuple[Contracts, Fleet]]:
    """Connects to a store as it is.

    Raises:
        InvalidSetting: The URL cannot be used, or the store was laid out by another version.
        StoreUnavailable: The store is away.
    """
    link = Link(redis_url)
    try:
        shards = await Fleet(link, 0).laid_out()
        yield Contracts(link, shards), Fleet(link, shards)
    finally:
        await link.close()
