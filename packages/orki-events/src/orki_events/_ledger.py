"""The ledger of a stream: how many events were published, and their outcome in each group.

`published` is the number of distinct event ids in the stream, plus the number of trimmed entries (`entries-added` less
the stream's length), each counted as one event. For a group, each published event is exactly one of:

* `before_start`: it was in the stream before the group began;
* `unread`: no consumer of the group has received it;
* `pending`: a consumer received it and has not acknowledged it;
* `dead_lettered`: the group's dead letter stream names one of its entries;
* `declared_lost`: it was trimmed before the group had settled it;
* `processed`: it was acknowledged, and is none of the above.

`published` always equals their sum. Once publishers have stopped and the group has drained, `unread` and `pending` are
0. If nothing was trimmed (`exact`), every figure is read from the stream's entries. For trimmed entries, the group's
counters tell how many were processed or dead-lettered; the rest is declared lost.

A repeated event (the same id in several entries) counts once. Before Redis 7, the server does not know how many entries
a stream ever had, so the ledger cannot count trimmed entries.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from google.protobuf.message import DecodeError

from orki.events.v1.envelope_pb2 import DeadLetter
from orki_contract.errors import EventUndecodable, OrkiError
from orki_contract.model import Group, Stream
from orki_events import entries as layout
from orki_events._letters import dropped_letters
from orki_events._readers import read_entries
from orki_events.connection import Connection
from orki_events.groups import Mark, groups_key, pairs, parse_stream_state

_PAGE: Final = 1_000


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupLedger:
    """Outcome of the published events in one group; the module defines the terms."""

    processed: int
    dead_lettered: int
    declared_lost: int
    before_start: int = 0
    pending: int = 0
    unread: int = 0

    def dump(self) -> dict[str, int]:
        """Return the figures for JSON; the last three only if they are not 0."""
        shown = {name: getattr(self, name) for name in ("processed", "dead_lettered", "declared_lost")}
        rest = {name: getattr(self, name) for name in ("before_start", "pending", "unread")}
        return shown | {name: value for name, value in rest.items() if value}


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamLedger:
    """The ledger of one stream.

    Attributes:
        stream: Its name.
        published: Number of distinct events.
        repeated: Number of entries beyond the first one of an event; readers drop these repetitions.
        missing: Numbers absent from producers' sequences: events that were refused, abandoned or lost by the server.
            0 if entries were trimmed.
        trimmed: Number of entries that the stream does not have any more.
        groups: Ledgers of the groups, by name.
    """

    stream: str
    published: int
    repeated: int
    missing: int
    trimmed: int
    groups: dict[str, GroupLedger]

    @property
    def exact(self) -> bool:
        """Whether every figure was read from the entries."""
        return self.trimmed == 0

    def dump(self) -> dict[str, Any]:
        """Return `published` and the groups for JSON."""
        return {"published": self.published, "groups": {name: each.dump() for name, each in self.groups.items()}}


@dataclass(slots=True)
class _Scan:
    """Entries of one partition, in order, with the ids of their events."""

    key: str
    ids: list[tuple[layout.EntryId, bytes]] = field(default_factory=list)
    trimmed: int = 0


@dataclass(slots=True)
class _GroupProgress:
    """A group's state in one partition."""

    start: Mark
    delivered: layout.EntryId
    pending: set[layout.EntryId]
    counted: dict[str, int]


_RANK: Final = ("dead_lettered", "processed", "pending", "unread", "before_start")


async def read_ledger(connection: Connection, stream: Stream) -> StreamLedger:
    sequences: dict[str, set[int]] = {}
    scans = [await _scan(connection, key, sequences) for key in layout.stream_keys(stream)]
    seen = {event_id for scan in scans for _, event_id in scan.ids}
    trimmed = sum(scan.trimmed for scan in scans)
    entries = sum(len(scan.ids) for scan in scans)
    declared = {group.name: group for group in stream.groups}
    for scan in scans:
        for name in await _groups(connection, scan.key):
            declared.setdefault(name, Group(name=name))
    return StreamLedger(
        stream=stream.name,
        published=len(seen) + trimmed,
        repeated=entries - len(seen),
        missing=0 if trimmed else sum(max(numbers) - len(numbers) for numbers in sequences.values()),
        trimmed=trimmed,
        groups={name: await _group(connection, stream, group, scans) for name, group in sorted(declared.items())},
    )


async def _scan(connection: Connection, key: str, sequences: dict[str, set[int]]) -> _Scan:
    scan = _Scan(key)
    async for entry_id, fields in read_entries(connection, key):
        try:
            envelope = layout.decode_envelope(layout.split_entry(fields)[0])
        except EventUndecodable:
            # Without an envelope, its position identifies it.
            scan.ids.append((layout.parse_id(entry_id), key.encode() + entry_id))
            continue
        scan.ids.append((layout.parse_id(entry_id), envelope.event_id))
        sequences.setdefault(envelope.producer, set()).add(envelope.sequence)
    if await connection.execute((b"EXISTS", key)):
        state = parse_stream_state(await connection.execute((b"XINFO", b"STREAM", key)))
        scan.trimmed = state.added - state.length
    return scan


