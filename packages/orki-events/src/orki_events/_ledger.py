"""The ledger of a stream: how many events were published, and their outcome in each group.

`published` is the number of distinct event ids in the stream, plus the number of trimmed entries (`entries-added` less
the stream's length) and of entries that the server lost (`rolled_back`), each counted as one event. For a group, each
published event is exactly one of:

* `before_start`: it was in the stream before the group began;
* `unread`: no consumer of the group has received it;
* `pending`: a consumer received it and has not acknowledged it;
* `dead_lettered`: it failed as often as the group allows;
* `declared_lost`: somebody declared that the group lost it: it was trimmed before the group had read or settled it, or
  the server lost it;
* `processed`: it was acknowledged, and is none of the above.

Each figure is read or counted by itself. `unaccounted` is the rest: events whose outcome nobody knows. It is 0 unless a
consumer was removed with its pending entries, somebody changed the stream or its groups by hand, or orki has a bug.
Once publishers have stopped and the group has drained, `unread` and `pending` are 0. If nothing was trimmed or lost
(`exact`), every figure is read from the stream's entries. For other entries, the group's counters and positions tell.

A repeated event (the same id in several entries) counts once. Before Redis 7, the server does not know how many entries
a stream ever had, so figures about trimmed entries are lower bounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from google.protobuf.message import DecodeError

from orki.events.v1.envelope_pb2 import DeadLetter
from orki_contract.errors import EventUndecodable, OrkiError
from orki_contract.model import Group, Stream
from orki_events import entries as layout
from orki_events._letters import dropped_letters
from orki_events._position_store import parse_snapshot, snapshot_command, take_snapshot
from orki_events._position_table import ZERO, GroupState
from orki_events._positions import View, group_lost
from orki_events._readers import read_entries
from orki_events.connection import Connection
from orki_events.groups import checked

_PAGE: Final = 1_000
_ATTEMPTS: Final = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupLedger:
    """Outcome of the published events in one group; the module defines the terms."""

    processed: int
    dead_lettered: int
    declared_lost: int
    before_start: int = 0
    pending: int = 0
    unread: int = 0
    unaccounted: int = 0

    def dump(self) -> dict[str, int]:
        """Return the figures for JSON; the last four only if they are not 0."""
        shown = {name: getattr(self, name) for name in ("processed", "dead_lettered", "declared_lost")}
        rest = {name: getattr(self, name) for name in ("before_start", "pending", "unread", "unaccounted")}
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
        rolled_back: Number of entries that the server lost although it had accepted them, as far as it is known.
        groups: Ledgers of the groups, by name.
    """

    stream: str
    published: int
    repeated: int
    missing: int
    trimmed: int
    groups: dict[str, GroupLedger]
    rolled_back: int = 0

    @property
    def exact(self) -> bool:
        """Whether every figure was read from the entries."""
        return self.trimmed == self.rolled_back == 0

    def dump(self) -> dict[str, Any]:
        """Return `published` and the groups for JSON."""
        return {"published": self.published, "groups": {name: each.dump() for name, each in self.groups.items()}}


@dataclass(slots=True)
class _Scan:
    """A partition at one instant.

    Attributes:
        ids: Its entries, in order, with the ids of their events.
        pending: Ids of each group's pending entries.
    """

    key: str
    view: View
    ids: list[tuple[layout.EntryId, bytes]]
    pending: dict[str, set[layout.EntryId]]


_RANK: Final = ("dead_lettered", "processed", "pending", "unread", "before_start")
_NOTHING: Final = GroupState()


async def read_ledger(connection: Connection, stream: Stream) -> StreamLedger:
    sequences: dict[str, set[int]] = {}
    scans = [await _scan(connection, key, sequences) for key in layout.stream_keys(stream)]
    seen = {event_id for scan in scans for _, event_id in scan.ids}
    trimmed = sum(scan.view.trimmed for scan in scans)
    rolled_back = sum(scan.view.rolled_back for scan in scans)
    entries = sum(len(scan.ids) for scan in scans)
    declared = {group.name: group for group in stream.groups}
    for scan in scans:
        for name in scan.view.snapshot.groups:
            declared.setdefault(name, Group(name=name))
    published = len(seen) + trimmed + rolled_back
    return StreamLedger(
        stream=stream.name,
        published=published,
        repeated=entries - len(seen),
        missing=0 if trimmed else sum(max(numbers) - len(numbers) for numbers in sequences.values()),
        trimmed=trimmed,
        rolled_back=rolled_back,
        groups={
            name: await _group(connection, stream, group, scans, published) for name, group in sorted(declared.items())
        },
    )


