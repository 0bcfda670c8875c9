"""Consumer groups: created before their first use, and recreated at a saved position if the server lost them.

A hash for each partition (`orki:groups:{STREAM}`) stores for each group its start (`start:GROUP`, with the number of
entries that it never sees), the position up to which everything is settled (`cursor:GROUP`, with the number of entries
that the stream had ever received by then), and counters of settled entries. Each process also remembers the last
cursor that it saw, so that it notices a flush, which deletes the hash too.
"""

from __future__ import annotations

__all__ = [
    "ConsumerGroups",
    "Mark",
    "StreamState",
    "checked",
    "group_start",
    "groups_key",
    "pairs",
    "parse_stream_state",
]

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

from orki_contract.errors import OrkiError
from orki_contract.model import Group, Start, Stream
from orki_events import _delivery_table as table
from orki_events._options import Gap, GapKind
from orki_events._position_store import Positions, groups_key, pairs, positions_key, write_records
from orki_events._position_table import Snapshot, id_text
from orki_events._positions import View
from orki_events.connection import Connection, Reply, Script
from orki_events.entries import ZERO_ID, parse_id, stream_keys

_log = logging.getLogger("orki.events")


@dataclass(frozen=True, slots=True)
class Mark:
    """A position in a stream.

    Attributes:
        entry_id: Everything up to this entry is settled for the group.
        added: A number of entries; for a cursor, all that the stream had ever received.
    """

    entry_id: str
    added: int

    def text(self) -> str:
        """Return the value in the hash."""
        return f"{self.entry_id} {self.added}"

    @classmethod
    def parse(cls, text: bytes | None) -> Mark | None:
        """Read a value of the hash; None if it is absent."""
        if not text:
            return None
        entry_id, _, added = text.decode().partition(" ")
        return cls(entry_id, int(added or 0))


@dataclass(frozen=True, slots=True)
class StreamState:
    """The server's state of one partition.

    Attributes:
        length: Number of entries.
        added: Number of entries that it ever received; `length` before Redis 7, which does not count them.
        last_id: Id of the newest entry that it ever had.
        first_id: Id of its oldest entry; empty without one.
    """

    length: int = 0
    added: int = 0
    last_id: str = ZERO_ID
    first_id: str = ""


def group_start(group: Group, state: StreamState | None, mark: Mark | None, forgotten: bool) -> tuple[str, str | None]:
    """Return the start of a group that the server does not have.

    Args:
        group: The declared group.
        state: The partition; None if the key does not exist.
        mark: The saved position, from the server's hash or this process; None for a group that never existed.
        forgotten: Whether this process knows the group and the server's hash does not.

    Returns:
        The entry id to begin after, and a description of a possible loss: None for a new group, empty for no loss.
    """
    state = state or StreamState()
    if mark is None:
        return (ZERO_ID if group.start is Start.EARLIEST else state.last_id), None
    if forgotten:
        return ZERO_ID, "the server forgot the stream's records, as after a flush or a restart without its data"
    if parse_id(state.last_id) < parse_id(mark.entry_id) or state.added < mark.added:
        return ZERO_ID, "the server's stream is older than the group's position, so entries were lost"
    if state.added > state.length and state.first_id and parse_id(state.first_id) > parse_id(mark.entry_id):
        return mark.entry_id, "entries after the group's position were trimmed before it could read them"
    return mark.entry_id, ""


def parse_stream_state(reply: list[Any]) -> StreamState:
    """Read the reply to XINFO STREAM."""
    found = pairs(reply)
    first = found.get("first-entry")
    return StreamState(
        length=found["length"],
        added=found.get("entries-added", found["length"]),
        last_id=found["last-generated-id"].decode(),
        first_id=first[0].decode() if first else "",
    )


