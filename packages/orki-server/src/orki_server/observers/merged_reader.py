"""Many streams read as one, by plain cursors: no group, nothing written, nothing pinned, exact to resume.

The streams are those that the fleet has registered, looked up again every second or so: a stream that appears while we
read is followed from its beginning.
"""

from __future__ import annotations

__all__ = ["MergedReader", "PossibleGap"]

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

from orki_contract.errors import OrkiError, UnknownStream
from orki_events.connection import Connection
from orki_events.entries import ZERO_ID, format_cursor, parse_cursor, parse_id, stream_keys
from orki_events.groups import parse_stream_state
from orki_events.registry import RegisteredStream, StreamRegistry
from orki_server.observers.entry_view import EntryView, Readers
from orki_server.observers.feed_cursor import format_feed_cursor

_LOOK_AGAIN_S: Final = 1.0
_COUNT: Final = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class PossibleGap:
    """Entries behind a cursor were trimmed; whether unread ones were among them cannot be told.

    Attributes:
        stream: Name of the stream.
        key: Redis key of the partition.
        after: The cursor: entry id there.
        first: Id of the oldest entry that is left.
    """

    stream: str
    key: str
    after: str
    first: str


class MergedReader:
    """Reads all streams, or some, from where a reader stands. One reader for each client."""

    def __init__(
        self,
        link: Connection,
        *,
        names: Collection[str] = (),
        cursors: Mapping[str, str] | None = None,
        block_ms: int = 1000,
    ) -> None:
        """Reads nothing yet.

        Args:
            link: A connection of this reader's own, since reads block.
            names: Only these streams; empty: all.
            cursors: Where the reader stands in each stream, as `parse_feed_cursor` reads it from `place`; a stream that
                is not among them is read from its beginning. None: every stream from its end.
            block_ms: Longest wait of a `read`.
        """
        self._link = link
        self._names = frozenset(names)
        self._given = None if cursors is None else dict(cursors)
        self._block_ms = block_ms
        self._registry = StreamRegistry()
        self._readers = Readers()
        self._streams: dict[str, RegisteredStream] = {}
        self._owner: dict[str, str] = {}
        self._places: dict[str, str] = {}
        self._cursors: dict[str, str] = {}
        self._looked = 0.0

    @property
    def streams(self) -> tuple[str, ...]:
        """Names of the streams that are read."""
        return tuple(self._streams)

    @property
    def place(self) -> str:
        """Where the reader stands in all streams after what `read` returned, as `format_feed_cursor` writes it.

        Raises:
            TooLarge: There are too many streams for one word.
        """
        return format_feed_cursor(self._cursors)

    async def start(self) -> list[PossibleGap]:
        """Takes up its place.

        Returns:
            What may have been lost since the cursors were made.

        Raises:
            UnknownStream: A name is not registered; the message lists those that are.
            InvalidArgument: A cursor belongs to a stream with another number of partitions.
            TooLarge: There are too many streams for one word.
            OrkiError: The server does not answer or refuses.
        """
        registered = await self._registry.streams(self._link)
        known = {each.contract.name for each in registered}
        if unknown := sorted(self._names - known):
            raise UnknownStream(
                f'no stream "{unknown[0]}" is registered (registered: {", ".join(sorted(known)) or "none yet"})'
            )
        newest = await self._newest(registered) if self._given is None else {}
        self._follow(registered, newest)
        self._looked = time.monotonic()
        _ = self.place
        return await self._gaps() if self._given else []

    async def read(self) -> list[tuple[str, EntryView]]:
        """The next entries, oldest first, each with the reader's place after it; none when nothing came for a while.

        Raises:
            TooLarge: There are too many streams for one word.
            OrkiError: The server does not answer or refuses; reading may be tried again.
        """
        if time.monotonic() - self._looked > _LOOK_AGAIN_S:
            self._follow(await self._registry.streams(self._link), {})
            self._looked = time.monotonic()
        places = list(self._places.items())
        if not places:
            return await self._wait()
        command = (b"XREAD", b"COUNT", _COUNT, b"BLOCK", self._block_ms, b"STREAMS")
        keys, ids = zip(*places, strict=True)
        timeout = self._link.answer_timeout + self._block_ms / 1000
        reply = await self._link.execute((*command, *keys, *ids), timeout=timeout)
        views = [self._view(key.decode(), entry) for key, entries in reply or () for entry in entries]
        return [(self._pass(view), view) for view in sorted(views, key=lambda each: parse_id(each.entry_id))]

    def _pass(self, view: EntryView) -> str:
        self._places[view.key] = view.entry_id
        self._cursors[view.stream] = self._cursor(view.stream)
        return self.place

    def _cursor(self, name: str) -> str:
        return format_cursor(self._places[key] for key in stream_keys(self._streams[name].contract))

    async def _wait(self) -> list[tuple[str, EntryView]]:
        # Blocks in the server, so that a server that went away is noticed.
        await self._link.execute(
            (b"BLPOP", b"orki:nothing-is-here", b"%.3f" % (self._block_ms / 1000)),
            timeout=self._link.answer_timeout + 1.0,
        )
        return []

    def _view(self, key: str, entry: Any) -> EntryView:
        entry_id, flat = entry
        fields = dict(zip(flat[::2], flat[1::2], strict=True))
        reader = self._readers.of(self._streams[self._owner[key]])
        return reader.view(key, entry_id.decode(), fields.get(b"e"), fields.get(b"d"))

    def _follow(self, registered: list[RegisteredStream], newest: Mapping[str, str]) -> None:
        for each in registered:
            name = each.contract.name
            if self._names and name not in self._names:
                continue
            keys = stream_keys(each.contract)
            if name not in self._streams and self._given and name in self._given:
                newest = {**newest, **dict(zip(keys, parse_cursor(self._given[name], len(keys)), strict=True))}
            self._streams[name] = each
            for key in keys:
                self._owner[key] = name
                self._places.setdefault(key, newest.get(key, ZERO_ID))
            self._cursors[name] = self._cursor(name)

    async def _newest(self, registered: list[RegisteredStream]) -> dict[str, str]:
        keys = [key for each in registered for key in stream_keys(each.contract)]
        replies = await self._link.pipeline(*((b"XREVRANGE", key, b"+", b"-", b"COUNT", 1) for key in keys))
        return {
            key: _checked(reply)[0][0].decode() for key, reply in zip(keys, replies, strict=True) if _checked(reply)
        }

    async def _gaps(self) -> list[PossibleGap]:
        keys = [key for key, place in self._places.items() if place != ZERO_ID]
        if not keys:
            return []
        types = await self._link.pipeline(*((b"TYPE", key) for key in keys))
        there = [key for key, reply in zip(keys, types, strict=True) if _checked(reply) == b"stream"]
        states = await self._link.pipeline(*((b"XINFO", b"STREAM", key) for key in there)) if there else []
        gaps = []
        for key, reply in zip(there, states, strict=True):
            state = parse_stream_state(_checked(reply))
            if state.added > state.length and state.first_id and parse_id(state.first_id) > parse_id(self._places[key]):
                gap = PossibleGap(stream=self._owner[key], key=key, after=self._places[key], first=state.first_id)
                gaps.append(gap)
        return gaps


def _checked(reply: Any) -> Any:
    if isinstance(reply, OrkiError):
        raise reply
    return reply
