"""The connection to Redis: explicit timeouts, no retries but our own, and one place where its errors become ours.

Once a command fails for the server's sake the link is *down*: a probe then tries, with full jitter and for ever, until
the server takes a write again. Callers are told at once, or wait with `wait_up`.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final
from urllib.parse import urlsplit

from redis import exceptions as redis_errors
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from orki_contract.errors import InvalidSetting, LocalProtocolError, OrkiError, StoreUnavailable
from orki_server.keys import FleetKeys

__all__ = ["Link", "address_of"]

_CONNECT_TIMEOUT: Final = 2.0
_REPLY_TIMEOUT: Final = 5.0
_PROBE_FIRST: Final = 0.05
_PROBE_LONGEST: Final = 1.0
_CONNECTIONS: Final = 16

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


class Link:
    """One Redis server, or its absence.

    Attributes:
        address: Where it is, for messages.
    """

    def __init__(self, url: str) -> None:
        self.address = address_of(url)
        try:
            self._pool = BlockingConnectionPool.from_url(
                url,
                max_connections=_CONNECTIONS,
                timeout=_REPLY_TIMEOUT,
                socket_timeout=_REPLY_TIMEOUT,
                socket_connect_timeout=_CONNECT_TIMEOUT,
                # redis-py would repeat commands of unknown fate by itself; who may be repeated is decided here.
                retry=Retry(NoBackoff(), 0),
                retry_on_timeout=False,
                health_check_interval=0,
                protocol=2,
                decode_responses=False,
            )
            # Connections are made late; one that is never used shows now what the URL's parameters are worth.
            self._pool.make_connection()  # type: ignore[no-untyped-call]
        except (ValueError, TypeError) as error:
            raise InvalidSetting(f"the Redis URL for {self.address} is not valid: {error}") from error
        self._redis: Redis = Redis(connection_pool=self._pool)
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

    async def calls(self, commands: Sequence[Sequence[Any]]) -> list[Any]:
        """Several commands in one round trip; errors as those of `call`, that of the first that failed."""
        replies = await self.attempt(commands)
        for reply in replies:
            if isinstance(reply, Exception):
                raise self.failed(reply)
        return replies

    async def attempt(self, commands: Sequence[Sequence[Any]]) -> list[Any]:
        """As `calls`, but the server's own errors stand in the places of the answers, for `failed` to judge.

        Raises:
            StoreUnavailable: No answer.
        """
        if not self.up:
            raise self._why
        return await self._send(commands)

    async def _send(self, commands: Sequence[Sequence[Any]]) -> list[Any]:
        try:
            async with self._redis.pipeline(transaction=False) as pipe:
                for command in commands:
                    pipe.execute_command(*command)
                replies: list[Any] = await pipe.execute(raise_on_error=False)
                return replies
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
                replies = await self._send([("HSET", FleetKeys.LAYOUT, "probe", "1")])
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
        reply = (await self._send([command]))[0]
        if isinstance(reply, Exception):
            raise self.failed(reply)
        return reply

    async def close(self) -> None:
        """Closes all connections."""
        if self._probe:
            self._probe.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._probe
        with contextlib.suppress(redis_errors.RedisError, OSError):
            await self._redis.aclose()
            await self._pool.aclose()
