"""What groups and streams have lost, and how far groups have come: for metrics, tables and the audit log.

Nothing here writes to the server. A loss that positions show is included before anybody has declared it.
"""

from __future__ import annotations

__all__ = ["GroupPosition", "PartitionPosition", "RecordedGap", "read_gaps", "read_positions"]

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from orki_contract.model import Stream
from orki_events._options import Gap, GapKind
from orki_events._position_store import gaps_key, pairs, parse_snapshot, snapshot_command, take_snapshot
from orki_events._position_table import GroupState
from orki_events._positions import View, first_record, progress
from orki_events.connection import Command, Connection
from orki_events.entries import stream_keys

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
        unaccounted: Entries that the group received and whose outcome nobody knows.
    """

    lag: int | None
    pending: int
    oldest_pending_ms: int
    consumers: int
    lost: int
    exact: bool
    unaccounted: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionPosition:
    """The state of one partition.

    Attributes:
        exists: Whether the server has its key.
        length: Number of entries.
        added: Number of entries that it ever received; before Redis 7, a lower bound.
        rolled_back: Number of entries that the server lost although it had accepted them.
        groups: The groups that the server has, by name.
    """

    exists: bool
    length: int
    added: int
    rolled_back: int
    groups: Mapping[str, GroupPosition]


async def read_positions(connection: Connection, keys: Sequence[str]) -> list[PartitionPosition]:
    """Return the state of partitions, by their Redis keys, in their order. Takes few round trips for any number.

    Raises:
        OrkiError: The server does not answer or refuses, or a key holds something else than a stream.
    """
    if not keys:
        return []
    # The first one loads the script if the server does not have it.
    found = [await take_snapshot(connection, keys[0])]
    commands = [snapshot_command(key) for key in keys[1:]]
    found += [parse_snapshot(reply) for reply in await _execute(connection, commands)]
    unclear = {
        index: names
        for index, each in enumerate(found)
        if (names := [name for name, group in each.groups.items() if progress(View.of(each), group) is None])
    }
    commands = [snapshot_command(keys[index], (), names) for index, names in unclear.items()]
    for index, reply in zip(unclear, await _execute(connection, commands), strict=True):
        found[index] = parse_snapshot(reply)
    return [_partition(View.of(each)) for each in found]


async def _execute(connection: Connection, commands: Sequence[Command]) -> list[list[object]]:
    replies = await connection.pipeline(*commands) if commands else []
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply
    return replies


def _partition(view: View) -> PartitionPosition:
    snapshot = view.snapshot
    return PartitionPosition(
        exists=snapshot.exists,
        length=snapshot.length,
        added=view.added,
        rolled_back=view.rolled_back,
        groups={name: _group(view, group) for name, group in snapshot.groups.items()},
    )


def _group(view: View, group: GroupState) -> GroupPosition:
    record = group.record or first_record(view, group)
    made = progress(view, group)
    reach = view.reach(group.read)
    unread = record.lost + (made.lost if made is not None else 0)
    rolled_back = max(view.rolled_back - group.base - record.kept, 0)
    unaccounted = 0
    if reach is not None and group.start is not None:
        unaccounted = max(reach - group.start[1] - group.received - unread, 0)
    lag = group.lag
    if reach is not None or lag is None or lag > view.snapshot.length:
        lag = None if made is None else view.added - (made.reach if reach is None else reach)
    return GroupPosition(
        lag=lag,
        pending=group.pending,
        oldest_pending_ms=group.oldest[0] if group.oldest is not None else 0,
        consumers=group.consumers,
        lost=unread + group.declared_lost + rolled_back,
        exact=made is not None and made.exact,
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
