"""Connections to Redis, shared by the event plane and the server's store.

`parse_address` reads a URL. `Connection` sends commands in one pipeline and returns their replies. redis-py connects,
authenticates and parses; its retries and timeouts are off, because only the caller knows whether a command whose
outcome is unknown may be repeated. Every error that leaves this module is an `OrkiError`, classified in one table:

| condition | event server | store |
|---|---|---|
| no connection, no reply, busy, slot not served | `EventsUnavailable` | `StoreUnavailable` |
| out of memory | `EventsOutOfMemory` | `StoreFull` |
| read-only, not persisting, loading | `EventsReadOnly`, … | `StoreUnavailable` |
| credentials or permissions refused | `EventsRefused` | `StoreUnavailable` |
| the command is wrong | `EventsRefused` | `LocalProtocolError` |
| the script is not loaded | `ScriptMissing` | `ScriptMissing` |
| the stream or its group is missing, or already exists | `GroupMissing`, `GroupExists` | the same |
"""

from __future__ import annotations

__all__ = [
    "Address",
    "Command",
    "Connection",
    "GroupExists",
    "GroupMissing",
    "Reply",
    "Role",
    "Script",
    "ScriptMissing",
    "pack",
    "parse_address",
]

import asyncio
import contextlib
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import hiredis

from orki_contract.errors import LocalProtocolError, OrkiError
from orki_events._address import Address, GroupExists, GroupMissing, Role, ScriptMissing, parse_address

Command = Sequence[bytes | str | int]
"""Name and arguments of one command."""
Reply = Any
"""A reply as RESP2 delivers it: bytes, int, list or None; an OrkiError instead of an error reply."""
_SLOWEST_LINK = 1 << 20
"""Bytes a second that a link carries at least."""
_pack: Callable[[tuple[bytes | str | int, ...]], bytes] = cast(Any, hiredis).pack_command


def _redis_py() -> Any:
    """Return redis-py, imported when a connection is opened: that takes longer than importing all of orki_events."""
    import redis.asyncio

    return redis


