"""The connection to Redis: explicit timeouts, no retries but our own, and one place where its errors become ours.

Once a command fails for the server's sake the link is *down*: a probe then tries, with full jitter and for ever, until
the server takes a write again. Callers are told at once, or wait with `wait_up`.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, TypeVar
from urllib.parse import urlsplit

from redis import exceptions as redis_errors
from redis.exceptions import NoScriptError, OutOfMemoryError, ResponseError

from orki_contract.errors import InvalidSetting, LocalProtocolError, OrkiError, StoreUnavailable
from orki_server._keys import FleetKeys, ShardKeys
from orki_server._store.operations import Argument, Operation
from orki_server._store.scripts import Script
from orki_server._store.wire import Wire

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


class StoreConnection:
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


R = TypeVar("R")

_OPERATIONS: Final = 256
"""Most transitions in one round trip: bounds how long a script holds the server up."""
_BYTES: Final = 8 << 20
"""Most bytes in one round trip."""
_WAITING: Final = 100_000
"""Most transitions in memory."""


@dataclass(slots=True, eq=False)
class _Entry:
    transition: Operation[Any]
    arguments: tuple[Argument, ...]
    size: int
    answer: asyncio.Future[Any]


class Batcher:
    """The way of all transitions to the store."""

    def __init__(self, link: StoreConnection, script: Script) -> None:
        self._link = link
        self._script = script
        self._waiting: deque[_Entry] = deque()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        link.on_change(self._link_changed)

    def start(self) -> None:
        """Begins to send."""
        self._task = asyncio.get_running_loop().create_task(self._run(), name="orki store lane")

    async def close(self) -> None:
        """Stops; what still waits fails as if the store were away."""
        if self._task:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._fail(list(self._waiting), StoreUnavailable("the orchestrator stops"))
        self._waiting.clear()

    @property
    def waiting(self) -> int:
        """Transitions in memory."""
        return len(self._waiting)

    def put(self, transition: Operation[R]) -> asyncio.Future[R]:
        """Hands in a transition without waiting; the future gets its outcome or the error.

        Raises:
            StoreUnavailable: The store is away and the transition is not patient, or too many wait.
        """
        if not self._link.up and not transition.patient:
            raise self._link.why_down
        if len(self._waiting) >= _WAITING:
            raise StoreUnavailable(f"the store at {self._link.address} does not keep up: {_WAITING} transitions wait")
        arguments = tuple(transition.arguments())
        size = sum(len(each) for each in arguments if isinstance(each, bytes | str))
        answer: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Entry(transition, arguments, size, answer))
        self._wake.set()
        return answer

    async def apply(self, transition: Operation[R]) -> R:
        """Hands in a transition and waits for its outcome.

        Raises:
            StoreUnavailable: The store is away. The transition may have been applied, and may be sent again.
            LocalProtocolError: The script failed: a defect.
        """
        return await self.put(transition)

    async def _run(self) -> None:
        while True:
            if not self._waiting:
                self._wake.clear()
                await self._wake.wait()
            await self._link.wait_up()
            batch = self._take()
            if not batch:
                continue
            try:
                await self._send(batch)
            except OrkiError as error:
                self._return(batch, error)

    def _take(self) -> list[_Entry]:
        batch: list[_Entry] = []
        size = 0
        while self._waiting and len(batch) < _OPERATIONS and (size < _BYTES or not batch):
            batch.append(self._waiting.popleft())
            size += batch[-1].size
        return batch

    async def _send(self, batch: Iterable[_Entry]) -> None:
        shards: dict[int, list[_Entry]] = {}
        for entry in batch:
            shards.setdefault(entry.transition.route(), []).append(entry)
        commands = [self._command(shard, entries) for shard, entries in shards.items()]
        replies = await self._link.attempt(commands, in_lane=True)
        if any(isinstance(reply, NoScriptError) for reply in replies):
            # Only what found no script is sent again: the others were applied.
            again = [place for place, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
            _, *second = await self._link.attempt(
                [("SCRIPT", "LOAD", self._script.text), *(commands[place] for place in again)], in_lane=True
            )
            for place, reply in zip(again, second, strict=True):
                replies[place] = reply
        failure: OrkiError | None = None
        for entries, reply in zip(shards.values(), replies, strict=True):
            if isinstance(reply, Exception):
                failure = self._link.failed(reply)
                self._return(entries, failure)
            else:
                self._answer(entries, reply)

    def _command(self, shard: int, entries: Iterable[_Entry]) -> list[Argument]:
        command: list[Argument] = ["EVALSHA", self._script.sha, 1, ShardKeys(shard).base]
        for entry in entries:
            command += (entry.transition.op, len(entry.arguments), *entry.arguments)
        return command

    def _answer(self, entries: list[_Entry], replies: list[list[bytes]]) -> None:
        refused: list[_Entry] = []
        error: OrkiError | None = None
        for entry, reply in zip(entries, replies, strict=True):
            if reply and reply[0] == b"error":
                error = self._link.failed(_script_error(reply[1].decode(errors="replace")))
                refused.append(entry)
            elif not entry.answer.done():
                entry.answer.set_result(entry.transition.outcome(reply))
        if error:
            self._return(refused, error)

    def _return(self, entries: list[_Entry], error: OrkiError) -> None:
        """Puts back what may wait, in its place at the front; fails the rest."""
        away = isinstance(error, StoreUnavailable)
        self._fail([entry for entry in entries if not (away and entry.transition.patient)], error)
        kept = [entry for entry in entries if away and entry.transition.patient and not entry.answer.cancelled()]
        self._waiting.extendleft(reversed(kept))

    @staticmethod
    def _fail(entries: Iterable[_Entry], error: OrkiError) -> None:
        for entry in entries:
            if not entry.answer.done():
                entry.answer.set_exception(type(error)(error.message))

    def _link_changed(self, up: bool) -> None:
        if not up:
            impatient = [entry for entry in self._waiting if not entry.transition.patient]
            self._waiting = deque(entry for entry in self._waiting if entry.transition.patient)
            self._fail(impatient, self._link.why_down)
        self._wake.set()


def _script_error(text: str) -> Exception:
    """The error that redis-py would have made of a failed command inside a script."""
    return OutOfMemoryError(text) if text.startswith("OOM") else ResponseError(text)
