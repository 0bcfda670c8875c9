"""Reads the size of streams and the progress of their consumer groups, for metrics, tables and the doctor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orki_contract.model import Group, Stream
from orki_events.connection import Command, Connection
from orki_events.entries import stream_keys, tagged_key
from orki_events.groups import checked, pairs
from orki_events.registry import StreamVersion


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupStats:
    """Progress of a consumer group over all partitions.

    Attributes:
        missing: Whether the group is missing on a partition that exists in Redis.
        lag: Entries not delivered yet; None if the server does not know.
        pending: Entries delivered and not acknowledged.
        oldest_pending_ms: Age of the oldest pending entry; 0 without one.
        consumers: Consumers known to the server.
        dead_letters: Entries in the group's dead letter stream.
        ack_deadline: Time after which others may claim a pending entry, in seconds.
    """

    stream: str
    group: str
    missing: bool
    lag: int | None
    pending: int
    oldest_pending_ms: int
    consumers: int
    dead_letters: int
    ack_deadline: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamStats:
    """Size of a stream over all partitions, and progress of its declared groups."""

    stream: str
    message: str
    partitions: int
    entries: int
    groups: tuple[GroupStats, ...]


async def read_stream_stats(link: Connection, streams: Sequence[StreamVersion]) -> list[StreamStats]:
    """Read the statistics of streams, in their order. Takes few round trips for any number of streams."""
    contracts = [each.contract for each in streams]
    keys = [key for each in contracts for key in stream_keys(each)]
    if not keys:
        return []
    (clock, *types) = await link.pipeline((b"TIME",), *((b"TYPE", key) for key in keys))
    seconds, micros = checked(clock)
    now_ms = int(seconds) * 1000 + int(micros) // 1000
    existing = [key for key, kind in zip(keys, types, strict=True) if checked(kind) == b"stream"]
    stats = _StatsReader(now_ms)
    await stats.read_streams(link, existing)
    await stats.read_pending(link, contracts)
    await stats.read_dead_letters(link, contracts)
    return [stats.stream(each) for each in contracts]


class _StatsReader:
    def __init__(self, now_ms: int) -> None:
        self._now_ms = now_ms
        self._entries: dict[str, int] = {}
        self._groups: dict[tuple[str, str], dict[str, Any]] = {}
        self._oldest: dict[tuple[str, str], int] = {}
        self._dead: dict[str, int] = {}

    async def read_streams(self, link: Connection, keys: list[str]) -> None:
        commands: list[Command] = [command for key in keys for command in ((b"XLEN", key), (b"XINFO", b"GROUPS", key))]
        replies = iter(await _execute(link, commands))
        for key in keys:
            self._entries[key] = next(replies)
            for found in map(pairs, next(replies)):
                self._groups[key, found["name"].decode()] = found

    async def read_pending(self, link: Connection, contracts: list[Stream]) -> None:
        wanted = [
            (key, group.name)
            for each in contracts
            for key in stream_keys(each)
            for group in each.groups
            if self._groups.get((key, group.name), {}).get("pending")
        ]
        replies = await _execute(link, [(b"XPENDING", key, group) for key, group in wanted])
        for key_group, reply in zip(wanted, replies, strict=True):
            if reply[1]:
                self._oldest[key_group] = max(0, self._now_ms - int(reply[1].partition(b"-")[0]))

    async def read_dead_letters(self, link: Connection, contracts: list[Stream]) -> None:
        names = sorted({each.dead_letter(group) for each in contracts for group in each.groups})
        replies = await _execute(link, [(b"XLEN", tagged_key("ev", name)) for name in names])
        self._dead = dict(zip(names, replies, strict=True))

    def stream(self, contract: Stream) -> StreamStats:
        keys = stream_keys(contract)
        return StreamStats(
            stream=contract.name,
            message=contract.message,
            partitions=contract.partitions,
            entries=sum(self._entries.get(key, 0) for key in keys),
            groups=tuple(self._group(contract, keys, group) for group in contract.groups),
        )

    def _group(self, contract: Stream, keys: Sequence[str], group: Group) -> GroupStats:
        found = [self._groups[key, group.name] for key in keys if (key, group.name) in self._groups]
        # `lag` is absent before Redis 7 and null where entries were deleted.
        lags = [each.get("lag") for each in found]
        return GroupStats(
            stream=contract.name,
            group=group.name,
            missing=any(key in self._entries and (key, group.name) not in self._groups for key in keys),
            lag=None if None in lags else sum(lag for lag in lags if lag is not None),
            pending=sum(each["pending"] for each in found),
            oldest_pending_ms=max((self._oldest.get((key, group.name), 0) for key in keys), default=0),
            consumers=sum(each["consumers"] for each in found),
            dead_letters=self._dead.get(contract.dead_letter(group), 0),
            ack_deadline=group.ack_deadline,
        )


async def _execute(link: Connection, commands: list[Command]) -> list[Any]:
    return [checked(reply) for reply in await link.pipeline(*commands)] if commands else []
