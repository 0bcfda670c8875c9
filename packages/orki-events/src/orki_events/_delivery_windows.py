"""The windows of a consumer: entries that are handled or queued, and entries that wait for a retry. No I/O."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable
from dataclasses import dataclass
from typing import Final

from orki_contract.model import Backoff
from orki_events._delivery_partition import Partition
from orki_events._delivery_table import Entry

# Before the size of entries is known.
_FIRST_READ: Final = 16
_MEASURED: Final = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliverySettings:
    """Limits of one consumer, as in `ConsumeOptions` and `Group`. Durations are in seconds.

    Attributes:
        key_of: Returns the key of an entry. If set, the partitions are ordered: they have one owner at a time, which
            handles the entries of a key one after another.
        single: Whether handlers take single entries.
        read_time: Time for which a read may be under way.
    """

    prefetch: int
    max_deliveries: int
    ack_deadline: float
    sweep_interval: float
    hold_limit: float
    backoff: Backoff
    prefetch_bytes: int = 1 << 24
    retry_entries: int = 1_000
    retry_bytes: int = 1 << 24
    key_of: Callable[[Entry], Hashable] | None = None
    single: bool = True
    read_time: float = 0.0


class Windows:
    """Decides how many entries a consumer may read or claim, and which may wait for a retry in its memory."""

    def __init__(self, settings: DeliverySettings, partitions: Collection[Partition]) -> None:
        self._settings = settings
        self._partitions = partitions
        self._mean_size = 0.0

    def free(self) -> tuple[int, bool]:
        """Return how many entries may be read or claimed, and whether at least half of the window is free."""
        settings = self._settings
        entries, size = settings.prefetch, settings.prefetch_bytes
        for each in self._partitions:
            count, retained = each.retained if each.waiting else (0, 0)
            entries -= len(each.held) - count
            size -= each.size - retained
        if not self._mean_size:
            return min(entries, _FIRST_READ), entries * 2 >= settings.prefetch
        half = entries * 2 >= settings.prefetch and size * 2 >= settings.prefetch_bytes
        return min(entries, max(int(size / self._mean_size), 1 if size > 0 else 0)), half

    def measure(self, batches: Iterable[list[Entry]]) -> None:
        """Estimate the size of the entries to come; it falls slowly, so that a few small ones do not mislead it."""
        sizes = [len(entry[1][1]) + len(entry[1][-1]) for each in batches for entry in each[:_MEASURED] if entry[1]]
        if sizes:
            self._mean_size = max(sum(sizes) / len(sizes), 1.0, 0.9 * self._mean_size)

    def may_wait(self, partition: Partition, entry_id: bytes) -> bool:
        """Whether a failed entry may wait for its retry here; otherwise it waits on the server."""
        entries, size = self._settings.retry_entries, self._settings.retry_bytes
        for each in self._partitions:
            count, retained = each.retained
            entries -= count
            size -= retained
        return entries > 0 and partition.held[entry_id][1] <= size

    def is_readable(self, partition: Partition, now: float) -> bool:
        """Whether new entries of a partition may be read: an ordered one needs its owner and room behind retries."""
        settings = self._settings
        if not partition.queue.keyed:
            return True
        # A read that outlived the ownership could take entries which only the next owner may handle.
        if partition.takeover or not partition.active(now + settings.read_time):
            return False
        count, size = partition.retained
        shares = len(self._partitions)
        return count < max(settings.retry_entries // shares, 1) and size < max(settings.retry_bytes // shares, 1)
