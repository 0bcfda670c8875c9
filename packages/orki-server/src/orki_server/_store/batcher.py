"""The batches of operations, and the script that applies them.

Operations that arrive during one round trip are sent together in the next. A round trip carries one script call for
each shard that has operations. There is one round trip at a time, so operations apply in the order of their arrival.
Large operations and large responses are the exception: they have a connection and a queue of their own, with all later
operations of their tasks, and do not delay others.

The outcomes of requests and results are given when they are durable. The next batches do not wait for that.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from importlib.resources import files
from typing import Any, Final, TypeVar

from orki.errors.v1.errors_pb2 import Reason
from orki.events.v1.audit_orki import AUDIT
from orki.events.v1.task_orki import TASKS
from orki_contract.errors import DamagedRecord, LocalProtocolError, OrkiError, StoreUnavailable, UnknownTask
from orki_events.connection import Script, ScriptMissing
from orki_events.entries import stream_keys
from orki_server._keys import EPOCH_STEP, ShardKeys, lua_names
from orki_server._store.connection import StoreConnection
from orki_server._store.event_tags import lua_tags
from orki_server._store.lifecycle import TERMINAL, lua_moves
from orki_server._store.operations import MAX_OFFERS, Argument, Operation
from orki_server._store.replies import BULK_BYTES, TaskView
from orki_server._store.slices import script_for

R = TypeVar("R")

_BATCH_OPERATIONS: Final = 256
"""Maximum number of operations in one round trip; limits how long a script blocks the server."""
_BATCH_BYTES: Final = 8 << 20
_ACKNOWLEDGED: Final = frozenset(
    {"submit", "cancel", "direct", "succeed", "fail", "cancelled", "checkpoint", "suspend", "answer", "pause"}
    | {"charge", "open_budget", "over_budget", "raise_budget"}
)
"""Operations whose outcome must be durable."""
_WAITING: Final = 100_000
"""Maximum number of operations in memory."""
_PARTS: Final = (
    *("events", "placement", "batch", "budget", "life", "pause", "lanes", "wake", "operations", "suspension"),
    *("family", "dispatch"),
)
_REASONS: Final = (
    *("CANCELLED", "TOTAL_TIMEOUT", "OFFER_TIMEOUT", "ATTEMPT_TIMEOUT", "LEASE_EXPIRED", "STALLED", "ABANDONED"),
    "OVER_BUDGET",
)
_MAX_STEP: Final = 1_000
"""Longest step of the shard's clock between two batches (ms): twice the longest interval of the sweeper's batches."""
_SOON: Final = 500
"""Time within which a new timer is reported (ms): the longest interval of the sweeps."""
_GRACE: Final = 6_000
"""Time for agents to connect again after nobody could hear them (ms): a little more than their longest back-off."""
_MAX_ABANDONED: Final = 50
"""Number of abandoned attempts after which others count as failed."""
_CAPTURED: Final = 55
"""Maximum number of names that a part of the script takes from the parts before it. Lua allows 60 in a function."""
_EVENT_KEYS: Final = (*stream_keys(TASKS.contract), *stream_keys(AUDIT.contract))
_log = logging.getLogger("orki.server.store")


@dataclass(slots=True, eq=False)
class _Entry:
    operation: Operation[Any]
    size: int
    outcome: asyncio.Future[Any]


class Batcher:
    """Sends operations in batches.

    Attributes:
        damaged: Number of operations that were refused because a record is damaged.
        on_batch: Called before each batch is taken; operations that it enqueues may join the batch.
        on_timer: Called with a shard and the time until a new timer there, if that is soon.
        event_limits: Number of entries that the streams `tasks` and `audit` keep, if the scripts write their events.
    """

    def __init__(self, connection: StoreConnection, script: Script, shards: int, caller: str) -> None:
        self.damaged = 0
        self.on_batch: Callable[[], None] = _nothing
        self.on_timer: Callable[[int, float], None] = _nothing
        self.event_limits: tuple[int, int] | None = None
        self._connection = connection
        self._caller = caller
        self._script = script
        self._prefixes = [ShardKeys(shard).base for shard in range(shards)]
        self._waiting: deque[_Entry] = deque()
        self._wake = asyncio.Event()
        self._bulk: deque[_Entry] = deque()
        self._bulk_wake = asyncio.Event()
        # Number of operations of each task that wait in the bulk queue or are on their way from it.
        self._bulk_tasks: Counter[Argument] = Counter()
        self._tasks: list[asyncio.Task[None]] = []
        connection.on_change(self._connection_changed)

    def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._tasks = [
            loop.create_task(self._run(), name="orki store operations"),
            loop.create_task(self._run_bulk(), name="orki store bulk operations"),
        ]

    async def close(self) -> None:
        """Stop. Operations that still wait fail with StoreUnavailable."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._fail([*self._bulk, *self._waiting], StoreUnavailable("the orchestrator is stopping"))
        self._waiting.clear()
        self._bulk.clear()

    @property
    def waiting(self) -> int:
        return len(self._waiting) + len(self._bulk)

    def apply(self, operation: Operation[R]) -> asyncio.Future[R]:
        """Enqueue an operation. The future gets its outcome, or an error: DamagedRecord (a record cannot be read),
        StoreFull (the operation needs memory, and there is none) or LocalProtocolError (the script failed, a defect).

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
            self.on_batch()
            if batch := self._take():
                await self._send(batch)

    async def _run_bulk(self) -> None:
        while True:
            if not self._bulk:
                self._bulk_wake.clear()
                await self._bulk_wake.wait()
            await self._connection.up.wait()
            if not self._bulk:
                continue
            entry = self._bulk.popleft()
            await self._send([entry], bulk=True)
            self._leave_bulk([entry])

    def _leave_bulk(self, entries: Iterable[_Entry]) -> None:
        for entry in entries:
            task = entry.operation.arguments[0]
            self._bulk_tasks[task] -= 1
            if not self._bulk_tasks[task]:
                del self._bulk_tasks[task]

    def _take(self) -> list[_Entry]:
        batch: list[_Entry] = []
        size = 0
        while self._waiting and len(batch) < _BATCH_OPERATIONS and (size < _BATCH_BYTES or not batch):
            entry = self._waiting[0]
            if entry.size >= BULK_BYTES or (self._bulk_tasks and entry.operation.arguments[0] in self._bulk_tasks):
                if batch:
                    break  # Earlier operations of its task come first.
                self._put_in_bulk(self._waiting.popleft())
                continue
            batch.append(self._waiting.popleft())
            size += entry.size
        return batch

    def _put_in_bulk(self, entry: _Entry) -> None:
        self._bulk_tasks[entry.operation.arguments[0]] += 1
        self._bulk.append(entry)
        self._bulk_wake.set()

    async def _send(self, batch: list[_Entry], *, bulk: bool = False) -> None:
        try:
            await self._send_shards(batch, bulk)
        except OrkiError as error:
            self._return(batch, error)
        except Exception as error:
            _log.exception("a batch of operations failed: a defect; the next one follows")
            self._fail(batch, LocalProtocolError(f"a batch of operations failed: {type(error).__name__}"))

    async def _send_shards(self, batch: Iterable[_Entry], bulk: bool) -> None:
        shards: dict[int, list[_Entry]] = {}
        for entry in batch:
            shards.setdefault(entry.operation.shard, []).append(entry)
        commands = [self._command(shard, entries) for shard, entries in shards.items()]
        if bulk:
            await self._load(commands[0], script_for(self._script, _kinds(next(iter(shards.values())))))
        calls = await self._connection.operate(commands, bulk=bulk)
        if missing := [position for position, call in enumerate(calls) if isinstance(call.reply, ScriptMissing)]:
            # Only these are sent again: the others were applied. EVAL also loads the script.
            scripts = [script_for(self._script, _kinds(entries)) for entries in shards.values()]
            whole = [["EVAL", scripts[position].text, *commands[position][2:]] for position in missing]
            for position, call in zip(missing, await self._connection.operate(whole, bulk=bulk), strict=True):
                calls[position] = call
        for entries, call in zip(shards.values(), calls, strict=True):
            if isinstance(call.reply, OrkiError):
                self._return(entries, call.reply)
            else:
                if len(call.reply) > len(entries):
                    self.on_timer(entries[0].operation.shard, int(call.reply.pop()) / 1000)
                self._resolve(entries, call.reply, call.settle)

    async def _load(self, command: Sequence[Argument], script: Script) -> None:
        """Let the server load the script of a command without its operations, which would be sent twice."""
        empty = command[: 5 + int(command[2])]
        (call,) = await self._connection.operate([empty], bulk=True)
        if isinstance(call.reply, ScriptMissing):
            await self._connection.operate([["EVAL", script.text, *empty[2:]]], bulk=True)

    def _command(self, shard: int, entries: Sequence[_Entry]) -> list[Argument]:
        keys, limits = [self._prefixes[shard]], ""
        if self.event_limits:
            keys, limits = [*keys, *_EVENT_KEYS], "{},{}".format(*self.event_limits)
        script = script_for(self._script, _kinds(entries))
        command: list[Argument] = ["EVALSHA", script.digest, len(keys), *keys, self._caller, limits]
        for entry in entries:
            arguments = entry.operation.arguments
            command += (entry.operation.op, len(arguments), *arguments)
        return command

    def _resolve(
        self, entries: list[_Entry], replies: list[list[bytes]], settle: Callable[[], asyncio.Future[None]]
    ) -> None:
        unsettled: list[tuple[_Entry, Any]] = []
        for entry, reply in zip(entries, replies, strict=True):
            if reply and reply[0] == b"error":
                self._return([entry], self._error(entry.operation, reply[1].decode(errors="replace")))
            elif reply == [b"large"]:
                entry.operation = replace(entry.operation, arguments=entry.operation.arguments[:-1])
                self._put_in_bulk(entry)
            elif not entry.outcome.done():
                try:
                    outcome = entry.operation.outcome(reply)
                except (ValueError, KeyError, TypeError) as error:
                    self._fail([entry], self._damage(entry.operation, f"{type(error).__name__}: {error}"))
                    continue
                if self._connection.durability.waits and _must_be_durable(entry.operation, outcome):
                    unsettled.append((entry, outcome))
                else:
                    entry.outcome.set_result(outcome)
        if unsettled:
            settle().add_done_callback(partial(self._settled, unsettled))

    def _settled(self, unsettled: list[tuple[_Entry, Any]], settled: asyncio.Future[None]) -> None:
        error = settled.exception()
        if isinstance(error, OrkiError):
            self._return([entry for entry, _ in unsettled], self._connection.failed(error))
            self._wake.set()
            return
        for entry, outcome in unsettled:
            if not entry.outcome.done():
                entry.outcome.set_result(outcome)

    def _error(self, operation: Operation[Any], text: str) -> OrkiError:
        if "DAMAGED " in text or "WRONGTYPE " in text:
            return self._damage(operation, text)
        return self._connection.failed(self._connection.address.error(text))

    def _damage(self, operation: Operation[Any], text: str) -> DamagedRecord:
        self.damaged += 1
        shown = self._connection.address.shown
        error = DamagedRecord(f"{shown} has a damaged record on shard {operation.shard}: {text}")
        _log.error("%s was refused: %s", operation.op, error.message)
        return error

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
            # They are older than what waits for the same tasks.
            self._waiting.extendleft(reversed(self._bulk))
            self._leave_bulk(self._bulk)
            self._bulk.clear()
            impatient = [entry for entry in self._waiting if not entry.operation.patient]
            self._waiting = deque(entry for entry in self._waiting if entry.operation.patient)
            self._fail(impatient, self._connection.cause)
        self._wake.set()


def _kinds(entries: Iterable[_Entry]) -> set[str]:
    return {entry.operation.op for entry in entries}


def _nothing(*_: object) -> None:
    pass


def _must_be_durable(operation: Operation[Any], outcome: object) -> bool:
    """Whether an outcome waits for durability: acknowledgements do, and the end of a task that is read."""
    if isinstance(outcome, TaskView):
        return outcome.task.state in TERMINAL
    return operation.op in _ACKNOWLEDGED


@lru_cache
def shard_script(retention: float, channel: str = "") -> Script:
    """Return the script that applies a batch of operations to one shard.

    Names, legal moves and reasons are generated in front of the files in `lua/`.

    Args:
        retention: Time for which a finished task is kept.
        channel: Channel of the announcements.
    """
    constants = [f"local REASON_{name} = '{Reason.Value(f'REASON_{name}')}'" for name in _REASONS]
    limits = {"RETENTION": round(retention * 1000), "MAX_STEP": _MAX_STEP, "GRACE": _GRACE}
    limits |= {"MAX_OFFERS": MAX_OFFERS, "MAX_ABANDONED": _MAX_ABANDONED, "SOON": _SOON}
    constants += [f"local {name} = {value}" for name, value in limits.items()]
    constants.append(f"local CHANNEL = '{channel}'")
    # The first fence depends on the clock: a store that lost everything continues above the fences that it gave before.
    constants.append(f"local function first_fence(now) return string.format('%.0f', {EPOCH_STEP} + now) end\n")
    folder = files("orki_server._store") / "lua"
    written = [(folder / f"{part}.lua").read_text(encoding="utf-8") for part in _PARTS]
    head = "\n".join([lua_names(), lua_moves(), lua_tags(), *constants])
    words, names = [_words(part) for part in written], [_locals(part) for part in (head, *written)]
    parts = []
    for at, part in enumerate(written):
        shared = [name for name in names[at + 1] if any(name in other for other in words[at + 1 :])]
        needed = words[at].intersection(name for earlier in names[: at + 1] for name in earlier)
        parts.append(_enclosed(part, shared) if len(needed) <= _CAPTURED else part)
    return Script("\n".join([head, *parts]))


def _enclosed(part: str, shared: Sequence[str]) -> str:
    """Return a part of the script as a function of its own, with the functions that later parts call as its results.

    Lua searches all captured variables of a function when it makes a closure in it, so a script that is one function
    needs longer for its definitions than for a transition. A part that shares more than functions is returned as it is.
    """
    if any(f"\nlocal function {name}(" not in part for name in shared):
        return part
    names = ", ".join(shared)
    return f"local {names} = (function()\n{part}\nreturn {names}\nend)()\n" if shared else f"do\n{part}\nend\n"


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", re.sub(r"--[^\n]*", "", text)))


def _locals(text: str) -> list[str]:
    """Return the variables of a part that are not inside of its functions or blocks."""
    found = re.findall(r"^local (?:function (\w+)|([\w, ]+))", text, re.MULTILINE)
    return [name.strip() for function, names in found for name in (function or names).split(",")]
