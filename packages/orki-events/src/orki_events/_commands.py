"""What the delivery machine asks for, as Redis commands: each method does one of its commands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from orki.events.v1.envelope_pb2 import DeadLetter as DeadLetterRecord
from orki_contract.errors import EventsReadOnly, OrkiError
from orki_contract.model import Group, Stream
from orki_events import _delivery_table as moves
from orki_events.connection import Command, Connection, GroupMissing, Script
from orki_events.entries import REASON_FIELD, stream_keys, tagged_key
from orki_events.groups import groups_key, pairs
from orki_events.tuning import read_retention

HANDED_BACK: Final = "handed-back"
"""Owner of pending entries that a stopped consumer left for others; never a consumer itself."""

_MOST_IDS: Final = 2_000
_LONGEST_MESSAGE: Final = 1_000


@dataclass(frozen=True, slots=True)
class GroupMember:
    """Whose consumer it is.

    Attributes:
        stream: The stream.
        group: The group.
        consumer: The consumer's name, its own.
    """

    stream: Stream
    group: Group
    consumer: str


class CommandExecutor:
    """Speaks for one consumer."""

    def __init__(self, place: GroupMember, reads: Connection, commands: Connection, block_ms: int) -> None:
        """Args: reads: a connection for reads that wait; commands: one for everything else."""
        self._stream = place.stream
        self._group = place.group
        self._consumer = place.consumer
        self._reads = reads
        self._commands = commands
        self._block_ms = block_ms
        self._keys = {key.encode(): key for key in stream_keys(place.stream)}

    async def run(self, command: moves.ServerCommand) -> moves.Event:
        """Does one command and returns what to tell the machine.

        Raises:
            OrkiError: The server refuses for good.
        """
        try:
            match command:
                case moves.Read():
                    return await self.read(command)
                case moves.Ack():
                    return await self.ack(command)
                case moves.Claim():
                    return await self.claim(command)
                case moves.Renew():
                    return await self.renew(command)
                case moves.HandBack():
                    return await self.hand_back(command)
                case moves.DeadLetter():
                    return await self.dead_letter(command)
        except GroupMissing:
            return moves.GroupMissing(command)
        except OrkiError as error:
            if not error.retryable:
                raise
            if isinstance(error, EventsReadOnly):
                # Another server may be behind the name by now.
                await self._reads.drop()
                await self._commands.drop()
            return moves.Unanswered(command)

    async def read(self, command: moves.Read) -> moves.EntriesRead:
        """XREADGROUP; blocks for new entries only."""
        asked: list[bytes | str | int] = [b"XREADGROUP", b"GROUP", self._group.name, self._consumer]
        asked += [b"COUNT", command.count]
        if not command.history:
            asked += [b"BLOCK", self._block_ms]
        asked += [b"STREAMS", *(key for key, _ in command.places), *(place for _, place in command.places)]
        blocks = 0.0 if command.history else self._block_ms / 1_000
        reply = await self._reads.execute(asked, timeout=self._reads.answer_timeout + blocks)
        entries = {self._keys[key]: found for key, found in reply or ()}
        deliveries: dict[str, Mapping[bytes, int]] = {}
        if command.history:
            for key, found in entries.items():
                if found:
                    deliveries[key] = await self._deliveries(key, found)
        return moves.EntriesRead(command, entries, deliveries)

    async def claim(self, command: moves.Claim) -> moves.EntriesClaimed:
        """XAUTOCLAIM."""
        reply = await self._commands.execute(
            (
                b"XAUTOCLAIM",
                command.key,
                self._group.name,
                self._consumer,
                self._group.ack_deadline_ms,
                command.cursor,
                b"COUNT",
                command.count,
            )
        )
        entries = [entry for entry in reply[1] if entry is not None]
        deliveries = await self._deliveries(command.key, entries) if entries else {}
        if len(entries) < len(reply[1]):
            entries += await self._trimmed(command.key)
        return moves.EntriesClaimed(command, reply[0], entries, deliveries, reply[2] if len(reply) > 2 else ())

    async def ack(self, command: moves.Ack) -> moves.Acked:
        """XACK, and the group's counter."""
        counter = f"{command.outcome.value}:{self._group.name}"
        keys = (command.key.encode(), groups_key(command.key))
        count = await self._commands.run_script(
            ACKNOWLEDGE, keys, self._group.name, counter, command.extra, *command.entry_ids
        )
        return moves.Acked(command, count)

    async def renew(self, command: moves.Renew) -> moves.Renewed:
        """XCLAIM of what is still ours."""
        gone = await self._hold(command.key, command.entry_ids, self._consumer, 0, command.deliveries or -1)
        return moves.Renewed(command, gone)

    async def hand_back(self, command: moves.HandBack) -> moves.HandedBack:
        """XCLAIM for nobody, idle for so long that the next sweep of anybody takes it."""
        by_count: dict[int, list[bytes]] = {}
        for entry_id, made in command.deliveries.items():
            by_count.setdefault(made, []).append(entry_id)
        for made, entry_ids in by_count.items():
            await self._hold(command.key, entry_ids, HANDED_BACK, self._group.ack_deadline_ms, made)
        return moves.HandedBack(command)

    async def dead_letter(self, command: moves.DeadLetter) -> moves.DeadLettered:
        """XADD to the dead letter stream."""
        key = tagged_key("ev", self._stream.dead_letter(self._group))
        limit = (await read_retention(self._commands, self._stream)).max_entries
        writes: list[Command] = []
        for letter in command.letters:
            entry_id, fields = letter.entry
            record = DeadLetterRecord(
                stream=self._stream.name,
                key=command.key,
                entry_id=entry_id.decode(),
                group=self._group.name,
                deliveries=letter.deliveries,
                reason=letter.reason,
                message=letter.message[:_LONGEST_MESSAGE],
            ).SerializeToString()
            writes.append((b"XADD", key, b"MAXLEN", b"~", limit, b"*", *fields, REASON_FIELD, record))
        for reply in await self._commands.pipeline(*writes):
            if isinstance(reply, OrkiError):
                raise reply
        return moves.DeadLettered(command)

    async def unblock(self) -> None:
        """Ends a read that waits; the server answers it as if its time were over."""
        if (client := self._reads.known_client_id) is not None:
            await self._commands.execute((b"CLIENT", b"UNBLOCK", client))

    async def learn_client_id(self) -> None:
        """Asks for the number that `unblock` needs."""
        if self._reads.known_client_id is None:
            await self._reads.client_id()

    async def leave(self) -> None:
        """Removes this consumer from the group where it holds nothing."""
        for key in self._keys:
            await self._commands.run_script(REMOVE_CONSUMER, (key,), self._group.name, self._consumer)

    async def remove_idle(self, idle_ms: int) -> int:
        """Removes consumers that were silent for so long and hold nothing; returns how many."""
        removed = 0
        for key in self._keys:
            for each in map(pairs, await self._commands.execute((b"XINFO", b"CONSUMERS", key, self._group.name))):
                name = each["name"].decode()
                if each["idle"] >= idle_ms and not each["pending"] and name not in (self._consumer, HANDED_BACK):
                    removed += await self._commands.run_script(REMOVE_CONSUMER, (key,), self._group.name, name)
        return removed

    async def _hold(self, key: str, entry_ids: list[bytes], owner: str, idle_ms: int, deliveries: int) -> list[bytes]:
        gone: list[bytes] = []
        for start in range(0, len(entry_ids), _MOST_IDS):
            chosen = entry_ids[start : start + _MOST_IDS]
            whose = (self._group.name, self._consumer, owner)
            gone += await self._commands.run_script(HOLD, (key.encode(),), *whose, idle_ms, deliveries, *chosen)
        return gone

    async def _trimmed(self, key: str) -> list[moves.Entry]:
        """What we hold although it was trimmed: before Redis 7, a claim gives such an entry as a nil without its id."""
        pending = await self._commands.execute(
            (b"XPENDING", key, self._group.name, b"-", b"+", _MOST_IDS, self._consumer)
        )
        ids = [each[0] for each in pending]
        found = await self._commands.pipeline(*((b"XRANGE", key, entry_id, entry_id) for entry_id in ids))
        return [[entry_id, None] for entry_id, entry in zip(ids, found, strict=True) if entry == []]

    async def _deliveries(self, key: str, entries: list[Any]) -> dict[bytes, int]:
        """How often entries of ours were delivered."""
        found: dict[bytes, int] = {}
        start, last = entries[0][0], entries[-1][0]
        while True:
            reply = await self._commands.execute(
                (b"XPENDING", key, self._group.name, start, last, _MOST_IDS, self._consumer)
            )
            found.update((entry_id, made) for entry_id, _, _, made in reply)
            if len(reply) < _MOST_IDS:
                return found
            start = b"(" + reply[-1][0]


