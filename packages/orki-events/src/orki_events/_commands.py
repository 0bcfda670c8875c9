"""Executes the delivery machine's commands against Redis."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from orki.events.v1.envelope_pb2 import DeadLetter as DeadLetterRecord
from orki_contract.errors import EventsReadOnly, OrkiError
from orki_contract.model import Group, Stream, milliseconds
from orki_events import _delivery_table as table
from orki_events._letters import HANDED_BACK, write_letters
from orki_events.connection import Connection, GroupMissing, Script
from orki_events.entries import only_group, stream_keys, tagged_key
from orki_events.groups import groups_key, pairs

_MAX_IDS: Final = 2_000


@dataclass(frozen=True, slots=True)
class GroupMember:
    """A consumer's identity: stream, group and unique name."""

    stream: Stream
    group: Group
    consumer: str


class CommandExecutor:
    """Executes the commands of one consumer."""

    def __init__(self, member: GroupMember, reads: Connection, commands: Connection, block_timeout: float) -> None:
        """Use one connection for blocking reads, of at most `block_timeout` seconds, and one for everything else."""
        self._stream = member.stream
        self._group = member.group
        self._consumer = member.consumer
        self._reads = reads
        self._commands = commands
        self._block_timeout = block_timeout
        self._keys = {key.encode(): key for key in stream_keys(member.stream)}

    async def run(self, command: table.ServerCommand) -> table.Event:
        """Execute a command and return its result for the machine.

        Raises:
            OrkiError: The server refuses the command, and a retry cannot succeed.
        """
        try:
            match command:
                case table.Read():
                    return await self._read(command)
                case table.Ack():
                    return await self._ack(command)
                case table.Claim():
                    return await self._claim(command)
                case table.Renew():
                    return await self._renew(command)
                case table.HandBack():
                    return await self._hand_back(command)
                case table.DeadLetter():
                    return await self._dead_letter(command)
                case table.GiveUp():
                    await release_owner(self._commands, command.key, self._group.name, self._consumer)
                    return table.GivenUp(command)
        except GroupMissing:
            return table.GroupMissing(command)
        except OrkiError as error:
            if not error.retryable:
                raise
            if isinstance(error, EventsReadOnly):
                # After a failover, the name may resolve to another server.
                await self._reads.drop()
                await self._commands.drop()
            return table.no_reply(command)

    async def _read(self, command: table.Read) -> table.EntriesRead:
        block = 0.0 if command.history else self._block_timeout
        parts: list[bytes | str | int] = [b"XREADGROUP", b"GROUP", self._group.name, self._consumer]
        parts += [b"COUNT", command.count]
        if block:
            parts += [b"BLOCK", round(block * 1_000)]
        parts += [b"STREAMS", *(key for key, _ in command.positions), *(position for _, position in command.positions)]
        reply = await self._reads.execute(parts, timeout=self._reads.answer_timeout + block)
        entries = {self._keys[key]: await self._own(key, found) for key, found in reply or ()}
        if command.history and any(found and not entries[self._keys[key]] for key, found in reply or ()):
            # An empty page would end the history.
            return await self._read(command)
        deliveries: dict[str, Mapping[bytes, int]] = {}
        if command.history:
            for key, found in entries.items():
                if found:
                    deliveries[key] = await self._deliveries(key, found)
        return table.EntriesRead(command, entries, deliveries)

    async def _own(self, key: bytes, entries: list[Any]) -> list[Any]:
        """Return the entries that concern this group, and acknowledge those that a replay added for another one."""
        foreign = [entry for entry in entries if entry[1] and len(entry[1]) > 4 and self._is_foreign(entry[1])]
        if not foreign:
            return entries
        await self._ack(table.Ack(self._keys[key], [entry[0] for entry in foreign], table.Outcome.PROCESSED))
        return [entry for entry in entries if entry not in foreign]

    def _is_foreign(self, fields: list[bytes]) -> bool:
        return only_group(fields) not in ("", self._group.name)

    async def _claim(self, command: table.Claim) -> table.EntriesClaimed:
        key, deadline = command.key, milliseconds(self._group.ack_deadline)
        idle = 0 if command.takeover else deadline
        claim = (b"XAUTOCLAIM", key, self._group.name, self._consumer, idle, command.cursor)
        reply = await self._commands.execute((*claim, b"COUNT", command.count))
        entries = [entry for entry in reply[1] if entry is not None]
        deliveries = await self._deliveries(command.key, entries) if entries else {}
        entries = await self._own(command.key.encode(), entries)
        if len(entries) < len(reply[1]):
            entries += await self._trimmed(command.key)
        return table.EntriesClaimed(command, reply[0], entries, deliveries, reply[2] if len(reply) > 2 else ())

    async def _ack(self, command: table.Ack) -> table.Acked:
        counter = f"{command.outcome.value}:{self._group.name}"
        keys = (command.key.encode(), groups_key(command.key))
        lost = f"{table.Outcome.DECLARED_LOST.value}:{self._group.name}"
        settings = (self._group.name, counter, command.extra, lost, command.regained)
        count = await self._commands.run_script(ACKNOWLEDGE, keys, *settings, *command.entry_ids)
        return table.Acked(command, count)

    async def _renew(self, command: table.Renew) -> table.Renewed:
        lost, trimmed = await self._hold(command.key, command.entry_ids, self._consumer, 0, command.deliveries or -1)
        return table.Renewed(command, lost, trimmed)

    async def _hand_back(self, command: table.HandBack) -> table.HandedBack:
        """Return entries to the group with an idle time such that any consumer can claim them when the wait is over."""
        by_count: dict[int, list[bytes]] = {}
        for entry_id, made in command.deliveries.items():
            by_count.setdefault(made, []).append(entry_id)
        trimmed: list[bytes] = []
        for made, entry_ids in by_count.items():
            idle_ms = max(milliseconds(self._group.ack_deadline - command.wait), 0)
            trimmed += (await self._hold(command.key, entry_ids, HANDED_BACK, idle_ms, made))[1]
        return table.HandedBack(command, trimmed)

    async def _dead_letter(self, command: table.DeadLetter) -> table.DeadLettered:
        letters = []
        for letter in command.letters:
            entry_id, fields = letter.entry
            reason = DeadLetterRecord(
                stream=self._stream.name,
                key=command.key,
                entry_id=entry_id.decode(),
                group=self._group.name,
                deliveries=letter.deliveries,
                reason=letter.reason,
                message=letter.message,
            )
            letters.append((reason, fields))
        return table.DeadLettered(command, await write_letters(self._commands, self._stream, self._group, letters))

    async def unblock(self) -> None:
        """End a blocking read; the server replies as if `block_timeout` had elapsed."""
        if self._reads.client_id is not None:
            await self._commands.execute((b"CLIENT", b"UNBLOCK", self._reads.client_id))

    async def leave(self) -> None:
        for key in self._keys:
            await self._commands.run_script(REMOVE_CONSUMER, (key,), self._group.name, self._consumer)

    async def remove_idle(self, idle: float) -> None:
        """Remove consumers that were silent for `idle` seconds and have no pending entries."""
        for key in self._keys:
            for each in map(pairs, await self._commands.execute((b"XINFO", b"CONSUMERS", key, self._group.name))):
                name = each["name"].decode()
                unused = each["idle"] >= idle * 1_000 and not each["pending"]
                if unused and name not in (self._consumer, HANDED_BACK):
                    await self._commands.run_script(REMOVE_CONSUMER, (key,), self._group.name, name)

    async def _hold(
        self, key: str, entry_ids: list[bytes], owner: str, idle_ms: int, deliveries: int
    ) -> tuple[list[bytes], list[bytes]]:
        """Renew or transfer entries; return those of other consumers, and those that were trimmed."""
        lost: list[bytes] = []
        trimmed: list[bytes] = []
        for start in range(0, len(entry_ids), _MAX_IDS):
            chosen = entry_ids[start : start + _MAX_IDS]
            identity = (self._group.name, self._consumer, owner)
            reply = await self._commands.run_script(HOLD, (key.encode(),), *identity, idle_ms, deliveries, *chosen)
            lost += reply[0]
            trimmed += reply[1]
        return lost, trimmed

    async def _trimmed(self, key: str) -> list[table.Entry]:
        """Return held entries that were trimmed: before Redis 7, a claim returns them as nil, without their ids."""
        pending = await self._commands.execute(
            (b"XPENDING", key, self._group.name, b"-", b"+", _MAX_IDS, self._consumer)
        )
        ids = [each[0] for each in pending]
        found = await self._commands.pipeline(*((b"XRANGE", key, entry_id, entry_id) for entry_id in ids))
        return [[entry_id, None] for entry_id, entry in zip(ids, found, strict=True) if entry == []]

    async def _deliveries(self, key: str, entries: list[Any]) -> dict[bytes, int]:
        """Return how often each entry that this consumer holds was delivered, by entry id."""
        found: dict[bytes, int] = {}
        start, last = entries[0][0], entries[-1][0]
        while True:
            reply = await self._commands.execute(
                (b"XPENDING", key, self._group.name, start, last, _MAX_IDS, self._consumer)
            )
            found.update((entry_id, made) for entry_id, _, _, made in reply)
            if len(reply) < _MAX_IDS:
                return found
            start = b"(" + reply[-1][0]