async def _scan(connection: Connection, key: str, sequences: dict[str, set[int]]) -> _Scan:
    """Read the entries, and then state and pending entries at one instant; again while others change the stream."""
    ids: list[tuple[layout.EntryId, bytes]] = []
    pending: dict[str, set[layout.EntryId]] = {}
    snapshot = await take_snapshot(connection, key)
    for _ in range(_ATTEMPTS):
        async for entry_id, fields in read_entries(connection, key, str(ids[-1][0]) if ids else None):
            try:
                envelope = layout.decode_envelope(layout.split_entry(fields)[0])
            except EventUndecodable:
                # Without an envelope, its position identifies it.
                ids.append((layout.parse_id(entry_id), key.encode() + entry_id))
                continue
            ids.append((layout.parse_id(entry_id), envelope.event_id))
            sequences.setdefault(envelope.producer, set()).add(envelope.sequence)
        groups = snapshot.groups
        limits = {name: group.pending + _PAGE for name, group in groups.items()}
        commands = [(b"XPENDING", key, name, b"-", b"+", limit) for name, limit in limits.items()]
        state, *listed = await connection.transaction(snapshot_command(key, (), groups), *commands)
        snapshot = parse_snapshot(checked(state))
        pending = {
            name: {layout.parse_id(entry[0]) for entry in reply}
            for name, reply in zip(groups, listed, strict=True)
            if isinstance(reply, list)
        }
        ids = [each for each in ids if each[0] >= snapshot.first] if snapshot.length else []
        known = all(len(pending.get(name, ())) == group.pending for name, group in snapshot.groups.items())
        if known and len(ids) == snapshot.length:
            break
    return _Scan(key, View.of(snapshot), ids, pending)


async def _group(
    connection: Connection, stream: Stream, group: Group, scans: list[_Scan], published: int
) -> GroupLedger:
    # After the pending entries: a consumer writes the dead letter before it acknowledges the entry.
    dead = await _dead(connection, stream, group)
    ranks: dict[bytes, int] = {}
    figures = dict.fromkeys((*_RANK, "declared_lost"), 0)
    for scan in scans:
        letters = dead.get(scan.key, set())
        state = scan.view.snapshot.groups.get(group.name, _NOTHING)
        pending = scan.pending.get(group.name, set())
        start = state.start[0] if state.start is not None else ZERO
        in_stream = dict.fromkeys(_RANK, 0)
        for entry_id, event_id in scan.ids:
            if entry_id in letters:
                rank = "dead_lettered"
            elif entry_id in pending:
                rank = "pending"
            elif entry_id > state.read:
                rank = "unread"
            elif entry_id <= start:
                rank = "before_start"
            else:
                rank = "processed"
            in_stream[rank] += 1
            ranks[event_id] = min(ranks.get(event_id, len(_RANK)), _RANK.index(rank))
        present = {entry_id for entry_id, _ in scan.ids}
        absent = _absent(scan.view, state, in_stream, (letters - present, pending - present))
        for name, count in absent.items():
            figures[name] += count
    for lowest in ranks.values():
        figures[_RANK[lowest]] += 1
    # The counter of dead letters includes those that their retention has dropped.
    dropped = min(sum((await dropped_letters(connection, stream, group)).values()), figures["dead_lettered"])
    figures["dead_lettered"] -= dropped
    figures["declared_lost"] += dropped
    return GroupLedger(**figures, unaccounted=published - sum(figures.values()))


def _absent(
    view: View,
    state: GroupState,
    in_stream: dict[str, int],
    absent: tuple[set[layout.EntryId], set[layout.EntryId]],
) -> dict[str, int]:
    """Return the outcomes of a partition's entries that are not in it any more, as the group's counters tell."""
    letters, pending = absent
    kept = state.record.kept if state.record is not None else 0
    before_start = state.start[1] if state.start is not None else 0
    # Letters that were trimmed themselves are known by the counter alone.
    dead_lettered = max(state.dead_lettered - in_stream["dead_lettered"], len(letters))
    # Their entries may still be in the stream, where they look processed.
    hidden = min(max(in_stream["processed"] - state.processed, 0), dead_lettered - len(letters))
    # Entries that are not pending any more, although nobody acknowledged them.
    unknown = max(in_stream["processed"] - state.processed - hidden, 0)
    acknowledged = state.processed + state.dead_lettered - in_stream["processed"] - in_stream["dead_lettered"]
    found = {
        "before_start": max(before_start - in_stream["before_start"], 0),
        "pending": len(pending),
        "dead_lettered": dead_lettered,
        "processed": max(acknowledged, dead_lettered) - dead_lettered + kept - hidden - unknown,
        "declared_lost": group_lost(view, state) + state.declared_lost + max(view.rolled_back - state.base - kept, 0),
    }
    # Entries that the server lost before the group was created.
    found["before_start"] += min(state.base, view.rolled_back)
    # Entries that were delivered again after their acknowledgement, as by a recreated group, were counted twice.
    twice = sum(found.values()) - view.trimmed - view.rolled_back
    for name in ("processed", "dead_lettered"):
        taken = min(max(twice, 0), max(found[name], 0))
        found[name] -= taken
        twice -= taken
    return found


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
