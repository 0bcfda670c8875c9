"""Event ids that a consumer has seen, so that what a publisher repeated is handled once."""

from __future__ import annotations

__all__ = ["SeenEvents"]

from collections.abc import Iterable, Sequence


class SeenEvents:
    """A bounded set in two generations: the older one is dropped whole when the younger is full.

    It remembers at least the last `window` ids. An id is added when its event is handed out and taken out when that
    fails, so an event counts as seen only while another copy of it is, or was, handled.
    """

    __slots__ = ("_old", "_window", "_young")

    def __init__(self, window: int) -> None:
        """Args: window: ids to remember; 0 remembers none."""
        self._window = window
        self._young: dict[bytes, None] = {}
        self._old: dict[bytes, None] = {}

    def add(self, event_ids: Sequence[bytes]) -> list[int]:
        """Remembers ids; returns the places of those that were known before, or stand twice in the sequence."""
        if not self._window:
            return []
        repeated = []
        fresh = dict.fromkeys(event_ids)
        if len(fresh) == len(event_ids) and self._young.keys().isdisjoint(fresh) and self._old.keys().isdisjoint(fresh):
            self._young.update(fresh)
        else:
            for place, event_id in enumerate(event_ids):
                if event_id in self._young or event_id in self._old:
                    repeated.append(place)
                else:
                    self._young[event_id] = None
        if len(self._young) >= self._window:
            self._old, self._young = self._young, {}
        return repeated

    def discard(self, event_ids: Iterable[bytes]) -> None:
        """Forgets ids."""
        for event_id in event_ids:
            self._young.pop(event_id, None)
            self._old.pop(event_id, None)
