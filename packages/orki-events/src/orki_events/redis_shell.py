"""The one place that speaks to Redis: a connection that sends commands in one pipeline and reads their answers.

redis-py connects, authenticates and parses. Its own retries and timeouts are off: a command whose fate is unknown is
repeated, or not, by the caller who knows what it means. What leaves this module is an answer or an OrkiError.
"""

from __future__ import annotations

__all__ = ["Address", "Command", "Link", "Reply", "pack", "parse_address"]

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import parse_qsl, urlsplit

import hiredis
from redis.asyncio.connection import Connection, SSLConnection, UnixDomainSocketConnection, parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, BusyLoadingError, RedisError, ResponseError

from orki_contract.errors import EventsUnavailable, InvalidSetting, LocalProtocolError, OrkiError
from orki_events.redis_shell_errors import refusal, unavailable

Command = tuple[bytes | str | int, ...]
"""Name and arguments of one command."""
Reply = Any
"""What the server answered (RESP2): bytes, int, list, None; or an OrkiError in place of an error reply."""

_pack: Callable[[Command], bytes] = cast(Any, hiredis).pack_command
_QUERY = frozenset({"db", "ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs", "ssl_check_hostname"})


@dataclass(frozen=True, slots=True)
class Address:
    """Where the server is, and as whom to speak to it.

    Attributes:
        shown: For messages; holds no secret.
        settings: For redis-py.
        connection: redis-py's class of connection.
    """

    shown: str
    settings: dict[str, Any] = field(repr=False)
    connection: type[Any] = field(repr=False)


def parse_address(url: str, username: str | None = None, password: str | None = None) -> Address:
    """Reads `redis://`, `rediss://` or `unix://`; user and password may be given apart, so that no URL holds them.

    Raises:
        InvalidSetting: It is no such URL, or it names an option that is not known here.
    """
    try:
        split = urlsplit(url)
        host, port = split.hostname, split.port
        query = dict(parse_qsl(split.query, keep_blank_values=True))
    except (ValueError, AttributeError) as error:
        raise InvalidSetting(f"the event server's URL cannot be read: {error}") from error
    if split.scheme not in ("redis", "rediss", "unix"):
        raise InvalidSetting(
            f'the event server\'s URL begins with "{split.scheme}:"; it must begin with redis://, rediss:// or unix://'
        )
    if unknown := sorted(query.keys() - _QUERY):
        raise InvalidSetting(
            f'the event server\'s URL has an unknown option "{unknown[0]}" (known: {", ".join(sorted(_QUERY))})'
        )
    path = split.path.strip("/")
    if split.scheme == "unix":
        shown = f"the event server at {split.path}"
    else:
        if path and not path.isdigit():
            raise InvalidSetting(
                f'the event server\'s URL ends in "/{path}"; only the number of a database may be there'
            )
        shown = f"the event server at {host or 'localhost'}:{port or 6379}"
    if not query.get("db", "0").isdigit():
        raise InvalidSetting(f'the event server\'s URL has db="{query["db"]}"; it must be a number')
    try:
        settings: dict[str, Any] = dict(parse_url(url))
    except ValueError as error:
        raise InvalidSetting(f"the event server's URL cannot be read: {error}") from error
    if username is not None:
        settings["username"] = username
    if password is not None:
        settings["password"] = password
    connection = settings.pop("connection_class", Connection)
    if connection not in (UnixDomainSocketConnection, SSLConnection):
        settings["socket_keepalive"] = True
    return Address(shown, settings, connection)


def pack(command: Command) -> bytes:
    """One command as it travels (RESP)."""
    # hiredis takes a tuple of any length; its stub says one of one.
    return _pack(command)


