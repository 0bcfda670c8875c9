"""Reads and writes positions: one script takes a snapshot of a partition, another one writes records and losses.

A hash for each partition (`orki:positions:{STREAM}`) stores the partition's record (`stream`) and the record of each
group (`group:GROUP`). A stream (`orki:gaps:{STREAM}`) lists the newest declared losses.

Both are scripts: a snapshot must be of one instant, the bodies in the replies to XINFO and XRANGE must not leave the
server, and a record may only replace the one that it was compared with.
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from orki_contract.errors import OrkiError
from orki_contract.model import Stream
from orki_events import _position_table as position
from orki_events._options import Gap, GapKind
from orki_events._position_table import (
    Arrived,
    Change,
    Counted,
    Declared,
    Event,
    GroupRecord,
    GroupState,
    Id,
    Measure,
    Observed,
    Outdated,
    Reopened,
    Settled,
    Snapshot,
    State,
    StreamRecord,
    Tell,
    Unanswered,
    Write,
    Written,
    id_text,
)
from orki_events._positions import PositionMachine
from orki_events.connection import Command, Connection, Script
from orki_events.entries import parse_id

_MAX_COUNTED: Final = 50_000
_MAX_COUNTED_BYTES: Final = 16 << 20
_MAX_GAPS: Final = 1_000
_MAX_STEPS: Final = 12
_log = logging.getLogger("orki.events")


def groups_key(key: str) -> bytes:
    """Return the key of the hash with the settled positions and counters of a partition's groups."""
    return key.replace("orki:ev:", "orki:groups:", 1).encode()


def positions_key(key: str) -> bytes:
    """Return the key of the hash with a partition's records."""
    return key.replace("orki:ev:", "orki:positions:", 1).encode()


def gaps_key(key: str) -> bytes:
    """Return the key of the stream with a partition's declared losses."""
    return key.replace("orki:ev:", "orki:gaps:", 1).encode()


def pairs(reply: list[Any]) -> dict[str, Any]:
    """Convert a flat list of names and values to a dictionary."""
    return {name.decode(): value for name, value in zip(reply[::2], reply[1::2], strict=True)}


async def take_snapshot(
    connection: Connection, key: str, ids: Iterable[Id] = (), groups: Iterable[str] = (), server: str = ""
) -> Snapshot:
    """Return the state of a partition at one instant, with the entries counted around ids and groups' positions.

    Raises:
        OrkiError: The server does not answer or refuses, or the key holds something else than a stream.
    """
    keys, words = _snapshot_arguments(key, ids, groups)
    return parse_snapshot(await connection.run_script(SNAPSHOT, keys, *words), server)


def snapshot_command(key: str, ids: Iterable[Id] = (), groups: Iterable[str] = ()) -> Command:
    """Return the command of `take_snapshot`, which requires that the script is loaded."""
    keys, words = _snapshot_arguments(key, ids, groups)
    return (b"EVALSHA", SNAPSHOT.digest, len(keys), *keys, *words)


def _snapshot_arguments(key: str, ids: Iterable[Id], groups: Iterable[str]) -> tuple[list[bytes], list[str | int]]:
    keys = [key.encode(), groups_key(key), positions_key(key)]
    return keys, [_MAX_COUNTED, _MAX_COUNTED_BYTES, *map(id_text, ids), *(f"@{group}" for group in groups)]


def parse_snapshot(reply: list[Any], server: str = "") -> Snapshot:
    """Read the reply to `snapshot_command`."""
    exists, length, added, last, first, deleted, groups, pending, counts, counters, records = reply
    known, written = pairs(counters), pairs(records)
    found = {}
    for each, summary in zip(map(pairs, groups), pending, strict=True):
        name = each["name"].decode()
        found[name] = _group(name, each, summary, known, written)
    raw = written.get("stream")
    return Snapshot(
        exists=bool(exists),
        length=length,
        added=None if added < 0 else added,
        last=parse_id(last),
        first=parse_id(first),
        deleted=parse_id(deleted),
        server=server,
        groups=found,
        record=StreamRecord.parse(raw),
        raw=raw,
        counted={
            parse_id(each): Counted(None if upto < 0 else upto, None if after < 0 else after, parse_id(floor))
            for each, upto, after, floor in counts
        },
        acknowledged=int(written.get("acknowledged", 0)),
    )