def pack(command: Command) -> bytes:
    """Encode one command (RESP)."""
    return _pack(tuple(command))


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script. It is called by its digest, so that a user without EVAL can run what an operator has loaded."""

    text: str
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        # Redis chose SHA-1; nothing is secured by it.
        object.__setattr__(self, "digest", hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest())


class Connection:
    """One connection. It opens on first use and again after a failure; exchanges run one after another.

    Attributes:
        address: The server.
        answer_timeout: Default time limit of one exchange.
        opened: How often it was opened.
        client_id: The server's number for this connection, for `CLIENT UNBLOCK`; None until `fetch_client_id`.
    """

    def __init__(self, address: Address, *, name: str, connect_timeout: float, answer_timeout: float) -> None:
        """Create the connection without opening it.

        Args:
            address: The server.
            name: The client name in `CLIENT LIST`.
            connect_timeout: Time limit for opening.
            answer_timeout: Time limit for the replies of one exchange.
        """
        self.address = address
        self.answer_timeout = answer_timeout
        self._name = "".join(letter if "!" <= letter <= "~" else "-" for letter in name)
        self._connect_timeout = connect_timeout
        self._open: Any = None
        self._deadline: asyncio.Timeout | None = None
        self.opened = 0
        # Whether every command that was sent has been answered.
        self._synchronized = True
        self._lock = asyncio.Lock()
        self.client_id: int | None = None
        self._ended = False

    async def pipeline(self, *commands: Command, timeout: float | None = None, same: int | None = None) -> list[Reply]:
        """Send commands in one pipeline.

        Args:
            commands: The commands, in their order.
            timeout: Time without any progress after which the exchange fails; the default is `answer_timeout`.
            same: Value of `opened` that the connection must still have: the exchange fails rather than to open another.

        Returns:
            One reply for each command; an error reply is an OrkiError in its position.

        Raises:
            EventsUnavailable, StoreUnavailable: There is no connection, or it failed. The outcome of the commands is
                unknown.
            OrkiError: The server refused the connection.
        """
        packed = b"".join(map(_pack, map(tuple, commands)))
        return await self.exchange(packed, len(commands), timeout=timeout, same=same)

    async def execute(self, command: Command, *, timeout: float | None = None) -> Reply:
        """Send one command and return its reply; raise it if it is an error. See `pipeline` for other errors."""
        (reply,) = await self.pipeline(command, timeout=timeout)
        if isinstance(reply, OrkiError):
            raise reply
        return reply

    async def transaction(self, *commands: Command) -> list[Reply]:
        """Send commands as one transaction (MULTI) and return their replies, as `pipeline` does.

        Raises:
            OrkiError: The server refused the whole transaction.
        """
        replies = await self.pipeline((b"MULTI",), *commands, (b"EXEC",))
        for reply in replies:
            if isinstance(reply, OrkiError):
                raise reply
        return [self.reply_error(each) if isinstance(each, Exception) else each for each in replies[-1]]

    def reply_error(self, reply: Reply) -> OrkiError:
        """Return the error for an error reply inside the reply of a transaction."""
        return self.address.error(_error_text(reply))

    async def run_script(self, script: Script, keys: Sequence[bytes], *arguments: bytes | str | int) -> Reply:
        """Run a script, loading it if the server does not have it. Raises the same errors as `execute`.

        A user that may not load scripts gets a retryable error until another one has loaded them.
        """
        command = (b"EVALSHA", script.digest, len(keys), *keys, *arguments)
        try:
            return await self.execute(command)
        except ScriptMissing:
            await self.load_script(script)
        return await self.execute(command)

    async def load_script(self, script: Script) -> None:
        """Load a script. Raises the same errors as `execute`."""
        try:
            await self.execute((b"SCRIPT", b"LOAD", script.text))
        except OrkiError as error:
            # An orchestrator loads them again after a restart of the server.
            hint = "its scripts are missing, and this user may not load them: run orki streams apply or an orchestrator"
            raise error if error.retryable else self.address.unavailable(f"{hint} ({error.message})") from error

    async def exchange(
        self, packed: bytes, count: int, *, timeout: float | None = None, same: int | None = None
    ) -> list[Reply]:
        """Send `count` commands that are already encoded and return their replies, as `pipeline` does."""
        limit = self.answer_timeout if timeout is None else timeout
        async with self._lock:
            if self._ended:
                raise LocalProtocolError(f"the connection to {self.address.shown} was ended by this process")
            await self._connect(same)
            self._synchronized = False
            # The commands get the time that a slow link takes for them, and replies as long as they arrive.
            sending = len(packed) / _SLOWEST_LINK
            try:
                async with asyncio.timeout(limit + sending) as self._deadline:
                    replies = await self._replies(packed, count)
                self._synchronized = True
                return replies
            except TimeoutError as error:
                raise self.address.unavailable(f"no reply within {round(limit + sending, 2):g} s") from error
            finally:
                self._deadline = None
                # After an incomplete exchange, the remaining replies would answer the next one.
                if not self._synchronized:
                    await self._drop()

    async def subscribe(
        self, channel: str, on_open: Callable[[], None], on_message: Callable[[bytes], None], *, silence: float
    ) -> None:
        """Pass the messages of a channel on, until the connection fails. It carries nothing else meanwhile.

        Args:
            channel: The channel.
            on_open: Called when the subscription has begun: earlier messages are lost.
            on_message: Called with each message.
            silence: Time without any reply after which the connection counts as lost; it is asked three times before.

        Raises:
            EventsUnavailable, StoreUnavailable: There is no connection, or it failed.
            OrkiError: The server refused the connection or the channel.
        """
        redis = _redis_py()
        async with self._lock:
            await self._connect()
            self._synchronized = False
            asking = asyncio.create_task(self._ask(silence / 4), name="orki subscription")
            try:
                await self._open.send_packed_command([pack((b"SUBSCRIBE", channel))], check_health=False)
                async with asyncio.timeout(silence) as limit:
                    while True:
                        reply = await self._open.read_response(disable_decoding=True)
                        limit.reschedule(asyncio.get_running_loop().time() + silence)
                        if reply[0] == b"message":
                            on_message(reply[2])
                        elif reply[0] == b"subscribe":
                            on_open()
            except TimeoutError as error:
                raise self.address.unavailable(f"no reply within {silence:g} s") from error
            except redis.ResponseError as error:
                raise self.address.error(_error_text(error)) from error
            except (redis.RedisError, OSError) as error:
                raise self.address.unavailable(str(error) or type(error).__name__) from error
            finally:
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)
                await self._drop()

    async def _ask(self, interval: float) -> None:
        """Send a PING now and then: a connection without messages may be dead."""
        while True:
            await asyncio.sleep(interval)
            await self._open.send_packed_command([pack((b"PING",))], check_health=False)

    async def fetch_client_id(self) -> None:
        """Set `client_id`, unless it is already set."""
        if self.client_id is None:
            self.client_id = int(await self.execute((b"CLIENT", b"ID")))

    async def drop(self) -> None:
        """Close the connection; the next exchange opens another."""
        async with self._lock:
            await self._drop()

    async def abort(self) -> None:
        """Close the connection at once: the current exchange fails."""
        await self._drop()

    async def end(self) -> None:
        """Close the connection for good: the current exchange and all later ones fail."""
        self._ended = True
        await self._drop()
        await self.close()

    async def close(self) -> None:
        """Close the connection and wait until it is closed."""
        async with self._lock:
            await self._drop(wait=True)

    def _bytes_arrived(self, feed: Callable[[bytes], None], limit: float, piece: bytes) -> None:
        feed(piece)
        if self._deadline is not None and (due := self._deadline.when()) is not None:
            extended = asyncio.get_running_loop().time() + limit
            # Rearmed only now and then: most replies arrive in one piece.
            if extended > due + limit / 10:
                self._deadline.reschedule(extended)

    async def _connect(self, same: int | None = None) -> None:
        """Connect and authenticate, unless an open connection is usable."""
        redis = _redis_py()
        if same not in (None, self.opened):
            raise self.address.unavailable("the connection was closed")
        if self._open is not None:
            with contextlib.suppress(redis.RedisError, OSError):
                # Between exchanges, only the connection's end can arrive.
                if not await self._open.can_read():
                    return
            await self._drop()
        if same is not None:
            raise self.address.unavailable("the connection was closed")
        address = await self._primary() if self.address.service else self.address
        settings = dict(address.settings)
        kind = redis.asyncio.SSLConnection if self.address.tls else redis.asyncio.Connection
        if "path" in settings:
            kind = redis.asyncio.UnixDomainSocketConnection
        elif not self.address.tls:
            settings["socket_keepalive"] = True
        connection = kind(
            **settings,
            protocol=2,
            client_name=self._name,
            driver_info=None,
            # `exchange` limits a whole exchange; redis-py would arm a timer for every single reply.
            socket_timeout=None,
            socket_connect_timeout=self._connect_timeout,
            retry=redis.asyncio.retry.Retry(redis.backoff.NoBackoff(), 0),
            health_check_interval=0,
        )
        try:
            async with asyncio.timeout(self._connect_timeout):
                await connection.connect()
                if self.address.service:
                    await self._check_role(connection)
            reader = connection._reader
            reader.feed_data = partial(self._bytes_arrived, reader.feed_data, self.answer_timeout)
            self._open = connection
            self.opened += 1
        except TimeoutError as error:
            raise self.address.unavailable(f"no connection within {self._connect_timeout:g} s") from error
        except (redis.RedisError, OSError) as error:
            raise self._failure(error) from error
        finally:
            if self._open is None:
                await connection.disconnect(nowait=True)

    async def _primary(self) -> Address:
        """Return the server that the sentinels watch: of their answers the one of the latest failover."""

        async def ask(host: str, port: int) -> tuple[int, str, int]:
            bare = self.address.at(host, port)
            bare.settings.update(username=None, password=None, db=0)
            link = Connection(bare, name=self._name, connect_timeout=self._connect_timeout, answer_timeout=1.0)
            try:
                reply = await link.execute((b"SENTINEL", b"MASTER", self.address.service))
            finally:
                await link.close()
            fields = dict(zip(reply[::2], reply[1::2], strict=True))
            return int(fields[b"config-epoch"]), fields[b"ip"].decode(), int(fields[b"port"])

        answers = await asyncio.gather(*(ask(*seed) for seed in self.address.seeds), return_exceptions=True)
        known = [answer for answer in answers if not isinstance(answer, BaseException)]
        if not known:
            raise self.address.unavailable(f"no sentinel answers for it: {answers[0]}")
        _, host, port = max(known)
        return self.address.at(host, port)

    async def _check_role(self, connection: Any) -> None:
        await connection.send_command("ROLE")
        role = await connection.read_response(disable_decoding=True)
        if role[0] != b"master":
            raise OSError("the sentinels still name a server that is a replica")

    def _failure(self, error: Exception) -> OrkiError:
        """Return the error for a connection that failed or was refused."""
        redis = _redis_py()
        refused = (redis.ResponseError, redis.BusyLoadingError, redis.AuthenticationError)
        if isinstance(error, refused) or (isinstance(error, redis.ConnectionError) and error.status_code):
            return self.address.error(_error_text(error))
        return self.address.unavailable(str(error) or type(error).__name__)

    async def _replies(self, packed: bytes, count: int) -> list[Reply]:
        redis = _redis_py()
        refused = (redis.ResponseError, redis.BusyLoadingError, redis.AuthenticationError)
        incomplete = redis._parsers.hiredis.NOT_ENOUGH_DATA
        connection = self._open
        replies: list[Reply] = []
        try:
            await connection.send_packed_command([packed], check_health=False)
            # Replies come straight from the parser: redis-py awaits, checks and arms a timer for every one.
            parser = connection._parser
            parse = parser._reader.gets
            while len(replies) < count:
                reply = parse(False)
                if reply is incomplete:
                    await parser.read_from_socket()
                    continue
                if isinstance(reply, Exception):
                    if isinstance(reply, redis.ConnectionError) and not isinstance(reply, refused):
                        raise reply
                    reply = self.address.error(_error_text(reply))
                replies.append(reply)
        except (redis.RedisError, OSError) as error:
            # redis-py closes the connection to a server that loads its data.
            raise self._failure(error) from error
        return replies

    async def _drop(self, *, wait: bool = False) -> None:
        connection, self._open, self.client_id = self._open, None, None
        if connection is not None:
            redis = _redis_py()
            with contextlib.suppress(redis.RedisError, OSError, TimeoutError):
                await connection.disconnect(nowait=not wait)


def _error_text(error: Any) -> str:
    """Return an error reply as the server sent it: redis-py removes the codes that it knows."""
    redis = _redis_py()
    code = error.status_code if isinstance(error, redis.RedisError) else None
    if isinstance(error, redis.BusyLoadingError):
        code = "LOADING"
    elif isinstance(error, redis.AuthenticationError | redis.exceptions.AuthenticationWrongNumberOfArgsError):
        code = "WRONGPASS" if code in (None, "ERR") else code
    return f"{code} {error}" if code else str(error)
