"""The connection to the store, which is up or down.

A store is on one server, on the server that sentinels name, or on the nodes of a cluster. A server that fails, refuses
writes or redirects takes the whole connection down: another server may have its keys, without their newest writes. So
before the connection is up again, the topology is read, and the recovery checks run.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Final, NamedTuple, TypeVar

from orki_contract.backoff import Jitter, JitterOptions
from orki_contract.errors import OrkiError, StoreUnavailable
from orki_events.connection import Address, Command, Reply, parse_address
from orki_server._keys import FleetKeys, ShardKeys
from orki_server._store.cluster import SLOTS, slot_of, topology
from orki_server._store.server import MEMORY, Durability, StoreServer

_PROBES: Final = JitterOptions(initial=0.05, maximum=1.0)
R = TypeVar("R")
_log = logging.getLogger("orki.server.store")


class Operated(NamedTuple):
    """The reply to one script call.

    Attributes:
        reply: The reply; an OrkiError for an error.
        settle: Returns a future that ends when what the call wrote is durable, or with StoreUnavailable.
    """

    reply: Reply
    settle: Callable[[], asyncio.Future[None]]


class StoreConnection:
    """The connection to the store's server, which is up or down.

    An error that is due to the server's state takes it down. A probe then tries until the server accepts a write.
    Meanwhile commands fail at once.

    Attributes:
        address: The server.
        durability: What acknowledged writes survive.
        up: Set while the server accepts commands.
        cause: The error that took the connection down last.
    """

    def __init__(self, url: str, *, shards: int = 0, durability: Durability = MEMORY) -> None:
        """Create the connection without opening it.

        Args:
            url: URL of the server, or of several.
            shards: Number of the store's shards, as far as it is known: all of them must accept writes.
            durability: What acknowledged writes survive.

        Raises:
            InvalidSetting: The URL is malformed.
        """
        self.address = parse_address(url, role="store")
        self.durability = durability
        self._shards = shards
        self._servers = (
            {} if self.address.is_cluster else {self.address.location: StoreServer(self.address, durability)}
        )
        self._slots: list[StoreServer | None] = []
        self.up = asyncio.Event()
        self.up.set()
        self.cause: OrkiError = StoreUnavailable(f"{self.address.shown} was not reached yet")
        self._closed = False
        self._recoveries = 0
        self._probe: asyncio.Task[None] | None = None
        self._checks: list[Callable[[], Awaitable[None]]] = []
        self._listeners: list[Callable[[bool], None]] = []

    async def open(self, *, starting: bool = True) -> None:
        """Open the connections anew, and check the server. Raises as `StoreServer.open`."""
        if self.address.is_cluster:
            await self._read_topology()
        probes: dict[StoreServer, list[Command]] = {}
        for base in (FleetKeys.BASE, *(ShardKeys(shard).base for shard in range(self._shards))):
            probe = ("DEL", f"{base}probe")
            probes.setdefault(self._server_of(probe), []).append(probe)
        opened = (server.open(sent, starting=starting) for server, sent in probes.items())
        for outcome in await asyncio.gather(*opened, return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome

    async def _read_topology(self) -> None:
        """Ask the nodes of the cluster which of them has each slot. The latest of their answers counts."""
        seeds = {self.address.at(*seed).location: self.address.at(*seed) for seed in self.address.seeds}
        seeds |= {server.address.location: server.address for server in self._servers.values()}
        answers = await asyncio.gather(*map(topology, seeds.values()), return_exceptions=True)
        known = [answer for answer in answers if not isinstance(answer, BaseException)]
        if not known:
            raise next(answer for answer in answers if isinstance(answer, BaseException))
        self._slots = [None] * SLOTS
        for low, high, address in max(known, key=lambda answer: answer.epoch).ranges:
            server = self._servers.setdefault(address.location, StoreServer(address, self.durability))
            self._slots[low : high + 1] = [server] * (high + 1 - low)
        for location in [name for name, server in self._servers.items() if server not in self._slots]:
            await self._servers.pop(location).close()

    @property
    def announcing(self) -> Address:
        """A server on which announcements arrive: a cluster passes them on to all of its nodes."""
        return self._server_of(("GET", FleetKeys.BASE)).address if self._slots else self.address

    def _server_of(self, command: Command) -> StoreServer:
        """Return the server that has the key of a command.

        Raises:
            StoreUnavailable: No node of the cluster has it.
        """
        if not self.address.is_cluster:
            return self._servers[self.address.location]
        # The key of a script follows its digest and the number of keys.
        key = str(command[3] if command[0] in ("EVAL", "EVALSHA") else command[1])
        server = self._slots[slot_of(key)] if self._slots else None
        if server is None:
            raise self.address.unavailable("no node of the cluster has this key's slot")
        return server

    def server_of_key(self, key: str) -> Address:
        """Return the server that has a key. Raises StoreUnavailable if no node of the cluster has it."""
        return self._server_of(("GET", key)).address

    def on_recovery(self, check: Callable[[], Awaitable[None]]) -> None:
        """Run `check` each time that the server is back, before anything else uses it."""
        self._checks.append(check)

    def on_change(self, listener: Callable[[bool], None]) -> None:
        """Call `listener` with the new state each time that the connection goes up or down."""
        self._listeners.append(listener)

    async def call(self, *command: Any, while_down: bool = False) -> Reply:
        """Send one command; with `while_down`, even if the connection is down, as recovery checks do.

        Raises:
            StoreUnavailable: No reply, or the server's state forbids the command. Whether it ran is unknown.
            LocalProtocolError: The command is wrong: a defect.
        """
        return (await self.calls([command], while_down=while_down))[0]

    async def calls(self, commands: Sequence[Command], *, while_down: bool = False) -> list[Reply]:
        """Send several commands in one round trip. Raises as `call`, for the first that failed."""
        replies = await self._send(commands, while_down)
        for reply in replies:
            if isinstance(reply, OrkiError):
                raise reply
        return replies

    async def replies(self, commands: Sequence[Command]) -> list[Reply]:
        """Send several commands in one round trip. An error reply is an OrkiError in its position.

        Raises:
            StoreUnavailable: No reply, or the server's state forbids a command.
        """
        replies = await self._send(commands)
        for reply in replies:
            if isinstance(reply, StoreUnavailable):
                raise reply
        return replies

    async def operate(self, commands: Sequence[Command], *, bulk: bool = False) -> list[Operated]:
        """Send script calls in one round trip; large ones as `bulk`, which does not delay others.

        Raises:
            StoreUnavailable: No reply.
        """
        if not self.up.is_set():
            raise self.cause

        since = self._recoveries

        async def send(server: StoreServer, sent: Sequence[Command]) -> list[Operated]:
            try:
                lane, replies = await server.operate(sent, bulk=bulk)
            except OrkiError as error:
                return [Operated(self.failed(error, since), _unsettled)] * len(sent)
            self._judge(replies, since)
            settle = partial(server.settle, lane)
            return [Operated(reply, settle) for reply in replies]

        return await self._spread(commands, send)

    async def _send(self, commands: Sequence[Command], while_down: bool = False) -> list[Reply]:
        if not self.up.is_set() and not while_down:
            raise self.cause
        if self.address.is_cluster and not self._slots:
            await self._read_topology()

        since = self._recoveries

        async def send(server: StoreServer, sent: Sequence[Command]) -> list[Reply]:
            try:
                replies = await server.call(sent, may_open=while_down)
            except OrkiError as error:
                return [self.failed(error, since)] * len(sent)
            self._judge(replies, since)
            return replies

        return await self._spread(commands, send)

    def _judge(self, replies: Sequence[Reply], since: int) -> None:
        for reply in replies:
            if isinstance(reply, OrkiError):
                self.failed(reply, since)

    async def _spread(
        self, commands: Sequence[Command], send: Callable[[StoreServer, Sequence[Command]], Awaitable[list[R]]]
    ) -> list[R]:
        """Send each command to its server, and return the replies in the order of the commands."""
        parts: dict[StoreServer, list[int]] = {}
        for position, command in enumerate(commands):
            parts.setdefault(self._server_of(command), []).append(position)
        if len(parts) == 1:
            return await send(next(iter(parts)), commands)
        found: dict[int, R] = {}
        sent = (send(server, [commands[each] for each in positions]) for server, positions in parts.items())
        for positions, replies in zip(parts.values(), await asyncio.gather(*sent), strict=True):
            found |= zip(positions, replies, strict=True)
        return [found[position] for position in range(len(commands))]

    def failed(self, error: OrkiError, since: int | None = None) -> OrkiError:
        """Take the connection down if the error is due to the server's state. Returns the error.

        With `since`, the number of recoveries when the command was sent, the failure of an older connection is ignored.
        """
        if isinstance(error, StoreUnavailable) and since in (None, self._recoveries):
            self.cause = error
            if self.up.is_set() and not self._closed:
                self.up.clear()
                self._notify(False)
                self._probe = asyncio.get_running_loop().create_task(self._recover(), name="orki store probe")
        return error

    def _notify(self, up: bool) -> None:
        for listener in self._listeners:
            try:
                listener(up)
            except Exception:
                _log.exception("a listener to %s failed: a defect", self.address.shown)

    async def _recover(self) -> None:
        jitter = Jitter(_PROBES)
        while not self.up.is_set():
            await asyncio.sleep(jitter.failed())
            try:
                await self.open(starting=False)
                for check in self._checks:
                    await check()
            except OrkiError as error:
                self.cause = error
            except Exception:
                _log.exception("the probe of %s failed: a defect; it goes on", self.address.shown)
            else:
                self._recoveries += 1
                self.up.set()
        self._notify(True)

    async def close(self) -> None:
        self._closed = True
        if self._probe:
            self._probe.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._probe
        for server in self._servers.values():
            await server.close()
        # Closed sockets leave the event loop in its next iteration.
        await asyncio.sleep(0)


def _unsettled() -> asyncio.Future[None]:
    raise AssertionError("a call that failed has nothing to settle")
