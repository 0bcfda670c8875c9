"""How full the streams are and where their groups stand, for metrics, tables and the doctor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orki_contract.errors import OrkiError
from orki_contract.model import Group, Stream
from orki_events.connection import Command, Connection
from orki_events.entries import stream_keys, tagged_key
from orki_events.groups import pairs
from orki_events.registry import RegisteredStream


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupFigures:
    """Where a consumer group stands, over all partitions.

    Attributes:
        stream: Name of the stream.
        group: Name of the group.
        missing: Whether the server lacks the group on a partition that has entries or other groups.
        lag: Entries not delivered yet; None where the server cannot tell.
        pending: Entries delivered and not acknowledged.
        oldest_pending_ms: Age of the oldest of those; 0 for none.
        consumers: Consumers that the server knows.
        dead_letters: Entries in the group's dead letter stream.
        ack_deadline: After which others may claim what is pending.
    """

    stream: str
    group: str
    missing: bool
    lag: int | None
    pending: int
    oldest_pending_ms: int
    consumers: int
    dead_letters: int
    ack_deadline: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamFigures:
    """How full a stream is.

    Attributes:
        stream: Name of the stream.
        message: Full name of its message.
        partitions: Number of its keys.
        entries: Entries that it holds.
        groups: By name.
    """

    stream: str
    message: str
    partitions: int
    entries: int
    groups: tuple[GroupFigures, ...]


async def stream_figures(link: Connection, streams: Sequence[RegisteredStream]) -> list[StreamFigures]:
    """Figures of these streams, in their order. Few round trips, whatever the number of streams.

    Raises:
        OrkiError: The server does not answer or refuses.
    """
    contracts = [each.contract for each in streams]
    keys = [key for each in contracts for key in stream_keys(each)]
    if not keys:
        return []
    (clock, *types) = await link.pipeline((b"TIME",), *((b"TYPE", key) for key in keys))
    seconds, micros = _checked(clock)
    now_ms = int(seconds) * 1000 + int(micros) // 1000
    there = [key for key, kind in zip(keys, types, strict=True) if _checked(kind) == b"stream"]
    look = _Look(now_ms)
    await look.at_keys(link, there)
    await look.at_pending(link, contracts)
    await look.at_dead(link, contracts)
    return [look.stream(each) for each in contracts]


class _Look:
    def __init__(self, now_ms: int) -> None:
        self._now_ms = now_ms
        self._entries: dict[str, int] = {}
        self._groups: dict[tuple[str, str], dict[str, Any]] = {}
        self._oldest: dict[tuple[str, str], int] = {}
        self._dead: dict[str, int] = {}

    async def at_keys(self, link: Connection, keys: list[str]) -> None:
        commands: list[Command] = [command for key in keys for command in ((b"XLEN", key), (b"XINFO", b"GROUPS", key))]
        replies = iter(await _asked(link, commands))
        for key in keys:
            self._entries[key] = next(replies)
            for found in map(pairs, next(replies)):
                self._groups[key, found["name"].decode()] = found

    async def at_pending(self, link: Connection, contracts: list[Stream]) -> None:
        wanted = [
            (key, group.name)
            for each in contracts
            for key in stream_keys(each)
            for group in each.groups
            if self._groups.get((key, group.name), {}).get("pending")
        ]
        replies = await _asked(link, [(b"XPENDING", key, group) for key, group in wanted])
        for place, reply in zip(wanted, replies, strict=True):
            if reply[1]:
                self._oldest[place] = max(0, self._now_ms - int(reply[1].partition(b"-")[0]))

    async def at_dead(self, link: Connection, contracts: list[Stream]) -> None:
        names = sorted({each.dead_letter(group) for each in contracts for group in each.groups})
        replies = await _asked(link, [(b"XLEN", tagged_key("ev", name)) for name in names])
        self._dead = dict(zip(names, replies, strict=True))

    def stream(self, contract: Stream) -> StreamFigures:
        keys = stream_keys(contract)
        return StreamFigures(
            stream=contract.name,
            message=contract.message,
            partitions=contract.partitions,
            entries=sum(self._entries.get(key, 0) for key in keys),
            groups=tuple(self._group(contract, keys, group) for group in contract.groups),
        )

    def _group(self, contract: Stream, keys: Sequence[str], group: Group) -> GroupFigures:
        found = [self._groups[key, group.name] for key in keys if (key, group.name) in self._groups]
        # `lag` is absent before Redis 7 and null where entries were deleted.
        lags = [each.get("lag") for each in found]
        return GroupFigures(
            stream=contract.name,
            group=group.name,
            missing=any(key in self._entries and (key, group.name) not in self._groups for key in keys),
            lag=None if None in lags else sum(lag for lag in lags if lag is not None),
            pending=sum(each["pending"] for each in found),
            oldest_pending_ms=max((self._oldest.get((key, group.name), 0) for key in keys), default=0),
            consumers=sum(each["consumers"] for each in found),
            dead_letters=self._dead.get(contract.dead_letter(group), 0),
            ack_deadline=group.ack_deadline,
        )


async def _asked(link: Connection, commands: list[Command]) -> list[Any]:
    return [_checked(reply) for reply in await link.pipeline(*commands)] if commands else []


def _checked(reply: Any) -> Any:
    if isinstance(reply, OrkiError):
        raise reply
    return reply
