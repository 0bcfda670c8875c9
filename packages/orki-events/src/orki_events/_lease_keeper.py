"""Acquires, renews and releases the leases of an ordered stream's partitions on the server."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Final

from orki_contract.errors import OrkiError
from orki_contract.model import milliseconds
from orki_events import _delivery_table as table
from orki_events._commands import GroupMember, members_key, owner_key, release_owner
from orki_events._ownership import Acquired, Expired, Extended, LeaseState, Ownership, Released, Withdrawn
from orki_events.connection import Connection, Script
from orki_events.entries import stream_keys

_INTERVAL: Final = 1.0


class LeaseKeeper:
    """Tells a consumer which partitions it owns."""

    def __init__(self, member: GroupMember, connection: Connection, receive: Callable[[table.Event], None]) -> None:
        """Create the object; `receive` is called with the events of ownership."""
        self._member = member
        self._connection = connection
        self._receive = receive
        self._lease = member.group.ack_deadline
        self._ownership = Ownership(stream_keys(member.stream), member.consumer, self._lease)
        self._ending = False

    async def keep(self, admitted: asyncio.Event, closed: asyncio.Event) -> None:
        """Own partitions from `admitted` until `closed`.

        Raises:
            OrkiError: The server refuses, and a retry cannot succeed.
        """
        await admitted.wait()
        running, closing = asyncio.ensure_future(self._run()), asyncio.ensure_future(closed.wait())
        try:
            await asyncio.wait({running, closing}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            closing.cancel()
            running.cancel()
            await asyncio.wait({running})
        if not running.cancelled():
            running.result()

    async def _run(self) -> None:
        """Keep leases until cancelled.

        Raises:
            OrkiError: The server refuses, and a retry cannot succeed.
        """
        while True:
            try:
                await self._renew()
                if not self._ending:
                    await self._balance(await self._meet())
            except OrkiError as error:
                if not error.retryable:
                    raise
            self._expire()
            await asyncio.sleep(min(self._lease / 4, _INTERVAL) * random.uniform(0.8, 1.0))

    def end(self) -> None:
        """Acquire and withdraw no more; leases are still renewed."""
        self._ending = True

    def released(self, key: str) -> None:
        """Note that the server has been told to release a partition."""
        self._ownership.receive(key, Released())

    async def leave(self) -> None:
        """Release all leases, so that other consumers need not wait for their end."""
        group, consumer = self._member.group.name, self._member.consumer
        for key in self._ownership.held():
            await release_owner(self._connection, key, group, consumer)
        await self._connection.execute((b"ZREM", members_key(self._member.stream, group), consumer))

    async def _meet(self) -> list[str]:
        """Report this consumer as a member of its group and return all members."""
        key = members_key(self._member.stream, self._member.group.name)
        found = await self._connection.run_script(MEET, (key,), self._member.consumer, milliseconds(self._lease))
        return sorted({*(each.decode() for each in found), self._member.consumer})

    async def _renew(self) -> None:
        self._expire()
        for key in self._ownership.held():
            asked_at = asyncio.get_running_loop().time()
            if await self._own(key, False):
                self._ownership.receive(key, Extended())
                self._receive(table.PartitionKept(key, self._ownership.extend(key, asked_at)))
            else:
                self._lose(key)

    async def _balance(self, members: list[str]) -> None:
        for key in self._ownership.excess(members):
            self._ownership.receive(key, Withdrawn())
            self._receive(table.PartitionWithdrawn(key))
        lacking = self._ownership.lacking(members)
        for key in self._ownership.wanted(members):
            if not lacking or self._ending:
                return
            asked_at = asyncio.get_running_loop().time()
            if await self._own(key, True):
                lacking -= 1
                self._ownership.receive(key, Acquired())
                self._receive(table.PartitionGained(key, self._ownership.extend(key, asked_at)))

    async def _own(self, key: str, acquire: bool) -> bool:
        owner = owner_key(key, self._member.group.name)
        settings = (self._member.consumer, milliseconds(self._lease), int(acquire))
        return bool(await self._connection.run_script(OWN, (owner,), *settings))

    def _expire(self) -> None:
        for key in self._ownership.expired(asyncio.get_running_loop().time()):
            self._lose(key)

    def _lose(self, key: str) -> None:
        if self._ownership.receive(key, Expired()) is LeaseState.FREE:
            self._receive(table.PartitionLost(key))


MEET: Final = Script("""\
-- KEYS: members by the end of their membership.  ARGV: consumer, milliseconds of a membership.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
-- Without memory for a new member, the others go on.
redis.pcall('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
redis.pcall('ZADD', KEYS[1], now + ARGV[2], ARGV[1])
redis.pcall('PEXPIRE', KEYS[1], ARGV[2] * 2)
return redis.call('ZRANGE', KEYS[1], 0, -1)
""")

OWN: Final = Script("""\
-- KEYS: owner.  ARGV: consumer, milliseconds of the lease, 1 to acquire it if it is free.
local owner = redis.call('GET', KEYS[1])
if owner == ARGV[1] then
  return redis.call('PEXPIRE', KEYS[1], ARGV[2])
end
if owner or ARGV[3] ~= '1' then
  return 0
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
""")
