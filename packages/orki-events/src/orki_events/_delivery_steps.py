"""The steps of the delivery machine that several events share: take, dispatch, read, hand back. No I/O."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

from orki_contract.backoff import Jitter, JitterOptions
from orki_contract.errors import LocalProtocolError, Reason
from orki_events import _delivery_table as table
from orki_events._delivery_partition import START, Partition
from orki_events._delivery_queue import KeyedQueue
from orki_events._delivery_table import TRANSITIONS, Command, Entry, State
from orki_events._delivery_windows import DeliverySettings, Windows

WAIT: Final = JitterOptions(initial=0.05, maximum=1.0, spread=0.0)
"""Waits before what got no reply is repeated."""


def _partition(key: str, settings: DeliverySettings) -> Partition:
    if settings.key_of is None:
        return Partition(key)
    return Partition(key, KeyedQueue(settings.key_of, settings.single), owned=False, recovery=None)


class DeliverySteps:
    """The state of a delivery machine and the steps that change it."""

    def __init__(self, keys: Sequence[str], settings: DeliverySettings) -> None:
        """Create the machine for the Redis keys of a stream's partitions."""
        self.state = TRANSITIONS.initial
        self.settings = settings
        self._partitions = {key: _partition(key, settings) for key in keys}
        self._turns = deque(self._partitions.values())
        self.guarded = settings.key_of is not None
        self._requests: deque[int] = deque()
        self._open: set[Command] = set()
        self._reading = False
        self._read_apart = False
        self._created = False
        self._claiming = 0
        self._windows = Windows(settings, self._partitions.values())
        self._read_at: float | None = None
        self._renew_at = 0.0
        self._backoff = Jitter(WAIT)
        self._order = itertools.count()
        self._retries: list[tuple[float, int, Partition, Entry]] = []
        self._repeats: list[tuple[float, int, Command]] = []

    @property
    def held(self) -> int:
        return sum(len(partition.held) for partition in self._partitions.values())

    def may_begin(self, key: str, entry_id: bytes, now: float) -> bool:
        """Whether the handling of a dispatched entry may begin: no other consumer has it. True unless `guarded`."""
        partition = self._partitions[key]
        return entry_id not in partition.foreign and now < partition.until and not partition.withdrawn

    def _sweeps_due(self, now: float) -> Iterator[Partition]:
        due = (each for each in self._partitions.values() if not each.sweeping and each.sweep_at <= now)
        return (each for each in due if each.active(now))

    def _dispatch(self, limit: int, now: float, commands: list[Command]) -> bool:
        """Answer the oldest request from the partition whose turn it is; return whether there were entries."""
        for _ in range(len(self._turns)):
            partition = self._turns[0]
            self._turns.rotate(-1)
            if partition.owned and now >= partition.until:
                continue
            while entries := partition.queue.take(limit):
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
                    return True
        return False

    def _read(self, now: float, commands: list[Command]) -> None:
        free, half = self._windows.free()
        if self.state in (State.RECOVERING, State.DRAINING):
            pending = [(each.key, each.recovery) for each in self._partitions.values() if each.recovery is not None]
            # The read skips held entries, so a full consumer must still read while it drains.
            if pending and (half or self.state is State.DRAINING):
                self._start_read(tuple(pending[:1] if self._read_apart else pending), free, True, commands)
        elif self.state is State.READING and half:
            keys = [each.key for each in self._partitions.values() if self._windows.is_readable(each, now)]
            if keys:
                self._start_read(tuple((key, b">") for key in keys), free, False, commands)

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
        if not partition.owned or now >= partition.until:
            # They stay pending for this consumer, and the owner takes them over.
            return
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
            partition.queue.put(fresh)
            if self.state is State.DRAINING or partition.withdrawn:
                self._empty(partition, commands)

    def _worn(self, partition: Partition, entry: Entry) -> table.Letter:
        made = partition.deliveries[entry[0]] - 1
        message = f"delivered {made} times, and no consumer reported an outcome"
        return table.Letter(entry, made, Reason.REASON_DELIVERIES_EXHAUSTED, message)

    def _retry(self, partition: Partition, entry: Entry, commands: list[Command]) -> None:
        entry_id = entry[0]
        if entry_id in partition.foreign:
            partition.forget([entry_id])
            return
        partition.end_wait(entry_id)
        made = partition.deliveries.get(entry_id, 1) + 1
        partition.deliveries[entry_id] = made
        if entry_id not in partition.detached:
            self._issue(table.Renew(partition.key, [entry_id], made), commands)
        partition.queue.resume(entry)

    def _empty(self, partition: Partition, commands: list[Command]) -> None:
        """Hand back all entries that no handler has; those that wait for a retry keep their number of deliveries."""
        back = {}
        gone = partition.foreign | partition.detached
        for entry_id in [entry[0] for entry in partition.queue.clear()] + list(partition.waiting):
            if partition.owned and entry_id not in gone:
                made = partition.deliveries.get(entry_id, 1)
                back[entry_id] = made if entry_id in partition.waiting else made - 1
            partition.forget([entry_id])
        if back:
            self._return(partition, back, 0.0, commands)

    def _return(self, partition: Partition, back: dict[bytes, int], wait: float, commands: list[Command]) -> None:
        partition.leaving.update(back)
        self._issue(table.HandBack(partition.key, back, wait), commands)

    def _give_up(self, partition: Partition, commands: list[Command]) -> None:
        if partition.held or partition.unfinished:
            return
        for command in itertools.chain(self._open, (each[2] for each in self._repeats)):
            keys = [key for key, _ in command.positions] if isinstance(command, table.Read) else ()
            if getattr(command, "key", None) == partition.key or partition.key in keys:
                return
        self._issue(table.GiveUp(partition.key), commands)

    def _recover(self, keys: Iterable[str]) -> None:
        for key in keys:
            partition = self._partitions[key]
            # A takeover reads them too, and otherwise they are the owner's.
            if partition.owned and not partition.takeover:
                partition.recovery = START

    def _partition(self, key: str) -> Partition:
        if key not in self._partitions:
            raise LocalProtocolError(f"{key} is not a partition of this consumer")
        return self._partitions[key]

    def _held_by(self, key: str, entry_ids: Sequence[bytes]) -> Partition:
        partition = self._partition(key)
        if not partition.held.keys() >= set(entry_ids):
            entry_id = next(each for each in entry_ids if each not in partition.held)
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
