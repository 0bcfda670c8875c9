"""One connection to Redis: commands go out in one write, answers come back in their order.

redis-py connects, authenticates and parses; its retries and its own timeouts are off. (With a socket timeout it writes
through `asyncio.wait_for`, which on Python 3.11 can swallow a cancellation.)
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any, Final

from hiredis import pack_command
from redis.asyncio import ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, BusyLoadingError, RedisError, ResponseError

from orki_contract.errors import InvalidSetting

_CONNECT_S: Final = 2.0
_ANSWER_S: Final = 5.0


class Wire:
    """One connection; opens itself when used, and again after it broke. Exchanges follow one another.

    Raises:
        InvalidSetting: The URL cannot be used; the message does not show it.
    """

    def __init__(self, url: str) -> None:
        try:
            # Used only for what it makes of a URL.
            pool = ConnectionPool.from_url(url)
            self._make: Any = pool.connection_class
            self._settings: dict[str, Any] = {
                **pool.connection_kwargs,
                "protocol": 2,
                "socket_timeout": None,
                "socket_connect_timeout": _CONNECT_S,
                "retry": Retry(NoBackoff(), 0),
                "health_check_interval": 0,
                "decode_responses": False,
            }
            self._make(**self._settings)
        except (ValueError, TypeError) as error:
            raise InvalidSetting(f"the Redis URL has parameters that cannot be used: {error}") from error
        self._connection: Any = None
        self._lock = asyncio.Lock()

    async def exchange(self, commands: Sequence[Sequence[bytes | str | int]]) -> list[Any]:
        """Sends commands; an error that is the answer to one stands in its place.

        Raises:
            RedisError, OSError: The connection could not be made, or broke. What the server did is not known.
        """
        packed = b"".join([pack_command(tuple(command)) for command in commands])  # type: ignore[arg-type]
        async with self._lock:
            connection = await self._usable()
            try:
                async with asyncio.timeout(_ANSWER_S):
                    await connection.send_packed_command([packed], check_health=False)
                    return [await _answer(connection) for _ in commands]
            except BaseException as error:
                # Half-way, the answers that are left would be taken for those of the next exchange.
                await self._drop()
                if isinstance(error, TimeoutError):
                    raise TimeoutError(f"no answer within {_ANSWER_S:g} s") from error
                raise

    async def close(self) -> None:
        """Closes the connection and waits until it is."""
        async with self._lock:
            connection, self._connection = self._connection, None
            if connection is not None:
                with contextlib.suppress(RedisError, OSError):
                    await connection.disconnect()

    async def _usable(self) -> Any:
        if self._connection is not None:
            with contextlib.suppress(RedisError, OSError):
                # Between exchanges nothing comes but the end of a connection.
                if not await self._connection.can_read():
                    return self._connection
            await self._drop()
        connection = self._make(**self._settings)
        try:
            async with asyncio.timeout(_CONNECT_S):
                await connection.connect()
        except BaseException as error:
            await connection.disconnect(nowait=True)
            if isinstance(error, TimeoutError):
                raise TimeoutError(f"no connection within {_CONNECT_S:g} s") from error
            raise
        self._connection = connection
        return connection

    async def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(RedisError, OSError):
                await connection.disconnect(nowait=True)


async def _answer(connection: Any) -> Any:
    try:
        return await connection.read_response(disable_decoding=True)
    except (ResponseError, BusyLoadingError, AuthenticationError) as error:
        if not connection.is_connected:
            raise
        return error
