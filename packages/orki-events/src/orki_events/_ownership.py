"""Which partitions of an ordered stream a consumer owns in its group. No I/O.

Each partition has one owner in each group: the consumer whose name is in the partition's lease on the server. Consumers
meet in a list of members and each aims at an equal share, so that no one has to assign partitions:

1. A consumer with less than its share acquires leases that are free.
2. A consumer with more than its share withdraws from some: it ends their running handlers, hands the rest back and then
   gives the lease up.
3. A lease ends by itself if its owner does not renew it. The owner counts from the time at which it asked, so that it
   stops before the server lets another have the lease.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from orki_contract.errors import LocalProtocolError
from orki_contract.transitions import Transitions


class LeaseState(StrEnum):
    """The lease of one partition, as one consumer sees it."""

    FREE = "not owned"
    OWNED = "owned"
    LEAVING = "leaving"


@dataclass(frozen=True, slots=True)
class Acquired:
    """The server gave the lease to this consumer."""


@dataclass(frozen=True, slots=True)
class Extended:
    """The server renewed the lease."""


@dataclass(frozen=True, slots=True)
class Expired:
    """The lease ended: it was not renewed in time, or the server gave it to another consumer."""


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """The consumer has more than its share."""


@dataclass(frozen=True, slots=True)
class Released:
    """The consumer has given the lease up."""


LEASE_TRANSITIONS: Final = Transitions(
    "partition lease",
    LeaseState.FREE,
    {
        LeaseState.FREE: {
            Acquired: LeaseState.OWNED,
            # It expired before the reply came.
            Released: LeaseState.FREE,
        },
        LeaseState.OWNED: {
            Extended: LeaseState.OWNED,
            Expired: LeaseState.FREE,
            Withdrawn: LeaseState.LEAVING,
            # It expired and was acquired again before the reply came; the next renewal tells that it is gone.
            Released: LeaseState.OWNED,
        },
        LeaseState.LEAVING: {
            Extended: LeaseState.LEAVING,
            Expired: LeaseState.FREE,
            Released: LeaseState.FREE,
        },
    },
)
"""Each state, its legal events and the next state. Any other pair is a LocalProtocolError."""


class Ownership:
    """The leases of one consumer. `now` is in seconds on a monotonic clock."""

    def __init__(self, keys: Sequence[str], consumer: str, lease: float) -> None:
        """Create the object for the Redis keys of the partitions and leases of `lease` seconds."""
        self._consumer = consumer
        self._lease = lease
        self._states = dict.fromkeys(keys, LEASE_TRANSITIONS.initial)
        self._until = dict.fromkeys(keys, 0.0)

    def receive(self, key: str, event: object) -> LeaseState:
        """Process an event of a partition and return the state after it.

        Raises:
            LocalProtocolError: The event is illegal in this state.
        """
        self._states[key] = LEASE_TRANSITIONS.next(self._states[key], type(event), LocalProtocolError)
        return self._states[key]

    def extend(self, key: str, asked_at: float) -> float:
        """Note that the server granted or renewed a lease, and return the time until which it surely lasts."""
        self._until[key] = asked_at + self._lease * 0.95
        return self._until[key]

    def held(self) -> list[str]:
        """Return the partitions whose lease must be renewed."""
        return [key for key, state in self._states.items() if state is not LeaseState.FREE]

    def expired(self, now: float) -> list[str]:
        """Return the partitions whose lease may have ended."""
        return [key for key in self.held() if now >= self._until[key]]

    def wanted(self, members: Sequence[str]) -> list[str]:
        """Return the partitions to acquire: as many as the share lacks suffice."""
        if self._surplus(members) >= 0:
            return []
        free = [key for key, state in self._states.items() if state is LeaseState.FREE]
        # Each member begins at another place, so that they seldom compete.
        place = self._rank(members) * len(self._states) // len(members)
        order = list(self._states)[place:] + list(self._states)[:place]
        return [key for key in order if key in free]

    def lacking(self, members: Sequence[str]) -> int:
        """Return how many partitions the consumer has less than its share."""
        return max(-self._surplus(members), 0)

    def excess(self, members: Sequence[str]) -> list[str]:
        """Return the partitions from which to withdraw."""
        surplus = self._surplus(members)
        owned = [key for key, state in self._states.items() if state is LeaseState.OWNED]
        return owned[len(owned) - surplus :] if surplus > 0 else []

    def _rank(self, members: Sequence[str]) -> int:
        return sum(1 for each in set(members) if each < self._consumer)

    def _surplus(self, members: Sequence[str]) -> int:
        count = len({*members, self._consumer})
        share, rest = divmod(len(self._states), count)
        owned = sum(1 for state in self._states.values() if state is LeaseState.OWNED)
        return owned - share - (1 if self._rank(members) < rest else 0)