class ConsumerGroups:
    """Creates groups, saves their positions and reports losses.

    Methods raise an OrkiError if the server does not answer or refuses.
    """

    def __init__(self, report: Callable[[Gap], None]) -> None:
        """Create the object; `report` is called for every loss and every group that had to be recreated."""
        self._report = report
        self._marks: dict[tuple[str, str], Mark] = {}
        self.positions = Positions(report)

    async def ensure(
        self, connection: Connection, stream: Stream, groups: Iterable[Group], *, consumes: bool = False
    ) -> dict[str, str]:
        """Create missing groups on every partition, and return the id of each partition's newest entry before that.

        Losses that positions show are declared and reported; `consumes` tells that this process consumes the groups.
        """
        newest = {}
        wanted = tuple(groups)
        for key in stream_keys(stream):
            snapshot = await self.positions.compare(connection, stream, key, "")
            newest[key] = id_text(snapshot.last)
            missing = [group for group in wanted if group.name not in snapshot.groups]
            if missing:
                known = pairs(await connection.execute((b"HGETALL", groups_key(key))))
                for group in missing:
                    await self._create(connection, stream, key, group, (snapshot, known))
            for group in wanted:
                found = await self.positions.compare(connection, stream, key, group.name, consumes=consumes)
                if (mark := Mark.parse(found.groups[group.name].cursor)) is not None:
                    self._marks.setdefault((key, group.name), mark)
        return newest

    async def save(self, connection: Connection, stream: Stream, group: Group) -> None:
        """Save the position up to which the group has settled everything, on the server and in this process."""
        for key in stream_keys(stream):
            found = await self.positions.compare(connection, stream, key, group.name, consumes=True)
            if group.name in found.groups:
                mark = Mark(id_text(found.groups[group.name].settled), View.of(found).added)
                self._marks[key, group.name] = mark

    async def note(self, connection: Connection, stream: Stream, group: Group, event: table.Event) -> None:
        """Remember what a reply to this process's consumer shows about the group, and report what it has lost."""
        if isinstance(event, table.EntriesRead) and not event.command.history:
            for key, entries in event.entries.items():
                if entries:
                    self.positions.arrived(connection, key, group.name, entries[0][0], entries[-1][0], len(entries))
        elif isinstance(event, table.Acked):
            key = event.command.key
            self.positions.settled(connection, key, group.name, event.count)
            # Those in hand are not reported before they are dropped unhandled.
            lost = event.count + event.command.extra - event.command.kept
            if event.command.outcome is table.Outcome.DECLARED_LOST and lost > 0:
                lost_of = f'{lost} entries of stream "{stream.name}"'
                await self._declare(
                    connection,
                    Gap(
                        kind=GapKind.TRIMMED_WHILE_PENDING,
                        stream=stream.name,
                        group=group.name,
                        count=lost,
                        possible=False,
                        message=f'{lost_of} were trimmed before group "{group.name}" had settled them',
                        key=key,
                    ),
                )

    async def _declare(self, connection: Connection, gap: Gap) -> None:
        """Report a gap, and list it on the server if that is possible."""
        self._report(gap)
        try:
            await write_records(connection, gap.key, (), (gap,))
        except OrkiError as error:
            _log.info("a gap could not be listed on the server: %s", error.message)

    async def _create(
        self,
        connection: Connection,
        stream: Stream,
        key: str,
        group: Group,
        found: tuple[Snapshot, dict[str, Any]],
    ) -> None:
        snapshot, known = found
        view = View.of(snapshot)
        first = id_text(snapshot.first) if snapshot.length else ""
        state = StreamState(snapshot.length, view.added, id_text(snapshot.last), first) if snapshot.exists else None
        recorded = Mark.parse(known.get(f"cursor:{group.name}"))
        remembered = self._marks.get((key, group.name))
        forgotten = recorded is None and remembered is not None
        start, loss = group_start(group, state, recorded or remembered, forgotten)
        mark = Mark(start, view.added)
        # Entries that the group never sees: all those before it, or those that were trimmed before it.
        unseen = Mark(start, view.trimmed if start == ZERO_ID else view.added)
        # What the server had lost before does not concern a new group.
        base = view.rolled_back if loss is None else 0
        keys = (key.encode(), groups_key(key), positions_key(key))
        settings = (group.name, start, unseen.text(), mark.text(), 1 if loss and start == ZERO_ID else 0, base)
        if not await connection.run_script(CREATE, keys, *settings):
            return
        self._marks[key, group.name] = mark
        if loss is not None:
            await self._declare(connection, _recreated(stream, group, key, start, loss))


def _recreated(stream: Stream, group: Group, key: str, start: str, loss: str) -> Gap:
    event = f'group "{group.name}" of stream "{stream.name}" was missing on {key} and was recreated after {start}'
    return Gap(
        kind=GapKind.GROUP_RECREATED,
        stream=stream.name,
        group=group.name,
        count=None if loss else 0,
        possible=bool(loss),
        message=f"{event}: {loss}" if loss else f"{event}; nothing was lost",
        key=key,
    )


def checked(reply: Reply) -> Any:
    """Return a reply of a pipeline; raise it if it is an error."""
    if isinstance(reply, OrkiError):
        raise reply
    return reply


CREATE: Final = Script("""\
-- KEYS: stream, counters, records.
-- ARGV: group, start, start with entries never seen, cursor, whether it begins anew, entries lost before it.
local made = redis.pcall('XGROUP', 'CREATE', KEYS[1], ARGV[1], ARGV[2], 'MKSTREAM')
if made.err then
  if string.find(made.err, 'BUSYGROUP', 1, true) then
    return 0
  end
  return made
end
if ARGV[5] == '1' then
  for _, name in ipairs({'start', 'processed', 'dead_lettered', 'declared_lost'}) do
    redis.call('HDEL', KEYS[2], name .. ':' .. ARGV[1])
  end
  redis.call('HDEL', KEYS[3], 'group:' .. ARGV[1])
end
if ARGV[6] ~= '0' then
  redis.call('HSET', KEYS[2], 'rolled_back:' .. ARGV[1], ARGV[6])
end
redis.call('HSETNX', KEYS[2], 'start:' .. ARGV[1], ARGV[3])
redis.call('HSET', KEYS[2], 'cursor:' .. ARGV[1], ARGV[4])
return 1
""")