class Link:
    """One connection; opens itself when used, and again after it broke. Exchanges follow one another.

    Attributes:
        opened: How often a connection was opened: a caller that kept the number sees that it is a new one.
    """

    def __init__(self, address: Address, *, name: str, connect_timeout_s: float, answer_timeout_s: float) -> None:
        """Opens nothing yet.

        Args:
            address: The server.
            name: Shown by `CLIENT LIST`.
            connect_timeout_s: Longest time for opening.
            answer_timeout_s: Longest time for the answers to one exchange.
        """
        self.opened = 0
        self._address = address
        self._name = "".join(letter if 33 <= ord(letter) <= 126 else "-" for letter in name)
        self._connect_timeout_s = connect_timeout_s
        self._answer_timeout_s = answer_timeout_s
        self._connection: Any = None
        self._lock = asyncio.Lock()
        self._client_id: int | None = None
        self._ended = False

    @property
    def where(self) -> str:
        """The server, for messages."""
        return self._address.shown

    async def ask(self, *commands: Command, extra_s: float = 0.0) -> list[Reply]:
        """Sends commands in one pipeline.

        Args:
            commands: In this order.
            extra_s: Time in seconds that the server may block, on top of the ordinary limit.

        Returns:
            An answer for each; an error reply is an OrkiError in its place.

        Raises:
            EventsUnavailable: No connection, or it broke: what the server did with the commands is not known.
            OrkiError: The server refused the connection, for the reason that the class says.
        """
        return await self.exchange(b"".join(map(pack, commands)), len(commands), extra_s=extra_s)

    async def one(self, command: Command, *, extra_s: float = 0.0) -> Reply:
        """Sends one command; an error reply is raised. Otherwise as `ask`."""
        (reply,) = await self.ask(command, extra_s=extra_s)
        if isinstance(reply, OrkiError):
            raise reply
        return reply

    async def transaction(self, *commands: Command) -> list[Reply]:
        """Sends commands as one transaction (MULTI); the server runs them with nothing in between. Otherwise as `ask`.

        Raises:
            OrkiError: The server refused the whole transaction.
        """
        replies = await self.ask((b"MULTI",), *commands, (b"EXEC",))
        for reply in replies:
            if isinstance(reply, OrkiError):
                raise reply
        return [refusal(each, self.where) if isinstance(each, RedisError) else each for each in replies[-1]]

    async def exchange(self, packed: bytes, count: int, *, extra_s: float = 0.0) -> list[Reply]:
        """As `ask`, for commands that are packed already."""
        async with self._lock:
            if self._ended:
                raise LocalProtocolError(f"the connection to {self.where} was ended here")
            connection = await self._usable()
            try:
                async with asyncio.timeout(self._answer_timeout_s + extra_s):
                    return await self._exchange(connection, packed, count)
            except TimeoutError as error:
                await self._drop()
                raise EventsUnavailable(
                    f"{self.where} took more than {self._answer_timeout_s + extra_s:g} s to answer"
                ) from error
            except (RedisError, OSError) as error:
                await self._drop()
                raise unavailable(error, self.where) from error
            except BaseException:
                # Cancelled half-way: the rest of the answers would be taken for those of the next exchange.
                await self._drop()
                raise

    async def client_id(self) -> int:
        """The server's number for this connection, for `CLIENT UNBLOCK`."""
        if self._client_id is None:
            self._client_id = int(await self.one((b"CLIENT", b"ID")))
        return self._client_id

    @property
    def known_client_id(self) -> int | None:
        """The number, if it was asked for since the connection was opened."""
        return self._client_id

    async def drop(self) -> None:
        """Closes the connection; the next exchange opens another."""
        async with self._lock:
            await self._drop()

    async def end(self) -> None:
        """Closes the connection for good; an exchange that is under way fails at once, and each further one."""
        self._ended = True
        await self._drop()
        await self.close()

    async def close(self) -> None:
        """Closes the connection and waits until it is."""
        async with self._lock:
            connection, self._connection, self._client_id = self._connection, None, None
            if connection is not None:
                with contextlib.suppress(RedisError, OSError, TimeoutError):
                    await connection.disconnect()

    async def _exchange(self, connection: Any, packed: bytes, count: int) -> list[Reply]:
        await connection.send_packed_command([packed], check_health=False)
        read = connection.read_response
        replies: list[Reply] = []
        while len(replies) < count:
            try:
                replies.append(await read(disable_decoding=True))
            except (ResponseError, BusyLoadingError, AuthenticationError) as error:
                if not connection.is_connected:
                    raise
                replies.append(refusal(error, self.where))
        return replies

    async def _usable(self) -> Any:
        """The connection, or a new one: between exchanges nothing comes but the end of a connection."""
        if self._connection is not None:
            try:
                if not await self._connection.can_read():
                    return self._connection
            except (RedisError, OSError):
                pass
            await self._drop()
        return await self._open()

    async def _open(self) -> Any:
        connection: Any = self._address.connection(
            **self._address.settings,
            protocol=2,
            client_name=self._name,
            driver_info=None,
            # Both limits are ours and span a whole exchange; redis-py's would be armed for every single answer.
            socket_timeout=None,
            socket_connect_timeout=self._connect_timeout_s,
            retry=Retry(NoBackoff(), 0),
            health_check_interval=0,
        )
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                await connection.connect()
        except TimeoutError as error:
            await connection.disconnect(nowait=True)
            raise EventsUnavailable(
                f"{self.where} did not accept a connection within {self._connect_timeout_s:g} s"
            ) from error
        except RedisError as error:
            await connection.disconnect(nowait=True)
            raise refusal(error, self.where) from error
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        self._connection = connection
        self._client_id = None
        self.opened += 1
        return connection

    async def _drop(self) -> None:
        connection, self._connection, self._client_id = self._connection, None, None
        if connection is not None:
            with contextlib.suppress(RedisError, OSError, TimeoutError):
                await connection.disconnect(nowait=True)