def _group(
    name: str, each: dict[str, Any], summary: list[Any], known: dict[str, Any], written: dict[str, Any]
) -> GroupState:
    raw = written.get(f"group:{name}")
    start = known.get(f"start:{name}")
    begun = None
    if start:
        entry_id, _, unseen = start.decode().partition(" ")
        begun = (parse_id(entry_id), int(unseen or 0))
    return GroupState(
        read=parse_id(each["last-delivered-id"]),
        pending=each["pending"],
        oldest=parse_id(summary[1]) if summary and summary[1] else None,
        consumers=each["consumers"],
        lag=each.get("lag"),
        processed=int(known.get(f"processed:{name}", 0)),
        dead_lettered=int(known.get(f"dead_lettered:{name}", 0)),
        declared_lost=int(known.get(f"declared_lost:{name}", 0)),
        start=begun,
        base=int(known.get(f"rolled_back:{name}", 0)),
        cursor=known.get(f"cursor:{name}"),
        record=GroupRecord.parse(raw),
        raw=raw,
        acknowledged=int(written.get(f"acknowledged:{name}", 0)),
    )


def describe(stream: str, key: str, loss: Declared) -> Gap:
    """Return the report of a loss that positions have shown."""
    count = f"{loss.count}" if loss.exact else f"about {loss.count}"
    lost = f'{count} {"entry" if loss.count == 1 else "entries"} of stream "{stream}" ({key})'
    span = f"ids after {id_text(loss.after)} up to {id_text(loss.until)}"
    if loss.kind.value == GapKind.TRIMMED_UNREAD:
        text = f'{lost} were trimmed or deleted before group "{loss.group}" had read them ({span})'
    else:
        text = f"the server has lost {lost} that it had accepted, as by a restart with older files ({span})"
        if loss.group:
            text += f'; group "{loss.group}" had not settled them'
    return Gap(
        kind=GapKind(loss.kind.value),
        stream=stream,
        group=loss.group,
        count=loss.count,
        possible=not loss.exact,
        message=text,
        key=key,
        after=id_text(loss.after),
        until=id_text(loss.until),
    )