async def _groups(connection: Connection, key: str) -> dict[str, layout.EntryId]:
    if not await connection.execute((b"EXISTS", key)):
        return {}
    found = map(pairs, await connection.execute((b"XINFO", b"GROUPS", key)))
    return {each["name"].decode(): layout.parse_id(each["last-delivered-id"]) for each in found}


async def _group(connection: Connection, stream: Stream, group: Group, scans: list[_Scan]) -> GroupLedger:
    states = [await _progress(connection, scan.key, group.name) for scan in scans]
    # After the pending entries: a consumer writes the dead letter before it acknowledges the entry.
    dead = await _dead(connection, stream, group)
    ranks: dict[bytes, int] = {}
    trimmed_by_outcome = dict.fromkeys(("processed", "dead_lettered", "declared_lost", "before_start", "pending"), 0)
    for scan, progress in zip(scans, states, strict=True):
        letters = dead.get(scan.key, set())
        start = layout.parse_id(progress.start.entry_id)
        in_stream = dict.fromkeys(_RANK, 0)
        for entry_id, event_id in scan.ids:
            if entry_id in letters:
                rank = "dead_lettered"
            elif entry_id in progress.pending:
                rank = "pending"
            elif entry_id > progress.delivered:
                rank = "unread"
            elif entry_id <= start:
                rank = "before_start"
            else:
                rank = "processed"
            in_stream[rank] += 1
            ranks[event_id] = min(ranks.get(event_id, len(_RANK)), _RANK.index(rank))
        if scan.trimmed:
            present = {entry_id for entry_id, _ in scan.ids}
            _add_trimmed(
                trimmed_by_outcome, scan.trimmed, progress, in_stream, (letters - present, progress.pending - present)
            )
    totals = {name: sum(1 for rank in ranks.values() if _RANK[rank] == name) for name in _RANK}
    if not any(scan.trimmed for scan in scans):
        # Trimmed entries whose letters were dropped are among the rest, which is declared lost.
        dropped = sum((await dropped_letters(connection, stream, group)).values())
        totals["processed"] -= dropped
        trimmed_by_outcome["declared_lost"] += dropped
    return GroupLedger(
        processed=totals["processed"] + trimmed_by_outcome["processed"],
        dead_lettered=totals["dead_lettered"] + trimmed_by_outcome["dead_lettered"],
        declared_lost=trimmed_by_outcome["declared_lost"],
        before_start=totals["before_start"] + trimmed_by_outcome["before_start"],
        pending=totals["pending"] + trimmed_by_outcome["pending"],
        unread=totals["unread"],
    )


def _add_trimmed(
    trimmed_by_outcome: dict[str, int],
    trimmed: int,
    progress: _GroupProgress,
    in_stream: dict[str, int],
    absent: tuple[set[layout.EntryId], set[layout.EntryId]],
) -> None:
    """Distribute the trimmed entries of a partition by the group's counters; the rest is lost."""
    letters, pending = absent
    claims = {
        "before_start": progress.start.added - in_stream["before_start"],
        "pending": len(pending),
        "dead_lettered": len(letters),
        "processed": progress.counted["processed"] - in_stream["processed"],
    }
    left = trimmed
    for name, claim in claims.items():
        share = min(max(claim, 0), left)
        trimmed_by_outcome[name] += share
        left -= share
    trimmed_by_outcome["declared_lost"] += left


async def _progress(connection: Connection, key: str, group: str) -> _GroupProgress:
    known = pairs(await connection.execute((b"HGETALL", groups_key(key))))
    counted = {name: int(known.get(f"{name}:{group}", 0)) for name in ("processed", "dead_lettered", "declared_lost")}
    start = Mark.parse(known.get(f"start:{group}")) or Mark(layout.ZERO_ID, 0)
    delivered = (await _groups(connection, key)).get(group)
    progress = _GroupProgress(start, delivered or layout.parse_id(layout.ZERO_ID), set(), counted)
    if delivered is None:
        return progress
    first = b"-"
    while True:
        page = await connection.execute((b"XPENDING", key, group, first, b"+", _PAGE))
        progress.pending.update(layout.parse_id(entry_id) for entry_id, _, _, _ in page)
        if len(page) < _PAGE:
            return progress
        first = b"(" + page[-1][0]


async def _dead(connection: Connection, stream: Stream, group: Group) -> dict[str, set[layout.EntryId]]:
    found: dict[str, set[layout.EntryId]] = {}
    async for _, fields in read_entries(connection, layout.tagged_key("ev", stream.dead_letter(group))):
        for name, value in zip(fields[::2], fields[1::2], strict=False):
            if name == layout.REASON_FIELD:
                try:
                    letter = DeadLetter.FromString(value)
                    if (letter.stream, letter.group) == (stream.name, group.name):
                        found.setdefault(letter.key, set()).add(layout.parse_id(letter.entry_id))
                except (DecodeError, OrkiError):
                    continue
    return found