def owner_key(key: str, group: str) -> bytes:
    """Return the key that names the owner of a partition in a group."""
    return f"{key.replace('orki:ev:', 'orki:owner:', 1)}:{group}".encode()


def members_key(stream: Stream, group: str) -> bytes:
    """Return the key of the consumers that share the partitions of a stream in a group."""
    return f"{tagged_key('members', stream.name)}:{group}".encode()


async def release_owner(connection: Connection, key: str, group: str, consumer: str) -> None:
    """End a consumer's ownership of a partition."""
    await connection.run_script(RELEASE, (owner_key(key, group),), consumer)


RELEASE: Final = Script("""\
-- KEYS: owner.  ARGV: consumer.
if redis.call('GET', KEYS[1]) == ARGV[1] then
  return redis.call('DEL', KEYS[1])
end
return 0
""")

ACKNOWLEDGE: Final = Script("""\
-- KEYS: stream, counters.
-- ARGV: group, counter, number of further entries, counter of lost entries, number to take from it, entry ids ...
local acknowledged = 0
if #ARGV > 5 then
  acknowledged = redis.call('XACK', KEYS[1], ARGV[1], unpack(ARGV, 6))
end
-- Counting needs memory and acknowledging does not: out of memory, acknowledging must go on without the counter.
redis.pcall('HINCRBY', KEYS[2], ARGV[2], acknowledged + tonumber(ARGV[3]))
if ARGV[5] ~= '0' then
  redis.pcall('HINCRBY', KEYS[2], ARGV[4], -tonumber(ARGV[5]))
end
return acknowledged
""")

HOLD: Final = Script("""\
-- KEYS: stream.  ARGV: group, consumer, new consumer, idle milliseconds, deliveries or -1, entry ids ...
-- Renews or transfers the entries that the consumer still holds, and returns those of other consumers, which XCLAIM
-- alone would take from them, and its own that were trimmed, which XCLAIM would drop from the pending entries.
-- An entry that is neither pending nor in the stream is in neither list: the consumer's copy is the last one.
local held, lost, trimmed = {}, {}, {}
for index = 6, #ARGV do
  local pending = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[index], ARGV[index], 1)
  local exists = #redis.call('XRANGE', KEYS[1], ARGV[index], ARGV[index]) > 0
  if pending[1] and pending[1][2] == ARGV[2] then
    local list = exists and held or trimmed
    list[#list + 1] = ARGV[index]
  elseif pending[1] or exists then
    lost[#lost + 1] = ARGV[index]
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
return {lost, trimmed}
""")

REMOVE_CONSUMER: Final = Script("""\
-- KEYS: stream.  ARGV: group, consumer.
-- Deleting a consumer drops its pending entries, so a consumer that holds entries is kept.
if #redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', 1, ARGV[2]) > 0 then
  return 0
end
redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], ARGV[2])
return 1
""")
