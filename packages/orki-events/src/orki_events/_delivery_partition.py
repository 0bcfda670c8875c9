"""The state that a consumer keeps of one partition: held entries, settled entries and positions. No I/O."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Final

from orki_events._delivery_queue import KeyedQueue, PlainQueue
from orki_events._delivery_table import Ack, Entry, Outcome

START: Final = b"0-0"
"""The position before every entry; as a claim's cursor, the end of a sweep."""

_MAX_ACKED: Final = 2_000  # A Lua script cannot unpack more than some 8,000 values.
_UNEVEN: Final = 4
_SIZE: Final = operator.itemgetter(1)


@dataclass(slots=True, eq=False)
class Partition:
    """One partition, as one consumer sees it.

    Attributes:
        key: Its Redis key.
        queue: Held entries that no handler has.
        owned: Whether the consumer may read and dispatch its entries, until the time `until`.
        withdrawn: Whether the consumer gives the partition up as soon as its handlers have ended.
        takeover: Whether pending entries of earlier owners must be claimed before new ones are read.
        recovery: Id after which the consumer's own pending entries must be read again; None when that is done.
        held: Time of arrival and size of each held entry, by id.
        size: Total size of the held entries.
        waiting: Held entries that wait for a retry.
        waiting_size: Their total size.
        deliveries: Deliveries of held entries that were delivered more than once, by id.
        foreign: Held entries that other consumers have claimed.
        detached: Held entries that were trimmed. The server counts them as lost until they are settled.
        leaving: Entries that are being handed back.
        settled: Entries whose acknowledgement is not confirmed yet.
        lost_unnamed: Number of pending entries that were trimmed and that the server has removed itself.
        kept: Number of lost entries whose report is withheld since they are held.
        cursor: Cursor of the next claim.
        sweep_at: Time of the next claim.
        sweeping, renewing, acking: Whether a Claim, a Renew or an Ack is in progress.
        stale_claim: Whether the Claim in progress began before the consumer owned the partition again.
    """

    key: str
    queue: PlainQueue | KeyedQueue = field(default_factory=PlainQueue)
    owned: bool = True
    until: float = inf
    withdrawn: bool = False
    takeover: bool = False
    recovery: bytes | None = START
    held: dict[bytes, tuple[float, int]] = field(default_factory=dict)
    size: int = 0
    waiting: set[bytes] = field(default_factory=set)
    waiting_size: int = 0
    deliveries: dict[bytes, int] = field(default_factory=dict)
    foreign: set[bytes] = field(default_factory=set)
    detached: set[bytes] = field(default_factory=set)
    leaving: set[bytes] = field(default_factory=set)
    settled: set[bytes] = field(default_factory=set)
    lost_unnamed: int = 0
    kept: int = 0
    cursor: bytes = START
    sweep_at: float = 0.0
    sweeping: bool = False
    renewing: bool = False
    acking: bool = False
    stale_claim: bool = False
    _waiting: dict[Outcome, list[bytes]] = field(default_factory=lambda: {outcome: [] for outcome in Outcome})
    _regained: dict[Outcome, int] = field(default_factory=dict)
    _acking: Outcome = Outcome.DECLARED_LOST

    @property
    def unfinished(self) -> bool:
        return self.recovery is not None or bool(self.settled) or bool(self.lost_unnamed) or bool(self.kept)

    @property
    def retained(self) -> tuple[int, int]:
        """Number and size of the entries that wait for a retry, or behind one that does."""
        blocked = self.queue.blocked
        behind = blocked * self.size // len(self.held) if blocked else 0
        return len(self.waiting) + blocked, self.waiting_size + behind

    def active(self, now: float) -> bool:
        """Whether the consumer may begin to handle entries."""
        return self.owned and not self.withdrawn and now < self.until

    def admit(self, entries: list[Entry], deliveries: Mapping[bytes, int], now: float) -> list[Entry]:
        """Hold entries and return those to dispatch: neither known already nor trimmed."""
        ids = [entry[0] for entry in entries]
        if not (self.held.keys().isdisjoint(ids) and self.settled.isdisjoint(ids) and self.leaving.isdisjoint(ids)):
            self.foreign.difference_update(ids)
            known = self.held.keys() | self.settled | self.leaving
            entries = [entry for entry in entries if entry[0] not in known]
            ids = [entry[0] for entry in entries]
        lost = [entry[0] for entry in entries if entry[1] is None]
        if lost:
            self.settle(lost, Outcome.DECLARED_LOST)
            entries = [entry for entry in entries if entry[1] is not None]
            ids = [entry[0] for entry in entries]
        if entries:
            # The fields that are large: the envelope, which comes first, and the message, which comes last.
            self._hold(ids, [len(entry[1][1]) + len(entry[1][-1]) for entry in entries], now)
        if deliveries:
            self.deliveries.update((each, deliveries[each]) for each in ids if deliveries.get(each, 1) > 1)
        return entries

    def _hold(self, ids: list[bytes], sizes: list[int], now: float) -> None:
        total = sum(sizes)
        if max(sizes) * len(sizes) <= total * _UNEVEN:
            # One mark for all: their sizes differ little.
            mean = total // len(sizes)
            self.size += mean * len(sizes)
            self.held.update(dict.fromkeys(ids, (now, mean)))
        else:
            self.size += total
            self.held.update((entry_id, (now, size)) for entry_id, size in zip(ids, sizes, strict=True))

    def held_by_count(self, entries: list[Entry]) -> dict[int, list[bytes]]:
        """Return the ids among `entries` that are held already, by their number of deliveries."""
        found: dict[int, list[bytes]] = {}
        if self.held and not self.held.keys().isdisjoint([entry[0] for entry in entries]):
            for entry in entries:
                if entry[0] in self.held:
                    found.setdefault(self.deliveries.get(entry[0], 1), []).append(entry[0])
        return found

    def wait(self, entry_id: bytes) -> None:
        """Note that an entry waits for its retry."""
        self.waiting.add(entry_id)
        self.waiting_size += self.held[entry_id][1]
        self.queue.suspend(entry_id)

    def end_wait(self, entry_id: bytes) -> None:
        self.waiting.discard(entry_id)
        self.waiting_size -= self.held[entry_id][1]

    def settle(self, entry_ids: Sequence[bytes], outcome: Outcome) -> None:
        """Stop holding entries and queue their acknowledgement."""
        if self.detached and (regained := self.detached.intersection(entry_ids)):
            # Those are not pending any more; their count moves from the lost ones to the outcome.
            self.detached -= regained
            self._regained[outcome] = self._regained.get(outcome, 0) + len(regained)
            self.forget(list(regained))
            entry_ids = [entry_id for entry_id in entry_ids if entry_id not in regained]
        self.forget(entry_ids)
        self.settled.update(entry_ids)
        self._waiting[outcome].extend(entry_ids)

    def detach(self, entry_ids: Iterable[bytes]) -> None:
        """Note that the server has dropped held entries: they are handled from this consumer's copy."""
        fresh = [entry_id for entry_id in entry_ids if entry_id in self.held and entry_id not in self.detached]
        self.detached.update(fresh)
        self.kept += len(fresh)

    def remove(self, entry_ids: Sequence[bytes]) -> None:
        """Note that the server has removed trimmed entries from the pending ones; those in hand are kept."""
        self.lost_unnamed += len(entry_ids)
        self.detach(entry_ids)
        for entry_id in self.settled.intersection(entry_ids):
            # Handled, but trimmed before its acknowledgement, which therefore counts nothing.
            outcome = next((each for each, waiting in self._waiting.items() if entry_id in waiting), self._acking)
            if outcome is not Outcome.DECLARED_LOST:
                self._regained[outcome] = self._regained.get(outcome, 0) + 1
                self.kept += 1

    def detach_pending(self, entry_ids: Sequence[bytes]) -> None:
        """Declare trimmed entries as lost that are still pending; those that are held are kept."""
        self.detach(entry_ids)
        self.settled.update(entry_ids)
        self._waiting[Outcome.DECLARED_LOST].extend(entry_ids)

    def forget(self, entry_ids: Sequence[bytes]) -> None:
        if self.waiting:
            for entry_id in self.waiting.intersection(entry_ids):
                self.end_wait(entry_id)
        marks = map(self.held.pop, entry_ids, itertools.repeat(None))
        self.size -= sum(map(_SIZE, filter(None, marks)))
        self.queue.release(entry_ids)
        if self.deliveries:
            for entry_id in entry_ids:
                self.deliveries.pop(entry_id, None)
        if self.foreign:
            self.foreign.difference_update(entry_ids)
        if self.detached and (dropped := self.detached.intersection(entry_ids)):
            self.detached -= dropped
            self.kept -= len(dropped)

    def next_ack(self) -> Ack | None:
        """Return the next acknowledgement to send; None while one is in progress or if there is none."""
        if self.acking:
            return None
        for outcome, waiting in self._waiting.items():
            is_loss = outcome is Outcome.DECLARED_LOST
            regained = self._regained.pop(outcome, 0) if self._regained else 0
            if waiting or regained or (is_loss and (self.lost_unnamed or self.kept)):
                extra = kept = 0
                if is_loss:
                    extra, self.lost_unnamed = self.lost_unnamed, 0
                    kept, self.kept = self.kept, 0
                self._waiting[outcome] = waiting[_MAX_ACKED:]
                self.acking, self._acking = True, outcome
                return Ack(self.key, waiting[:_MAX_ACKED], outcome, extra + regained, kept, regained)
        return None

    def due_for_renewal(self, now: float, interval: float, limit: float) -> list[bytes]:
        """Return entries held for longer than half an interval and shorter than the limit, if the server has them."""
        return [
            entry_id
            for entry_id, (since, _) in self.held.items()
            if now - limit < since <= now - interval / 2
            and entry_id not in self.foreign
            and entry_id not in self.detached
        ]
