"""The position machine: finds out by positions what a partition lost, for one group or for the partition itself.

It compares three witnesses: the server's state, the records on the server, and what this process knew before. Two
kinds of loss follow from positions alone:

* *Trimmed unread*: the oldest entries left are beyond the position that a group had reached. The group lost the
  entries between, less those that it received before they were trimmed.
* *Rolled back*: a position that was known has a lower ordinal than before, so the server lost entries that it had
  accepted. A restart with older files, a failover to a replica that lagged, or a flush does that.

A loss is declared once: the machine's `Write` is carried out only if no other process has written meanwhile. Each
process that knows the group or the partition is told. No I/O, no clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from orki_contract.errors import LocalProtocolError
from orki_events._position_table import (
    TRANSITIONS,
    ZERO,
    Agreed,
    Arrived,
    Change,
    ChangeFound,
    Command,
    Counted,
    CountNeeded,
    Declared,
    Event,
    GroupRecord,
    GroupState,
    Id,
    Loss,
    LossKind,
    Measure,
    Observed,
    Reopened,
    Settled,
    Snapshot,
    State,
    StreamRecord,
    Tell,
    Write,
    Written,
    id_before,
    id_text,
)

_CONFIRM: Final = 0.1
"""Pause before a loss is computed again: a consumer may be counting entries that a claim has just removed."""


@dataclass(frozen=True, slots=True)
class View:
    """A snapshot with the number of entries that the partition ever received; `exact` if the server counts them."""

    snapshot: Snapshot
    added: int
    exact: bool

    @classmethod
    def of(cls, snapshot: Snapshot, at_least: int = 0) -> View:
        """Return the view; before Redis 7, the number derives from the record, and is a lower bound."""
        if snapshot.added is not None:
            return cls(snapshot, snapshot.added, True)
        record = snapshot.record
        if record is None:
            return cls(snapshot, max(snapshot.length, at_least), at_least <= snapshot.length)
        more = snapshot.length - record.length
        exact = record.length == 0 or snapshot.first == record.first
        if not exact and snapshot.first > record.last:
            more = snapshot.length
        found = record.added + max(more, 0)
        return cls(snapshot, max(found, at_least), exact and found >= at_least)

    @property
    def trimmed(self) -> int:
        """Number of entries that are not in the partition any more."""
        return max(self.added - self.snapshot.length, 0)

    def reach(self, position: Id) -> int | None:
        """Return the number of entries that came before or at a position, or are gone; None if it must be counted."""
        snapshot = self.snapshot
        if not snapshot.exists or position >= snapshot.last:
            return self.added
        if snapshot.length == 0 or position < snapshot.first:
            return self.trimmed
        counted = snapshot.counted.get(position)
        if counted is None:
            return None
        if counted.after is not None:
            return self.added - counted.after
        return None if counted.upto is None else self.trimmed + counted.upto

    @property
    def rolled_back(self) -> int:
        """Number of entries that the server lost although it had accepted them."""
        return self.snapshot.record.rolled_back if self.snapshot.record is not None else 0

    def floor(self, position: Id) -> Id:
        """Return the newest entry up to a position, as far as it is known without another snapshot."""
        snapshot = self.snapshot
        if position >= snapshot.last:
            return snapshot.last if snapshot.exists else ZERO
        return snapshot.counted.get(position, Counted(None, None)).floor


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a group has come.

    Attributes:
        reach: Number of entries that it has received or cannot receive any more.
        lost: Of these, the entries that were trimmed or deleted unread since the group's record.
        exact: Whether both figures are exact; otherwise, at least as many were lost.
    """

    reach: int
    lost: int
    exact: bool


def first_record(view: View, group: GroupState) -> GroupRecord:
    """Return the record of a group that has none: it begins at the group's start, if that is known."""
    if group.start is not None:
        return GroupRecord(read=group.start[0], reach=group.start[1])
    reach = view.reach(group.read)
    return GroupRecord(read=group.read, reach=view.trimmed if reach is None else reach, received=group.received)


