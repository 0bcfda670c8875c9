"""A Redis server in this process: the commands that the store uses, and the store's own Lua scripts.

The scripts run in Lua 5.1, the version of Redis, by `lupa`. Only the commands are written here; a test compares them
with a real server, on the store's operations.
"""

from __future__ import annotations

import copy
import hashlib
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from typing import Any, Final

import lupa.lua51  # type: ignore[import-untyped]

_PRELUDE: Final = """
redis = {}
function redis.pcall(...)
  return py_call(...)
end
function redis.call(...)
  local reply = py_call(...)
  if type(reply) == 'table' and reply.err then error(reply, 0) end
  return reply
end
function redis.sha1hex(text) return py_sha1(text) end
function run(script, keys, argv)
  KEYS, ARGV = keys, argv
  local done, reply = pcall(script)
  if done then return reply end
  if type(reply) == 'table' and reply.err then return reply end
  return { err = 'ERR ' .. tostring(reply) }
end
function compile(text)
  local script, problem = loadstring(text)
  if not script then error(problem) end
  return script
end
"""
_DENIED_WHEN_FULL: Final = frozenset({b"SET", b"SETRANGE", b"HSET", b"HSETNX", b"HINCRBY", b"ZADD", b"XADD", b"SADD"})


class Error(Exception):
    """An error reply."""


class Status(bytes):
    """A status reply."""


class _SortedSet:
    def __init__(self) -> None:
        self.scores: dict[bytes, float] = {}
        self.rows: list[tuple[float, bytes]] = []

    def add(self, member: bytes, score: float) -> None:
        self.remove(member)
        self.scores[member] = score
        insort(self.rows, (score, member))

    def remove(self, member: bytes) -> bool:
        if (score := self.scores.pop(member, None)) is None:
            return False
        del self.rows[bisect_left(self.rows, (score, member))]
        return True


class _Set(dict[bytes, None]):
    """A set."""


class _Stream:
    def __init__(self) -> None:
        self.entries: list[tuple[tuple[int, int], list[bytes]]] = []
        self.last = (0, 0)


