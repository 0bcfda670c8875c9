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

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from orki_contract.errors import OrkiError
from orki_contract.model import Group, Start, Stream
from orki_events._options import Gap, GapKind
from orki_events.connection import Command, Connection, GroupExists, Reply
from orki_events.entries import ZERO_ID, parse_id, predecessor, stream_keys


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


def groups_key(key: str) -> bytes:
    """Return the key of the hash that belongs to a partition."""
    return key.replace("orki:ev:", "orki:groups:", 1).encode()


def pairs(reply: list[Any]) -> dict[str, Any]:
    """Convert a flat list of names and values to a dictionary."""
    return {name.decode(): value for name, value in zip(reply[::2], reply[1::2], strict=True)}


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
        """Create the object; `report` is called for every group that had to be recreated."""
        self._report = report
        self._marks: dict[tuple[str, str], Mark] = {}

    async def ensure(self, connection: Connection, stream: Stream, groups: Iterable[Group]) -> dict[str, str]:
        """Create missing groups on every partition, and return the id of each partition's newest entry before that."""
        newest = {}
        wanted = tuple(groups)
        for key in stream_keys(stream):
            kind, info, present, records = await connection.pipeline(
                (b"TYPE", key), (b"XINFO", b"STREAM", key), (b"XINFO", b"GROUPS", key), (b"HGETALL", groups_key(key))
            )
            exists = checked(kind) != b"none"
            state = parse_stream_state(checked(info)) if exists else None
            names = {pairs(each)["name"].decode() for each in checked(present)} if exists else set()
            known = pairs(checked(records))
            newest[key] = state.last_id if state else ZERO_ID
            for group in wanted:
                if group.name not in names:
                    await self._create(connection, stream, key, group, (state, known))
                elif (mark := Mark.parse(known.get(f"cursor:{group.name}"))) is not None:
                    self._marks.setdefault((key, group.name), mark)
        return newest

    async def save(self, connection: Connection, stream: Stream, group: Group) -> None:
        """Save the position up to which the group has settled everything, on the server and in this process."""
        for key in stream_keys(stream):
            info, present, pending = await connection.transaction(
                (b"XINFO", b"STREAM", key), (b"XINFO", b"GROUPS", key), (b"XPENDING", key, group.name)
            )
            delivered = {each["name"].decode(): each["last-delivered-id"] for each in map(pairs, checked(present))}
            oldest = checked(pending)[1]
            settled = predecessor(parse_id(oldest)) if oldest else parse_id(delivered[group.name])
            mark = Mark(str(settled), parse_stream_state(checked(info)).added)
            if self._marks.get((key, group.name)) != mark:
                await connection.execute((b"HSET", groups_key(key), f"cursor:{group.name}", mark.text()))
                self._marks[key, group.name] = mark

    async def _create(
        self,
        connection: Connection,
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
            await connection.execute((b"XGROUP", b"CREATE", key, group.name, start, b"MKSTREAM"))
        except GroupExists:
            return
        mark = Mark(start, state.added if state else 0)
        changes: list[Command] = []
        if loss and start == ZERO_ID:
            stale = [f"{name}:{group.name}" for name in ("start", "processed", "dead_lettered", "declared_lost")]
            changes.append((b"HDEL", groups_key(key), *stale))
        # Entries that the group never sees: all those before it, or those that were trimmed before it.
        unseen = 0 if state is None else state.added if start != ZERO_ID else state.added - state.length
        changes.append((b"HSETNX", groups_key(key), f"start:{group.name}", Mark(start, unseen).text()))
        changes.append((b"HSET", groups_key(key), f"cursor:{group.name}", mark.text()))
        for reply in await connection.pipeline(*changes):
            checked(reply)
        self._marks[key, group.name] = mark
        if loss is not None:
            self._report(_recreated(stream, group, key, start, loss))


def _recreated(stream: Stream, group: Group, key: str, start: str, loss: str) -> Gap:
    event = f'group "{group.name}" of stream "{stream.name}" was missing on {key} and was recreated after {start}'
    return Gap(
        kind=GapKind.GROUP_RECREATED,
        stream=stream.name,
        group=group.name,
        count=None if loss else 0,
        possible=bool(loss),
        message=f"{event}: {loss}" if loss else f"{event}; nothing was lost",
    )


def checked(reply: Reply) -> Any:
    """Return a reply of a pipeline; raise it if it is an error."""
    if isinstance(reply, OrkiError):
        raise reply
    return reply