ACKNOWLEDGE: Final = Script("""\
-- KEYS: stream, counters.  ARGV: group, counter, entries lost without an id, entry ids ...
local acknowledged = 0
if #ARGV > 3 then
  acknowledged = redis.call('XACK', KEYS[1], ARGV[1], unpack(ARGV, 4))
end
-- Counting needs memory and acknowledging does not: out of memory, the second must go on without the first.
redis.pcall('HINCRBY', KEYS[2], ARGV[2], acknowledged + tonumber(ARGV[3]))
return acknowledged
""")

HOLD: Final = Script("""\
-- KEYS: stream.  ARGV: group, consumer, new consumer, idle milliseconds, deliveries or -1, entry ids ...
-- Touches or hands on what the consumer still holds, and returns what it does not: XCLAIM alone would take that from
-- its new owner.
local held, gone = {}, {}
for place = 6, #ARGV do
  local pending = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[place], ARGV[place], 1)
  if pending[1] and pending[1][2] == ARGV[2] then
    held[#held + 1] = ARGV[place]
  else
    gone[#gone + 1] = ARGV[place]
  end
end
if #held > 0 then
  held[#held + 1] = 'IDLE'
  held[#held + 1] = ARGV[4]
  if ARGV[5] ~= '-1' then
    held[#held + 1] = 'RETRYCOUNT'
    held[#held + 1] = ARGV[5]
  end
  held[#held + 1] = 'JUSTID'
  redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[3], 0, unpack(held))
end
return gone
""")

REMOVE_CONSUMER: Final = Script("""\
-- KEYS: stream.  ARGV: group, consumer.  Deleting a consumer drops what it holds, so only one with empty hands goes.
if #redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', 1, ARGV[2]) > 0 then
  return 0
end
redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], ARGV[2])
return 1
""")
