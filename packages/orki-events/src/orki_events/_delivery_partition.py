"""What a consumer knows of one partition: what it holds, what it has settled, where it looks next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from orki_events._delivery_table import Ack, Entry, Outcome

START: Final = b"0-0"
"""Before every entry; as a claim's cursor: the sweep is complete."""

_MOST_ACKED: Final = 2_000  # A Lua script unpacks no more than some 8,000 values.


def _no_outcomes() -> dict[Outcome, list[bytes]]:
    return {outcome: [] for outcome in Outcome}


@dataclass(slots=True, eq=False)
class Partition:
    """One partition, as one consumer sees it.

    Attributes:
        key: Its Redis key.
        place: Id behind which the consumer's own pending entries are read again; None when that is done.
        held: When each entry in hand came, by id.
        deliveries: How often entries in hand were delivered, where it is more than once.
        foreign: Entries in hand that others have claimed.
        settled: Entries that wait for their acknowledgement to be sent or answered.
        lost_unnamed: Entries trimmed while pending that the server has dropped itself.
        cursor: Where the next claim goes on.
        sweep_at: When it is due.
        sweeping, renewing, acking: Whether such a command is under way.
    """

    key: str
    place: bytes | None = START
    held: dict[bytes, float] = field(default_factory=dict)
    deliveries: dict[bytes, int] = field(default_factory=dict)
    foreign: set[bytes] = field(default_factory=set)
    settled: dict[bytes, None] = field(default_factory=dict)
    lost_unnamed: int = 0
    cursor: bytes = START
    sweep_at: float = 0.0
    sweeping: bool = False
    renewing: bool = False
    acking: bool = False
    _waiting: dict[Outcome, list[bytes]] = field(default_factory=_no_outcomes)

    @property
    def unfinished(self) -> bool:
        """Whether anything is left to read again or to acknowledge."""
        return self.place is not None or bool(self.settled) or bool(self.lost_unnamed)

    def admit(self, entries: list[Entry], deliveries: Mapping[bytes, int], now: float) -> list[Entry]:
        """Takes entries in hand; returns those to dispatch: neither known already, nor trimmed."""
        ids = [entry[0] for entry in entries]
        if not (self.held.keys().isdisjoint(ids) and self.settled.keys().isdisjoint(ids)):
            self.foreign.difference_update(ids)
            entries = [entry for entry in entries if entry[0] not in self.held and entry[0] not in self.settled]
            ids = [entry[0] for entry in entries]
        lost = [entry[0] for entry in entries if entry[1] is None]
        if lost:
            self.settle(lost, Outcome.DECLARED_LOST)
            entries = [entry for entry in entries if entry[1] is not None]
            ids = [entry[0] for entry in entries]
        self.held.update(dict.fromkeys(ids, now))
        if deliveries:
            self.deliveries.update((each, deliveries[each]) for each in ids if deliveries.get(each, 1) > 1)
        return entries

    def held_by_count(self, entries: list[Entry]) -> dict[int, list[bytes]]:
        """The ids among these that are in hand already, by the number of their deliveries."""
        found: dict[int, list[bytes]] = {}
        if self.held and not self.held.keys().isdisjoint([entry[0] for entry in entries]):
            for entry in entries:
                if entry[0] in self.held:
                    found.setdefault(self.deliveries.get(entry[0], 1), []).append(entry[0])
        return found

    def settle(self, entry_ids: Sequence[bytes], outcome: Outcome) -> None:
        """Lets entries go, and remembers to acknowledge them."""
        self.forget(entry_ids)
        self.settled.update(dict.fromkeys(entry_ids))
        self._waiting[outcome].extend(entry_ids)

    def forget(self, entry_ids: Sequence[bytes]) -> None:
        """Lets entries go."""
        for entry_id in entry_ids:
            self.held.pop(entry_id, None)
        if self.deliveries:
            for entry_id in entry_ids:
                self.deliveries.pop(entry_id, None)
        self.foreign.difference_update(entry_ids)

    def next_ack(self) -> Ack | None:
        """The next acknowledgement to send; None while one is under way, or when there is none."""
        if self.acking:
            return None
        for outcome, waiting in self._waiting.items():
            if waiting or (outcome is Outcome.DECLARED_LOST and self.lost_unnamed):
                extra, self.lost_unnamed = (
                    (self.lost_unnamed, 0) if outcome is Outcome.DECLARED_LOST else (0, self.lost_unnamed)
                )
                self._waiting[outcome] = waiting[_MOST_ACKED:]
                self.acking = True
                return Ack(self.key, waiting[:_MOST_ACKED], outcome, extra)
        return None

    def due_for_renewal(self, now: float, interval: float, limit: float) -> list[bytes]:
        """What is in hand for longer than half an interval and shorter than the limit, and still ours."""
        return [
            entry_id
            for entry_id, since in self.held.items()
            if now - limit < since <= now - interval / 2 and entry_id not in self.foreign
        ]
