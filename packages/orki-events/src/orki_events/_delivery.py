"""The delivery machine: one consumer of one group, as pure decisions. No socket, no clock, no task.

Laws:

1. An entry is acknowledged only after its handler succeeded, its dead letter was written, or it is known to be lost.
2. An entry that may have been given to this consumer without its knowledge is read again before anything new.
3. What is held is bounded (reading and claiming fill a hand of `prefetch` each), and renewed until it is settled,
   handed back, or held too long.
4. A failed entry is dispatched again after its wait, at most `max_deliveries` times in all, and then dead-lettered.
5. A drained consumer leaves nothing behind that others must wait for.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from orki_contract.errors import LocalProtocolError, Reason, RemoteProtocolError
from orki_events._delivery_partition import START, Partition
from orki_events._delivery_table import (
    TRANSITIONS,
    Ack,
    Acked,
    Claim,
    Command,
    CreateGroups,
    DeadLetter,
    DeadLettered,
    DeliverySettings,
    Dispatch,
    DrainAsked,
    EntriesClaimed,
    EntriesRead,
    Entry,
    Event,
    Failed,
    GroupMissing,
    GroupsReady,
    HandBack,
    HandedBack,
    Letter,
    Opened,
    Outcome,
    Read,
    Renew,
    Renewed,
    Returned,
    State,
    Succeeded,
    Unanswered,
    Wanted,
)

_WAIT_S: Final = 0.05
_LONGEST_WAIT_S: Final = 1.0
_MOST_CLAIMED: Final = 100


class DeliveryMachine:
    """Decides. Feed it with `receive` and `handle_timer`, do what they return, and tell it how that ended.

    `now` is in seconds on any clock that does not go back.
    """

    def __init__(self, keys: Sequence[str], settings: DeliverySettings) -> None:
        """Args: keys: of the partitions; settings: the limits."""
        self.state = State.NEW
        self.settings = settings
        self._partitions = {key: Partition(key) for key in keys}
        self._ready: deque[tuple[Partition, list[Entry], int]] = deque()
        self._wanted: deque[int] = deque()
        self._open: set[Command] = set()
        self._reading = False
        self._claiming = 0
        self._read_at = 0.0
        self._renew_at = 0.0
        self._failures = 0
        self._order = itertools.count()
        self._retries: list[tuple[float, int, Partition, Entry]] = []
        self._repeats: list[tuple[float, int, Command]] = []

    @property
    def held(self) -> int:
        """Entries that this consumer holds."""
        return sum(len(partition.held) for partition in self._partitions.values())

    def receive(self, event: Event, now: float) -> list[Command]:
        """Takes in what happened.

        Returns:
            What to do next, in this order.

        Raises:
            LocalProtocolError: The event is not possible in this state, or speaks of what is not there: our defect.
            RemoteProtocolError: The server answered with what was not asked for.
        """
        kind = type(event)
        allowed = TRANSITIONS.get((self.state, kind))
        if allowed is None:
            raise LocalProtocolError(f"{kind.__name__} is not possible while {self.state.value}")
        commands: list[Command] = []
        _HANDLERS[kind](self, event, now, commands)
        self._plan(now, commands)
        if self.state not in allowed:
            raise LocalProtocolError(f"{kind.__name__} led to {self.state.value}, which the table does not allow")
        return commands

    def next_timer(self) -> float | None:
        """When `handle_timer` is due; None for never."""
        if self.state in (State.NEW, State.CLOSED):
            return None
        due = [heap[0][0] for heap in (self._retries, self._repeats) if heap]
        if self.held:
            due.append(self._renew_at)
        if self._read_at and not self._reading:
            due.append(self._read_at)
        if self.state is State.READING:
            due.extend(each.sweep_at for each in self._partitions.values() if not each.sweeping)
        return min(due, default=None)

    def handle_timer(self, now: float) -> list[Command]:
        """Time has passed; harmless when nothing is due."""
        commands: list[Command] = []
        if self.state in (State.NEW, State.CLOSED):
            return commands
        while self._repeats and self._repeats[0][0] <= now:
            self._issue(heapq.heappop(self._repeats)[2], commands)
        while self._retries and self._retries[0][0] <= now:
            _, _, partition, entry = heapq.heappop(self._retries)
            self._retry(partition, entry, commands)
        if self._renew_at <= now:
            self._renew(now, commands)
        if self.state is State.READING:
            # Not before: what is claimed while the own pending entries are read would be delivered twice over.
            self._sweep(now, commands)
        self._plan(now, commands)
        return commands

    # Events.

    def _on_opened(self, event: Opened, now: float, commands: list[Command]) -> None:
        self.state = State.CREATING
        self._issue(CreateGroups(), commands)

    def _on_groups_ready(self, event: GroupsReady, now: float, commands: list[Command]) -> None:
        self._answered(event.command)
        if self.state is State.CREATING:
            self.state = State.RECOVERING
            self._recover(self._partitions)
            for partition in self._partitions.values():
                partition.sweep_at = max(partition.sweep_at, now)

    def _on_entries_read(self, event: EntriesRead, now: float, commands: list[Command]) -> None:
        self._answered(event.command)
        asked = dict(event.command.places)
        if unasked := event.entries.keys() - asked.keys():
            raise RemoteProtocolError(f"the server sent entries of {min(unasked)}, which was not read")
        for key, place in asked.items():
            entries = event.entries.get(key, [])
            partition = self._partitions[key]
            if event.command.history and partition.place == place:
                partition.place = entries[-1][0] if entries else None
            if entries:
                self._take(partition, entries, event.deliveries.get(key, {}), now, commands)
        self._recovered()

    def _on_entries_claimed(self, event: EntriesClaimed, now: float, commands: list[Command]) -> None:
        self._answered(event.command)
        partition = self._partitions[event.command.key]
        partition.cursor = event.cursor
        partition.sweep_at = now if event.cursor != START else now + self.settings.sweep_interval_s
        partition.lost_unnamed += sum(1 for entry_id in event.deleted if entry_id not in partition.held)
        if event.entries:
            self._take(partition, event.entries, event.deliveries, now, commands)

    def _on_acked(self, event: Acked, now: float, commands: list[Command]) -> None:
        self._answered(event.command)
        partition = self._partitions[event.command.key]
        partition.acking = False
        for entry_id in event.command.entry_ids:
            partition.settled.pop(entry_id, None)

    def _on_dead_lettered(self, event: DeadLettered, now: float, commands: list[Command]) -> None:
        self._answered(event.command)
        partition = self._partitions[event.command.key]
        partition.settle([letter.entry[0] for letter in event.command.letters], Outcome.DEAD_LETTERED)

    def _on_renewed(self, event: Renewed, now: float, commands: list[Command]) -> None:
        self._answered(event.command)
        partition = self._partitions[event.command.key]
        partition.foreign.update(entry_id for entry_id in event.gone if entry_id in partition.held)

    def _on_handed_back(self, event: HandedBack, now: float, commands: list[Command]) -> None:
        self._answered(event.command)

    def _on_unanswered(self, event: Unanswered, now: float, commands: list[Command]) -> None:
        command = event.command
        self._close(command)
        wait = min(_WAIT_S * 2.0**self._failures, _LONGEST_WAIT_S)
        self._failures = min(self._failures + 1, 10)
        match command:
            case Read(places=places):
                self._read_at = now + wait
                self._recover(key for key, _ in places)
            case Claim(key=key):
                # What it claimed, if it did, is ours without our knowing which.
                self._partitions[key].sweep_at = now + wait
                self._recover([key])
            case Renew():
                self._renew_at = min(self._renew_at, now + wait)
            case CreateGroups() if self.state is State.DRAINING:
                pass
            case _:
                heapq.heappush(self._repeats, (now + wait, next(self._order), command))

    def _on_group_missing(self, event: GroupMissing, now: float, commands: list[Command]) -> None:
        command = event.command
        self._answered(command)
        match command:
            case Read():
                for partition in self._partitions.values():
                    partition.place = None
            case Ack(key=key, entry_ids=entry_ids):
                self._partitions[key].acking = False
                for entry_id in entry_ids:
                    self._partitions[key].settled.pop(entry_id, None)
            case DeadLetter():
                self._issue(command, commands)
            case _:
                pass
        if self.state is not State.DRAINING:
            self.state = State.CREATING
            if not any(isinstance(each, CreateGroups) for each in (*self._open, *(r[2] for r in self._repeats))):
                # Not at once: a group that somebody destroys over and over must not be made in a hot loop.
                heapq.heappush(self._repeats, (now + _WAIT_S, next(self._order), CreateGroups()))

    def _on_wanted(self, event: Wanted, now: float, commands: list[Command]) -> None:
        if event.count < 1:
            raise LocalProtocolError(f"{event.count} entries wanted")
        self._wanted.append(event.count)

    def _on_returned(self, event: Returned, now: float, commands: list[Command]) -> None:
        partition = self._held_by(event.key, [entry[0] for entry in event.entries])
        self._ready.appendleft((partition, list(event.entries), 0))
        if self.state is State.DRAINING:
            self._hand_back(commands)

    def _on_succeeded(self, event: Succeeded, now: float, commands: list[Command]) -> None:
        self._held_by(event.key, event.entry_ids).settle(event.entry_ids, Outcome.PROCESSED)

    def _on_failed(self, event: Failed, now: float, commands: list[Command]) -> None:
        partition = self._held_by(event.key, [entry[0] for entry in event.entries])
        letters = []
        back: dict[bytes, int] = {}
        for entry in event.entries:
            entry_id = entry[0]
            made = partition.deliveries.get(entry_id, 1)
            if entry_id in partition.foreign:
                # Somebody else has it by now, and its count.
                partition.forget([entry_id])
            elif event.final:
                letters.append(Letter(entry, made, event.reason, event.message))
            elif made >= self.settings.max_deliveries:
                letters.append(Letter(entry, made, Reason.REASON_DELIVERIES_EXHAUSTED, event.message))
            elif self.state is State.DRAINING:
                back[entry_id] = made
                partition.forget([entry_id])
            else:
                due = now + self.settings.backoff.wait_ms(made) / 1_000
                heapq.heappush(self._retries, (due, next(self._order), partition, entry))
        if letters:
            self._issue(DeadLetter(partition.key, tuple(letters)), commands)
        if back:
            self._issue(HandBack(partition.key, back), commands)

    def _on_drain_asked(self, event: DrainAsked, now: float, commands: list[Command]) -> None:
        if self.state is State.NEW:
            self.state = State.CLOSED
        if self.state in (State.CLOSED, State.DRAINING):
            return
        if self.state is State.CREATING:
            # Without a group there is nothing that we might hold unknowingly.
            for partition in self._partitions.values():
                partition.place = None
        self.state = State.DRAINING
        self._wanted.clear()
        self._repeats = [each for each in self._repeats if not isinstance(each[2], CreateGroups)]
        heapq.heapify(self._repeats)
        self._ready.extend((partition, [entry], 0) for _, _, partition, entry in self._retries)
        made = {(id(partition), entry[0]) for _, _, partition, entry in self._retries}
        self._retries.clear()
        self._hand_back(commands, tried=made)

    # What follows from events.

    def _plan(self, now: float, commands: list[Command]) -> None:
        """Issues what has become possible."""
        while self._wanted and self._ready:
            self._dispatch(self._wanted[0], commands)
        for partition in self._partitions.values():
            while (ack := partition.next_ack()) is not None:
                self._issue(ack, commands)
        if not self._reading and self._read_at <= now:
            self._read_at = 0.0
            self._read(commands)
        if self.state is State.DRAINING and not (self._open or self._repeats or self.held or self._unfinished()):
            self.state = State.CLOSED

    def _dispatch(self, limit: int, commands: list[Command]) -> None:
        partition, waiting, begin = self._ready[0]
        entries = waiting[begin : begin + limit]
        if begin + limit < len(waiting):
            # Only the place moves: cutting the list would cost its length for every single entry.
            self._ready[0] = (partition, waiting, begin + limit)
        else:
            self._ready.popleft()
        if partition.foreign:
            stolen = [entry[0] for entry in entries if entry[0] in partition.foreign]
            partition.forget(stolen)
            entries = [entry for entry in entries if entry[0] not in stolen]
        if entries:
            self._wanted.popleft()
            counts = partition.deliveries
            known = {entry[0]: counts[entry[0]] for entry in entries if entry[0] in counts} if counts else {}
            # Not kept open: what was dispatched is answered entry by entry, and `held` knows what is missing.
            commands.append(Dispatch(partition.key, entries, known))

    def _read(self, commands: list[Command]) -> None:
        free = self.settings.prefetch - self.held
        if self.state in (State.RECOVERING, State.DRAINING):
            behind = [(each.key, each.place) for each in self._partitions.values() if each.place is not None]
            # Held entries come along and are skipped, so a full hand must not stop it while draining.
            if behind and (free * 2 >= self.settings.prefetch or self.state is State.DRAINING):
                self._start_read(tuple(behind), free, True, commands)
        elif self.state is State.READING and free * 2 >= self.settings.prefetch:
            self._start_read(tuple((key, b">") for key in self._partitions), free, False, commands)

    def _start_read(
        self, places: tuple[tuple[str, bytes], ...], free: int, history: bool, commands: list[Command]
    ) -> None:
        self._reading = True
        # The server counts for each key by itself.
        self._issue(Read(places, max(free // len(places), 1), history), commands)

    def _take(
        self,
        partition: Partition,
        entries: list[Entry],
        deliveries: Mapping[bytes, int],
        now: float,
        commands: list[Command],
    ) -> None:
        """Entries are ours: keeps those that are new to us."""
        if not self.held:
            self._renew_at = now + self.settings.ack_deadline_s / 3
        for made, entry_ids in partition.held_by_count(entries).items():
            # The server counted one more delivery of what we have in hand; it was none.
            self._issue(Renew(partition.key, entry_ids, made), commands)
        fresh = partition.admit(entries, deliveries, now)
        if partition.deliveries:
            limit = self.settings.max_deliveries
            worn = [entry for entry in fresh if partition.deliveries.get(entry[0], 1) > limit]
            if worn:
                fresh = [entry for entry in fresh if entry not in worn]
                self._issue(DeadLetter(partition.key, tuple(self._worn(partition, entry) for entry in worn)), commands)
        if fresh:
            self._ready.append((partition, fresh, 0))
            if self.state is State.DRAINING:
                self._hand_back(commands)

    def _worn(self, partition: Partition, entry: Entry) -> Letter:
        made = partition.deliveries[entry[0]] - 1
        said = f"delivered {made} times, and no consumer lived to answer"
        return Letter(entry, made, Reason.REASON_DELIVERIES_EXHAUSTED, said)

    def _retry(self, partition: Partition, entry: Entry, commands: list[Command]) -> None:
        entry_id = entry[0]
        if entry_id in partition.foreign:
            partition.forget([entry_id])
            return
        made = partition.deliveries.get(entry_id, 1) + 1
        partition.deliveries[entry_id] = made
        self._issue(Renew(partition.key, [entry_id], made), commands)
        self._ready.append((partition, [entry], 0))

    def _renew(self, now: float, commands: list[Command]) -> None:
        interval = self.settings.ack_deadline_s / 3
        self._renew_at = now + interval
        for partition in self._partitions.values():
            if not partition.renewing and (due := partition.due_for_renewal(now, interval, self.settings.hold_limit_s)):
                partition.renewing = True
                self._issue(Renew(partition.key, due), commands)

    def _sweep(self, now: float, commands: list[Command]) -> None:
        due = [each for each in self._partitions.values() if not each.sweeping and each.sweep_at <= now]
        free = self.settings.prefetch - self.held - self._claiming
        if free < 1:
            for partition in due:
                partition.sweep_at = now + self.settings.sweep_interval_s
            return
        for partition in due:
            # In equal parts: the first to be asked must not starve the others.
            count = min(max(free // len(due), 1), _MOST_CLAIMED)
            self._claiming += count
            partition.sweeping = True
            self._issue(Claim(partition.key, partition.cursor, count), commands)

    def _hand_back(self, commands: list[Command], tried: set[tuple[int, bytes]] | None = None) -> None:
        """Hands back everything that no handler has; what one has tried keeps its count."""
        while self._ready:
            partition, waiting, begin = self._ready.popleft()
            entries = waiting[begin:]
            back = {}
            for entry in entries:
                if entry[0] not in partition.foreign:
                    attempted = tried is not None and (id(partition), entry[0]) in tried
                    back[entry[0]] = partition.deliveries.get(entry[0], 1) - (0 if attempted else 1)
            partition.forget([entry[0] for entry in entries])
            if back:
                self._issue(HandBack(partition.key, back), commands)

    def _unfinished(self) -> bool:
        return any(partition.unfinished for partition in self._partitions.values())

    def _recover(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._partitions[key].place = START
        if self.state is State.READING:
            self.state = State.RECOVERING

    def _recovered(self) -> None:
        if self.state is State.RECOVERING and all(each.place is None for each in self._partitions.values()):
            self.state = State.READING

    def _held_by(self, key: str, entry_ids: Sequence[bytes]) -> Partition:
        partition = self._partitions.get(key)
        if partition is None:
            raise LocalProtocolError(f"{key} is no partition of this consumer")
        for entry_id in entry_ids:
            if entry_id not in partition.held:
                raise LocalProtocolError(f"{entry_id.decode()} of {key} is not held")
        return partition

    def _issue(self, command: Command, commands: list[Command]) -> None:
        self._open.add(command)
        commands.append(command)

    def _answered(self, command: Command) -> None:
        self._close(command)
        self._failures = 0

    def _close(self, command: Command) -> None:
        if command not in self._open:
            raise LocalProtocolError(f"{type(command).__name__} was answered twice, or never issued")
        self._open.remove(command)
        if isinstance(command, Claim):
            self._claiming -= command.count
            self._partitions[command.key].sweeping = False
        elif isinstance(command, Read):
            self._reading = False
        elif isinstance(command, Renew):
            self._partitions[command.key].renewing = False


_HANDLERS: Final[dict[type[Event], Callable[[DeliveryMachine, Any, float, list[Command]], None]]] = {
    Opened: DeliveryMachine._on_opened,
    GroupsReady: DeliveryMachine._on_groups_ready,
    EntriesRead: DeliveryMachine._on_entries_read,
    EntriesClaimed: DeliveryMachine._on_entries_claimed,
    Acked: DeliveryMachine._on_acked,
    DeadLettered: DeliveryMachine._on_dead_lettered,
    Renewed: DeliveryMachine._on_renewed,
    HandedBack: DeliveryMachine._on_handed_back,
    Unanswered: DeliveryMachine._on_unanswered,
    GroupMissing: DeliveryMachine._on_group_missing,
    Wanted: DeliveryMachine._on_wanted,
    Returned: DeliveryMachine._on_returned,
    Succeeded: DeliveryMachine._on_succeeded,
    Failed: DeliveryMachine._on_failed,
    DrainAsked: DeliveryMachine._on_drain_asked,
}