def progress(view: View, group: GroupState) -> Progress | None:
    """Return how far a group has come; None if the entries around its position must be counted first."""
    record = group.record or first_record(view, group)
    received = group.received - record.received
    deleted = view.snapshot.deleted > record.read
    stepped_back = group.read < record.read
    reach = view.reach(group.read)
    if not (view.trimmed > record.reach or deleted or stepped_back):
        return Progress(min(record.reach + max(received, 0), view.added) if reach is None else reach, 0, view.exact)
    exact = view.exact
    if reach is None:
        if group.read not in view.snapshot.counted:
            return None
        reach, exact = max(record.reach + max(received, 0), view.trimmed), False
    if stepped_back:
        # The group was created again, or set back: it receives entries again, and only what was trimmed is lost.
        lost = max(view.trimmed - record.reach, 0)
        return Progress(reach, lost, exact and not lost)
    most = view.trimmed if deleted else max(view.trimmed - record.reach, 0)
    return Progress(reach, min(max(reach - record.reach - received, 0), most), exact)


@dataclass(slots=True)
class _Memory:
    """What this process knew. Totals are ordinals that include what the server had lost before.

    Attributes:
        server: The server's identity.
        last: The newest entry.
        total: Its total.
        recorded: Whether the server had a record.
        read: The newest entry that the group received.
        reach: Total of `read`, or of the entries that were trimmed.
        unsettled: Entries that the group received and had not settled.
        lost: Losses of the group that its counters contain.
    """

    server: str
    last: Id
    total: int
    recorded: bool
    read: Id = ZERO
    reach: int = 0
    unsettled: int = 0
    lost: int = 0


def group_lost(view: View, group: GroupState) -> int:
    """Return how many entries a group has lost unread, those included that nobody has declared yet."""
    made = progress(view, group)
    return (group.record.lost if group.record is not None else 0) + (made.lost if made is not None else 0)


def _still(group: GroupState) -> bool:
    """Whether the group holds nothing and received nothing since its record: then no counter is on its way."""
    return not group.pending and group.record is not None and group.read == group.record.read


