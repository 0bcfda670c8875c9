"""Rules of Redis's access control for each role of the event plane, from the contracts of the streams.

Each role gets the commands and the keys of its work and nothing else. Servers before Redis 7 have neither keys that are
only read (`%R~`) nor rules for some keys only (selectors), so there a role can also write the registry, and a consumer
can also publish to its stream. No server can limit a user to one group of a stream.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from orki_contract.model import Group, Stream
from orki_events.entries import tagged_key

_CONNECT = "+ping +info +client|setname +client|setinfo +client|id +client|unblock +multi +exec +time +wait +waitaof"
_CALL = "+evalsha"
_READ = "+exists +type +get +hget +hmget +hgetall +xlen +xrange +xrevrange +xinfo|stream +xinfo|groups +xpending"
_REGISTER = "+hset +hsetnx +hdel +hincrby +xgroup|create +xtrim"
_PUBLISH = "+xadd"
_CONSUME = (
    "+xreadgroup +xack +xclaim +xautoclaim +xinfo|consumers +xgroup|createconsumer +xgroup|delconsumer "
    "+set +del +pexpire +zadd +zrange +zrem +zremrangebyscore"
)
_OBSERVE = "+xread +blpop +zrangebyscore +hvals"
_REGISTRY = ("orki:streams", "orki:images", "orki:subscriptions", "orki:retention")
_AFTER_7 = ("+waitaof", "+client|setinfo")


@dataclass(frozen=True, slots=True)
class Role:
    """A user of the server.

    Attributes:
        user: Its name.
        rules: Its rules, as ACL SETUSER takes them. They set neither a password nor whether the user is on.
    """

    user: str
    rules: tuple[str, ...]

    def __str__(self) -> str:
        """Return the command."""
        quoted = (f'"{rule}"' if " " in rule else rule for rule in self.rules)
        return " ".join(("ACL", "SETUSER", self.user, *quoted))


def roles(streams: Iterable[Stream], *, prefix: str = "orki", version: tuple[int, ...] = (7, 2)) -> list[Role]:
    """Return the roles for streams: publisher, a consumer for each group, observer, orchestrator and operator.

    Args:
        streams: The registered streams.
        prefix: What the users' names begin with.
        version: The Redis version that the server is compatible with.
    """
    known = sorted(streams, key=lambda each: each.name)
    registry = _keys(_REGISTRY, version, read=True)
    found = [
        Role(
            f"{prefix}-publisher",
            (
                *_base(version),
                *registry,
                *(f"~{pattern}" for each in known for pattern in _stream_keys(each.name)),
                *_commands(version, _CONNECT, _CALL, _READ, _REGISTER, _PUBLISH),
                # Probes how durable writes are; servers before Redis 7 cannot tell.
                *(("(~orki:durable +set)",) if version >= (7,) else ()),
            ),
        )
    ]
    found += [_consumer(each, group, prefix, version) for each in known for group in each.groups]
    dead = [f"orki:*:{{*.{group}.dead}}*" for group in ("audit", "metrics")]
    letters = sorted({each.dead_letter(group) for each in known for group in each.groups})
    counted = [pattern for name in letters for pattern in _stream_keys(name)]
    observed = _keys(("orki:{of}:*", *counted), version, read=True)
    found.append(
        Role(
            f"{prefix}-observer",
            (
                *_base(version),
                *registry,
                *observed,
                "~orki:nothing-is-here",
                *(f"~{pattern}" for each in known for pattern in _stream_keys(each.name)),
                *_with_letters(version, dead),
                *_commands(version, _CONNECT, _CALL, _READ, _REGISTER, _CONSUME, _OBSERVE),
            ),
        )
    )
    data = ("+@read", "+@write", "+@stream", "+@scripting", "+@transaction", "+@connection", "+@pubsub", "-@dangerous")
    orchestrator = (*_base(version), "~orki:*", "&orki:*", *data, "+info", "+role", "+wait", "+time")
    orchestrator += () if version < (7, 2) else ("+waitaof",)
    found.append(Role(f"{prefix}-orchestrator", orchestrator))
    found.append(Role(f"{prefix}-operator", (*orchestrator, "+acl", "+config", "+client", "+slowlog", "+latency")))
    return found


def _consumer(stream: Stream, group: Group, prefix: str, version: tuple[int, ...]) -> Role:
    return Role(
        f"{prefix}-consumer-{stream.name}-{group.name}",
        (
            *_base(version),
            *_keys(_REGISTRY, version, read=True),
            *(f"~{pattern}" for pattern in _stream_keys(stream.name)),
            *_with_letters(version, _stream_keys(stream.dead_letter(group))),
            *_commands(version, _CONNECT, _CALL, _READ, _REGISTER, _CONSUME),
        ),
    )


def _base(version: tuple[int, ...]) -> tuple[str, ...]:
    return ("resetkeys", "resetchannels", "-@all", *(("clearselectors",) if version >= (7,) else ()))


def _stream_keys(name: str) -> tuple[str, ...]:
    """Return the patterns of a stream's partitions and of what belongs to them: groups, positions, owners."""
    start = tagged_key("*", name).removesuffix("}")
    return f"{start}}}*", f"{start}:*"


def _keys(names: Iterable[str], version: tuple[int, ...], *, read: bool) -> tuple[str, ...]:
    return tuple(f"%R~{name}" if read and version >= (7,) else f"~{name}" for name in names)


def _with_letters(version: tuple[int, ...], patterns: Iterable[str]) -> tuple[str, ...]:
    """Return the rules for adding dead letters, and for trimming them."""
    keys = [f"~{pattern}" for pattern in patterns]
    commands = (*_READ.split(), "+xadd", "+xtrim", "+hset", "+hincrby", "+evalsha", "+expire", "+pexpire")
    if version < (7,):
        return (*keys, "+xadd", "+xtrim")
    return (f"({' '.join((*keys, *commands))})",)


def _commands(version: tuple[int, ...], *parts: str) -> tuple[str, ...]:
    names = [name for part in parts for name in part.split()]
    return tuple(name for name in names if version >= (7, 2) or name not in _AFTER_7)
