"""The delivery machine: decides what one consumer of one group does next. No I/O.

Rules:

1. An entry is acknowledged only after its handler succeeded, its dead letter was written, or it is known to be lost.
2. If the server may have given entries to this consumer without a reply, the consumer reads its pending entries again
   before it reads new ones.
3. The number of held entries is bounded: reading and claiming each fill up to `prefetch`. Held entries are renewed
   until they are settled, handed back or held for too long.
4. A failed entry is dispatched again after its wait, at most `max_deliveries` times in all, and then dead-lettered.
5. A drained consumer leaves nothing behind that other consumers must wait for.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from orki_contract.backoff import Jitter, JitterOptions
from orki_contract.errors import LocalProtocolError, Reason, RemoteProtocolError
from orki_events import _delivery_table as table
from orki_events._delivery_partition import START, Partition
from orki_events._delivery_table import TRANSITIONS, Command, CreateGroups, Entry, Outcome, State

_WAIT: Final = JitterOptions(initial=0.05, maximum=1.0, spread=0.0)
_MAX_CLAIMED: Final = 100


class DeliveryMachine:
    """Takes events with `receive` and `handle_timer`, and returns commands.

    The caller executes the commands and reports each result as an event. `now` is in seconds on a monotonic clock.
    """

    def __init__(self, keys: Sequence[str], settings: table.DeliverySettings) -> None:
        """Create the machine for the Redis keys of a stream's partitions."""
        self.state = TRANSITIONS.initial
        self.settings = settings
        self._partitions = {key: Partition(key) for key in keys}
        self._ready: deque[tuple[Partition, list[Entry], int]] = deque()
        self._requests: deque[int] = deque()
        self._open: set[Command] = set()
        self._reading = False
        self._read_apart = False
        self._created = False
        self._claiming = 0
        self._read_at: float | None = None
        self._renew_at = 0.0
        self._backoff = Jitter(_WAIT)
        self._order = itertools.count()
        self._retries: list[tuple[float, int, Partition, Entry]] = []
        self._repeats: list[tuple[float, int, Command]] = []

    @property
    def held(self) -> int:
        return sum(len(partition.held) for partition in self._partitions.values())

    def receive(self, event: table.Event, now: float) -> list[Command]:
        """Process an event.

        Returns:
            The commands to execute, in this order.

        Raises:
            LocalProtocolError: The event is illegal in this state, or names an unknown command, partition or entry.
            RemoteProtocolError: The server sent entries of a key that was not read.
        """
        commands: list[Command] = []
        self._apply(event, now, commands)
        self._plan(now, commands)
        return commands

    def next_timer(self) -> float | None:
        """Return the time at which `handle_timer` is due; None for never."""
        if self.state in (State.NEW, State.CLOSED):
            return None
        due = [heap[0][0] for heap in (self._retries, self._repeats) if heap]
        if self.held:
            due.append(self._renew_at)
        if self._read_at is not None:
            due.append(self._read_at)
        if self.state is State.READING:
            due.extend(each.sweep_at for each in self._partitions.values() if not each.sweeping)
        return min(due, default=None)

    def handle_timer(self, now: float) -> list[Command]:
        """Process the timers that are due; does nothing if none is."""
        commands: list[Command] = []
        if self.state not in (State.NEW, State.CLOSED):
            for event in self._due(now):
                self._apply(event, now, commands)
            self._plan(now, commands)
        return commands

    def _due(self, now: float) -> Iterator[table.Event]:
        """Yield the events of due timers; each condition is evaluated after the earlier events were processed."""
        if self._repeats and self._repeats[0][0] <= now:
            yield table.RepeatDue()
        if self._retries and self._retries[0][0] <= now:
            yield table.RetryDue()
        if self.held and self._renew_at <= now:
            yield table.RenewalDue()
        if self._read_at is not None and self._read_at <= now:
            yield table.ReadDue()
        if self.state is State.READING and any(self._sweeps_due(now)):
            yield table.SweepDue()

    def _apply(self, event: table.Event, now: float, commands: list[Command]) -> None:
        kind = type(event)
        following = TRANSITIONS.next(self.state, kind, LocalProtocolError)
        # The handler sees the state in which the event arrived.
        _HANDLERS[kind](self, event, now, commands)
        self.state = following

    # Events.

    def _on_opened(self, event: table.Opened, now: float, commands: list[Command]) -> None:
        self._issue(CreateGroups(), commands)

    def _on_groups_ready(self, event: table.GroupsReady, now: float, commands: list[Command]) -> None:
        self._answered(event.command)
        self._created = True
        if self.state is State.CREATING:
            self._recover(self._partitions)
            for partition in self._partitions.values():
                partition.sweep_at = max(partition.sweep_at, now)

    def _on_entries_read(self, event: table.EntriesRead, now: float, commands: list[Command]) -> None:
        self._answered(event.command)
        positions = dict(event.command.positions)
        if unknown := event.entries.keys() - positions.keys():
            raise RemoteProtocolError(f"the server sent entries of {min(unknown)}, which was not read")
        for key, position in positions.items():
            entries = event.entries.get(key, [])
            partition = self._partitions[key]
            if event.command.history and partition.recovery == position:
                partition.recovery = entries[-1][0] if entries else None
            if entries:
                self._take(partition, entries, event.deliveries.get(key, {}), now, commands)

    def _on_entries_claimed(self, event: table.EntriesClaimed, now: float, commands: list[Command]) -> None:
        self._answered(event.command)
        partition = self._partitions[event.command.key]
        partition.cursor = event.cursor
        partition.sweep_at = now if event.cursor != START else now + self.settings.sweep_interval
        partition.lost_unnamed += len(event.deleted)
        partition.detach(event.deleted)
        if event.entries:
            self._take(partition, event.entries, event.deliveries, now, commands)

    def _on_acked(self, event: table.Acked, now: float, commands: list[Command]) -> None:
        self._answered(event.command)
        partition = self._partitions[event.command.key]
        partition.acking = False
        for entry_id in event.command.entry_ids:
            partition.settled.pop(entry_id, None)

    def _on_dead_lettered(self, event: table.DeadLettered, now: float, commands: list[Command]) -> None:
        self._answered(event.command)
        partition = self._partitions[event.command.key]
        partition.settle([letter.entry[0] for letter in event.command.letters], Outcome.DEAD_LETTERED)

    def _on_renewed(self, event: table.Renewed, now: float, commands: list[Command]) -> None:
        self._answered(event.command)
        partition = self._partitions[event.command.key]
        partition.foreign.update(entry_id for entry_id in event.lost if entry_id in partition.held)
        partition.detach_pending(event.trimmed)

    def _on_handed_back(self, event: table.HandedBack, now: float, commands: list[Command]) -> None:
        self._answered(event.command)
        self._partitions[event.command.key].detach_pending(event.trimmed)

    def _on_unanswered(self, event: table.Unanswered, now: float, commands: list[Command]) -> None:
        command = event.command
        self._close(command)
        due = now + self._backoff.failed()
        if isinstance(command, table.Renew):
            self._renew_at = min(self._renew_at, due)
        elif not (isinstance(command, CreateGroups) and self.state is State.DRAINING):
            heapq.heappush(self._repeats, (due, next(self._order), command))

    def _on_entries_unknown(self, event: table.EntriesUnknown, now: float, commands: list[Command]) -> None:
        command = event.command
        self._close(command)
        due = now + self._backoff.failed()
        if isinstance(command, table.Read):
            self._read_at = due
            self._recover(key for key, _ in command.positions)
        else:
            self._partitions[command.key].sweep_at = due
            self._recover([command.key])

    def _on_group_missing(self, event: table.GroupMissing, now: float, commands: list[Command]) -> None:
        command = event.command
        self._answered(command)
        match command:
            case table.Read(positions=((key, _),)):
                self._partitions[key].recovery = None
            case table.Read():
                # The other partitions may still have their group and entries of this consumer.
                self._read_apart = True
            case table.Ack(key=key, entry_ids=entry_ids):
                self._partitions[key].acking = False
                for entry_id in entry_ids:
                    self._partitions[key].settled.pop(entry_id, None)
            case table.DeadLetter():
                self._issue(command, commands)
            case _:
                pass
        creating = any(isinstance(each, CreateGroups) for each in (*self._open, *(each[2] for each in self._repeats)))
        if self.state is not State.DRAINING and not creating:
            # With a wait, so that a group that is destroyed again and again is not created in a busy loop.
            heapq.heappush(self._repeats, (now + _WAIT.initial, next(self._order), CreateGroups()))

    def _on_requested(self, event: table.Requested, now: float, commands: list[Command]) -> None:
        if event.count < 1:
            raise LocalProtocolError(f"{event.count} entries requested")
        self._requests.append(event.count)

    def _on_returned(self, event: table.Returned, now: float, commands: list[Command]) -> None:
        partition = self._held_by(event.key, [entry[0] for entry in event.entries])
        self._ready.appendleft((partition, list(event.entries), 0))
        if self.state is State.DRAINING:
            self._hand_back(commands)

    def _on_succeeded(self, event: table.Succeeded, now: float, commands: list[Command]) -> None:
        self._held_by(event.key, event.entry_ids).settle(event.entry_ids, Outcome.PROCESSED)

    def _on_failed(self, event: table.Failed, now: float, commands: list[Command]) -> None:
        partition = self._held_by(event.key, [entry[0] for entry in event.entries])
        letters = []
        back: dict[bytes, int] = {}
        for entry in event.entries:
            entry_id = entry[0]
            made = partition.deliveries.get(entry_id, 1)
            if entry_id in partition.foreign:
                # Another consumer has claimed it and counts its deliveries.
                partition.forget([entry_id])
            elif event.final:
                letters.append(table.Letter(entry, made, event.reason, event.message))
            elif made >= self.settings.max_deliveries:
                letters.append(table.Letter(entry, made, Reason.REASON_DELIVERIES_EXHAUSTED, event.message))
            elif self.state is State.DRAINING:
                if entry_id not in partition.detached:
                    back[entry_id] = made
                partition.forget([entry_id])
            else:
                due = now + self.settings.backoff.delay(made)
                heapq.heappush(self._retries, (due, next(self._order), partition, entry))
        if letters:
            self._issue(table.DeadLetter(partition.key, tuple(letters)), commands)
        if back:
            self._issue(table.HandBack(partition.key, back), commands)

    def _on_drain_requested(self, event: table.DrainRequested, now: float, commands: list[Command]) -> None:
        if self.state in (State.NEW, State.CLOSED, State.DRAINING):
            return
        if self.state is State.CREATING and not self._created:
            # Without a group, the server cannot have given entries to this consumer.
            for partition in self._partitions.values():
                partition.recovery = None
        self._requests.clear()
        self._repeats = [each for each in self._repeats if not isinstance(each[2], CreateGroups)]
        heapq.heapify(self._repeats)
        self._ready.extend((partition, [entry], 0) for _, _, partition, entry in self._retries)
        made = {(id(partition), entry[0]) for _, _, partition, entry in self._retries}
        self._retries.clear()
        self._hand_back(commands, tried=made)

    def _on_repeat_due(self, event: table.RepeatDue, now: float, commands: list[Command]) -> None:
        while self._repeats and self._repeats[0][0] <= now:
            self._issue(heapq.heappop(self._repeats)[2], commands)

    def _on_retry_due(self, event: table.RetryDue, now: float, commands: list[Command]) -> None:
        while self._retries and self._retries[0][0] <= now:
            _, _, partition, entry = heapq.heappop(self._retries)
            self._retry(partition, entry, commands)

    def _on_renewal_due(self, event: table.RenewalDue, now: float, commands: list[Command]) -> None:
        interval = self.settings.ack_deadline / 3
        self._renew_at = now + interval
        for partition in self._partitions.values():
            if not partition.renewing and (due := partition.due_for_renewal(now, interval, self.settings.hold_limit)):
                partition.renewing = True
                self._issue(table.Renew(partition.key, due), commands)

    def _on_sweep_due(self, event: table.SweepDue, now: float, commands: list[Command]) -> None:
        due = list(self._sweeps_due(now))
        free = self.settings.prefetch - self.held - self._claiming
        if free < 1:
            for partition in due:
                partition.sweep_at = now + self.settings.sweep_interval
            return
        for partition in due:
            # In equal parts, so that the first partition does not starve the others.
            count = min(max(free // len(due), 1), _MAX_CLAIMED)
            self._claiming += count
            partition.sweeping = True
            self._issue(table.Claim(partition.key, partition.cursor, count), commands)

    def _on_read_due(self, event: table.ReadDue, now: float, commands: list[Command]) -> None:
        self._read_at = None

    def _on_conclusion(self, event: table.Event, now: float, commands: list[Command]) -> None:
        pass

    # Steps after every event.

    def _plan(self, now: float, commands: list[Command]) -> None:
        if self.state is State.RECOVERING and all(each.recovery is None for each in self._partitions.values()):
            self._apply(table.Recovered(), now, commands)
        while self._requests and self._ready:
            self._dispatch(self._requests[0], commands)
        for partition in self._partitions.values():
            while (ack := partition.next_ack()) is not None:
                self._issue(ack, commands)
        if not self._reading and self._read_at is None:
            self._read(commands)
        if self.state is State.DRAINING:
            unfinished = any(each.unfinished for each in self._partitions.values())
            if not (unfinished or self._open or self._repeats or self.held):
                self._apply(table.Drained(), now, commands)

    def _sweeps_due(self, now: float) -> Iterator[Partition]:
        return (each for each in self._partitions.values() if not each.sweeping and each.sweep_at <= now)

    def _dispatch(self, limit: int, commands: list[Command]) -> None:
        partition, waiting, begin = self._ready[0]
        entries = waiting[begin : begin + limit]
        if begin + limit < len(waiting):
            # Only the index moves: cutting the list would copy it for every single entry.
            self._ready[0] = (partition, waiting, begin + limit)
        else:
            self._ready.popleft()
        if partition.foreign:
            stolen = [entry[0] for entry in entries if entry[0] in partition.foreign]
            partition.forget(stolen)
            entries = [entry for entry in entries if entry[0] not in stolen]
        if entries:
            self._requests.popleft()
            counts = partition.deliveries
            known = {entry[0]: counts[entry[0]] for entry in entries if entry[0] in counts} if counts else {}
            # Not kept open: entries are answered one by one, and `held` shows which are missing.
            commands.append(table.Dispatch(partition.key, entries, known))

    def _read(self, commands: list[Command]) -> None:
        free = self.settings.prefetch - self.held
        if self.state in (State.RECOVERING, State.DRAINING):
            pending = [(each.key, each.recovery) for each in self._partitions.values() if each.recovery is not None]
            # The read skips held entries, so a full consumer must still read while it drains.
            if pending and (free * 2 >= self.settings.prefetch or self.state is State.DRAINING):
                self._start_read(tuple(pending[:1] if self._read_apart else pending), free, True, commands)
        elif self.state is State.READING and free * 2 >= self.settings.prefetch:
            self._start_read(tuple((key, b">") for key in self._partitions), free, False, commands)

    def _start_read(
        self, positions: tuple[tuple[str, bytes], ...], free: int, history: bool, commands: list[Command]
    ) -> None:
        self._reading = True
        # The count applies to each key.
        self._issue(table.Read(positions, max(free // len(positions), 1), history), commands)

    def _take(
        self,
        partition: Partition,
        entries: list[Entry],
        deliveries: Mapping[bytes, int],
        now: float,
        commands: list[Command],
    ) -> None:
        if not self.held:
            self._renew_at = now + self.settings.ack_deadline / 3
        for made, entry_ids in partition.held_by_count(entries).items():
            # The server counted another delivery of held entries, although there was none.
            self._issue(table.Renew(partition.key, entry_ids, made), commands)
        fresh = partition.admit(entries, deliveries, now)
        if partition.deliveries:
            limit = self.settings.max_deliveries
            worn = [entry for entry in fresh if partition.deliveries.get(entry[0], 1) > limit]
            if worn:
                fresh = [entry for entry in fresh if entry not in worn]
                self._issue(
                    table.DeadLetter(partition.key, tuple(self._worn(partition, entry) for entry in worn)), commands
                )
        if fresh:
            self._ready.append((partition, fresh, 0))
            if self.state is State.DRAINING:
                self._hand_back(commands)

    def _worn(self, partition: Partition, entry: Entry) -> table.Letter:
        made = partition.deliveries[entry[0]] - 1
        message = f"delivered {made} times, and no consumer reported an outcome"
        return table.Letter(entry, made, Reason.REASON_DELIVERIES_EXHAUSTED, message)

    def _retry(self, partition: Partition, entry: Entry, commands: list[Command]) -> None:
        entry_id = entry[0]
        if entry_id in partition.foreign:
            partition.forget([entry_id])
            return
        made = partition.deliveries.get(entry_id, 1) + 1
        partition.deliveries[entry_id] = made
        if entry_id not in partition.detached:
            self._issue(table.Renew(partition.key, [entry_id], made), commands)
        self._ready.append((partition, [entry], 0))

    def _hand_back(self, commands: list[Command], tried: set[tuple[int, bytes]] | None = None) -> None:
        """Hand back all entries that no handler has; entries in `tried` keep their number of deliveries."""
        while self._ready:
            partition, waiting, begin = self._ready.popleft()
            entries = waiting[begin:]
            back = {}
            for entry in entries:
                if entry[0] not in partition.foreign and entry[0] not in partition.detached:
                    attempted = tried is not None and (id(partition), entry[0]) in tried
                    back[entry[0]] = partition.deliveries.get(entry[0], 1) - (0 if attempted else 1)
            partition.forget([entry[0] for entry in entries])
            if back:
                self._issue(table.HandBack(partition.key, back), commands)

    def _recover(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._partitions[key].recovery = START

    def _held_by(self, key: str, entry_ids: Sequence[bytes]) -> Partition:
        partition = self._partitions.get(key)
        if partition is None:
            raise LocalProtocolError(f"{key} is not a partition of this consumer")
        for entry_id in entry_ids:
            if entry_id not in partition.held:
                raise LocalProtocolError(f"{entry_id.decode()} of {key} is not held")
        return partition

    def _issue(self, command: Command, commands: list[Command]) -> None:
        self._open.add(command)
        commands.append(command)

    def _answered(self, command: Command) -> None:
        self._close(command)
        self._backoff.reset()

    def _close(self, command: Command) -> None:
        if command not in self._open:
            raise LocalProtocolError(f"{type(command).__name__} was answered twice or never issued")
        self._open.remove(command)
        if isinstance(command, table.Claim):
            self._claiming -= command.count
            self._partitions[command.key].sweeping = False
        elif isinstance(command, table.Read):
            self._reading = False
        elif isinstance(command, table.Renew):
            self._partitions[command.key].renewing = False


_HANDLERS: Final[dict[type, Callable[[DeliveryMachine, Any, float, list[Command]], None]]] = {
    table.Opened: DeliveryMachine._on_opened,
    table.GroupsReady: DeliveryMachine._on_groups_ready,
    table.EntriesRead: DeliveryMachine._on_entries_read,
    table.EntriesClaimed: DeliveryMachine._on_entries_claimed,
    table.Acked: DeliveryMachine._on_acked,
    table.DeadLettered: DeliveryMachine._on_dead_lettered,
    table.Renewed: DeliveryMachine._on_renewed,
    table.HandedBack: DeliveryMachine._on_handed_back,
    table.Unanswered: DeliveryMachine._on_unanswered,
    table.EntriesUnknown: DeliveryMachine._on_entries_unknown,
    table.GroupMissing: DeliveryMachine._on_group_missing,
    table.Requested: DeliveryMachine._on_requested,
    table.Returned: DeliveryMachine._on_returned,
    table.Succeeded: DeliveryMachine._on_succeeded,
    table.Failed: DeliveryMachine._on_failed,
    table.DrainRequested: DeliveryMachine._on_drain_requested,
    table.RepeatDue: DeliveryMachine._on_repeat_due,
    table.RetryDue: DeliveryMachine._on_retry_due,
    table.RenewalDue: DeliveryMachine._on_renewal_due,
    table.SweepDue: DeliveryMachine._on_sweep_due,
    table.ReadDue: DeliveryMachine._on_read_due,
    table.Recovered: DeliveryMachine._on_conclusion,
    table.Drained: DeliveryMachine._on_conclusion,
}
