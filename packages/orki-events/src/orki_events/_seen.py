"""The event ids that a consumer has seen, by which it skips repeated events."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class SeenEvents:
    """A bounded set of event ids in two generations: the older one is dropped when the younger one is full.

    It remembers at least the last `window` ids. An id is added when its event is handed out and removed when the
    handler fails, so a repeated event is dropped only while another copy is being handled or was handled.
    """

    __slots__ = ("_old", "_window", "_young")

    def __init__(self, window: int) -> None:
        """Create the set; a window of 0 remembers nothing."""
        self._window = window
        self._young: dict[bytes, None] = {}
        self._old: dict[bytes, None] = {}

    def add(self, event_ids: Sequence[bytes]) -> list[int]:
        """Add ids and return the indexes of those that are repeated: known before, or earlier in the sequence."""
        if not self._window:
            return []
        repeated = []
        fresh = dict.fromkeys(event_ids)
        if len(fresh) == len(event_ids) and self._young.keys().isdisjoint(fresh) and self._old.keys().isdisjoint(fresh):
            self._young.update(fresh)
        else:
            for index, event_id in enumerate(event_ids):
                if event_id in self._young or event_id in self._old:
                    repeated.append(index)
                else:
                    self._young[event_id] = None
        if len(self._young) >= self._window:
            self._old, self._young = self._young, {}
        return repeated

    def add_one(self, event_id: bytes) -> bool:
        """Add an id and return whether it is new."""
        if not self._window:
            return True
        young = self._young
        if event_id in young or event_id in self._old:
            return False
        young[event_id] = None
        if len(young) >= self._window:
            self._old, self._young = young, {}
        return True

    def discard(self, event_ids: Iterable[bytes]) -> None:
        for event_id in event_ids:
            self._young.pop(event_id, None)
            self._old.pop(event_id, None)
