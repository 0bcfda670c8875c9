"""Dead letters: events that a group gave up, in a stream of their own with its own retention.

A letter holds the whole event: its fields `e` and `d`, the reason `x`, and the origin `o` (group and partition). What
the retention drops is counted in the same step, for each origin, in the hash of the letters' stream
(`dropped:GROUP KEY`): the group has lost these events.

A replay delivers an event to its group and to no other. While the entry is in the stream, it becomes pending and
claimable again. If it was trimmed, a copy is added that names its only group in the field `g`; other groups
acknowledge it unread. A mark (`orki:replayed:…`) makes each letter replay once, whoever replays it and how often.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Generic, TypeVar

from google.protobuf.message import DecodeError

from orki.events.v1.envelope_pb2 import DeadLetter
from orki_contract.model import Group, Stream, milliseconds
from orki_events import entries as layout
from orki_events._options import Gap, GapKind
from orki_events.connection import Connection, Script
from orki_events.groups import groups_key, pairs

T = TypeVar("T")
HANDED_BACK: Final = "handed-back"
"""The consumer name that owns entries which a stopped consumer left for others; no process uses it."""
_MAX_MESSAGE: Final = 1_000
_REPLAY_MEMORY: Final = 30 * 86_400
"""Time in seconds for which a replayed letter is remembered."""
_MAX_DROPPED: Final = 1_000

_DROP: Final = """\
-- Drops the oldest letters beyond a number of letters, or up to an id, and counts them by origin.
local function drop(limit, oldest)
  local excess = math.min(redis.call('XLEN', KEYS[1]) - limit, 1000)
  local found = {}
  if excess > 0 then found = redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', excess) end
  if #found == 0 and oldest ~= '' then found = redis.call('XRANGE', KEYS[1], '-', '(' .. oldest, 'COUNT', 1000) end
  local dropped = {}
  for _, letter in ipairs(found) do
    local origin = ''
    for at = 1, #letter[2], 2 do
      if letter[2][at] == 'o' then origin = letter[2][at + 1] end
    end
    redis.call('HINCRBY', KEYS[2], 'dropped:' .. origin, 1)
    redis.call('XDEL', KEYS[1], letter[1])
    dropped[#dropped + 1] = origin
  end
  return dropped
end
"""
_WRITE: Final = Script(
    _DROP
    + """\
-- KEYS: letters, their hash.  ARGV: limit, then for each letter the number of its words and the words.
local at = 2
while at <= #ARGV do
  local count = tonumber(ARGV[at])
  redis.call('XADD', KEYS[1], '*', unpack(ARGV, at + 1, at + count))
  at = at + count + 1
end
return drop(tonumber(ARGV[1]), '')
"""
)
_TRIM: Final = Script(
    _DROP
    + """\
-- KEYS: letters, their hash.  ARGV: limit, id of the oldest letter to keep or "".
return drop(tonumber(ARGV[1]), ARGV[2])
"""
)
_REPLAY: Final = Script("""\
-- KEYS: partition, its hash, mark of the letter.
-- ARGV: group, consumer that gets the entry, entry id, idle milliseconds, seconds of the mark, fields e and d.
-- Returns 1, or 0 if the letter was replayed before. The mark comes first: it needs memory, as the copy does.
if not redis.call('SET', KEYS[3], '1', 'NX', 'EX', ARGV[5]) then
  return 0
end
local done, copied = nil, 0
if #redis.call('XRANGE', KEYS[1], ARGV[3], ARGV[3]) > 0 then
  done = redis.pcall('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[3], 'IDLE', ARGV[4], 'RETRYCOUNT', 0, 'FORCE',
    'JUSTID')
else
  copied = 1
  done = redis.pcall('XADD', KEYS[1], '*', 'e', ARGV[6], 'd', ARGV[7], 'g', ARGV[1])
end
if type(done) == 'table' and done.err then
  redis.call('DEL', KEYS[3])
  return done
end
redis.call('HINCRBY', KEYS[2], 'dead_lettered:' .. ARGV[1], -1)
-- The trimmed entry has been passed on: the copy is an entry of its own.
redis.call('HINCRBY', KEYS[2], 'processed:' .. ARGV[1], copied)
return 1
""")


@dataclass(frozen=True, slots=True)
class DeadLetterEntry(Generic[T]):
    """One dead letter.

    Attributes:
        letter_id: Id of its entry in the dead letter stream.
        reason: The origin of the event and the reason for the dead letter.
        event: The event; None if it cannot be decoded.
        envelope_bytes: The field `e`; empty if the entry had none.
        event_bytes: The field `d`; empty if the entry had none.
    """

    letter_id: str
    reason: DeadLetter
    event: T | None
    envelope_bytes: bytes = field(repr=False)
    event_bytes: bytes = field(repr=False)


def letters_key(stream: Stream, group: Group) -> str:
    """Return the key of the stream that holds a group's dead letters."""
    return layout.tagged_key("ev", stream.dead_letter(group))


async def write_letters(
    connection: Connection, stream: Stream, group: Group, letters: Iterable[tuple[DeadLetter, Sequence[Any]]]
) -> int:
    """Write dead letters, each with its reason and the fields of its entry.

    Returns:
        Number of letters of this group that the retention has dropped.
    """
    words: list[bytes | str | int] = [group.max_dead_letters]
    for reason, fields in letters:
        reason.message = reason.message[:_MAX_MESSAGE]
        origin = _origin(reason.group, reason.key)
        letter: list[bytes | str | int] = [
            *fields,
            layout.REASON_FIELD,
            reason.SerializeToString(),
            layout.ORIGIN_FIELD,
            origin,
        ]
        words += [len(letter), *letter]
    key = letters_key(stream, group)
    return _count(await connection.run_script(_WRITE, _keys(key), *words), group)


async def trim_letters(connection: Connection, stream: Stream, group: Group, now_ms: int) -> int:
    """Drop the letters beyond the group's retention. Returns their number, as far as they are of this group."""
    key, dropped = letters_key(stream, group), 0
    oldest = f"{max(now_ms - milliseconds(group.max_dead_letter_age), 0)}-0" if group.max_dead_letter_age else ""
    while True:
        found = await connection.run_script(_TRIM, _keys(key), group.max_dead_letters, oldest)
        dropped += _count(found, group)
        if len(found) < _MAX_DROPPED:
            return dropped


async def dropped_letters(connection: Connection, stream: Stream, group: Group) -> dict[str, int]:
    """Return how many letters of a group the retention has dropped, by key of the partition."""
    found = pairs(await connection.execute((b"HGETALL", groups_key(letters_key(stream, group)))))
    wanted = {f"dropped:{_origin(group.name, key)}": key for key in layout.stream_keys(stream)}
    return {wanted[name]: int(count) for name, count in found.items() if name in wanted}


async def list_dead_letters(
    connection: Connection, stream: Stream, group: Group, decode: Callable[[bytes], T], count: int, after: str
) -> list[DeadLetterEntry[T]]:
    found = []
    command = (b"XRANGE", letters_key(stream, group), f"({after}", b"+", b"COUNT", count)
    for letter_id, fields in await connection.execute(command):
        values = dict(zip(fields[::2], fields[1::2], strict=True))
        reason = read_reason(values.get(layout.REASON_FIELD, b""))
        if reason.group != group.name or reason.stream != stream.name:
            # Several groups may share one dead letter stream.
            continue
        raw = values.get(layout.DATA_FIELD)
        event: T | None = None
        if raw is not None:
            try:
                event = decode(raw)
            except DecodeError:
                event = None
        envelope = values.get(layout.ENVELOPE_FIELD, b"")
        found.append(DeadLetterEntry(letter_id.decode(), reason, event, envelope, raw or b""))
    return found


async def replay_dead_letters(
    connection: Connection, stream: Stream, group: Group, letters: Iterable[DeadLetterEntry[Any]]
) -> list[str]:
    """Make the group process events again, and return the ids of the letters that this call has replayed.

    A letter is deleted after its replay; a replay that a crash has cut off here only deletes it when it is repeated.
    """
    source, replayed = letters_key(stream, group), []
    for letter in letters:
        key = letter.reason.key
        if not await connection.execute((b"XRANGE", source, letter.letter_id, letter.letter_id)):
            continue
        mark = key.replace("orki:ev:", "orki:replayed:", 1) + f":{group.name}:{letter.letter_id}"
        claim = (group.name, HANDED_BACK, letter.reason.entry_id, milliseconds(group.ack_deadline), _REPLAY_MEMORY)
        done = await connection.run_script(
            _REPLAY, (key.encode(), groups_key(key), mark.encode()), *claim, letter.envelope_bytes, letter.event_bytes
        )
        await connection.execute((b"XDEL", source, letter.letter_id))
        if done:
            replayed.append(letter.letter_id)
    return replayed


def letters_gap(stream: Stream, group: Group, count: int) -> Gap:
    """Return the report of letters that their retention has dropped."""
    message = f'{count} dead letters of group "{group.name}" of stream "{stream.name}" were dropped by their retention'
    kind = GapKind.LETTERS_DROPPED
    return Gap(kind=kind, stream=stream.name, group=group.name, count=count, possible=False, message=message)


def read_reason(raw: bytes) -> DeadLetter:
    """Return the reason of a letter; an empty one if it cannot be read."""
    try:
        return DeadLetter.FromString(raw)
    except DecodeError:
        return DeadLetter()


def _keys(key: str) -> tuple[bytes, bytes]:
    return key.encode(), groups_key(key)


def _origin(group: str, key: str) -> str:
    return f"{group} {key}"


def _count(origins: Iterable[bytes], group: Group) -> int:
    return sum(origin.decode().partition(" ")[0] == group.name for origin in origins)
