"""The connection to the store's server, which is up or down."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

from orki_contract.backoff import Jitter, JitterOptions
from orki_contract.errors import OrkiError, StoreUnavailable
from orki_events.connection import Command, Reply, parse_address
from orki_server._keys import FleetKeys
from orki_server._store.server import MEMORY, Durability, StoreServer

_PROBES: Final = JitterOptions(initial=0.05, maximum=1.0)
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

    def __init__(self, url: str, *, durability: Durability = MEMORY) -> None:
        """Create the connection without opening it.

        Raises:
            InvalidSetting: The URL is malformed.
        """
        self.address = parse_address(url, role="store")
        self.durability = durability
        self._server = StoreServer(self.address, durability)
        self.up = asyncio.Event()
        self.up.set()
        self.cause: OrkiError = StoreUnavailable(f"{self.address.shown} was not reached yet")
        self._closed = False
        self._probe: asyncio.Task[None] | None = None
        self._checks: list[Callable[[], Awaitable[None]]] = []
        self._listeners: list[Callable[[bool], None]] = []

    async def open(self, *, starting: bool = True) -> None:
        """Open the connections anew, and check the server. Raises as `StoreServer.open`."""
        await self._server.open([("DEL", FleetKeys.PROBE)], starting=starting)

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
                raise self.failed(reply)
        return replies

    async def replies(self, commands: Sequence[Command]) -> list[Reply]:
        """Send several commands in one round trip. An error reply is an OrkiError in its position.

        Raises:
            StoreUnavailable: No reply, or the server's state forbids a command.
        """
        replies = await self._send(commands)
        for reply in replies:
            if isinstance(reply, StoreUnavailable):
                raise self.failed(reply)
        return replies

    async def operate(self, commands: Sequence[Command], *, bulk: bool = False) -> list[Operated]:
        """Send script calls in one round trip; large ones as `bulk`, which does not delay others.

        Raises:
            StoreUnavailable: No reply.
        """
        if not self.up.is_set():
            raise self.cause
        try:
            lane, replies = await self._server.operate(commands, bulk=bulk)
        except OrkiError as error:
            raise self.failed(error) from None
        settle = partial(self._server.settle, lane)
        return [Operated(reply, settle) for reply in replies]

    async def _send(self, commands: Sequence[Command], while_down: bool = False) -> list[Reply]:
        if not self.up.is_set() and not while_down:
            raise self.cause
        try:
            return await self._server.call(commands, may_open=while_down)
        except OrkiError as error:
            self.failed(error)
            raise

    def failed(self, error: OrkiError) -> OrkiError:
        """Take the connection down if the error is due to the server's state. Returns the error."""
        if isinstance(error, StoreUnavailable):
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
                self.up.set()
        self._notify(True)

    async def close(self) -> None:
        self._closed = True
        if self._probe:
            self._probe.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._probe
        await self._server.close()
        # Closed sockets leave the event loop in its next iteration.
        await asyncio.sleep(0)