class Server:
    """The server's data, which survive a restart.

    Args:
        clock: Returns the time of the server's host in seconds.

    Attributes:
        full: Whether the server is out of memory.
        published: Called with channel and message of each PUBLISH.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.full = False
        self.published: Callable[[bytes, bytes], None] = lambda channel, message: None
        self._clock = clock
        self._keys: dict[bytes, Any] = {}
        self._expiry: dict[bytes, float] = {}
        self._lua: Any = lupa.lua51.LuaRuntime(encoding=None, unpack_returned_tuples=False)
        lua_globals = self._lua.globals()
        lua_globals[b"py_call"] = self._from_lua
        lua_globals[b"py_sha1"] = lambda text: hashlib.sha1(text, usedforsecurity=False).hexdigest().encode()
        self._lua.execute(_PRELUDE)
        self._compile, self._run = lua_globals[b"compile"], lua_globals[b"run"]
        self._table = self._lua.table_from
        self._scripts: dict[bytes, Any] = {}
        self._texts: dict[str, bytes] = {}
        self._in_script = self._wrote = False

    def snapshot(self) -> Any:
        """Return a copy of the data, for `restore`."""
        return copy.deepcopy((self._keys, self._expiry))

    def restore(self, snapshot: Any) -> None:
        """Replace the data, as after a restart that lost the newest writes."""
        self._keys, self._expiry = copy.deepcopy(snapshot)

    def execute(self, command: Sequence[Any]) -> Any:
        """Execute a command. Returns its reply as RESP2 delivers it; an `Error` for an error reply."""
        name, *arguments = [
            each if type(each) is bytes else each.encode() if type(each) is str else b"%d" % each for each in command
        ]
        try:
            return self._execute(name.upper(), arguments)
        except Error as error:
            return error

    # --- Scripts. ---

    def _script(self, text: bytes) -> Any:
        if text not in self._scripts:
            self._scripts[text] = self._compile(text)
            self._texts[hashlib.sha1(text, usedforsecurity=False).hexdigest()] = text
        return self._scripts[text]

    def _evaluate(self, text: bytes, arguments: list[bytes]) -> Any:
        script, count = self._script(text), int(arguments[0])
        keys, argv = arguments[1 : 1 + count], arguments[1 + count :]
        self._in_script, self._wrote = True, False
        try:
            return self._to_python(self._run(script, self._table(keys), self._table(argv)))
        finally:
            self._in_script = False

    def _to_python(self, value: Any) -> Any:
        if value is None or value is False:
            return None
        if value is True:
            return 1
        if isinstance(value, bytes):
            return value
        if isinstance(value, int | float):
            return int(value)
        if (problem := value[b"err"]) is not None:
            raise Error(problem.decode())
        if (status := value[b"ok"]) is not None:
            return Status(status)
        found, at = [], 1
        while (each := value[at]) is not None:
            found.append(self._to_python(each))
            at += 1
        return found

    def _from_lua(self, *arguments: Any) -> Any:
        name, *rest = [each if type(each) is bytes else b"%.17g" % each for each in arguments]
        try:
            return self._to_lua(self._execute(name.upper(), rest))
        except Error as error:
            return self._table({b"err": str(error).encode()})

    def _to_lua(self, value: Any) -> Any:
        if value is None:
            return False
        if isinstance(value, Status):
            return self._table({b"ok": bytes(value)})
        if isinstance(value, list):
            return self._table([self._to_lua(each) for each in value])
        return value

    # --- Commands. ---

    def _execute(self, name: bytes, arguments: list[bytes]) -> Any:
        if name in _DENIED_WHEN_FULL:
            if self.full and not self._wrote:
                raise Error("OOM command not allowed when used memory > 'maxmemory'.")
            self._wrote = self._in_script
        elif self._in_script and name in (b"DEL", b"HDEL", b"ZREM", b"SREM", b"XDEL", b"PEXPIRE", b"EXPIRE"):
            self._wrote = True
        command = getattr(self, "on_" + name.decode().lower(), None)
        if command is None:
            raise NotImplementedError(f"simulator/redis.py lacks the command {name.decode()}")
        return command(*arguments)

    def _get_as(self, key: bytes, kind: type) -> Any:
        self._expire(key)
        value = self._keys.get(key)
        if value is not None and type(value) is not kind:
            raise Error("WRONGTYPE Operation against a key holding the wrong kind of value")
        return value

    def _make(self, key: bytes, kind: type) -> Any:
        value = self._get_as(key, kind)
        if value is None:
            value = self._keys[key] = kind()
        return value

    def _expire(self, key: bytes) -> None:
        if key in self._expiry and self._expiry[key] <= self._clock():
            self._keys.pop(key, None)
            del self._expiry[key]

    def _drop_empty(self, key: bytes, content: object) -> None:
        if not content:
            self._keys.pop(key, None)
            self._expiry.pop(key, None)

    def on_ping(self) -> Any:
        return Status(b"PONG")

    def on_info(self, section: bytes) -> bytes:
        assert section == b"cluster"
        return b"cluster_enabled:0\r\n"

    def on_time(self) -> Any:
        now = int(self._clock() * 1_000_000)
        return [b"%d" % (now // 1_000_000), b"%d" % (now % 1_000_000)]

    def on_eval(self, text: bytes, *arguments: bytes) -> Any:
        return self._evaluate(text, list(arguments))

    def on_evalsha(self, digest: bytes, *arguments: bytes) -> Any:
        text = self._texts.get(digest.decode())
        if text is None:
            raise Error("NOSCRIPT No matching script. Please use EVAL.")
        return self._evaluate(text, list(arguments))

    def on_script(self, action: bytes, text: bytes) -> Any:
        assert action == b"LOAD"
        self._script(text)
        return hashlib.sha1(text, usedforsecurity=False).hexdigest().encode()

    def on_publish(self, channel: bytes, message: bytes) -> int:
        self.published(channel, message)
        return 1

    def on_type(self, key: bytes) -> Any:
        self._expire(key)
        value = self._keys.get(key)
        kinds = {bytes: b"string", dict: b"hash", _SortedSet: b"zset", _Stream: b"stream", _Set: b"set"}
        return Status(b"none" if value is None else kinds[type(value)])

    def on_exists(self, *keys: bytes) -> int:
        for key in keys:
            self._expire(key)
        return sum(key in self._keys for key in keys)

    def on_del(self, *keys: bytes) -> int:
        for key in keys:
            self._expiry.pop(key, None)
        return sum(self._keys.pop(key, None) is not None for key in keys)

    on_unlink = on_del

    def on_pexpire(self, key: bytes, after: bytes) -> int:
        self._expire(key)
        if key not in self._keys:
            return 0
        self._expiry[key] = self._clock() + int(after) / 1000
        return 1

    def on_expire(self, key: bytes, after: bytes) -> int:
        return self.on_pexpire(key, b"%d" % (int(after) * 1000))

    def on_get(self, key: bytes) -> Any:
        return self._get_as(key, bytes)

    def on_set(self, key: bytes, value: bytes) -> Any:
        self._keys[key] = value
        self._expiry.pop(key, None)
        return Status(b"OK")

    def on_setrange(self, key: bytes, offset: bytes, value: bytes) -> int:
        assert (offset, value) == (b"0", b"")
        return len(self._get_as(key, bytes) or b"")

    def on_hget(self, key: bytes, field: bytes) -> Any:
        return (self._get_as(key, dict) or {}).get(field)

    def on_hmget(self, key: bytes, *fields: bytes) -> Any:
        value = self._get_as(key, dict) or {}
        return [value.get(field) for field in fields]

    def on_hgetall(self, key: bytes) -> Any:
        return [each for pair in (self._get_as(key, dict) or {}).items() for each in pair]

    def on_hkeys(self, key: bytes) -> Any:
        return list(self._get_as(key, dict) or {})

    def on_hexists(self, key: bytes, field: bytes) -> int:
        return int(field in (self._get_as(key, dict) or {}))

    def on_hlen(self, key: bytes) -> int:
        return len(self._get_as(key, dict) or {})

    def on_hstrlen(self, key: bytes, field: bytes) -> int:
        return len((self._get_as(key, dict) or {}).get(field, b""))

    def on_hset(self, key: bytes, *pairs: bytes) -> int:
        value = self._make(key, dict)
        before = len(value)
        value.update(zip(pairs[::2], pairs[1::2], strict=True))
        return len(value) - before

    def on_hsetnx(self, key: bytes, field: bytes, text: bytes) -> int:
        value = self._make(key, dict)
        if field in value:
            return 0
        value[field] = text
        return 1

    def on_hincrby(self, key: bytes, field: bytes, by: bytes) -> int:
        value = self._make(key, dict)
        number = int(value.get(field, b"0")) + int(by)
        value[field] = b"%d" % number
        return number

    def on_hdel(self, key: bytes, *fields: bytes) -> int:
        value = self._get_as(key, dict)
        if value is None:
            return 0
        count = sum(value.pop(field, None) is not None for field in fields)
        self._drop_empty(key, value)
        return count

    def on_hvals(self, key: bytes) -> Any:
        return list((self._get_as(key, dict) or {}).values())

    # Sets keep the order of their members here, so that runs repeat.

    def on_sadd(self, key: bytes, *members: bytes) -> int:
        value = self._make(key, _Set)
        before = len(value)
        value.update(dict.fromkeys(members))
        return len(value) - before

    def on_srem(self, key: bytes, *members: bytes) -> int:
        value = self._get_as(key, _Set)
        if value is None:
            return 0
        count = sum(member in value for member in members)
        for member in members:
            value.pop(member, None)
        self._drop_empty(key, value)
        return count

    def on_scard(self, key: bytes) -> int:
        return len(self._get_as(key, _Set) or ())

    def on_smembers(self, key: bytes) -> Any:
        return list(self._get_as(key, _Set) or ())

    def on_srandmember(self, key: bytes, count: bytes | None = None) -> Any:
        members = self.on_smembers(key)
        if count is None:
            return members[0] if members else None
        return members[: int(count)]

    def on_zadd(self, key: bytes, *pairs: bytes) -> int:
        value = self._make(key, _SortedSet)
        before = len(value.scores)
        for score, member in zip(pairs[::2], pairs[1::2], strict=True):
            value.add(member, float(score))
        return len(value.scores) - before

    def on_zrem(self, key: bytes, *members: bytes) -> int:
        value = self._get_as(key, _SortedSet)
        if value is None:
            return 0
        count = sum(value.remove(member) for member in members)
        self._drop_empty(key, value.scores)
        return int(count)

    def on_zcard(self, key: bytes) -> int:
        value = self._get_as(key, _SortedSet)
        return len(value.scores) if value else 0

    def on_zscore(self, key: bytes, member: bytes) -> Any:
        value = self._get_as(key, _SortedSet)
        return _number(value.scores[member]) if value and member in value.scores else None

    def on_zrange(self, key: bytes, first: bytes, last: bytes, *options: bytes) -> Any:
        value = self._get_as(key, _SortedSet)
        end = int(last)
        rows = value.rows[int(first) : end + 1 if end >= 0 else len(value.rows) + end + 1] if value else []
        return _rows(rows, b"WITHSCORES" in options)

    def on_zrangebyscore(self, key: bytes, low: bytes, high: bytes, *options: bytes) -> Any:
        value = self._get_as(key, _SortedSet)
        rows = [row for row in value.rows if _bound(low) <= row[0] <= _bound(high)] if value else []
        return _rows(_limited(rows, options), b"WITHSCORES" in options)

    def on_zrevrangebyscore(self, key: bytes, high: bytes, low: bytes, *options: bytes) -> Any:
        value = self._get_as(key, _SortedSet)
        rows = [row for row in reversed(value.rows) if _bound(low) <= row[0] <= _bound(high)] if value else []
        return _rows(_limited(rows, options), b"WITHSCORES" in options)

    def on_zremrangebyscore(self, key: bytes, low: bytes, high: bytes) -> int:
        value = self._get_as(key, _SortedSet)
        rows = [row for row in value.rows if _bound(low) <= row[0] <= _bound(high)] if value else []
        return self.on_zrem(key, *(member for _, member in rows)) if rows else 0

    def on_xadd(self, key: bytes, *arguments: bytes) -> Any:
        at = arguments.index(b"*")
        stream = self._make(key, _Stream)
        milliseconds = int(self._clock() * 1000)
        last = stream.last
        stream.last = (milliseconds, 0) if milliseconds > last[0] else (last[0], last[1] + 1)
        stream.entries.append((stream.last, list(arguments[at + 1 :])))
        if b"MAXLEN" in arguments[:at]:
            # An approximate limit, which a server applies to whole blocks of a hundred entries.
            del stream.entries[: max(0, len(stream.entries) - int(arguments[at - 1]) - 100)]
        return _entry_id(stream.last)

    def on_xlen(self, key: bytes) -> int:
        stream = self._get_as(key, _Stream)
        return len(stream.entries) if stream else 0

    def on_xrange(self, key: bytes, first: bytes, last: bytes, *options: bytes) -> Any:
        stream = self._get_as(key, _Stream)
        assert last == b"+"
        low = (-1, -1) if first == b"-" else _parse_id(first.removeprefix(b"("))
        exclusive = first.startswith(b"(")
        found = [
            [_entry_id(number), list(fields)]
            for number, fields in (stream.entries if stream else [])
            if number > low or (number == low and not exclusive)
        ]
        return found[: int(options[1])] if options else found

    def on_xdel(self, key: bytes, *ids: bytes) -> int:
        stream = self._get_as(key, _Stream)
        if stream is None:
            return 0
        before, numbers = len(stream.entries), {_parse_id(each) for each in ids}
        stream.entries = [each for each in stream.entries if each[0] not in numbers]
        return before - len(stream.entries)

    def on_xtrim(self, key: bytes, *options: bytes) -> int:
        stream = self._get_as(key, _Stream)
        assert options[:2] == (b"MINID", b"=")
        if stream is None:
            return 0
        before = len(stream.entries)
        stream.entries = [each for each in stream.entries if each[0] >= _parse_id(options[2])]
        return before - len(stream.entries)


def _entry_id(number: tuple[int, int]) -> bytes:
    return b"%d-%d" % number


def _parse_id(text: bytes) -> tuple[int, int]:
    milliseconds, _, number = text.partition(b"-")
    return int(milliseconds), int(number or b"0")


def _bound(text: bytes) -> float:
    return float(text)


def _limited(rows: list[Any], options: Sequence[bytes]) -> list[Any]:
    if b"LIMIT" not in options:
        return rows
    at = options.index(b"LIMIT")
    offset, count = int(options[at + 1]), int(options[at + 2])
    return rows[offset:] if count < 0 else rows[offset : offset + count]


def _number(score: float) -> bytes:
    return b"%d" % score if score == int(score) else b"%.17g" % score


def _rows(rows: list[tuple[float, bytes]], with_scores: bool) -> list[bytes]:
    if not with_scores:
        return [member for _, member in rows]
    return [each for score, member in rows for each in (member, _number(score))]
