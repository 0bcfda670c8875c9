"""The delivery machine's commands, events, states and transition table.

Commands and events carry batches: a read of 500 entries is one object. No I/O.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from orki_contract.errors import Reason
from orki_contract.transitions import Transitions

Entry = list[Any]
"""An entry as the server sends it: the id, and the flat list of fields, or None if the entry was trimmed."""


class Outcome(StrEnum):
    """How an acknowledged entry is counted."""

    PROCESSED = "processed"
    DEAD_LETTERED = "dead_lettered"
    DECLARED_LOST = "declared_lost"


# Commands. They compare by identity: a reply names the command that it answers.


@dataclass(frozen=True, slots=True, eq=False)
class CreateGroups:
    """Create the group on every partition, at its saved position. Reply: GroupsReady."""


@dataclass(frozen=True, slots=True, eq=False)
class Read:
    """Read new entries, or with `history` the consumer's own pending entries. Reply: EntriesRead.

    `positions` are pairs of key and id to read after (`>` for new entries). `count` applies to each key.
    """

    positions: tuple[tuple[str, bytes], ...]
    count: int
    history: bool


@dataclass(frozen=True, slots=True, eq=False)
class Dispatch:
    """Pass entries to the oldest request. Replies: Succeeded, Failed and Returned, for any part of the entries.

    `deliveries` is the number of deliveries of each entry by id, this one included (1 if absent).
    """

    key: str
    entries: list[Entry]
    deliveries: Mapping[bytes, int]


@dataclass(frozen=True, slots=True, eq=False)
class Ack:
    """Acknowledge and count entries. Reply: Acked.

    Attributes:
        extra: Number of further entries to count, which are not pending on the server any more.
        kept: Number of lost entries that the consumer still holds, less those that it held and dropped. They are not
            reported as lost as long as it holds them.
        regained: Number of entries that were counted as lost and got another outcome.
    """

    key: str
    entry_ids: list[bytes]
    outcome: Outcome
    extra: int = 0
    kept: int = 0
    regained: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Claim:
    """Take over entries that were not renewed in time, or with `takeover` all pending ones. Reply: EntriesClaimed."""

    key: str
    cursor: bytes
    count: int
    takeover: bool = False


@dataclass(frozen=True, slots=True)
class Letter:
    """An entry for the dead letter stream, with the reason."""

    entry: Entry
    deliveries: int
    reason: Reason.ValueType
    message: str


@dataclass(frozen=True, slots=True, eq=False)
class DeadLetter:
    """Write entries to the dead letter stream; they are acknowledged afterwards. Reply: DeadLettered."""

    key: str
    letters: tuple[Letter, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Renew:
    """Renew entries and store their number of deliveries, unless it is 0. Reply: Renewed."""

    key: str
    entry_ids: list[bytes]
    deliveries: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class HandBack:
    """Let any consumer claim entries after `wait` seconds, at most the acknowledgement deadline. Reply: HandedBack.

    `deliveries` is the number of deliveries of each entry by id.
    """

    key: str
    deliveries: Mapping[bytes, int]
    wait: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class GiveUp:
    """End the ownership of a partition. Reply: GivenUp."""

    key: str


ServerCommand = Read | Ack | Claim | DeadLetter | Renew | HandBack | GiveUp
"""Commands that one or more Redis commands carry out."""
Command = CreateGroups | Dispatch | ServerCommand


class Event:
    """Base of all events."""

    __slots__ = ()


# Events: replies of the server.


@dataclass(frozen=True, slots=True)
class GroupsReady(Event):
    """The group exists on every partition."""

    command: CreateGroups


@dataclass(frozen=True, slots=True)
class EntriesRead(Event):
    """Entries that were read, by key, and the deliveries of each entry, by key and id (1 if absent)."""

    command: Read
    entries: Mapping[str, list[Entry]]
    deliveries: Mapping[str, Mapping[bytes, int]]


@dataclass(frozen=True, slots=True)
class EntriesClaimed(Event):
    """Entries that now belong to this consumer, and the number of deliveries of each by id, this one included.

    `cursor` is where the next claim starts, `0-0` at the end. `deleted` are pending entries that were trimmed and that
    the server has removed.
    """

    command: Claim
    cursor: bytes
    entries: list[Entry]
    deliveries: Mapping[bytes, int]
    deleted: Sequence[bytes]


@dataclass(frozen=True, slots=True)
class Acked(Event):
    """The server has the acknowledgements; `count` entries were pending until now."""

    command: Ack
    count: int


@dataclass(frozen=True, slots=True)
class DeadLettered(Event):
    """The dead letter stream has the entries, and its retention has dropped `dropped` letters of the group."""

    command: DeadLetter
    dropped: int = 0


@dataclass(frozen=True, slots=True)
class Renewed(Event):
    """Entries were renewed, except for those of other consumers (`lost`) and those that were trimmed."""

    command: Renew
    lost: Sequence[bytes]
    trimmed: Sequence[bytes] = ()


@dataclass(frozen=True, slots=True)
class HandedBack(Event):
    """Other consumers can claim the entries, except for those that were trimmed."""

    command: HandBack
    trimmed: Sequence[bytes] = ()


@dataclass(frozen=True, slots=True)
class GivenUp(Event):
    """Another consumer can own the partition."""

    command: GiveUp


@dataclass(frozen=True, slots=True)
class Unanswered(Event):
    """No reply came: the outcome of the command is unknown."""

    command: CreateGroups | Ack | DeadLetter | Renew | HandBack | GiveUp


@dataclass(frozen=True, slots=True)
class EntriesUnknown(Event):
    """A read or a claim got no reply: the server may have given entries to this consumer."""

    command: Read | Claim


@dataclass(frozen=True, slots=True)
class GroupMissing(Event):
    """The stream or the group does not exist on the server."""

    command: CreateGroups | ServerCommand


# Events: calls by the consumer's code.


@dataclass(frozen=True, slots=True)
class Opened(Event):
    """The consumer starts."""


@dataclass(frozen=True, slots=True)
class Requested(Event):
    """The consumer's code can handle entries: one Dispatch of at most `count` is due."""

    count: int


