"""The entries of one partition that wait for a handler, with or without an order per key. No I/O."""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field

from orki_events._delivery_table import Entry

KeyOf = Callable[[Entry], Hashable]
"""Returns the value of an entry's partition key."""


class PlainQueue:
    """Entries in the order of their arrival. A failed entry lets the others pass."""

    def __init__(self) -> None:
        self._chunks: deque[list[Entry]] = deque()
        self._begin = 0

    keyed = False
    blocked = 0

    def put(self, entries: list[Entry]) -> None:
        """Append entries."""
        self._chunks.append(entries)

    def put_back(self, entries: list[Entry]) -> None:
        """Put entries at the front whose handling did not begin."""
        if self._begin:
            self._chunks[0] = self._chunks[0][self._begin :]
            self._begin = 0
        self._chunks.appendleft(entries)

    def take(self, limit: int) -> list[Entry]:
        """Remove and return entries to dispatch; they are busy until they are released, put back or suspended."""
        if not self._chunks:
            return []
        chunk, begin = self._chunks[0], self._begin
        if begin + limit < len(chunk):
            # Only the index moves: cutting the list would copy it for every small request.
            self._begin = begin + limit
            return chunk[begin : begin + limit]
        self._chunks.popleft()
        self._begin = 0
        return chunk[begin:] if begin else chunk

    def release(self, entry_ids: Iterable[bytes]) -> None:
        """Note that entries are settled or forgotten."""

    def suspend(self, entry_id: bytes) -> None:
        """Note that a busy entry waits for its retry."""

    def resume(self, entry: Entry) -> None:
        """Queue an entry whose wait is over."""
        self._chunks.append([entry])

    def clear(self) -> list[Entry]:
        """Remove and return all entries that are queued."""
        found = [entry for chunk in self._chunks for entry in chunk][self._begin :]
        self._chunks.clear()
        self._begin = 0
        return found


@dataclass(slots=True, eq=False)
class _Lane:
    """The entries of one key: queued ones in the order of their ids, busy ones and suspended ones."""

    key: Hashable
    queued: list[tuple[tuple[int, int], Entry]] = field(default_factory=list)
    busy: set[bytes] = field(default_factory=set)
    suspended: set[bytes] = field(default_factory=set)
    listed: bool = False


class KeyedQueue:
    """Entries in the order of their ids for each key: the next ones of a key wait until its earlier ones are settled.

    Attributes:
        blocked: Number of queued entries behind one of their key that waits for a retry.
    """

    keyed = True

    def __init__(self, key_of: KeyOf, single: bool) -> None:
        """Create a queue; `single` dispatches at most one entry of each key at a time, which suits single handlers."""
        self.blocked = 0
        self._key_of = key_of
        self._single = single
        self._lanes: dict[Hashable, _Lane] = {}
        self._lane_of: dict[bytes, _Lane] = {}
        self._ready: deque[_Lane] = deque()

    def put(self, entries: list[Entry]) -> None:
        """Queue entries at the places that their ids give them."""
        for entry in entries:
            key = self._key_of(entry)
            lane = self._lanes.get(key)
            if lane is None:
                lane = self._lanes[key] = _Lane(key)
            self._insert(lane, entry)
            self._list(lane)

    def put_back(self, entries: list[Entry]) -> None:
        """Queue entries again whose handling did not begin."""
        for entry in entries:
            self.resume(entry)

    def take(self, limit: int) -> list[Entry]:
        """Remove and return entries of keys of which no entry is busy or suspended, in the order of their ids."""
        taken: list[tuple[tuple[int, int], Entry]] = []
        while self._ready and len(taken) < limit:
            lane = self._ready.popleft()
            lane.listed = False
            count = 1 if self._single else limit - len(taken)
            chosen = lane.queued[:count]
            del lane.queued[:count]
            for _, entry in chosen:
                lane.busy.add(entry[0])
                self._lane_of[entry[0]] = lane
            taken += chosen
        taken.sort(key=lambda each: each[0])
        return [entry for _, entry in taken]

    def release(self, entry_ids: Iterable[bytes]) -> None:
        """Note that entries are settled or forgotten."""
        for entry_id in entry_ids:
            lane = self._lane_of.pop(entry_id, None)
            if lane is not None:
                lane.busy.discard(entry_id)
                self._unblock(lane, entry_id)
                self._list(lane)

    def suspend(self, entry_id: bytes) -> None:
        """Note that a busy entry waits for its retry: it holds back the later ones of its key."""
        lane = self._lane_of[entry_id]
        lane.busy.discard(entry_id)
        if not lane.suspended:
            self.blocked += len(lane.queued)
        lane.suspended.add(entry_id)

    def resume(self, entry: Entry) -> None:
        """Queue an entry whose wait is over."""
        lane = self._lane_of.pop(entry[0])
        lane.busy.discard(entry[0])
        self._unblock(lane, entry[0])
        self._insert(lane, entry)
        self._list(lane)

    def clear(self) -> list[Entry]:
        """Remove and return all entries that are queued."""
        found = sorted((each for lane in self._lanes.values() for each in lane.queued), key=lambda each: each[0])
        for lane in list(self._lanes.values()):
            lane.queued.clear()
            lane.listed = False
            self._list(lane)
        self._ready.clear()
        self.blocked = 0
        return [entry for _, entry in found]

    def _insert(self, lane: _Lane, entry: Entry) -> None:
        milliseconds, _, sequence = entry[0].partition(b"-")
        item = (int(milliseconds), int(sequence)), entry
        if not lane.queued or lane.queued[-1][0] < item[0]:
            lane.queued.append(item)
        else:
            bisect.insort(lane.queued, item, key=lambda each: each[0])
        if lane.suspended:
            self.blocked += 1

    def _unblock(self, lane: _Lane, entry_id: bytes) -> None:
        if entry_id in lane.suspended:
            lane.suspended.discard(entry_id)
            if not lane.suspended:
                self.blocked -= len(lane.queued)

    def _list(self, lane: _Lane) -> None:
        if not lane.busy and not lane.suspended and not lane.listed:
            if lane.queued:
                lane.listed = True
                self._ready.append(lane)
            else:
                self._lanes.pop(lane.key, None)
