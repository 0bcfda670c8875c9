"""Finds numbers that are missing in the sequences of producers. No I/O and no clock.

Producers number their events of each stream. A reader that receives all events of a stream therefore sees a hole where
an event is missing: the server lost it, or its publication failed. It is a second witness beside positions, and the
only one if no process has survived that knew the lost entries.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

_MAX_PRODUCERS: Final = 10_000
_MAX_AHEAD: Final = 100_000


@dataclass(slots=True)
class _Producer:
    """Numbers of one producer: all below `following` were seen or reported; `ahead` are later ones, with their time."""

    following: int
    ahead: dict[int, float] = field(default_factory=dict)

    def advance(self) -> None:
        while self.following in self.ahead:
            del self.ahead[self.following]
            self.following += 1


class SequenceWatch:
    """The sequences of one stream."""

    def __init__(self, grace: float) -> None:
        """Create the watch; a number that arrives within `grace` seconds after a later one is not missing."""
        self._grace = grace
        self._producers: OrderedDict[str, _Producer] = OrderedDict()

    def saw(self, numbers: Iterable[tuple[str, int, bool]], now: float) -> None:
        """Take note of events: producer, number, and whether it was delivered for the first time.

        The first number of a producer begins its sequence, unless it was delivered before: then others after it may
        have been processed already.
        """
        for producer, number, fresh in numbers:
            found = self._producers.get(producer)
            if found is None:
                if not fresh:
                    continue
                found = self._producers[producer] = _Producer(number)
                if len(self._producers) > _MAX_PRODUCERS:
                    self._producers.popitem(last=False)
            if number == found.following and not found.ahead:
                found.following += 1
            elif number >= found.following:
                found.ahead.setdefault(number, now)
                found.advance()

    def missing(self, now: float) -> dict[str, int]:
        """Return the numbers of missing events by producer; each is returned once."""
        holes = {}
        for name, each in self._producers.items():
            count = 0
            while each.ahead:
                first = min(each.ahead)
                if now - each.ahead[first] < self._grace and len(each.ahead) < _MAX_AHEAD:
                    break
                count += first - each.following
                each.following = first
                each.advance()
            if count:
                holes[name] = count
        return holes
