"""The store: its connection, the batches of operations, and the checks that detect lost data.

Operations that arrive during one round trip are sent together in the next. A round trip carries one script call for
each shard that has operations. There is one round trip at a time, so operations apply in the order of their arrival.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Final, TypeVar

from orki.errors.v1.errors_pb2 import Reason
from orki_contract.backoff import Jitter, JitterOptions
from orki_contract.errors import InvalidSetting, OrkiError, StoreUnavailable, UnknownTask
from orki_control.session import AttemptKey
from orki_events.connection import Command, Connection, Reply, Script, ScriptMissing, parse_address
from orki_server._keys import EPOCH_STEP, LAYOUT_VERSION, FleetKeys, ShardKeys, lua_names
from orki_server._store.lifecycle import lua_moves
from orki_server._store.operations import Argument, OfferedAttempt, Operation, raise_epoch, shard_of

R = TypeVar("R")

_CONNECT_TIMEOUT: Final = 2.0
_ANSWER_TIMEOUT: Final = 5.0
_PROBES: Final = JitterOptions(initial=0.05, maximum=1.0)
_BATCH_OPERATIONS: Final = 256
"""Maximum number of operations in one round trip; limits how long a script blocks the server."""
_BATCH_BYTES: Final = 8 << 20
_WAITING: Final = 100_000
"""Maximum number of operations in memory."""
_REASONS: Final = ("CANCELLED", "TOTAL_TIMEOUT", "OFFER_TIMEOUT", "ATTEMPT_TIMEOUT", "LEASE_EXPIRED", "STALLED")


class StoreConnection:
    """The connection to the store's server, which is up or down.

    An error that is due to the server's state takes it down. A probe then tries until the server accepts a write.
    Meanwhile commands fail at once.

    Attributes:
        address: The server.
        up: Set while the server accepts commands.
        cause: The error that took the connection down last.
    """

    def __init__(self, url: str) -> None:
        """Create the connection without opening it.

        Raises:
            InvalidSetting: The URL is malformed.
        """
        self.address = parse_address(url, role="store")
        # Operations have a connection of their own, so that long replies of other commands do not delay them.
        self._operations, self._commands = (
            Connection(self.address, name=name, connect_timeout=_CONNECT_TIMEOUT, answer_timeout=_ANSWER_TIMEOUT)
            for name in ("orki-store-operations", "orki-store")
        )
        self.up = asyncio.Event()
        self.up.set()
        self.cause: OrkiError = StoreUnavailable(f"{self.address.shown} was not reached yet")
        self._probe: asyncio.Task[None] | None = None
        self._checks: list[Callable[[], Awaitable[None]]] = []
        self._listeners: list[Callable[[bool], None]] = []

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
        replies = await self._send(self._commands, commands, while_down)
        for reply in replies:
            if isinstance(reply, OrkiError):
                raise self.failed(reply)
        return replies

    async def operate(self, commands: Sequence[Command]) -> list[Reply]:
        """Send script calls in one round trip. An error reply is an OrkiError in its position.

        Raises:
            StoreUnavailable: No reply.
        """
        return await self._send(self._operations, commands)

    async def _send(self, connection: Connection, commands: Sequence[Command], while_down: bool = False) -> list[Reply]:
        if not self.up.is_set() and not while_down:
            raise self.cause
        try:
            return await connection.pipeline(*commands)
        except OrkiError as error:
            self.failed(error)
            raise

    def failed(self, error: OrkiError) -> OrkiError:
        """Take the connection down if the error is due to the server's state. Returns the error."""
        if isinstance(error, StoreUnavailable):
            self.cause = error
            if self.up.is_set():
                self.up.clear()
                self._notify(False)
                self._probe = asyncio.get_running_loop().create_task(self._recover(), name="orki store probe")
        return error

    def _notify(self, up: bool) -> None:
        for listener in self._listeners:
            listener(up)

    async def _recover(self) -> None:
        jitter = Jitter(_PROBES)
        while not self.up.is_set():
            await asyncio.sleep(jitter.failed())
            try:
                # A server that replies may still refuse writes.
                await self.call("HSET", FleetKeys.LAYOUT, "probe", "1", while_down=True)
                for check in self._checks:
                    await check()
            except OrkiError as error:
                self.cause = error
            else:
                self.up.set()
        self._notify(True)

    async def close(self) -> None:
        if self._probe:
            self._probe.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._probe
        await self._operations.close()
        await self._commands.close()
        # Closed sockets leave the event loop in its next iteration.
        await asyncio.sleep(0)


