"""Reads the size of streams, and progress and losses of their groups: for metrics, tables and the doctor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orki_contract.model import Group, Retention, Stream
from orki_events.connection import Connection
from orki_events.entries import stream_keys, tagged_key
from orki_events.groups import checked
from orki_events.losses import GroupPosition, PartitionPosition, read_positions
from orki_events.registry import StreamVersion
from orki_events.tuning import effective_retention, read_tunings


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupStats:
    """Progress of a consumer group over all partitions.

    Attributes:
        missing: Whether the group is missing on a partition that exists in Redis.
        lag: Entries not delivered yet; None if nobody knows.
        pending: Entries delivered and not acknowledged.
        oldest_pending_ms: Age of the oldest pending entry; 0 without one.
        consumers: Consumers known to the server.
        dead_letters: Entries in the group's dead letter stream.
        ack_deadline: Time after which others may claim a pending entry, in seconds.
        lost: Entries that the group lost: trimmed or deleted before it settled them, or lost by the server.
        unseen_losses: How many of these no operator has acknowledged.
        unaccounted: Entries that the group received and whose outcome nobody knows.
        used_retention: How near retention is to trimming what the group has not read: 1 when it does.
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
    lost: int = 0
    unseen_losses: int = 0
    unaccounted: int = 0
    used_retention: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamStats:
    """Size of a stream over all partitions, and progress of its declared groups.

    Attributes:
        rolled_back: Entries that the server lost although it had accepted them.
        unseen_losses: How many of these no operator has acknowledged.
    """

    stream: str
    message: str
    partitions: int
    entries: int
    groups: tuple[GroupStats, ...]
    rolled_back: int = 0
    unseen_losses: int = 0


async def read_stream_stats(link: Connection, streams: Sequence[StreamVersion]) -> list[StreamStats]:
    """Read the statistics of streams, in their order. Takes few round trips for any number of streams."""
    contracts = [each.contract for each in streams]
    keys = [key for each in contracts for key in stream_keys(each)]
    if not keys:
        return []
    names = sorted({each.dead_letter(group) for each in contracts for group in each.groups})
    clock, *lengths = await link.pipeline((b"TIME",), *((b"XLEN", tagged_key("ev", name)) for name in names))
    seconds, micros = checked(clock)
    tunings = await read_tunings(link)
    positions = dict(zip(keys, await read_positions(link, keys), strict=True))
    reader = _StatsReader(
        now_ms=int(seconds) * 1000 + int(micros) // 1000,
        dead=dict(zip(names, map(checked, lengths), strict=True)),
        positions=positions,
    )
    return [reader.stream(each, effective_retention(each.retention, tunings.get(each.name))) for each in contracts]


@dataclass(frozen=True, slots=True, kw_only=True)
class _StatsReader:
    now_ms: int
    dead: Mapping[str, int]
    positions: Mapping[str, PartitionPosition]

    def stream(self, contract: Stream, retention: Retention) -> StreamStats:
        partitions = [self.positions[key] for key in stream_keys(contract)]
        return StreamStats(
            stream=contract.name,
            message=contract.message,
            partitions=contract.partitions,
            entries=sum(each.length for each in partitions),
            groups=tuple(self._group(contract, partitions, group, retention) for group in contract.groups),
            rolled_back=sum(each.rolled_back for each in partitions),
            unseen_losses=sum(max(each.rolled_back - each.acknowledged, 0) for each in partitions),
        )

    def _group(
        self, contract: Stream, partitions: Sequence[PartitionPosition], group: Group, retention: Retention
    ) -> GroupStats:
        found = [each.groups[group.name] for each in partitions if group.name in each.groups]
        lags = [each.lag for each in found]
        oldest = [self.now_ms - each.oldest_pending_ms for each in found if each.oldest_pending_ms]
        return GroupStats(
            stream=contract.name,
            group=group.name,
            missing=any(each.exists and group.name not in each.groups for each in partitions),
            lag=None if None in lags else sum(lag for lag in lags if lag is not None),
            pending=sum(each.pending for each in found),
            oldest_pending_ms=max(0, *oldest) if oldest else 0,
            consumers=sum(each.consumers for each in found),
            dead_letters=self.dead.get(contract.dead_letter(group), 0),
            ack_deadline=group.ack_deadline,
            lost=sum(each.lost for each in found),
            unseen_losses=sum(max(each.lost - each.acknowledged, 0) for each in found),
            unaccounted=sum(each.unaccounted for each in found),
            used_retention=max((self._used(each, retention) for each in found), default=0.0),
        )

    def _used(self, group: GroupPosition, retention: Retention) -> float:
        if not group.lag:
            return 0.0
        used = group.lag / retention.max_entries if retention.max_entries else 0.0
        if retention.max_age and group.read_ms:
            used = max(used, (self.now_ms - group.read_ms) / 1_000 / retention.max_age)
        return used
