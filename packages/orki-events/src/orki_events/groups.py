"""Consumer groups: created before the first use, and made anew at a remembered place when the server lost them.

A hash for each partition (`orki:groups:{STREAM}`) remembers for each group where it began (`start:GROUP`, with the
number of entries that it never sees) and up to which entry everything was settled (`cursor:GROUP`, with the number of
entries that the stream had ever taken by then); beside them lie the group's counters of settled entries.
Every process also remembers the cursor that it saw last, so that a flush, which takes the hash along, is noticed.
"""

from __future__ import annotations

__all__ = [
    "ConsumerGroups",
    "Mark",
    "StreamState",
    "group_start",
    "groups_key",
    "pairs",
    "parse_stream_state",
]

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from orki_contract.errors import OrkiError
from orki_contract.model import Group, Start, Stream
from orki_events._options import Gap, GapKind
from orki_events.connection import Connection, GroupExists, Reply
from orki_events.entries import ZERO_ID, parse_id, predecessor, stream_keys


@dataclass(frozen=True, slots=True)
class Mark:
    """A place in a stream.

    Attributes:
        entry_id: Everything up to it is settled for the group.
        added: A number of entries; of a cursor, those that the stream had ever taken.
    """

    entry_id: str
    added: int

    def text(self) -> str:
        """As it lies in the hash."""
        return f"{self.entry_id} {self.added}"

    @classmethod
    def parse(cls, text: bytes | None) -> Mark | None:
        """From the hash; None where there is none."""
        if not text:
            return None
        entry_id, _, added = text.decode().partition(" ")
        return cls(entry_id, int(added or 0))


@dataclass(frozen=True, slots=True)
class StreamState:
    """What the server says of one partition.

    Attributes:
        length: Entries in it.
        added: Entries that it ever took; `length` where the server does not count them (before Redis 7).
        last_id: Id of the newest entry that it ever had.
        first_id: Id of its oldest entry; empty without one.
    """

    length: int = 0
    added: int = 0
    last_id: str = ZERO_ID
    first_id: str = ""


def group_start(group: Group, state: StreamState | None, mark: Mark | None, forgotten: bool) -> tuple[str, str | None]:
    """Where a group that is not there begins.

    Args:
        group: The declared group.
        state: The partition; None where the key does not exist.
        mark: The remembered place, from the server's hash or this process; None for a group that was never there.
        forgotten: Whether this process knows of the group and the server's hash does not.

    Returns:
        The entry id to begin behind, and what may be lost, in words: None for a group that is simply new, empty where
        nothing is lost.
    """
    state = state or StreamState()
    if mark is None:
        return (ZERO_ID if group.start is Start.EARLIEST else state.last_id), None
    if forgotten:
        return ZERO_ID, "the server forgot the stream's records, as after a flush or a restart without its data"
    younger = parse_id(state.last_id) < parse_id(mark.entry_id) or state.added < mark.added
    if younger:
        return ZERO_ID, "the server's stream is younger than what this group has read, so entries were lost"
    if state.added > state.length and state.first_id and parse_id(state.first_id) > parse_id(mark.entry_id):
        return mark.entry_id, "entries behind the group's last place were trimmed before it could read them"
    return mark.entry_id, ""


def groups_key(key: str) -> bytes:
    """The hash that belongs to a partition's key."""
    return key.replace("orki:ev:", "orki:groups:", 1).encode()


def pairs(reply: list[Any]) -> dict[str, Any]:
    """A flat list of names and values as a dictionary."""
    return {name.decode(): value for name, value in zip(reply[::2], reply[1::2], strict=True)}


def parse_stream_state(reply: list[Any]) -> StreamState:
    """The answer to XINFO STREAM."""
    found = pairs(reply)
    first = found.get("first-entry")
    return StreamState(
        length=found["length"],
        added=found.get("entries-added", found["length"]),
        last_id=found["last-generated-id"].decode(),
        first_id=first[0].decode() if first else "",
    )


