"""What groups and streams have lost, and how far groups have come: for metrics, tables and the audit log.

A loss that positions show is included before anybody has declared it.
"""

from __future__ import annotations

__all__ = [
    "GroupPosition",
    "PartitionPosition",
    "RecordedGap",
    "acknowledge_losses",
    "read_gaps",
    "read_positions",
]

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from orki_contract.errors import OrkiError
from orki_contract.model import Stream
from orki_events._options import Gap, GapKind
from orki_events._position_store import SNAPSHOT, gaps_key, pairs, parse_snapshot, positions_key, snapshot_command
from orki_events._position_table import GroupState, Snapshot
from orki_events._positions import View, first_record, progress
from orki_events.connection import Command, Connection, ScriptMissing
from orki_events.entries import stream_keys
from orki_events.groups import checked

_PAGE: Final = 1_000


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupPosition:
    """How far a group has come in one partition.

    Attributes:
        lag: Entries that it has not received yet; None if neither orki nor the server knows.
        pending: Entries that it received and has not acknowledged.
        oldest_pending_ms: Server's time of the oldest of these, in milliseconds since the Unix epoch; 0 without one.
        consumers: Consumers that the server knows.
        lost: Entries that were trimmed or deleted before the group had settled them, or that the server lost.
        exact: Whether `lost` is exact; otherwise it is a lower bound.
        acknowledged: How many of `lost` an operator has acknowledged.
        read_ms: Server's time of the last entry that it received, in milliseconds since the Unix epoch.
        unaccounted: Entries that the group received and whose outcome nobody knows.
    """

    lag: int | None
    pending: int
    oldest_pending_ms: int
    consumers: int
    lost: int
    exact: bool
    acknowledged: int
    read_ms: int
    unaccounted: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionPosition:
    """The state of one partition.

    Attributes:
        exists: Whether the server has its key.
        length: Number of entries.
        added: Number of entries that it ever received; before Redis 7, a lower bound.
        rolled_back: Number of entries that the server lost although it had accepted them.
        acknowledged: How many of these an operator has acknowledged.
        groups: The groups that the server has, by name.
    """

    exists: bool
    length: int
    added: int
    rolled_back: int
    acknowledged: int
    groups: Mapping[str, GroupPosition]


async def read_positions(connection: Connection, keys: Sequence[str]) -> list[PartitionPosition]:
    """Return the state of partitions, by their Redis keys, in their order. Takes few round trips for any number.

    A key that holds something else than a stream counts as absent.

    Raises:
        OrkiError: The server does not answer or refuses.
    """
    found = await _snapshots(connection, [snapshot_command(key) for key in keys])
    unclear = {
        index: names
        for index, each in enumerate(found)
        if (names := [name for name, group in each.groups.items() if _is_unclear(View.of(each), group)])
    }
    again = [snapshot_command(keys[index], (), names) for index, names in unclear.items()]
    for index, each in zip(unclear, await _snapshots(connection, again), strict=True):
        found[index] = each
    return [_partition(View.of(each)) for each in found]


def _is_unclear(view: View, group: GroupState) -> bool:
    """Whether the entries around the group's position must be counted."""
    if view.snapshot.added is None and view.reach(group.read) is None:
        return True
    return progress(view, group) is None


async def _snapshots(connection: Connection, commands: Sequence[Command]) -> list[Snapshot]:
    if not commands:
        return []
    replies = await connection.pipeline(*commands)
    if any(isinstance(reply, ScriptMissing) for reply in replies):
        await connection.execute((b"SCRIPT", b"LOAD", SNAPSHOT.text))
        replies = await connection.pipeline(*commands)
    found = []
    for reply in replies:
        if isinstance(reply, OrkiError) and "WRONGTYPE" in reply.message:
            found.append(Snapshot(exists=False))
        else:
            found.append(parse_snapshot(checked(reply)))
    return found


async def acknowledge_losses(connection: Connection, stream: Stream) -> int:
    """Note that an operator knows of a stream's losses, and return the number of entries newly acknowledged."""
    fresh = 0
    keys = stream_keys(stream)
    for key, position in zip(keys, await read_positions(connection, keys), strict=True):
        values = {"acknowledged": position.rolled_back}
        fresh += max(position.rolled_back - position.acknowledged, 0)
        for name, group in position.groups.items():
            values[f"acknowledged:{name}"] = group.lost
            fresh += max(group.lost - group.acknowledged, 0)
        words = [word for item in values.items() for word in item]
        await connection.execute((b"HSET", positions_key(key), *words))
    return fresh


def _partition(view: View) -> PartitionPosition:
    snapshot = view.snapshot
    return PartitionPosition(
        exists=snapshot.exists,
        length=snapshot.length,
        added=view.added,
        rolled_back=view.rolled_back,
        acknowledged=snapshot.acknowledged,
        groups={name: _group(view, group) for name, group in snapshot.groups.items()},
    )


def _group(view: View, group: GroupState) -> GroupPosition:
    record = group.record or first_record(view, group)
    made = progress(view, group)
    reach = view.reach(group.read)
    unread = record.lost + (made.lost if made is not None else 0)
    rolled_back = max(view.rolled_back - group.base - record.kept, 0)
    unaccounted = 0
    if reach is not None and group.start is not None and view.exact:
        unaccounted = max(reach - group.start[1] - group.received - unread, 0)
    lag = group.lag
    if (counted := view.snapshot.counted.get(group.read)) is not None and counted.after is not None:
        lag = counted.after
    elif reach is not None or lag is None or lag > view.snapshot.length:
        lag = None if made is None else view.added - (made.reach if reach is None else reach)
    return GroupPosition(
        lag=lag,
        pending=group.pending,
        oldest_pending_ms=group.oldest[0] if group.oldest is not None else 0,
        consumers=group.consumers,
        lost=unread + group.declared_lost + rolled_back,
        exact=made is not None and made.exact,
        acknowledged=group.acknowledged,
        read_ms=group.read[0],
        unaccounted=unaccounted,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedGap:
    """A loss that was declared on the server.

    Attributes:
        gap_id: Its id in the partition's list of losses; the first part is the time of the declaration, in
            milliseconds since the Unix epoch.
        gap: The loss.
    """

    gap_id: str
    gap: Gap


async def read_gaps(
    connection: Connection, stream: Stream, after: Mapping[str, str] | None = None
) -> list[RecordedGap]:
    """Return the declared losses of a stream, oldest first in each partition. The server keeps the newest 1,000.

    Args:
        connection: The server.
        stream: The stream.
        after: For each partition's key, the gap id after which to begin.
    """
    found = []
    for key in stream_keys(stream):
        start = f"({after[key]}" if after and key in after else "-"
        while True:
            page = await connection.execute((b"XRANGE", gaps_key(key), start, b"+", b"COUNT", _PAGE))
            for gap_id, listed in page:
                values = {name: value.decode("utf-8", "replace") for name, value in pairs(listed).items()}
                # A newer version may know more kinds.
                with contextlib.suppress(ValueError, KeyError):
                    found.append(RecordedGap(gap_id=gap_id.decode(), gap=_gap(stream, key, values)))
            if len(page) < _PAGE:
                break
            start = f"({page[-1][0].decode()}"
    return found


def _gap(stream: Stream, key: str, values: dict[str, str]) -> Gap:
    count = values.get("count", "")
    return Gap(
        kind=GapKind(values["kind"]),
        stream=stream.name,
        group=values.get("group", ""),
        count=int(count) if count else None,
        possible=values.get("possible") == "1",
        message=values.get("message", ""),
        key=key,
        after=values.get("after", ""),
        until=values.get("until", ""),
    )
