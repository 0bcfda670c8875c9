"""The operations of `family.lua`: children that end with their parent."""

from __future__ import annotations

from dataclasses import dataclass

from orki_control.session import AttemptKey
from orki_server._store.operations import Operation, shard_of


def adopt(parent: AttemptKey, child: str) -> Operation[str]:
    """Note a child of a running attempt. The outcome is `adopted`, `stale` (no such attempt runs) or `full`."""
    arguments = (parent.task_id, parent.fence, child)
    return Operation("adopt", shard_of(parent.task_id), arguments, lambda reply: reply[0].decode(), patient=False)


@dataclass(frozen=True, slots=True)
class Family:
    """A task that failed or was cancelled, and its children.

    Attributes:
        parent: The task.
        age: Time since its end.
        children: The children that end with it.
    """

    parent: str
    age: float
    children: tuple[str, ...]


def orphans(shard: int, limit: int) -> Operation[list[Family]]:
    """Return the families of one shard whose parents have ended, the oldest first, at most `limit`."""
    return Operation("orphans", shard, (limit,), _orphans, patient=False)


def _orphans(reply: list[bytes]) -> list[Family]:
    found: list[Family] = []
    at = 0
    while at < len(reply):
        first, count = at + 3, int(reply[at + 2])
        children = tuple(each.decode() for each in reply[first : first + count])
        found.append(Family(reply[at].decode(), int(reply[at + 1]) / 1000, children))
        at = first + count
    return found


def disown(parent: str) -> Operation[None]:
    """Forget the children of a parent, as all were cancelled."""
    return Operation("disown", shard_of(parent), (parent,), lambda reply: None, patient=False)
