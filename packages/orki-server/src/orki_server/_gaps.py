"""Gaps in the progress that a watcher reads."""

from __future__ import annotations

from orki.control.v1 import task_pb2 as pb
from orki_server._store.replies import StoredProgress


class GapFinder:
    """Finds the progress that is missing between the entries that one watcher reads.

    Args:
        after: Cursor at which the watcher begins; empty for the beginning.
        position: Position of the last progress or gap that the watcher has; None if it is unknown.
    """

    def __init__(self, after: str, position: pb.ProgressPosition | None) -> None:
        self._cursor = after
        self._last = (position.attempt, position.index, position.number) if position else (0, 0, 0)
        # Progress that an older orchestrator stored has no number.
        self._known = self._last[2] > 0 or not after

    def before(self, entry: StoredProgress) -> list[pb.ProgressGap]:
        """Return the gaps before an entry, and the entry itself if it only ends a gap."""
        cursor, attempt, index, number = entry.cursor, entry.attempt, entry.index, entry.number
        last_attempt, last_index, last_number = self._last
        missing = max(0, number - last_number - 1) if self._known else 0
        here = min(missing, index - 1)
        gaps = []
        if missing > here:
            # The rest of an earlier attempt, and perhaps whole attempts after it, were trimmed.
            last = last_index + missing - here
            gaps.append(self._gap(self._cursor, last_attempt or 1, last_index + 1, last, last_number + missing - here))
        if here or entry.dropped:
            before = 0 if entry.dropped else 1
            end = cursor if entry.dropped else self._cursor
            gaps.append(self._gap(end, attempt, index - here, index - before, number - before))
        self._cursor, self._known, self._last = cursor, number > 0, (attempt, index, number)
        return gaps

    @staticmethod
    def _gap(cursor: str, attempt: int, first: int, last: int, number: int) -> pb.ProgressGap:
        return pb.ProgressGap(cursor=cursor, attempt=attempt, first_index=first, last_index=last, number=number)
