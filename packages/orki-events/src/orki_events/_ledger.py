"""The ledger: what was published, and what became of it in each group.

Definition. `published` is the number of distinct event ids in the stream, plus the entries that were trimmed from it
(`entries-added` less its length), each of which counts as one. For a group, each published event is exactly one of:

* `before_start`: it was in the stream before the group began;
* `unread`: no consumer of the group was given it;
* `pending`: it was given out, and is not acknowledged;
* `dead_lettered`: the group's dead letter stream names one of its entries;
* `declared_lost`: it was trimmed before the group had settled it;
* `processed`: it was acknowledged, and is none of these.

So `published` is their sum, always; where publishers have stopped and the group has drained, `unread` and `pending` are
0. While nothing was trimmed (`exact`), all of it is read off the stream itself, entry by entry, and nothing is assumed
of counters. Of trimmed entries the stream says no more: those that the group's counters claim are processed or
dead-lettered, and what no counter claims is declared lost.

A repeated event (the same id in several entries) counts once. Before Redis 7 the server does not say how many entries a
stream ever had, so there the ledger knows nothing of what was trimmed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from google.protobuf.message import DecodeError

from orki.events.v1.envelope_pb2 import DeadLetter
from orki_contract.errors import EventUndecodable, OrkiError
from orki_contract.model import Group, Stream
from orki_events.connection import Connection
from orki_events.entries import (
    REASON_FIELD,
    ZERO_ID,
    EntryId,
    decode_envelope,
    parse_id,
    split_entry,
    stream_keys,
    tagged_key,
)
from orki_events.groups import Mark, groups_key, pairs, parse_stream_state

_PAGE: Final = 1_000


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupLedger:
    """What became of the published events in one group; see the module for the terms."""

    processed: int
    dead_lettered: int
    declared_lost: int
    before_start: int = 0
    pending: int = 0
    unread: int = 0

    def dump(self) -> dict[str, int]:
        """For JSON; the last three only where they are not 0."""
        shown = {name: getattr(self, name) for name in ("processed", "dead_lettered", "declared_lost")}
        rest = {name: getattr(self, name) for name in ("before_start", "pending", "unread")}
        return shown | {name: value for name, value in rest.items() if value}


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamLedger:
    """The ledger of one stream.

    Attributes:
        stream: Its name.
        published: Distinct events.
        repeated: Entries beyond the first of an event: repetitions that readers drop.
        missing: Numbers absent from producers' sequences: events that were refused, given up or lost by the server.
            Only told where nothing was trimmed.
        trimmed: Entries that are no longer there.
        groups: By name.
    """

    stream: str
    published: int
    repeated: int
    missing: int
    trimmed: int
    groups: dict[str, GroupLedger]

    @property
    def exact(self) -> bool:
        """Whether every figure was read off the entries themselves."""
        return self.trimmed == 0

    def dump(self) -> dict[str, Any]:
        """For JSON: `published` and the groups."""
        return {"published": self.published, "groups": {name: each.dump() for name, each in self.groups.items()}}


@dataclass(slots=True)
class _Scan:
    """Entries of one partition, in order, with their events' ids."""

    key: str
    ids: list[tuple[EntryId, bytes]] = field(default_factory=list)
    trimmed: int = 0


@dataclass(slots=True)
class _GroupPlace:
    """Where a group is in one partition."""

    start: Mark
    delivered: EntryId
    pending: set[EntryId]
    counted: dict[str, int]


_RANK: Final = ("dead_lettered", "processed", "pending", "unread", "before_start")


async def read_ledger(link: Connection, stream: Stream) -> StreamLedger:
    """Reads the ledger of a stream.

    Raises:
        OrkiError: The server does not answer or refuses.
    """
    sequences: dict[str, set[int]] = {}
    scans = [await _scan(link, key, sequences) for key in stream_keys(stream)]
    seen = {event_id for scan in scans for _, event_id in scan.ids}
    trimmed = sum(scan.trimmed for scan in scans)
    entries = sum(len(scan.ids) for scan in scans)
    names = {group.name: group for group in stream.groups}
    for scan in scans:
        for name in await _group_names(link, scan.key):
            names.setdefault(name, Group(name=name))
    groups = {}
    for name, group in sorted(names.items()):
        groups[name] = await _group(link, stream, group, scans)
    return StreamLedger(
        stream=stream.name,
        published=len(seen) + trimmed,
        repeated=entries - len(seen),
        missing=0 if trimmed else sum(max(numbers) - len(numbers) for numbers in sequences.values()),
        trimmed=trimmed,
        groups=groups,
    )


async def _scan(link: Connection, key: str, sequences: dict[str, set[int]]) -> _Scan:
    scan = _Scan(key)
    async for entry_id, fields in _entries(link, key):
        try:
            envelope = decode_envelope(split_entry(fields)[0])
        except EventUndecodable:
            # It has no identity but its place.
            scan.ids.append((parse_id(entry_id), key.encode() + entry_id))
            continue
        scan.ids.append((parse_id(entry_id), envelope.event_id))
        sequences.setdefault(envelope.producer, set()).add(envelope.sequence)
    if await link.execute((b"EXISTS", key)):
        state = parse_stream_state(await link.execute((b"XINFO", b"STREAM", key)))
        scan.trimmed = state.added - state.length
    return scan


