"""The connection to Redis: explicit timeouts, no retries but our own, and one place where its errors become ours.

Once a command fails for the server's sake the link is *down*: a probe then tries, with full jitter and for ever, until
the server takes a write again. Callers are told at once, or wait with `wait_up`.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, TypeAlias
from urllib.parse import urlsplit

from redis import exceptions as redis_errors

from orki_contract.errors import InvalidSetting, LocalProtocolError, OrkiError, StoreUnavailable
from orki_server.keys import FleetKeys
from orki_server.store.wire import Wire

__all__ = ["Link", "address_of", "without_credentials"]

Command: TypeAlias = Sequence[bytes | str | int]
"""A command and its arguments."""

_PROBE_FIRST: Final = 0.05
_PROBE_LONGEST: Final = 1.0

# What Redis says when it cannot serve us now, and what one does about it.
_CONDITIONS: Final = {
    redis_errors.BusyLoadingError: "still loads its data; wait",
    redis_errors.ReadOnlyError: "is a replica and takes no writes; give the URL of the primary",
    redis_errors.OutOfMemoryError: "is out of memory; raise maxmemory, or shorten the retention of finished tasks",
    redis_errors.AuthenticationError: "refuses the user or the password; check the URL",
    redis_errors.NoPermissionError: "forbids a command; give the user's ACL the commands that the store needs",
    redis_errors.ClusterDownError: "is part of a cluster that is down",
    redis_errors.MasterDownError: "has lost its primary",
    redis_errors.TryAgainError: "moves its slots; wait",
}
_PREFIXES: Final = {
    "OOM": "is out of memory; raise maxmemory, or shorten the retention of finished tasks",
    "MISCONF": "cannot write to its disk; free some space, or see its log",
    "NOREPLICAS": "has too few replicas to take writes",
    "READONLY": "is a replica and takes no writes; give the URL of the primary",
    "LOADING": "still loads its data; wait",
    "NOAUTH": "wants a password; put it into the URL",
}


def address_of(url: str) -> str:
    """Where a Redis URL leads, without its credentials, for messages.

    Raises:
        InvalidSetting: It is no Redis URL.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("redis", "rediss", "unix"):
        raise InvalidSetting(
            "the Redis URL must begin with redis://, rediss:// or unix:// (as in redis://127.0.0.1:6379/0)"
        )
    try:
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise InvalidSetting(f"the Redis URL has no valid port: {error}") from error
    if parts.scheme == "unix":
        return parts.path
    return f"{host or 'localhost'}:{port or 6379}"


def without_credentials(url: str) -> str:
    """A Redis URL that may be told to anybody: no user, no password, no parameters."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.path if parts.scheme == 'unix' else address_of(url) + parts.path}"


class Link:
    """One Redis server, or its absence.

    Attributes:
        address: Where it is, for messages.
    """

    def __init__(self, url: str) -> None:
        self.address = address_of(url)
        self._lane = Wire(url)
        self._aside = Wire(url)
        self._up = asyncio.Event()
        self._up.set()
        self._why: OrkiError = StoreUnavailable(f"the store at {self.address} was not reached yet")
        self._probe: asyncio.Task[None] | None = None
        self._recovered: list[Callable[[], Awaitable[None]]] = []
        self._changed: list[Callable[[bool], None]] = []

    @property
    def up(self) -> bool:
        """Whether the server answered last time."""
        return self._up.is_set()

    @property
    def why_down(self) -> OrkiError:
        """What was wrong with it last."""
        return self._why

    async def wait_up(self) -> None:
        """Waits until the server takes writes."""
        await self._up.wait()

    def on_recovery(self, check: Callable[[], Awaitable[None]]) -> None:
        """Runs `check` each time the server is back, before anybody else may use it."""
        self._recovered.append(check)

    def on_change(self, tell: Callable[[bool], None]) -> None:
        """Calls `tell` with whether the server is there, each time that changes."""
        self._changed.append(tell)

    async def call(self, *command: Any) -> Any:
        """One command.

        Raises:
            StoreUnavailable: No answer, or the server cannot serve us now. Whether the command ran is not known.
            LocalProtocolError: The server does not understand us: a defect.
        """
        return (await self.calls([command]))[0]

    async def calls(self, commands: Sequence[Command]) -> list[Any]:
        """Several commands in one round trip; errors as those of `call`, that of the first that failed."""
        replies = await self.attempt(commands)
        for reply in replies:
            if isinstance(reply, Exception):
                raise self.failed(reply)
        return replies

    async def attempt(self, commands: Sequence[Command], *, in_lane: bool = False) -> list[Any]:
        """As `calls`, but the server's own errors stand in the places of the answers, for `failed` to judge.

        Args:
            commands: What to send.
            in_lane: Whether they are transitions, which have a connection of their own.

        Raises:
            StoreUnavailable: No answer.
        """
        if not self.up:
            raise self._why
        return await self._send(commands, self._lane if in_lane else self._aside)

    async def _send(self, commands: Sequence[Command], wire: Wire) -> list[Any]:
        try:
            return await wire.exchange(commands)
        except (redis_errors.RedisError, OSError) as error:
            raise self.failed(error) from error

    def failed(self, error: Exception) -> OrkiError:
        """Our error for one of redis-py's; the link is down when it is about the server's state."""
        text = str(error)
        condition = next((words for kind, words in _CONDITIONS.items() if isinstance(error, kind)), None)
        condition = condition or next((words for word, words in _PREFIXES.items() if text.startswith(word)), None)
        if condition:
            return self._down(StoreUnavailable(f"the store at {self.address} {condition}"))
        if isinstance(error, redis_errors.ResponseError):
            return LocalProtocolError(f"the store at {self.address} refused a command: {text}")
        return self._down(StoreUnavailable(f"the store at {self.address} does not answer: {text}"))

    def _down(self, why: OrkiError) -> OrkiError:
        self._why = why
        if self.up:
            self._up.clear()
            for tell in self._changed:
                tell(False)
            self._probe = asyncio.get_running_loop().create_task(self._recover(), name="orki store probe")
        return why

    async def _recover(self) -> None:
        longest = _PROBE_FIRST
        while True:
            await asyncio.sleep(random.uniform(0, longest))
            longest = min(2 * longest, _PROBE_LONGEST)
            try:
                # A write, since a server may answer and still take none.
                replies = await self._send([("HSET", FleetKeys.LAYOUT, "probe", "1")], self._aside)
                if isinstance(replies[0], Exception):
                    self.failed(replies[0])
                    continue
                for check in self._recovered:
                    await check()
            except OrkiError as error:
                self._why = error
                continue
            self._up.set()
            for tell in self._changed:
                tell(True)
            return

    async def direct(self, *command: Any) -> Any:
        """One command even while the link is down, for checks during recovery; errors as those of `call`."""
        reply = (await self._send([command], self._aside))[0]
        if isinstance(reply, Exception):
            raise self.failed(reply)
        return reply

    async def close(self) -> None:
        """Closes all connections."""
        if self._probe:
            self._probe.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._probe
        await self._lane.close()
        await self._aside.close()
        # One turn of the loop, in which closed sockets leave it.
        await asyncio.sleep(0)