@dataclass(slots=True, eq=False)
class _Entry:
    operation: Operation[Any]
    size: int
    outcome: asyncio.Future[Any]


class Batcher:
    """Sends operations in batches."""

    def __init__(self, connection: StoreConnection, script: Script, shards: int) -> None:
        self._connection = connection
        self._script = script
        self._prefixes = [ShardKeys(shard).base for shard in range(shards)]
        self._waiting: deque[_Entry] = deque()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        connection.on_change(self._connection_changed)

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run(), name="orki store operations")

    async def close(self) -> None:
        """Stop. Operations that still wait fail with StoreUnavailable."""
        if self._task:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._fail(list(self._waiting), StoreUnavailable("the orchestrator is stopping"))
        self._waiting.clear()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def apply(self, operation: Operation[R]) -> asyncio.Future[R]:
        """Enqueue an operation. The future gets its outcome, or a LocalProtocolError: the script failed, a defect.

        Raises:
            UnknownTask: The store has no such shard.
            StoreUnavailable: The store is down and the operation is not patient, or too many operations wait. The
                future gets the same error if the store goes down; the operation may have been applied, and may be
                sent again.
        """
        if operation.shard >= len(self._prefixes):
            raise UnknownTask(f"there is no task {operation.arguments[0]!r}")
        if not self._connection.up.is_set() and not operation.patient:
            raise self._connection.cause
        if len(self._waiting) >= _WAITING:
            raise StoreUnavailable(f"{self._connection.address.shown} is too slow: {_WAITING} operations wait")
        size = sum(len(each) for each in operation.arguments if isinstance(each, bytes | str))
        outcome: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Entry(operation, size, outcome))
        self._wake.set()
        return outcome

    async def _run(self) -> None:
        while True:
            if not self._waiting:
                self._wake.clear()
                await self._wake.wait()
            await self._connection.up.wait()
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
        while self._waiting and len(batch) < _BATCH_OPERATIONS and (size < _BATCH_BYTES or not batch):
            batch.append(self._waiting.popleft())
            size += batch[-1].size
        return batch

    async def _send(self, batch: Iterable[_Entry]) -> None:
        shards: dict[int, list[_Entry]] = {}
        for entry in batch:
            shards.setdefault(entry.operation.shard, []).append(entry)
        commands = [self._command(shard, entries) for shard, entries in shards.items()]
        replies = await self._connection.operate(commands)
        if missing := [position for position, reply in enumerate(replies) if isinstance(reply, ScriptMissing)]:
            # Only these are sent again: the others were applied.
            load = ("SCRIPT", "LOAD", self._script.text)
            _, *again = await self._connection.operate([load, *(commands[position] for position in missing)])
            for position, reply in zip(missing, again, strict=True):
                replies[position] = reply
        for entries, reply in zip(shards.values(), replies, strict=True):
            if isinstance(reply, OrkiError):
                self._return(entries, self._connection.failed(reply))
            else:
                self._resolve(entries, reply)

    def _command(self, shard: int, entries: Iterable[_Entry]) -> list[Argument]:
        command: list[Argument] = ["EVALSHA", self._script.digest, 1, self._prefixes[shard]]
        for entry in entries:
            arguments = entry.operation.arguments
            command += (entry.operation.op, len(arguments), *arguments)
        return command

    def _resolve(self, entries: list[_Entry], replies: list[list[bytes]]) -> None:
        refused: list[_Entry] = []
        error: OrkiError | None = None
        for entry, reply in zip(entries, replies, strict=True):
            if reply and reply[0] == b"error":
                error = self._connection.failed(self._connection.address.error(reply[1].decode(errors="replace")))
                refused.append(entry)
            elif not entry.outcome.done():
                entry.outcome.set_result(entry.operation.outcome(reply))
        if error:
            self._return(refused, error)

    def _return(self, entries: list[_Entry], error: OrkiError) -> None:
        """Put patient operations back to the front if the store is down; fail the others."""
        down = isinstance(error, StoreUnavailable)
        self._fail([entry for entry in entries if not (down and entry.operation.patient)], error)
        kept = [entry for entry in entries if down and entry.operation.patient and not entry.outcome.cancelled()]
        self._waiting.extendleft(reversed(kept))

    @staticmethod
    def _fail(entries: Iterable[_Entry], error: OrkiError) -> None:
        for entry in entries:
            if not entry.outcome.done():
                entry.outcome.set_exception(type(error)(error.message))

    def _connection_changed(self, up: bool) -> None:
        if not up:
            impatient = [entry for entry in self._waiting if not entry.operation.patient]
            self._waiting = deque(entry for entry in self._waiting if entry.operation.patient)
            self._fail(impatient, self._connection.cause)
        self._wake.set()