@dataclass(frozen=True, slots=True)
class Returned(Event):
    """Dispatched entries whose handling did not begin; they are dispatched next."""

    key: str
    entries: list[Entry]


@dataclass(frozen=True, slots=True)
class Succeeded(Event):
    """The handlers returned, or the entries need no handling."""

    key: str
    entry_ids: Sequence[bytes]


@dataclass(frozen=True, slots=True)
class Failed(Event):
    """The handlers raised an error. If `final`, another delivery cannot succeed, and `reason` is the dead letter's."""

    key: str
    entries: Sequence[Entry]
    reason: Reason.ValueType
    message: str
    final: bool = False


@dataclass(frozen=True, slots=True)
class DrainRequested(Event):
    """The consumer must stop in an orderly way."""


# Events: the ownership of ordered partitions.


@dataclass(frozen=True, slots=True)
class PartitionGained(Event):
    """The consumer owns a partition until the given time, unless it keeps it for longer."""

    key: str
    until: float


@dataclass(frozen=True, slots=True)
class PartitionKept(Event):
    """The consumer owns a partition for longer."""

    key: str
    until: float


@dataclass(frozen=True, slots=True)
class PartitionLost(Event):
    """The ownership ended: another consumer may own the partition already."""

    key: str


@dataclass(frozen=True, slots=True)
class PartitionWithdrawn(Event):
    """The consumer must give the partition up once its running handlers have ended."""

    key: str


# Events: timers.


@dataclass(frozen=True, slots=True)
class RepeatDue(Event):
    """The wait before repeating unanswered commands is over."""


@dataclass(frozen=True, slots=True)
class RetryDue(Event):
    """The wait before dispatching failed entries again is over."""


@dataclass(frozen=True, slots=True)
class RenewalDue(Event):
    """Held entries must be renewed."""


@dataclass(frozen=True, slots=True)
class SweepDue(Event):
    """It is time to claim entries that other consumers abandoned."""


@dataclass(frozen=True, slots=True)
class ReadDue(Event):
    """The wait after an unanswered read is over."""


# Events: conclusions of the machine itself.


@dataclass(frozen=True, slots=True)
class Recovered(Event):
    """Every entry that the consumer was given before has been read again."""


@dataclass(frozen=True, slots=True)
class Drained(Event):
    """The consumer holds nothing and waits for no reply."""


def no_reply(command: CreateGroups | ServerCommand) -> Unanswered | EntriesUnknown:
    if isinstance(command, Read | Claim):
        return EntriesUnknown(command)
    return Unanswered(command)


class State(StrEnum):
    """Stages of a consumer's life."""

    NEW = "new"
    CREATING = "creating groups"
    RECOVERING = "recovering"
    READING = "reading"
    DRAINING = "draining"
    CLOSED = "closed"


