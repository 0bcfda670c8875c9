"""The delivery machine: decides what one consumer of one group does next. No I/O.

Rules:

1. An entry is acknowledged only after its handler succeeded, its dead letter was written, or it is known to be lost.
2. If the server may have given entries to this consumer without a reply, the consumer reads its pending entries again
   before it reads new ones.
3. Held entries are bounded in number and size: those that are handled or queued, which reading and claiming each
   fill up, and those that wait for a retry. Held entries are renewed until they are settled, handed back or held for
   too long.
4. A failed entry is dispatched again after its wait, at most `max_deliveries` times in all, and then dead-lettered.
   Beyond the bound, it waits on the server. In an ordered partition it holds back the later entries of its key;
   beyond the bound, the partition is not read.
5. A drained consumer leaves nothing behind that other consumers must wait for.
6. Only the owner of an ordered partition reads, claims and dispatches its entries. A new owner takes all pending
   entries over before it reads new ones.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from math import inf
from typing import Any, Final

from orki_contract.errors import LocalProtocolError, Reason, RemoteProtocolError
from orki_events import _delivery_table as table
from orki_events._delivery_partition import START
from orki_events._delivery_steps import WAIT, DeliverySteps
from orki_events._delivery_table import TRANSITIONS, Command, CreateGroups, Outcome, State

_MAX_CLAIMED: Final = 100
_TAKEOVER_WAIT: Final = 0.1


class DeliveryMachine(DeliverySteps):
    """Takes events with `receive` and `handle_timer`, and returns commands.

    The caller executes the commands and reports each result as an event. `now` is in seconds on a monotonic clock.
    """

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
            sweeps = (each for each in self._partitions.values() if each.owned and not each.withdrawn)
            due.extend(each.sweep_at for each in sweeps if not each.sweeping)
        return min(due, default=None)

    def handle_timer(self, now: float) -> list[Command]:
        """Process the timers that are due; does nothing if none is."""
        commands: list[Command] = []
        if self.state not in (State.NEW, State.CLOSED):
            for partition in self._partitions.values():
                if now >= partition.until:
                    # Until the ownership is extended or lost, nothing is due.
                    partition.sweep_at = inf
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
        self._windows.measure(event.entries.values())
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
        partition.cursor = START if partition.stale_claim else event.cursor
        if not partition.stale_claim and event.cursor == START:
            partition.takeover = False
            partition.sweep_at = now + self.settings.sweep_interval
        else:
            partition.sweep_at = now
        partition.stale_claim = False
        partition.remove(event.deleted)
        if event.entries:
            self._take(partition, event.entries, event.deliveries, now, commands)

    def _on_acked(self, event: table.Acked, now: float, commands: list[Command]) -> None:
        self._answered(event.command)
        partition = self._partitions[event.command.key]
        partition.acking = False
        partition.settled.difference_update(event.command.entry_ids)

    def _on_dead_lettered(self, event: table.DeadLettered, now: float, commands: list[Command]) -> None:
        self._answered(event.command)
        partition = self._partitions[event.command.key]
        partition.settle([letter.entry[0] for letter in event.command.letters], Outcome.DEAD_LETTERED)

    def _on_renewed(self, event: table.Renewed, now: float, commands: list[Command]) -> None:
        self._answered(event.command)
        partition = self._partitions[event.command.key]
        partition.foreign.update(entry_id for entry_id in event.lost if entry_id in partition.held)
        self.guarded = self.settings.key_of is not None or any(each.foreign for each in self._partitions.values())
        partition.detach_pending(event.trimmed)

    def _on_handed_back(self, event: table.HandedBack, now: float, commands: list[Command]) -> None:
        self._answered(event.command)
        partition = self._partitions[event.command.key]
        partition.leaving.difference_update(event.command.deliveries)
        partition.detach_pending(event.trimmed)

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
                self._partitions[key].settled.difference_update(entry_ids)
            case table.HandBack(key=key, deliveries=deliveries):
                self._partitions[key].leaving.difference_update(deliveries)
            case table.DeadLetter():
                self._issue(command, commands)
            case _:
                pass
        creating = any(isinstance(each, CreateGroups) for each in (*self._open, *(each[2] for each in self._repeats)))
        if self.state is not State.DRAINING and not creating:
            # With a wait, so that a group that is destroyed again and again is not created in a busy loop.
            heapq.heappush(self._repeats, (now + WAIT.initial, next(self._order), CreateGroups()))

    def _on_requested(self, event: table.Requested, now: float, commands: list[Command]) -> None:
        if event.count < 1:
            raise LocalProtocolError(f"{event.count} entries requested")
        self._requests.append(event.count)

    def _on_returned(self, event: table.Returned, now: float, commands: list[Command]) -> None:
        partition = self._held_by(event.key, [entry[0] for entry in event.entries])
        partition.queue.put_back(list(event.entries))
        if self.state is State.DRAINING or not partition.owned or partition.withdrawn:
            self._empty(partition, commands)

    def _on_succeeded(self, event: table.Succeeded, now: float, commands: list[Command]) -> None:
        self._held_by(event.key, event.entry_ids).settle(event.entry_ids, Outcome.PROCESSED)

    def _on_failed(self, event: table.Failed, now: float, commands: list[Command]) -> None:
        partition = self._held_by(event.key, [entry[0] for entry in event.entries])
        letters = []
        back: dict[bytes, int] = {}
        waits: dict[bytes, int] = {}
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
            elif self.state is State.DRAINING or partition.withdrawn:
                if entry_id not in partition.detached:
                    back[entry_id] = made
                partition.forget([entry_id])
            elif partition.queue.keyed or entry_id in partition.detached or self._windows.may_wait(partition, entry_id):
                partition.wait(entry_id)
                due = now + self.settings.backoff.delay(made)
                heapq.heappush(self._retries, (due, next(self._order), partition, entry))
            else:
                waits[entry_id] = made
                partition.forget([entry_id])
        if letters:
            self._issue(table.DeadLetter(partition.key, tuple(letters)), commands)
        if back:
            self._return(partition, back, 0.0, commands)
        if waits:
            self._return(partition, waits, self.settings.backoff.delay(max(waits.values())), commands)

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
        self._retries.clear()
        for partition in self._partitions.values():
            self._empty(partition, commands)

    def _on_gained(self, event: table.PartitionGained, now: float, commands: list[Command]) -> None:
        partition = self._partition(event.key)
        partition.owned, partition.until, partition.withdrawn = True, event.until, False
        # Its own pending entries are taken over like those of others, so that all come in the order of their ids.
        partition.takeover, partition.recovery = True, None
        partition.cursor, partition.sweep_at, partition.stale_claim = START, now, partition.sweeping

    def _on_kept(self, event: table.PartitionKept, now: float, commands: list[Command]) -> None:
        partition = self._partition(event.key)
        partition.until = event.until
        partition.sweep_at = min(partition.sweep_at, now + self.settings.sweep_interval)

    def _on_lost(self, event: table.PartitionLost, now: float, commands: list[Command]) -> None:
        partition = self._partition(event.key)
        partition.owned = partition.withdrawn = partition.takeover = False
        partition.recovery = None
        # The next owner takes them over.
        partition.forget([entry[0] for entry in partition.queue.clear()])
        partition.forget(list(partition.waiting))
        partition.foreign.update(partition.held)

    def _on_withdrawn(self, event: table.PartitionWithdrawn, now: float, commands: list[Command]) -> None:
        partition = self._partition(event.key)
        if partition.owned:
            partition.withdrawn = True
            self._empty(partition, commands)

    def _on_given_up(self, event: table.GivenUp, now: float, commands: list[Command]) -> None:
        self._answered(event.command)
        partition = self._partitions[event.command.key]
        partition.owned = partition.withdrawn = partition.takeover = False

    def _on_repeat_due(self, event: table.RepeatDue, now: float, commands: list[Command]) -> None:
        while self._repeats and self._repeats[0][0] <= now:
            self._issue(heapq.heappop(self._repeats)[2], commands)

    def _on_retry_due(self, event: table.RetryDue, now: float, commands: list[Command]) -> None:
        while self._retries and self._retries[0][0] <= now:
            _, _, partition, entry = heapq.heappop(self._retries)
            if entry[0] in partition.waiting:
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
        free = self._windows.free()[0] - self._claiming
        if free < 1:
            for partition in due:
                partition.sweep_at = now + (_TAKEOVER_WAIT if partition.takeover else self.settings.sweep_interval)
            return
        for partition in due:
            # In equal parts, so that the first partition does not starve the others.
            count = min(max(free // len(due), 1), _MAX_CLAIMED)
            self._claiming += count
            partition.sweeping = True
            self._issue(table.Claim(partition.key, partition.cursor, count, partition.takeover), commands)

    def _on_read_due(self, event: table.ReadDue, now: float, commands: list[Command]) -> None:
        self._read_at = None

    def _on_conclusion(self, event: table.Event, now: float, commands: list[Command]) -> None:
        pass

    # Steps after every event.

    def _plan(self, now: float, commands: list[Command]) -> None:
        if self.state is State.RECOVERING and all(each.recovery is None for each in self._partitions.values()):
            self._apply(table.Recovered(), now, commands)
        while self._requests and self._dispatch(self._requests[0], now, commands):
            pass
        for partition in self._partitions.values():
            while (ack := partition.next_ack()) is not None:
                self._issue(ack, commands)
            if partition.withdrawn:
                self._give_up(partition, commands)
        if not self._reading and self._read_at is None:
            self._read(now, commands)
        if self.state is State.DRAINING:
            unfinished = any(each.unfinished for each in self._partitions.values())
            if not (unfinished or self._open or self._repeats or self.held):
                self._apply(table.Drained(), now, commands)


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
    table.PartitionGained: DeliveryMachine._on_gained,
    table.PartitionKept: DeliveryMachine._on_kept,
    table.PartitionLost: DeliveryMachine._on_lost,
    table.PartitionWithdrawn: DeliveryMachine._on_withdrawn,
    table.GivenUp: DeliveryMachine._on_given_up,
    table.RepeatDue: DeliveryMachine._on_repeat_due,
    table.RetryDue: DeliveryMachine._on_retry_due,
    table.RenewalDue: DeliveryMachine._on_renewal_due,
    table.SweepDue: DeliveryMachine._on_sweep_due,
    table.ReadDue: DeliveryMachine._on_read_due,
    table.Recovered: DeliveryMachine._on_conclusion,
    table.Drained: DeliveryMachine._on_conclusion,
}
