"""Trimming: keeps streams and dead letters within their retention, also while nobody publishes.

Each process that uses a stream offers to trim it. A lease on the server (`orki:trimmer:STREAM`) chooses one of them; if
it dies, another one takes over within seconds. A trim is idempotent, so it does no harm if two processes trim at once.

A step removes at most some thousand entries, so that no step blocks the server. Whole nodes of a stream go first
(`XTRIM ~`); what is too old in the last node is removed exactly.

Where the policy keeps unread entries, trimming ends before the first entry that a declared group has not settled. A
declared group that the server does not have yet keeps every entry, unless it starts at the latest one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Final

from orki_contract.errors import EventsRefused, OrkiError
from orki_contract.model import Group, Overflow, Retention, Start, Stream, milliseconds
from orki_events._letters import letters_gap, trim_letters
from orki_events._options import Gap
from orki_events.connection import Command, Connection, Script
from orki_events.entries import EntryId, parse_id, stream_keys
from orki_events.groups import checked, pairs

_LEASE: Final = 4.0
_INTERVAL: Final = 1.0
_SHORTEST: Final = 0.1
_REFRESH: Final = 10.0
_STEP: Final = 10_000
_SAMPLES: Final = 20
_log = logging.getLogger("orki.events")

_TRIM_SETTLED: Final = Script("""\
-- KEYS: partition.  ARGV: number of entries to keep, id of the first entry to keep in any case.
-- Removes at most 1,000 of the oldest entries beyond the number, and returns how many.
local excess = math.min(redis.call('XLEN', KEYS[1]) - tonumber(ARGV[1]), 1000)
if excess <= 0 then return 0 end
local found = redis.call('XRANGE', KEYS[1], '-', '(' .. ARGV[2], 'COUNT', excess)
if #found == 0 then return 0 end
return redis.call('XTRIM', KEYS[1], 'MAXLEN', '=', redis.call('XLEN', KEYS[1]) - #found)
""")


async def trim_stream(connection: Connection, stream: Stream, retention: Retention, groups: Iterable[Group]) -> int:
    """Trim each partition of a stream to a retention, and return the number of removed entries.

    Args:
        connection: The server.
        stream: The stream.
        retention: The retention.
        groups: The declared groups, which matter where the policy keeps unread entries.
    """
    keys = stream_keys(stream)
    clock, *sizes = await connection.pipeline((b"TIME",), *(_size(key, retention) for key in keys))
    now_ms = int(checked(clock)[0]) * 1_000 + int(clock[1]) // 1_000
    oldest = max(now_ms - milliseconds(retention.max_age), 0) if retention.max_age else 0
    trimmed = 0
    for key, size in zip(keys, sizes, strict=True):
        entries = retention.max_entries
        if retention.max_bytes and checked(size):
            length = checked(await connection.execute((b"XLEN", key)))
            if size > retention.max_bytes:
                entries = min(entries, max(length * retention.max_bytes // size, 1))
        floor = None
        if retention.overflow is not Overflow.DROP_OLDEST:
            floor = await _floor(connection, key, groups)
        trimmed += await _trim(connection, key, entries, EntryId(oldest, 0), floor)
    return trimmed


def _size(key: str, retention: Retention) -> Command:
    """Return the command that tells the size of a partition, if that matters."""
    return (b"MEMORY", b"USAGE", key, b"SAMPLES", _SAMPLES) if retention.max_bytes else (b"PING",)


async def _trim(connection: Connection, key: str, entries: int, oldest: EntryId, floor: EntryId | None) -> int:
    trimmed = 0
    if floor is not None:
        oldest = min(oldest, floor)
    if oldest > EntryId(0, 0):
        trimmed += await _steps(connection, (b"XTRIM", key, b"MINID", b"~", str(oldest)))
        # Less than a node is left.
        trimmed += await connection.execute((b"XTRIM", key, b"MINID", str(oldest)))
    if floor is None:
        return trimmed + await _steps(connection, (b"XTRIM", key, b"MAXLEN", b"~", entries))
    while step := await connection.run_script(_TRIM_SETTLED, (key.encode(),), entries, str(floor)):
        trimmed += step
    return trimmed


async def _steps(connection: Connection, command: Command) -> int:
    trimmed = 0
    while step := await connection.execute((*command, b"LIMIT", _STEP)):
        trimmed += step
    return trimmed


async def _floor(connection: Connection, key: str, groups: Iterable[Group]) -> EntryId:
    """Return the first entry that a declared group has not settled."""
    (present,) = await connection.pipeline((b"XINFO", b"GROUPS", key))
    if isinstance(present, OrkiError):
        # There is no stream.
        return EntryId(0, 0)
    delivered = {each["name"].decode(): each["last-delivered-id"] for each in map(pairs, present)}
    floor = EntryId((1 << 64) - 1, 0)
    for group in groups:
        if group.name not in delivered:
            if group.start is Start.EARLIEST:
                return EntryId(0, 0)
            continue
        count, first, _, _ = await connection.execute((b"XPENDING", key, group.name))
        read = parse_id(delivered[group.name])
        floor = min(floor, parse_id(first) if count else EntryId(read.milliseconds, read.sequence + 1))
    return floor


@dataclass(slots=True)
class _Kept:
    """A stream that this process offers to trim.

    Attributes:
        stream: The stream with all declared groups.
        due: Time of the next look at it.
        leased_until: End of this process's lease, on its own clock.
        failure: The last failure, to report each once.
    """

    stream: Stream
    due: float = 0.0
    leased_until: float = 0.0
    failure: str = ""


class Trimmer:
    """Trims the streams that this process uses, as long as it has their leases."""

    def __init__(
        self,
        connection: Connection,
        owner: str,
        retention: Callable[[Connection, Stream], Any],
        declared: Callable[[Connection], Any],
        report: Callable[[Gap], None],
    ) -> None:
        """Create the trimmer, which starts with the first stream.

        Args:
            connection: The server.
            owner: Name of this process, for the leases.
            retention: Returns the current retention of a stream.
            declared: Returns the registered streams with all declared groups.
            report: Called with dead letters that were dropped.
        """
        self._connection = connection
        self._owner = owner
        self._retention = retention
        self._declared = declared
        self._report = report
        self._kept: dict[str, _Kept] = {}
        self._all = False
        self._closing = False
        self._refreshed = -_REFRESH
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def use(self, stream: Stream) -> None:
        """Offer to trim a stream."""
        if stream.name not in self._kept:
            self._kept[stream.name] = _Kept(stream)
            self._start()

    def use_all(self) -> None:
        """Offer to trim all registered streams."""
        self._all = True
        self._start()

    async def close(self) -> None:
        """Stop, and leave the streams to others."""
        if self._task is not None:
            # A step that is cut off would cost the connection, and with it the lease.
            self._closing = True
            self._wake.set()
            await asyncio.wait([self._task], timeout=_INTERVAL)
            self._task.cancel()
            await asyncio.wait([self._task])
        leased = [kept for kept in self._kept.values() if kept.leased_until]
        if leased:
            commands = ((b"DEL", _lease_key(kept.stream)) for kept in leased)
            # Another process waits for the end of the lease otherwise. Only an open connection is worth it.
            with contextlib.suppress(OrkiError):
                await self._connection.pipeline(*commands, timeout=_INTERVAL, same=self._connection.opened)
        await self._connection.close()

    def _start(self) -> None:
        self._wake.set()
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="orki-events-trimmer")

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._wake.clear()
            try:
                await self._refresh(loop.time())
                for kept in [each for each in self._kept.values() if each.due <= loop.time()]:
                    await self._attend(kept, loop)
            except OrkiError as error:
                _log.debug("the trimmer waits: %s", error.message)
            except Exception:
                _log.exception("internal error in the trimmer")
                await asyncio.sleep(_INTERVAL)
            if self._closing:
                return
            due = min((each.due for each in self._kept.values()), default=loop.time() + _INTERVAL)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(due - loop.time(), _SHORTEST / 2)):
                    await self._wake.wait()

    async def _refresh(self, now: float) -> None:
        """Read which groups are declared, and with `use_all` which streams there are."""
        keeps = any(each.stream.retention.ceiling for each in self._kept.values())
        if not (self._all or keeps) or now < self._refreshed + _REFRESH:
            return
        for version in await self._declared(self._connection):
            stream = version.contract
            kept = self._kept.get(stream.name)
            if kept is not None:
                groups = {each.name: each for each in (*stream.groups, *kept.stream.groups)}
                kept.stream = replace(kept.stream, groups=tuple(sorted(groups.values())))
            elif self._all:
                self._kept[stream.name] = _Kept(stream)
        self._refreshed = now

    async def _attend(self, kept: _Kept, loop: asyncio.AbstractEventLoop) -> None:
        """Trim a stream if this process has, or gets, its lease."""
        interval = _INTERVAL
        try:
            if await self._has_lease(kept, loop.time()):
                retention = await self._retention(self._connection, kept.stream)
                if retention.max_age:
                    interval = min(max(retention.max_age / 10, _SHORTEST), _INTERVAL)
                await trim_stream(self._connection, kept.stream, retention, kept.stream.groups)
                await self._trim_letters(kept.stream)
            kept.failure = ""
        except OrkiError as error:
            if kept.failure != error.message:
                kept.failure = error.message
                # A user of least privilege gets no lease: an orchestrator trims its streams.
                level = logging.DEBUG if isinstance(error, EventsRefused) and not kept.leased_until else logging.WARNING
                _log.log(level, 'stream "%s" cannot be trimmed now: %s', kept.stream.name, error.message)
            kept.leased_until = 0.0
            if error.retryable:
                raise
        finally:
            kept.due = loop.time() + interval * random.uniform(0.8, 1.0)

    async def _has_lease(self, kept: _Kept, now: float) -> bool:
        if now < kept.leased_until - _LEASE / 2:
            return True
        key, lasts = _lease_key(kept.stream), milliseconds(_LEASE)
        taken, holder = await self._connection.pipeline((b"SET", key, self._owner, b"NX", b"PX", lasts), (b"GET", key))
        kept.leased_until = 0.0
        if checked(holder) != self._owner.encode():
            return False
        if not checked(taken) and not await self._connection.execute((b"PEXPIRE", key, lasts)):
            return False
        kept.leased_until = now + _LEASE
        return True

    async def _trim_letters(self, stream: Stream) -> None:
        for group in stream.groups:
            if not group.max_dead_letter_age:
                continue
            (clock,) = await self._connection.pipeline((b"TIME",))
            now_ms = int(checked(clock)[0]) * 1_000 + int(clock[1]) // 1_000
            if dropped := await trim_letters(self._connection, stream, group, now_ms):
                self._report(letters_gap(stream, group, dropped))


def _lease_key(stream: Stream) -> str:
    return f"orki:trimmer:{stream.name}"
