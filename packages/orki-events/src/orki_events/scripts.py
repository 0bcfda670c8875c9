"""The Lua scripts of the event plane: what must happen in one step. Each touches one partition's keys, or one table."""

from __future__ import annotations

__all__ = ["ACKNOWLEDGE", "HOLD", "REGISTER", "REMOVE_CONSUMER", "Script", "run_script"]

import hashlib
from dataclasses import dataclass, field
from typing import Final

from orki_contract.errors import OrkiError
from orki_events.connection import Connection, Reply, ScriptMissing


@dataclass(frozen=True, slots=True)
class Script:
    """A script, called by its digest, so that a role without EVAL can use what an operator has loaded."""

    text: str
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        """Computes the digest that the server knows it by."""
        # SHA-1 is the server's choice (`SCRIPT LOAD`); nothing is secured by it.
        object.__setattr__(self, "digest", hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest())


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


REGISTER: Final = Script("""\
-- KEYS: the table of streams.  ARGV: stream, the record that the caller saw or "", the record to write.
-- 1, or 0 where the record is another one by now.
if (redis.call('HGET', KEYS[1], ARGV[1]) or '') ~= ARGV[2] then
  return 0
end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
return 1
""")


async def run_script(link: Connection, script: Script, keys: tuple[bytes, ...], *arguments: bytes | str | int) -> Reply:
    """Runs a script, bringing it to the server where the server does not have it.

    Raises:
        OrkiError: As `Connection.one`.
    """
    try:
        return await link.execute((b"EVALSHA", script.digest, len(keys), *keys, *arguments))
    except ScriptMissing:
        try:
            await link.execute((b"SCRIPT", b"LOAD", script.text))
        except OrkiError as error:
            raise type(error)(f"{error.message}; an operator must load the package's scripts for this role") from error
        return await link.execute((b"EVALSHA", script.digest, len(keys), *keys, *arguments))