def shard_script(retention: float) -> Script:
    """Return the script that applies a batch of operations to one shard.

    Names, legal moves and reasons are generated in front of the files in `lua/`.

    Args:
        retention: Time for which a finished task is kept.
    """
    constants = [f"local REASON_{name} = '{Reason.Value(f'REASON_{name}')}'" for name in _REASONS]
    constants.append(f"local RETENTION = {round(retention * 1000)}")
    # The first fence depends on the clock: a store that lost everything continues above the fences that it gave before.
    constants.append(f"local function first_fence(now) return string.format('%.0f', {EPOCH_STEP} + now) end\n")
    folder = files("orki_server._store") / "lua"
    written = [(folder / f"{part}.lua").read_text(encoding="utf-8") for part in ("task", "operations")]
    return Script("\n".join([lua_names(), lua_moves(), "\n".join(constants), *written]))


class Store:
    """Tasks in Redis.

    Attributes:
        connection: The connection, for commands that are not operations.
        shards: Number of shards.
        apply: Enqueues an operation; see `Batcher.apply`.
    """

    def __init__(self, url: str, *, shards: int = 8, retention: float = 3600.0) -> None:
        """Create the store without connecting.

        Args:
            url: URL of the server.
            shards: Number of shards; fixed when the store is first used.
            retention: Time for which finished tasks are kept.

        Raises:
            InvalidSetting: The URL is malformed.
        """
        self.shards = shards
        self.connection = StoreConnection(url)
        self._batcher = Batcher(self.connection, shard_script(retention), shards)
        self._generation = b""
        self._highest_fence: dict[int, int] = {}
        self._loss_listeners: list[Callable[[], None]] = []
        self.connection.on_recovery(self._check_generation)
        self.connection.on_change(self._connection_changed)
        self.apply = self._batcher.apply

    async def open(self) -> None:
        """Connect.

        Raises:
            StoreUnavailable: The server does not answer, or its state forbids writes.
            InvalidSetting: It holds a store of another layout.
        """
        await self._claim_layout()
        self._batcher.start()

    async def close(self) -> None:
        await self._batcher.close()
        await self.connection.close()

    @property
    def up(self) -> bool:
        """Whether the server replied last time."""
        return self.connection.up.is_set()

    @property
    def waiting(self) -> int:
        return self._batcher.waiting

    def on_loss(self, listener: Callable[[], None]) -> None:
        """Call `listener` when the store came back without its data: all of it, or its newest writes."""
        self._loss_listeners.append(listener)

    def offer(self, operation: Operation[list[OfferedAttempt]]) -> asyncio.Future[list[OfferedAttempt]]:
        """Apply an offer and remember its fences, to detect a store that forgets them. Raises as `apply`."""

        def remember(offered: asyncio.Future[list[OfferedAttempt]]) -> None:
            if not offered.cancelled() and offered.exception() is None:
                known = self._highest_fence.get(operation.shard, 0)
                fences = [each.attempt.fence for each in offered.result()]
                if fences:
                    self._highest_fence[operation.shard] = max(known, *fences)

        future = self.apply(operation)
        future.add_done_callback(remember)
        return future

    async def check_fence(self, attempt: AttemptKey) -> bool:
        """Check that the store knows a fence that an agent holds. If not, it has lost its newest writes.

        Its epoch is raised then, so that no fence repeats. Returns whether it was raised.

        Raises:
            UnknownTask: The attempt has a malformed task id.
        """
        shard = shard_of(attempt.task_id)
        if attempt.fence <= self._highest_fence.get(shard, 0):
            return False
        self._highest_fence[shard] = attempt.fence
        return await self.apply(raise_epoch(shard, attempt.fence))

    def _connection_changed(self, up: bool) -> None:
        if not up:
            # These operations are patient: they run first when the server is back, before any offer.
            for shard, seen in self._highest_fence.items():
                self.apply(raise_epoch(shard, seen)).add_done_callback(self._epoch_checked)

    def _epoch_checked(self, outcome: asyncio.Future[bool]) -> None:
        if not outcome.cancelled() and outcome.exception() is None and outcome.result():
            self._report_loss()

    async def _check_generation(self) -> None:
        if await self._claim_layout():
            self._report_loss()

    def _report_loss(self) -> None:
        for listener in self._loss_listeners:
            listener()

    async def _claim_layout(self) -> bool:
        """Write the layout, or compare it with ours. Returns whether the content is another one than at the last call.

        Raises:
            InvalidSetting: The store has another layout, or a damaged one.
            StoreUnavailable: The store is down.
        """
        ours = {"shards": self.shards, "version": LAYOUT_VERSION, "generation": os.urandom(8).hex()}
        for field, value in ours.items():
            await self.connection.call("HSETNX", FleetKeys.LAYOUT, field, value, while_down=True)
        reply = await self.connection.call("HMGET", FleetKeys.LAYOUT, *ours, while_down=True)
        generation = reply[2]
        shards, version = _layout_numbers(self.connection, *reply[:2])
        shown = self.connection.address.shown
        if version != LAYOUT_VERSION:
            raise InvalidSetting(
                f"{shown} has layout {version}, this orchestrator writes {LAYOUT_VERSION}; "
                "use orchestrators of one version, or another Redis database"
            )
        if shards != self.shards:
            raise InvalidSetting(
                f"{shown} has {shards} shards, this orchestrator is set to {self.shards}; "
                f"set shards to {shards}, or use another Redis database"
            )
        exchanged = self._generation not in (b"", generation)
        self._generation = generation
        return exchanged


def _layout_numbers(connection: StoreConnection, *values: bytes | None) -> list[int]:
    if not all(re.fullmatch(rb"[1-9][0-9]{0,3}", value or b"") for value in values):
        raise InvalidSetting(
            f"{connection.address.shown} has a damaged layout: its key {FleetKeys.LAYOUT} was changed by another "
            "program; restore the store from a backup, or use another Redis database"
        )
    return [int(value or b"") for value in values]


async def read_layout(connection: StoreConnection) -> int:
    """Return a store's number of shards; 0 if no orchestrator has used it yet.

    Raises:
        InvalidSetting: The store has the layout of another version, or a damaged one.
        StoreUnavailable: The store is down.
    """
    reply = await connection.call("HMGET", FleetKeys.LAYOUT, "shards", "version")
    if None in reply:  # an orchestrator writes the layout just now, or never did
        return 0
    shards, version = _layout_numbers(connection, *reply)
    if version != LAYOUT_VERSION:
        raise InvalidSetting(
            f"{connection.address.shown} has layout {version}, this command knows {LAYOUT_VERSION}; "
            "use the command of the orchestrator's version"
        )
    return shards