class ConsumerGroups:
    """Creates groups, remembers their places, and tells of what was lost."""

    def __init__(self, report: Callable[[Gap], None]) -> None:
        """Args: report: called with every group that had to be made anew."""
        self._report = report
        self._marks: dict[tuple[str, str], Mark] = {}

    async def ensure(self, link: Connection, stream: Stream, groups: Iterable[Group]) -> dict[str, str]:
        """Creates the groups that are missing, on every partition.

        Returns:
            The newest entry id of each partition, by key, as it was just before.

        Raises:
            OrkiError: The server does not answer or refuses.
        """
        newest = {}
        wanted = tuple(groups)
        for key in stream_keys(stream):
            kind, info, present, records = await link.pipeline(
                (b"TYPE", key), (b"XINFO", b"STREAM", key), (b"XINFO", b"GROUPS", key), (b"HGETALL", groups_key(key))
            )
            exists = _checked(kind) != b"none"
            state = parse_stream_state(_checked(info)) if exists else None
            names = {pairs(each)["name"].decode() for each in _checked(present)} if exists else set()
            known = pairs(_checked(records))
            newest[key] = state.last_id if state else ZERO_ID
            for group in wanted:
                if group.name not in names:
                    await self._create(link, stream, key, group, (state, known))
                elif (mark := Mark.parse(known.get(f"cursor:{group.name}"))) is not None:
                    self._marks.setdefault((key, group.name), mark)
        return newest

    async def save(self, link: Connection, stream: Stream, group: Group) -> None:
        """Remembers, on the server and here, up to where the group has settled everything.

        Raises:
            OrkiError: The server does not answer or refuses; nothing was remembered.
        """
        for key in stream_keys(stream):
            info, present, pending = await link.transaction(
                (b"XINFO", b"STREAM", key), (b"XINFO", b"GROUPS", key), (b"XPENDING", key, group.name)
            )
            places = {each["name"].decode(): each["last-delivered-id"] for each in map(pairs, _checked(present))}
            oldest = _checked(pending)[1]
            settled = predecessor(parse_id(oldest)) if oldest else parse_id(places[group.name])
            mark = Mark(str(settled), parse_stream_state(_checked(info)).added)
            if self._marks.get((key, group.name)) != mark:
                await link.execute((b"HSET", groups_key(key), f"cursor:{group.name}", mark.text()))
                self._marks[key, group.name] = mark

    async def _create(
        self,
        link: Connection,
        stream: Stream,
        key: str,
        group: Group,
        found: tuple[StreamState | None, dict[str, Any]],
    ) -> None:
        state, known = found
        recorded = Mark.parse(known.get(f"cursor:{group.name}"))
        remembered = self._marks.get((key, group.name))
        forgotten = recorded is None and remembered is not None
        start, loss = group_start(group, state, recorded or remembered, forgotten)
        try:
            await link.execute((b"XGROUP", b"CREATE", key, group.name, start, b"MKSTREAM"))
        except GroupExists:
            return
        mark = Mark(start, state.added if state else 0)
        changes: list[tuple[bytes | str | int, ...]] = []
        if loss and start == ZERO_ID:
            stale = [f"{name}:{group.name}" for name in ("start", "processed", "dead_lettered", "declared_lost")]
            changes.append((b"HDEL", groups_key(key), *stale))
        # Entries that the group never sees: all those before it, or those that were trimmed before it.
        unseen = 0 if state is None else state.added if start != ZERO_ID else state.added - state.length
        changes.append((b"HSETNX", groups_key(key), f"start:{group.name}", Mark(start, unseen).text()))
        changes.append((b"HSET", groups_key(key), f"cursor:{group.name}", mark.text()))
        for reply in await link.pipeline(*changes):
            _checked(reply)
        self._marks[key, group.name] = mark
        if loss is not None:
            self._report(_recreated(stream, group, key, start, loss))


def _recreated(stream: Stream, group: Group, key: str, start: str, loss: str) -> Gap:
    said = f'group "{group.name}" of stream "{stream.name}" was gone from {key} and was made anew behind {start}'
    return Gap(
        kind=GapKind.GROUP_RECREATED,
        stream=stream.name,
        group=group.name,
        count=None if loss else 0,
        possible=bool(loss),
        message=f"{said}: {loss}" if loss else f"{said}; nothing was lost",
    )


def _checked(reply: Reply) -> Any:
    if isinstance(reply, OrkiError):
        raise reply
    return reply
