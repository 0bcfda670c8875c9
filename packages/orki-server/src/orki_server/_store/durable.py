"""Durability of single submissions, beyond the orchestrator's setting.

A server confirms all that it has written before, on whichever connection. So a submission that asks for more is
followed by a write on a connection of this module, and by the wait for that write.
"""

from __future__ import annotations

import asyncio

from orki_contract.errors import InvalidSetting, NotDurable, OrkiError, StoreUnavailable
from orki_events.connection import Address
from orki_server._keys import ShardKeys
from orki_server._store.connection import StoreConnection
from orki_server._store.server import Durability, StoreServer


class DurableWrites:
    """Makes writes durable on request."""

    def __init__(self, connection: StoreConnection) -> None:
        self._connection = connection
        self._servers: dict[tuple[str, Durability], StoreServer] = {}
        self._opening = asyncio.Lock()

    async def check(self, shard: int, wanted: Durability) -> None:
        """Check that the shard's server can make writes durable.

        Raises:
            NotDurable: It cannot, now or at all; the message says why.
            StoreUnavailable: It is down.
        """
        if not self._connection.durability.covers(wanted):
            await self._opened(shard, wanted)

    async def confirm(self, shard: int, wanted: Durability) -> None:
        """Return when all earlier writes of a shard are durable.

        Raises:
            NotDurable: The server can no longer make writes durable.
            StoreUnavailable: It did not confirm them. The writes are applied, and may be durable or not.
        """
        if self._connection.durability.covers(wanted):
            return
        server = await self._opened(shard, wanted)
        try:
            lane, (reply,) = await server.operate([("SET", _probe(shard), "", "PX", 1)], bulk=False)
            if isinstance(reply, OrkiError):
                raise reply
            await server.settle(lane)
        except StoreUnavailable:
            # Only the first one to fail closes it; the others may find a new one in its place.
            if self._servers.get((server.address.location, wanted)) is server:
                del self._servers[server.address.location, wanted]
                await server.close()
            raise

    async def close(self) -> None:
        for server in self._servers.values():
            await server.close()
        self._servers.clear()

    async def _opened(self, shard: int, wanted: Durability) -> StoreServer:
        address = self._connection.server_of_key(_probe(shard))
        async with self._opening:
            key = (address.location, wanted)
            if key not in self._servers:
                self._servers[key] = await _open(address, wanted)
            return self._servers[key]


async def _open(address: Address, wanted: Durability) -> StoreServer:
    server = StoreServer(address, wanted)
    try:
        await _check_replicas(server, wanted)
        await server.open((), starting=True)
    except (InvalidSetting, StoreUnavailable, NotDurable) as error:
        await server.close()
        if isinstance(error, InvalidSetting):
            raise NotDurable(f"durability {wanted}: {error.message}") from None
        raise
    return server


async def _check_replicas(server: StoreServer, wanted: Durability) -> None:
    if wanted.replicas:
        (reply,) = await server.call([("INFO", "replication")], may_open=True)
        if isinstance(reply, OrkiError):
            raise reply
        count = reply.count(b"state=online")
        if count < wanted.replicas:
            shown = server.address.shown
            raise NotDurable(f"durability {wanted}: {shown} has {count} connected replicas, not {wanted.replicas}")


def _probe(shard: int) -> str:
    return f"{ShardKeys(shard).base}probe"