class PositionMachine:
    """Compares one group's position, or with an empty name that of the partition, with what was known before."""

    def __init__(self, group: str = "", *, consumes: bool = False) -> None:
        """Create the machine; `consumes` tells that this process has a consumer of the group."""
        self.group = group
        self._consumes = consumes
        self._state = State.NEW
        self._memory: _Memory | None = None
        self._next: _Memory | None = None
        self._doubtful = False
        self._candidate: int | None = None
        self._losses: tuple[Declared, ...] = ()
        self._told: dict[LossKind, int] = {}
        self._emitted: dict[LossKind, int] = {}
        self._notes: list[Arrived | Settled] = []

    @property
    def state(self) -> State:
        """The current stage."""
        return self._state

    def consume(self) -> None:
        """Take note that this process has a consumer of the group, which is told of losses that nobody was told of."""
        if not self._consumes:
            self._consumes = True
            self._told = dict(self._emitted)

    def receive(self, event: Event) -> list[Command]:
        """Apply an event and return the commands that follow.

        Raises:
            LocalProtocolError: The event is illegal in this state.
        """
        before = self._state
        self._move(type(event))
        if isinstance(event, Observed):
            return self._compare(event.snapshot, before)
        if isinstance(event, Arrived | Settled):
            if before is State.FOLLOWING:
                self._note(event)
            elif before in (State.MEASURING, State.WRITING):
                self._notes.append(event)
        elif isinstance(event, Reopened):
            self._doubtful = self._memory is not None
            self._notes.clear()
        elif isinstance(event, Written):
            return self._adopt()
        elif self._state is State.DOUBTFUL:
            self._candidate = None
            self._notes.clear()
        return []

    def _move(self, event: type[Event]) -> None:
        self._state = TRANSITIONS.next(self._state, event, LocalProtocolError)

    def _compare(self, snapshot: Snapshot, before: State) -> list[Command]:
        self._doubtful = self._doubtful or (before is State.DOUBTFUL and self._memory is not None)
        view = self._view(snapshot)
        group = snapshot.groups.get(self.group)
        witnesses = self._witnesses(view)
        # Counted also for the newest entry up to there, which tells where the server's history ends.
        ids = {each.last for each in witnesses if snapshot.first <= each.last < snapshot.last}
        made = progress(view, group) if group is not None else None
        missing = ids - snapshot.counted.keys()
        if missing or (group is not None and made is None):
            return self._measure(missing, group is not None)
        if made is not None and group is not None and made.lost and not _still(group):
            if self._candidate is None:
                self._candidate = made.lost
                return self._measure(ids, True, _CONFIRM)
            # What came on top is left for the next comparison.
            surplus = max(made.lost - self._candidate, 0)
            made = replace(made, lost=made.lost - surplus, reach=made.reach - surplus)
        self._candidate = None
        return self._conclude(view, group, made, witnesses)

    def _measure(self, ids: set[Id], position: bool, pause: float = 0.0) -> list[Command]:
        self._move(CountNeeded)
        return [Measure(tuple(sorted(ids)), position, pause)]

    def _view(self, snapshot: Snapshot) -> View:
        memory = self._memory
        vanished = memory is not None and memory.recorded and snapshot.record is None
        if memory is None or self._doubtful or vanished or snapshot.last < memory.last:
            return View.of(snapshot)
        if snapshot.server != memory.server:
            return View.of(snapshot)
        lost = snapshot.record.lost_before(memory.last) if snapshot.record is not None else 0
        return View.of(snapshot, max(memory.total - lost, 0))

    def _witnesses(self, view: View) -> list[_Memory]:
        """Return the earlier positions that must be looked up in the server's history."""
        snapshot, found = view.snapshot, []
        record = snapshot.record
        known = [] if self._memory is None else [self._memory]
        if record is not None:
            known.append(_Memory(record.server, record.last, record.added + record.lost_before(record.last), True))
        for each in known:
            moved = snapshot.server != each.server or (each.recorded and record is None)
            doubtful = self._doubtful and each is self._memory and not snapshot.server
            behind = view.added + (record.rolled_back if record is not None else 0) < each.total
            if moved or doubtful or behind or each.last > snapshot.last:
                found.append(each)
        return found

    def _conclude(
        self, view: View, group: GroupState | None, made: Progress | None, witnesses: Sequence[_Memory]
    ) -> list[Command]:
        snapshot = view.snapshot
        stream, losses = _rolled_back(view, witnesses)
        self._next = _Memory(
            snapshot.server, snapshot.last, view.added + stream.lost_before(snapshot.last), snapshot.record is not None
        )
        changes = []
        if stream.text().encode() != snapshot.raw:
            changes.append(Change(False, "stream", snapshot.raw, stream.text()))
            self._next.recorded = True
        told = list(losses)
        if group is not None and made is not None:
            changes += self._group(view, group, made, stream, losses, told)
        elif not self.group and not losses:
            before = snapshot.record.rolled_back if snapshot.record is not None else 0
            told += self._untold(LossKind.ROLLED_BACK, stream.rolled_back, before, stream)
        self._losses = tuple(told)
        if changes:
            self._move(ChangeFound)
            return [Write(tuple(changes), tuple(losses))]
        self._move(Agreed)
        return self._adopt()

    def _group(
        self,
        view: View,
        group: GroupState,
        made: Progress,
        stream: StreamRecord,
        losses: list[Declared],
        told: list[Declared],
    ) -> list[Change]:
        """Add the group's losses to `losses` if they are new, and to `told`; return the changes of its fields."""
        record = group.record or first_record(view, group)
        kept, kept_until = self._kept(view, group, record)
        lost = record.lost + made.lost
        rolled_back = max(stream.rolled_back - group.base - kept, 0)
        if made.lost:
            until = id_before(view.snapshot.first) if view.snapshot.length else view.snapshot.last
            kind = LossKind.TRIMMED_UNREAD
            losses.append(Declared(kind, self.group, made.lost, made.exact, record.read, until, lost))
        trimmed = losses[-1:] if made.lost else []
        told_trimmed, told_rolled_back = record.told_trimmed, record.told_rolled_back
        if self._consumes:
            told += self._untold(LossKind.TRIMMED_UNREAD, lost, told_trimmed, stream, trimmed)
            untold = self._untold(LossKind.ROLLED_BACK, rolled_back, told_rolled_back, stream)
            if self._memory is not None and self._memory.unsettled == 0:
                untold = [replace(each, exact=view.exact) for each in untold]
            told += untold
            if rolled_back > told_rolled_back:
                losses += untold
            told_trimmed, told_rolled_back = lost, max(rolled_back, told_rolled_back)
        else:
            # Only what it declares itself: a consumer knows better what the group had settled.
            told += trimmed
        new = GroupRecord(
            read=group.read,
            reach=made.reach,
            received=group.received,
            lost=lost,
            kept=kept,
            kept_until=kept_until,
            told_trimmed=told_trimmed,
            told_rolled_back=told_rolled_back,
        )
        assert self._next is not None
        self._next.read = group.read
        self._next.reach = made.reach + stream.lost_before(group.read)
        self._next.unsettled = group.pending
        self._next.lost = lost + group.declared_lost
        changes = []
        if new.text().encode() != group.raw:
            changes.append(Change(False, f"group:{self.group}", group.raw, new.text()))
        if self._consumes:
            cursor = f"{id_text(group.settled)} {view.added}"
            if cursor.encode() != group.cursor:
                changes.append(Change(True, f"cursor:{self.group}", group.cursor, cursor))
        return changes

    def _kept(self, view: View, group: GroupState, record: GroupRecord) -> tuple[int, int]:
        """Count the entries that this process knows the group to have settled before the server lost them."""
        memory = self._memory
        if memory is None or (reach := view.reach(memory.last)) is None:
            return record.kept, record.kept_until
        found = view.snapshot.record or StreamRecord()
        floor = view.floor(memory.last)
        survivors = reach + found.lost_before(floor)
        if floor == memory.last or survivors >= memory.total:
            return record.kept, record.kept_until
        settled = memory.reach - memory.unsettled
        fresh = settled - max(survivors, record.kept_until) - max(memory.lost - record.lost - group.declared_lost, 0)
        return record.kept + max(fresh, 0), max(record.kept_until, settled)

    def _untold(
        self, kind: LossKind, total: int, known: int, stream: StreamRecord, declared: Sequence[Declared] = ()
    ) -> list[Declared]:
        """Return what this process was not told yet; `known` is the total of which it need not be told."""
        before = self._told.setdefault(kind, known)
        if total <= before:
            return []
        if declared and declared[0].count == total - before:
            return list(declared)
        recent = stream.losses[-1] if kind is LossKind.ROLLED_BACK and stream.losses else Loss(ZERO, ZERO, 0)
        return [Declared(kind, self.group, total - before, False, recent.after, recent.until, total)]

    def _adopt(self) -> list[Command]:
        told, self._losses = self._losses, ()
        self._memory, self._next = self._next, None
        self._doubtful = False
        notes, self._notes = self._notes, []
        for note in notes:
            self._note(note)
        for each in told:
            if each.group == self.group:
                self._told[each.kind] = self._emitted[each.kind] = each.total
        return [Tell(told)] if told else []

    def _note(self, event: Arrived | Settled) -> None:
        memory = self._memory
        if memory is None:
            return
        if isinstance(event, Settled):
            memory.unsettled = max(memory.unsettled - event.count, 0)
            return
        known = memory.read if self.group else memory.last
        if event.last <= known:
            return
        # If a snapshot has some of them, at least the newest one is more.
        count = event.count if event.first > known else 1
        if not self.group:
            memory.total, memory.last = memory.total + count, event.last
            return
        memory.read = event.last
        memory.reach += count
        memory.unsettled += count
        if event.last > memory.last:
            memory.total, memory.last = max(memory.total, memory.reach), event.last


def _rolled_back(view: View, witnesses: Sequence[_Memory]) -> tuple[StreamRecord, list[Declared]]:
    """Return the partition's new record, and what the server lost of the positions that were known."""
    snapshot = view.snapshot
    record = snapshot.record or StreamRecord()
    losses = []
    for each in witnesses:
        reach, floor = view.reach(each.last), view.floor(each.last)
        gone = not view.exact and snapshot.exists and each.last < snapshot.first
        if reach is None or floor == each.last or gone:
            # The entry is there, so all before it were; or nothing can be said about it.
            continue
        lost = each.total - reach - record.lost_before(each.last)
        if lost > 0:
            loss = Loss(floor, each.last, lost)
            record = record.with_loss(loss)
            kind = LossKind.ROLLED_BACK
            losses.append(Declared(kind, "", lost, view.exact, floor, each.last, record.rolled_back))
    found = replace(
        record,
        added=view.added,
        length=snapshot.length,
        last=snapshot.last,
        first=snapshot.first,
        deleted=snapshot.deleted,
        server=snapshot.server,
    )
    return found, losses