class Positions:
    """The positions that one process knows, for each partition and each of its groups."""

    def __init__(self, report: Callable[[Gap], None]) -> None:
        """Create the object; `report` is called for every loss that this process was not told about before."""
        self._report = report
        self._machines: dict[tuple[str, str], PositionMachine] = {}
        self._locks: dict[tuple[str, str], asyncio.Lock] = {}
        self._opened: weakref.WeakKeyDictionary[Connection, int] = weakref.WeakKeyDictionary()
        self._servers: weakref.WeakKeyDictionary[Connection, tuple[int, str]] = weakref.WeakKeyDictionary()
        self._told: dict[str, int] = {}
        # What is heard while a snapshot is on its way may be newer than the snapshot.
        self._heard: dict[tuple[str, str], list[Event]] = {}

    def arrived(self, connection: Connection, key: str, group: str, first: bytes, last: bytes, count: int) -> None:
        """Take note of entries that this process published (without a group) or received."""
        self._note(connection, key, group, Arrived(parse_id(first), parse_id(last), count))

    def published(self, connection: Connection, key: str, replies: Sequence[Any]) -> None:
        """Take note of the replies to this process's XADD commands."""
        if ids := [reply for reply in replies if type(reply) is bytes]:
            self.arrived(connection, key, "", ids[0], ids[-1], len(ids))

    def settled(self, connection: Connection, key: str, group: str, count: int) -> None:
        """Take note of entries that this process settled."""
        self._note(connection, key, group, Settled(count))

    def _note(self, connection: Connection, key: str, group: str, event: Event) -> None:
        if (machine := self._machines.get((key, group))) is None:
            return
        if self._opened.setdefault(connection, connection.opened) != connection.opened:
            self._opened[connection] = connection.opened
            # Any machine may have heard through this connection.
            for each in self._machines.values():
                if each.state is not State.COMPARING:
                    each.receive(Reopened())
        if (key, group) in self._heard:
            self._heard[key, group].append(event)
        else:
            machine.receive(event)

    async def compare(
        self, connection: Connection, stream: Stream, key: str, group: str, *, consumes: bool = False
    ) -> Snapshot:
        """Compare a group's position, or with an empty name the partition's, and declare and report what was lost.

        Returns the last snapshot. Nothing is compared while the server does not have the group.

        Raises:
            OrkiError: The server does not answer or refuses.
        """
        name = (key, group)
        machine = self._machines.setdefault(name, PositionMachine(group))
        if consumes:
            machine.consume()
        async with self._locks.setdefault(name, asyncio.Lock()):
            self._heard[name] = []
            try:
                return await self._run(connection, stream, key, machine)
            finally:
                if machine.state in (State.MEASURING, State.WRITING):
                    machine.receive(Unanswered())
                for event in self._heard.pop(name):
                    machine.receive(event)

    async def _run(self, connection: Connection, stream: Stream, key: str, machine: PositionMachine) -> Snapshot:
        snapshot = await self.snapshot(connection, key)
        for _ in range(_MAX_STEPS):
            if machine.group and machine.group not in snapshot.groups:
                break
            commands = machine.receive(Observed(snapshot))
            while commands:
                command, *rest = commands
                if isinstance(command, Measure):
                    await asyncio.sleep(command.pause)
                    around = (machine.group,) if command.position else ()
                    snapshot = await self.snapshot(connection, key, command.ids, around)
                    rest = machine.receive(Observed(snapshot)) if self._has(machine, snapshot) else []
                elif isinstance(command, Write):
                    rest += await self._write(connection, stream, key, command, machine)
                elif isinstance(command, Tell):
                    self._tell(stream, key, command)
                commands = rest
            if machine.state is State.FOLLOWING:
                break
            snapshot = await self.snapshot(connection, key)
        return snapshot

    @staticmethod
    def _has(machine: PositionMachine, snapshot: Snapshot) -> bool:
        if machine.group and machine.group not in snapshot.groups:
            machine.receive(Unanswered())
            return False
        return True

    async def snapshot(
        self, connection: Connection, key: str, ids: Iterable[Id] = (), groups: Iterable[str] = ()
    ) -> Snapshot:
        """Return the state of a partition, and the identity of the server that it is of."""
        wanted, names = tuple(ids), tuple(groups)
        while True:
            opened, server = self._servers.get(connection, (0, ""))
            if not opened or opened != connection.opened:
                replies = await connection.pipeline((b"INFO", b"server"), (b"INFO", b"replication"))
                server = _identity(replies)
                opened = connection.opened
                self._servers[connection] = (opened, server)
            found = await take_snapshot(connection, key, wanted, names, server)
            if connection.opened == opened:
                return found

    async def _write(
        self, connection: Connection, stream: Stream, key: str, command: Write, machine: PositionMachine
    ) -> list[position.Command]:
        gaps = [describe(stream.name, key, each) for each in command.losses]
        done = await write_records(connection, key, command.changes, gaps)
        return machine.receive(Written() if done else Outdated())

    def _tell(self, stream: Stream, key: str, command: Tell) -> None:
        for each in command.losses:
            if not each.group:
                # Several machines of this process may have seen the same loss of the partition.
                if each.total <= self._told.get(key, 0):
                    continue
                self._told[key] = each.total
            self._report(describe(stream.name, key, each))


async def write_records(connection: Connection, key: str, changes: Sequence[Change], gaps: Sequence[Gap]) -> bool:
    """Change fields if all have their expected values, and list losses; return whether it was done."""
    words: list[bytes | str | int] = [len(changes)]
    for each in changes:
        words += [1 if each.settled else 2, each.name, each.expected or b"", each.value]
    for gap in gaps:
        listed = {
            "kind": gap.kind.value,
            "group": gap.group,
            "count": "" if gap.count is None else str(gap.count),
            "possible": "1" if gap.possible else "0",
            "after": gap.after,
            "until": gap.until,
            "message": gap.message,
        }
        words.append(2 * len(listed))
        for name, value in listed.items():
            words += [name, value]
    keys = (groups_key(key), positions_key(key), gaps_key(key))
    return bool(await connection.run_script(WRITE, keys, _MAX_GAPS, *words))


def _identity(replies: Sequence[Any]) -> str:
    """Return the server's run id and replication id; empty if the user may not see them."""
    found = {}
    for reply in replies:
        if isinstance(reply, OrkiError):
            return ""
        for line in reply.decode("ascii", "replace").splitlines():
            name, _, value = line.partition(":")
            found[name] = value.strip()
    return f"{found.get('run_id', '')}/{found.get('master_replid', '')}"


