"""One server of the store: its connections, and the wait until its writes are durable.

A server answers a wait (WAITAOF or WAIT) when all that the same connection has written before is safe, and answers
nothing else on this connection meanwhile. So operations have several connections, the lanes, and continue on another
lane while one waits. A wait covers all batches that its lane has sent; while all lanes wait, batches gather for the
next wait.

Some servers (Redis 7.4.0 to 7.4.2, and Valkey up to 9.1 at least) answer WAITAOF with `appendfsync everysec` when the
kernel has the writes, but not the disk. `open` recognises them. Writes then count as durable only when the server's own
statistics show a flush that began after them.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from orki_contract.errors import InvalidSetting, LocalProtocolError, OrkiError, StoreUnavailable
from orki_events.connection import Address, Command, Connection, Reply
from orki_server._keys import FleetKeys

_CONNECT_TIMEOUT: Final = 2.0
_ANSWER_TIMEOUT: Final = 5.0
_DURABLE_TIMEOUT: Final = 10.0
"""Maximum time for writes to become durable."""
_LANES: Final = 4
_FLUSH_INTERVAL: Final = 1.2
"""Time in which a server with `appendfsync everysec` begins a flush if none is under way, with some slack."""
_SAMPLE_INTERVAL: Final = 0.05
_STATISTICS: Final = ("INFO", "persistence", "replication")
_IDLE: Final = b"aof_pending_bio_fsync:0"
"""Says in the statistics that no flush is under way."""
_OFFSET: Final = re.compile(rb"^master_repl_offset:(\d+)", re.MULTILINE)
"""The number in the statistics that rises with every write."""


@dataclass(frozen=True, slots=True)
class Durability:
    """What an acknowledged write survives.

    Attributes:
        fsync: Whether it is on the server's disk.
        replicas: Number of replicas that have it.
    """

    fsync: bool = False
    replicas: int = 0

    def __str__(self) -> str:
        return "fsync" if self.fsync else f"replicas:{self.replicas}" if self.replicas else "memory"

    @classmethod
    def parse(cls, text: str) -> Durability:
        """Read `memory`, `fsync` or `replicas:N`.

        Raises:
            InvalidSetting: The text is something else.
        """
        match = re.fullmatch(r"memory|fsync|replicas:([1-9])", text)
        if match is None:
            raise InvalidSetting(f"durability {text!r}: use memory, fsync, or replicas:N with N from 1 to 9")
        return cls(text == "fsync", int(match[1] or 0))

    def covers(self, other: Durability) -> bool:
        """Whether writes of this durability also have the other one."""
        return (self.fsync or not other.fsync) and self.replicas >= other.replicas

    @property
    def waits(self) -> bool:
        """Whether writes are not durable at once."""
        return self.fsync or self.replicas > 0

    @property
    def command(self) -> Command:
        """The command that waits."""
        timeout = round(_DURABLE_TIMEOUT * 1000)
        return ("WAITAOF", 1, 0, timeout) if self.fsync else ("WAIT", self.replicas, timeout)

    def shortage(self, reply: Reply) -> str:
        """Return what is missing according to the reply of the command; empty for nothing."""
        if self.fsync:
            return "" if reply[0] >= 1 else f"it did not flush its file within {_DURABLE_TIMEOUT:g} s"
        if reply >= self.replicas:
            return ""
        return f"{reply} of {self.replicas} replicas confirmed within {_DURABLE_TIMEOUT:g} s"


MEMORY: Final = Durability()


@dataclass(slots=True, eq=False)
class Lane:
    """A connection for operations.

    Attributes:
        connection: The connection.
        written: Its `opened` at the last batch: a wait on another connection would not cover the batch.
        waiting: Whether a wait is under way.
        unsettled: Batches that the next wait covers.
    """

    connection: Connection
    written: int = 0
    waiting: bool = False
    unsettled: list[asyncio.Future[None]] = field(default_factory=list)


class StoreServer:
    """The connections to one server.

    Attributes:
        address: The server.
        commands: Connection for what is not an operation, so that long replies do not delay operations.
        bulk: Lane for operations that are large.
    """

    def __init__(self, address: Address, durability: Durability) -> None:
        self.address = address
        self._durability = durability
        self.commands = self._connection("orki-store")
        self.bulk = Lane(self._connection("orki-store-bulk"))
        names = [f"orki-store-operations-{number}" for number in range(_LANES if durability.waits else 1)]
        self._lanes = [Lane(self._connection(name)) for name in names]
        self._current = self._lanes[0]
        self._waits: set[asyncio.Task[None]] = set()
        self._calls: set[asyncio.Task[list[Reply]]] = set()
        self._hasty = False
        self._flushed = -1

    def _connection(self, name: str) -> Connection:
        return Connection(self.address, name=name, connect_timeout=_CONNECT_TIMEOUT, answer_timeout=_ANSWER_TIMEOUT)

    @property
    def _connections(self) -> list[Connection]:
        return [self.commands, self.bulk.connection, *(lane.connection for lane in self._lanes)]

    async def open(self, probes: Sequence[Command], *, starting: bool) -> None:
        """Open all connections anew, and check that the server accepts writes and can make them durable.

        Raises:
            StoreUnavailable: It does not answer, refuses writes, or cannot make them durable now.
            InvalidSetting: It can never make them durable; only with `starting`.
        """
        await self.abort()
        self._flushed = -1
        # A server that replies may still refuse writes. These need no memory.
        _raise_first(await self.commands.pipeline(*probes))
        for lane in (self.bulk, *self._lanes):
            await lane.connection.execute(("PING",))
        if self._durability.waits:
            try:
                await self._confirm(self.bulk.connection, self.bulk.connection.opened)
                self._hasty = self._durability.fsync and await self._is_hasty(self.bulk.connection)
            except LocalProtocolError as error:
                kind = InvalidSetting if starting else StoreUnavailable
                raise kind(
                    f"{error.message}; durability fsync needs appendonly, and Redis or Valkey 7.2 or newer"
                ) from error

    async def abort(self) -> None:
        """Close all connections at once. Waits under way fail."""
        for lane in (self.bulk, *self._lanes):
            _end(lane.unsettled, self.cut())
            lane.unsettled = []
        for each in self._connections:
            await each.abort()

    async def close(self) -> None:
        for wait in self._waits:
            wait.cancel()
        await asyncio.gather(*self._waits, return_exceptions=True)
        await self.abort()
        for each in self._connections:
            await each.close()

    def cut(self) -> StoreUnavailable:
        """Return the error for writes whose durability is unknown."""
        return StoreUnavailable(f"{self.address.shown} was lost before it confirmed that writes are durable")

    async def call(self, commands: Sequence[Command], *, may_open: bool) -> list[Reply]:
        """Send commands in one pipeline, only with `may_open` on a new connection. Raises as `Connection.pipeline`."""
        exchange = self.commands.pipeline(*commands, same=_same(self.commands, may_open))
        # A caller that is cancelled must not break the connection, which would look like a failure of the server.
        task = asyncio.get_running_loop().create_task(exchange, name="orki store command")
        self._calls.add(task)
        task.add_done_callback(self._called)
        return await asyncio.shield(task)

    def _called(self, task: asyncio.Task[list[Reply]]) -> None:
        self._calls.discard(task)
        if not task.cancelled():
            task.exception()

    async def operate(self, commands: Sequence[Command], *, bulk: bool) -> tuple[Lane, list[Reply]]:
        """Send script calls, and return the lane that `settle` needs. Raises as `Connection.pipeline`."""
        lane = self.bulk if bulk else self._current
        replies = await lane.connection.pipeline(*commands, same=_same(lane.connection, may_open=False))
        lane.written = lane.connection.opened
        return lane, replies

    # --- Durability. ---

    def settle(self, lane: Lane) -> asyncio.Future[None]:
        """Return a future that ends when all that the lane has written is durable, or with StoreUnavailable."""
        outcome: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        lane.unsettled.append(outcome)
        self._start_wait(lane)
        return outcome

    def _start_wait(self, lane: Lane) -> None:
        if lane.waiting or not lane.unsettled:
            return
        if lane is self._current:
            idle = next((each for each in self._lanes if each is not lane and not each.waiting), None)
            if idle is None:
                return
            self._current = idle
        lane.waiting = True
        covered, lane.unsettled = lane.unsettled, []
        task = asyncio.get_running_loop().create_task(self._wait(lane, covered), name="orki store durability")
        self._waits.add(task)
        task.add_done_callback(self._waits.discard)
        # A task that is cancelled before its first step never enters `_wait`.
        task.add_done_callback(lambda _: _end(covered, self.cut()))

    async def _wait(self, lane: Lane, covered: list[asyncio.Future[None]]) -> None:
        error: OrkiError | None = self.cut()
        try:
            await self._confirm(lane.connection, lane.written)
            error = None
        except OrkiError as failure:
            error = StoreUnavailable(failure.message)
        finally:
            lane.waiting = False
            _end(covered, error)
        self._start_wait(lane)
        self._start_wait(self._current)

    async def _confirm(self, connection: Connection, opened: int) -> None:
        limit = _DURABLE_TIMEOUT + _ANSWER_TIMEOUT
        (reply,) = await connection.pipeline(self._durability.command, timeout=limit, same=opened)
        if isinstance(reply, OrkiError):
            raise reply
        if shortage := self._durability.shortage(reply):
            raise StoreUnavailable(f"{self.address.shown} cannot make writes durable: {shortage}")
        if self._hasty:
            await self._see_flush(connection, opened)

    async def _is_hasty(self, connection: Connection) -> bool:
        """Whether the server may confirm writes before they are flushed.

        It does not if it holds a confirmation back while no flush is under way.
        """
        policy, *_ = await connection.pipeline(("CONFIG", "GET", "appendfsync"))
        if not isinstance(policy, OrkiError) and policy[1:] == [b"always"]:
            return False
        for _ in range(5):
            (before,) = await connection.pipeline(_STATISTICS)
            # A full server refuses the write, and is not trusted.
            (written,) = await connection.pipeline(("SET", FleetKeys.PROBE, "", "PX", 1))
            (confirmed,) = await connection.pipeline(("WAITAOF", 1, 0, 200))
            (after,) = await connection.pipeline(_STATISTICS)
            if any(isinstance(reply, OrkiError) for reply in (before, written, confirmed, after)):
                return True
            if confirmed[0] == 0 and _IDLE in before and _IDLE in after:
                return False
        return True

    async def _see_flush(self, connection: Connection, opened: int) -> None:
        """Wait until a flush that began after this call has ended, unless nothing was written since an earlier one.

        It began between an answer that shows none and one that shows one, or, as the server begins one each second,
        in the time in which none was seen.
        """
        loop = asyncio.get_running_loop()
        due, idle_since, began = loop.time() + _DURABLE_TIMEOUT, 0.0, False
        offset = -1
        while loop.time() < due:
            asked = loop.time()
            (text,) = await connection.pipeline(_STATISTICS, same=opened)
            if isinstance(text, OrkiError):
                raise text
            if offset < 0 and (found := _OFFSET.search(text)):
                offset = int(found[1])
                if offset <= self._flushed:
                    return
            if _IDLE not in text:
                began = began or idle_since > 0
                idle_since = 0.0
            elif began or (idle_since and asked - idle_since > _FLUSH_INTERVAL):
                self._flushed = max(self._flushed, offset)
                return
            else:
                idle_since = idle_since or loop.time()
            await asyncio.sleep(_SAMPLE_INTERVAL)
        raise StoreUnavailable(f"{self.address.shown} did not flush its file within {_DURABLE_TIMEOUT:g} s")


def _same(connection: Connection, may_open: bool) -> int | None:
    """Return the `opened` that a connection must keep.

    A server that closed a connection may be another one when it is back, so only the recovery opens it again.
    """
    return None if may_open or not connection.opened else connection.opened


def _raise_first(replies: Iterable[Reply]) -> None:
    for reply in replies:
        if isinstance(reply, OrkiError):
            raise reply


def _end(outcomes: Iterable[asyncio.Future[None]], error: OrkiError | None) -> None:
    for outcome in outcomes:
        if not outcome.done():
            if error is None:
                outcome.set_result(None)
            else:
                outcome.set_exception(type(error)(error.message))
