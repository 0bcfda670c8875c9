"""Adapter to redis-py. Foreign exceptions end here; the module is imported when a connection is opened."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, Self

from redis.asyncio.connection import Connection, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    AuthenticationWrongNumberOfArgsError,
    BusyLoadingError,
    ConnectionError,
    RedisError,
    ResponseError,
)

from orki_contract.errors import OrkiError
from orki_events._address import Address


def error_text(error: BaseException) -> str:
    """Return an error reply as the server sent it: redis-py removes the codes that it knows."""
    text = str(error)
    code = error.status_code if isinstance(error, RedisError) else None
    if isinstance(error, BusyLoadingError):
        code = "LOADING"
    elif isinstance(error, AuthenticationError | AuthenticationWrongNumberOfArgsError) and code in (None, "ERR"):
        code = "WRONGPASS"
    return f"{code} {text}" if code else text


class Channel:
    """An open connection of redis-py, with redis-py's retries and timeouts off.

    Attributes:
        synchronized: Whether every command that was sent has been answered.
    """

    def __init__(self, address: Address, connection: Any) -> None:
        self.synchronized = True
        self._address = address
        self._connection = connection

    @classmethod
    async def open(cls, address: Address, name: str, timeout: float) -> Self:
        """Connect and authenticate.

        Raises:
            OrkiError: The server cannot be reached or refuses the connection.
        """
        settings = dict(address.settings)
        kind: Any = Connection
        if "path" in settings:
            kind = UnixDomainSocketConnection
        elif address.tls:
            kind = SSLConnection
        else:
            settings["socket_keepalive"] = True
        connection = kind(
            **settings,
            protocol=2,
            client_name=name,
            driver_info=None,
            # `Connection` limits a whole exchange; redis-py would arm a timer for every single reply.
            socket_timeout=None,
            socket_connect_timeout=timeout,
            retry=Retry(NoBackoff(), 0),
            health_check_interval=0,
        )
        try:
            async with asyncio.timeout(timeout):
                await connection.connect()
        except TimeoutError as error:
            await connection.disconnect(nowait=True)
            raise address.unavailable(f"no connection within {timeout:g} s") from error
        except (RedisError, OSError) as error:
            await connection.disconnect(nowait=True)
            raise _failure(address, error) from error
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        return cls(address, connection)

    async def exchange(self, packed: bytes, count: int) -> list[Any]:
        """Send encoded commands and read their replies.

        Raises:
            OrkiError: The connection failed; `synchronized` is then false, as it is after a cancellation.
        """
        self.synchronized = False
        replies: list[Any] = []
        try:
            await self._connection.send_packed_command([packed], check_health=False)
            read = self._connection.read_response
            while len(replies) < count:
                try:
                    replies.append(await read(disable_decoding=True))
                except (ResponseError, BusyLoadingError, AuthenticationError) as error:
                    if not self._connection.is_connected:
                        raise
                    replies.append(self._address.error(error_text(error)))
        except (RedisError, OSError) as error:
            raise self._address.unavailable(str(error) or type(error).__name__) from error
        self.synchronized = True
        return replies

    async def is_usable(self) -> bool:
        """Whether the connection is open and nothing arrived: between exchanges, only its end can arrive."""
        try:
            return not await self._connection.can_read()
        except (RedisError, OSError):
            return False

    async def close(self, *, wait: bool) -> None:
        """Close the connection; with `wait`, return once it is closed."""
        with contextlib.suppress(RedisError, OSError, TimeoutError):
            await self._connection.disconnect(nowait=not wait)


def _failure(address: Address, error: RedisError | OSError) -> OrkiError:
    """Return the error for a connection that failed or was refused."""
    if isinstance(error, ResponseError | BusyLoadingError | AuthenticationError) or (
        isinstance(error, ConnectionError) and error.status_code
    ):
        return address.error(error_text(error))
    return address.unavailable(str(error) or type(error).__name__)