SNAPSHOT: Final = Script("""\
-- KEYS: stream, counters, records.  ARGV: entries and bytes that may be counted, ids or @GROUPS to count around ...
local length, added, last, first, deleted = 0, 0, '0-0', '0-0', '0-0'
local groups, pending, counts, positions = {}, {}, {}, {}
local exists = redis.call('EXISTS', KEYS[1])

-- One step counts a page; a side is done at its end.
local function step(side)
  local page = redis.call('XRANGE', KEYS[1], side.first, side.last, 'COUNT', side.size)
  side.found = side.found + #page
  if #page < side.size then
    side.done = true
    return 0
  end
  local bytes = 0
  for _, entry in ipairs(page) do
    for _, value in ipairs(entry[2]) do
      bytes = bytes + #value
    end
  end
  side.first = '(' .. page[#page][1]
  side.size = math.min(side.size * 2, 1000)
  return bytes
end

local function count(id)
  local upto = {first = '-', last = id, found = 0, size = 10}
  local after = {first = '(' .. id, last = '+', found = 0, size = 10}
  local bytes = 0
  while not upto.done and not after.done do
    bytes = bytes + step(upto)
    if not upto.done then
      bytes = bytes + step(after)
    end
    if upto.found + after.found > tonumber(ARGV[1]) or bytes > tonumber(ARGV[2]) then
      break
    end
  end
  local floor = redis.call('XREVRANGE', KEYS[1], id, '-', 'COUNT', 1)
  return {id, upto.done and upto.found or -1, after.done and after.found or -1, floor[1] and floor[1][1] or '0-0'}
end

if exists == 1 then
  local info = redis.call('XINFO', 'STREAM', KEYS[1])
  added = -1
  for index = 1, #info, 2 do
    local name, value = info[index], info[index + 1]
    if name == 'length' then length = value end
    if name == 'entries-added' then added = value end
    if name == 'last-generated-id' then last = value end
    if name == 'max-deleted-entry-id' then deleted = value end
    if name == 'first-entry' and value then first = value[1] end
  end
  groups = redis.call('XINFO', 'GROUPS', KEYS[1])
  for number, group in ipairs(groups) do
    pending[number] = {}
    local name
    for index = 1, #group, 2 do
      if group[index] == 'name' then name = group[index + 1] end
      if group[index] == 'pending' and group[index + 1] > 0 then
        pending[number] = redis.call('XPENDING', KEYS[1], name)
      end
      if group[index] == 'last-delivered-id' then positions['@' .. name] = group[index + 1] end
    end
  end
end
for index = 3, #ARGV do
  local id = positions[ARGV[index]] or ARGV[index]
  if string.sub(id, 1, 1) ~= '@' then
    counts[#counts + 1] = count(id)
  end
end
local counters, records = redis.call('HGETALL', KEYS[2]), redis.call('HGETALL', KEYS[3])
return {exists, length, added, last, first, deleted, groups, pending, counts, counters, records}
""")

WRITE: Final = Script("""\
-- KEYS: counters, records, losses.  ARGV: number of losses kept, number of changes, changes ..., losses ...
-- A change: number of the key, field, expected value (empty if absent), value.  A loss: number of words, words ...
local changes = tonumber(ARGV[2])
for index = 3, 2 + 4 * changes, 4 do
  local value = redis.call('HGET', KEYS[tonumber(ARGV[index])], ARGV[index + 1]) or ''
  if value ~= ARGV[index + 2] then
    return 0
  end
end
-- A server without memory checks only the first write of a script, and deletions pass. Records are few and small, and
-- losses must become known then too.
redis.call('HDEL', KEYS[2], '')
for index = 3, 2 + 4 * changes, 4 do
  redis.call('HSET', KEYS[tonumber(ARGV[index])], ARGV[index + 1], ARGV[index + 3])
end
local index = 3 + 4 * changes
while index <= #ARGV do
  local words = tonumber(ARGV[index])
  redis.call('XADD', KEYS[3], 'MAXLEN', '~', ARGV[1], '*', unpack(ARGV, index + 1, index + words))
  index = index + words + 1
end
return 1
""")