TRANSITIONS: Final = Transitions(
    "delivery",
    State.NEW,
    {
        State.NEW: {
            Opened: State.CREATING,
            DrainRequested: State.CLOSED,
        },
        State.CREATING: {
            GroupsReady: State.RECOVERING,
            EntriesRead: State.CREATING,
            EntriesClaimed: State.CREATING,
            Acked: State.CREATING,
            DeadLettered: State.CREATING,
            Renewed: State.CREATING,
            HandedBack: State.CREATING,
            Unanswered: State.CREATING,
            EntriesUnknown: State.CREATING,
            GroupMissing: State.CREATING,
            Requested: State.CREATING,
            Returned: State.CREATING,
            Succeeded: State.CREATING,
            Failed: State.CREATING,
            PartitionGained: State.CREATING,
            PartitionKept: State.CREATING,
            PartitionLost: State.CREATING,
            PartitionWithdrawn: State.CREATING,
            GivenUp: State.CREATING,
            RepeatDue: State.CREATING,
            RetryDue: State.CREATING,
            RenewalDue: State.CREATING,
            ReadDue: State.CREATING,
            DrainRequested: State.DRAINING,
        },
        State.RECOVERING: {
            EntriesRead: State.RECOVERING,
            EntriesClaimed: State.RECOVERING,
            Acked: State.RECOVERING,
            DeadLettered: State.RECOVERING,
            Renewed: State.RECOVERING,
            HandedBack: State.RECOVERING,
            Unanswered: State.RECOVERING,
            EntriesUnknown: State.RECOVERING,
            GroupMissing: State.CREATING,
            Requested: State.RECOVERING,
            Returned: State.RECOVERING,
            Succeeded: State.RECOVERING,
            Failed: State.RECOVERING,
            PartitionGained: State.RECOVERING,
            PartitionKept: State.RECOVERING,
            PartitionLost: State.RECOVERING,
            PartitionWithdrawn: State.RECOVERING,
            GivenUp: State.RECOVERING,
            RepeatDue: State.RECOVERING,
            RetryDue: State.RECOVERING,
            RenewalDue: State.RECOVERING,
            ReadDue: State.RECOVERING,
            Recovered: State.READING,
            DrainRequested: State.DRAINING,
        },
        State.READING: {
            EntriesRead: State.READING,
            EntriesClaimed: State.READING,
            Acked: State.READING,
            DeadLettered: State.READING,
            Renewed: State.READING,
            HandedBack: State.READING,
            Unanswered: State.READING,
            EntriesUnknown: State.RECOVERING,
            GroupMissing: State.CREATING,
            Requested: State.READING,
            Returned: State.READING,
            Succeeded: State.READING,
            Failed: State.READING,
            PartitionGained: State.READING,
            PartitionKept: State.READING,
            PartitionLost: State.READING,
            PartitionWithdrawn: State.READING,
            GivenUp: State.READING,
            RepeatDue: State.READING,
            RetryDue: State.READING,
            RenewalDue: State.READING,
            # The partition whose read was not answered may be another consumer's by now.
            ReadDue: State.READING,
            # Not in RECOVERING: entries claimed while own pending entries are read would be delivered twice.
            SweepDue: State.READING,
            DrainRequested: State.DRAINING,
        },
        State.DRAINING: {
            GroupsReady: State.DRAINING,
            EntriesRead: State.DRAINING,
            EntriesClaimed: State.DRAINING,
            Acked: State.DRAINING,
            DeadLettered: State.DRAINING,
            Renewed: State.DRAINING,
            HandedBack: State.DRAINING,
            Unanswered: State.DRAINING,
            EntriesUnknown: State.DRAINING,
            GroupMissing: State.DRAINING,
            Returned: State.DRAINING,
            Succeeded: State.DRAINING,
            Failed: State.DRAINING,
            PartitionKept: State.DRAINING,
            PartitionLost: State.DRAINING,
            GivenUp: State.DRAINING,
            RepeatDue: State.DRAINING,
            RenewalDue: State.DRAINING,
            ReadDue: State.DRAINING,
            DrainRequested: State.DRAINING,
            Drained: State.CLOSED,
        },
        State.CLOSED: {
            DrainRequested: State.CLOSED,
        },
    },
)
"""Each state, its legal events and the next state. Any other pair is a LocalProtocolError."""