async def _entries(link: Connection, key: str) -> Any:
    start = b"-"
    while True:
        page = await link.execute((b"XRANGE", key, start, b"+", b"COUNT", _PAGE))
        for entry_id, fields in page:
            yield entry_id, fields
        if len(page) < _PAGE:
            return
        start = b"(" + page[-1][0]


async def _group_names(link: Connection, key: str) -> list[str]:
    if not await link.execute((b"EXISTS", key)):
        return []
    return [pairs(each)["name"].decode() for each in await link.execute((b"XINFO", b"GROUPS", key))]


async def _group(link: Connection, stream: Stream, group: Group, scans: list[_Scan]) -> GroupLedger:
    dead = await _dead(link, stream, group)
    ranks: dict[bytes, int] = {}
    gone = dict.fromkeys(("processed", "dead_lettered", "declared_lost", "before_start", "pending"), 0)
    for scan in scans:
        place = await _place(link, scan.key, group.name)
        letters = dead.get(scan.key, set())
        start = parse_id(place.start.entry_id)
        in_stream = dict.fromkeys(_RANK, 0)
        for entry_id, event_id in scan.ids:
            if entry_id in letters:
                rank = "dead_lettered"
            elif entry_id in place.pending:
                rank = "pending"
            elif entry_id > place.delivered:
                rank = "unread"
            elif entry_id <= start:
                rank = "before_start"
            else:
                rank = "processed"
            in_stream[rank] += 1
            ranks[event_id] = min(ranks.get(event_id, len(_RANK)), _RANK.index(rank))
        if scan.trimmed:
            present = {entry_id for entry_id, _ in scan.ids}
            _add_trimmed(gone, scan.trimmed, place, in_stream, (letters - present, place.pending - present))
    totals = {name: sum(1 for rank in ranks.values() if _RANK[rank] == name) for name in _RANK}
    return GroupLedger(
        processed=totals["processed"] + gone["processed"],
        dead_lettered=totals["dead_lettered"] + gone["dead_lettered"],
        declared_lost=gone["declared_lost"],
        before_start=totals["before_start"] + gone["before_start"],
        pending=totals["pending"] + gone["pending"],
        unread=totals["unread"],
    )


def _add_trimmed(
    gone: dict[str, int],
    trimmed: int,
    place: _GroupPlace,
    in_stream: dict[str, int],
    absent: tuple[set[EntryId], set[EntryId]],
) -> None:
    """Shares out the entries of a partition that the stream no longer has; what nothing claims is lost."""
    letters, pending = absent
    claims = {
        "before_start": place.start.added - in_stream["before_start"],
        "pending": len(pending),
        "dead_lettered": len(letters),
        "processed": place.counted["processed"] - in_stream["processed"],
    }
    left = trimmed
    for name, claim in claims.items():
        share = min(max(claim, 0), left)
        gone[name] += share
        left -= share
    gone["declared_lost"] += left


async def _place(link: Connection, key: str, group: str) -> _GroupPlace:
    known = pairs(await link.execute((b"HGETALL", groups_key(key))))
    counted = {name: int(known.get(f"{name}:{group}", 0)) for name in ("processed", "dead_lettered", "declared_lost")}
    start = Mark.parse(known.get(f"start:{group}")) or Mark(ZERO_ID, 0)
    place = _GroupPlace(start, parse_id(ZERO_ID), set(), counted)
    if group not in await _group_names(link, key):
        return place
    for each in map(pairs, await link.execute((b"XINFO", b"GROUPS", key))):
        if each["name"].decode() == group:
            place.delivered = parse_id(each["last-delivered-id"])
    first = b"-"
    while True:
        page = await link.execute((b"XPENDING", key, group, first, b"+", _PAGE))
        place.pending.update(parse_id(entry_id) for entry_id, _, _, _ in page)
        if len(page) < _PAGE:
            return place
        first = b"(" + page[-1][0]


async def _dead(link: Connection, stream: Stream, group: Group) -> dict[str, set[EntryId]]:
    """Entries that the group's dead letters name, by partition."""
    found: dict[str, set[EntryId]] = {}
    async for _, fields in _entries(link, tagged_key("ev", stream.dead_letter(group))):
        for name, value in _field_pairs(fields):
            if name == REASON_FIELD:
                try:
                    letter = DeadLetter.FromString(value)
                    if (letter.stream, letter.group) == (stream.name, group.name):
                        found.setdefault(letter.key, set()).add(parse_id(letter.entry_id))
                except (DecodeError, OrkiError):
                    continue
    return found


def _field_pairs(fields: list[bytes]) -> Iterable[tuple[bytes, bytes]]:
    return zip(fields[::2], fields[1::2], strict=False)
