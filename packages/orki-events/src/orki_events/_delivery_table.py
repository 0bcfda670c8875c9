"""What the delivery machine is told, and what it asks for, in batches: one object for a read of 500 entries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from orki_contract.errors import Reason
from orki_contract.model import Backoff

Entry = list[Any]
"""As the server sends it: the id, and the flat list of fields, or None where the entry was trimmed."""


class Outcome(StrEnum):
    """As what an acknowledged entry counts."""

    PROCESSED = "processed"
    DEAD_LETTERED = "dead_lettered"
    DECLARED_LOST = "declared_lost"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliverySettings:
    """Limits of one consumer.

    Attributes:
        prefetch: Most entries held.
        max_deliveries: Deliveries of one entry before it is dead-lettered.
        ack_deadline_s: Others may claim an entry that was not renewed for so long.
        sweep_interval_s: Time between two looks for entries that others left behind.
        hold_limit_s: Longest time that an entry is renewed.
        backoff: Wait before a failed entry is dispatched again.
    """

    prefetch: int
    max_deliveries: int
    ack_deadline_s: float
    sweep_interval_s: float
    hold_limit_s: float
    backoff: Backoff


# Commands. They are told apart by identity: an answer names the command that it answers.


@dataclass(frozen=True, slots=True, eq=False)
class CreateGroups:
    """Create the group on every partition, at its remembered place. Answer: GroupsReady."""


@dataclass(frozen=True, slots=True, eq=False)
class Read:
    """Read new entries (`history` false), or those that the consumer was given before. Answer: EntriesRead.

    Attributes:
        places: Key, and the id to read behind; `>` for new entries.
        count: Most entries of each key.
        history: Whether it reads the consumer's own pending entries.
    """

    places: tuple[tuple[str, bytes], ...]
    count: int
    history: bool


@dataclass(frozen=True, slots=True, eq=False)
class Dispatch:
    """Hand entries to whoever wanted some first. Answers: Succeeded, Failed, Returned, in any portions.

    Attributes:
        key: Their partition.
        entries: At least one, at most as many as were wanted.
        deliveries: How often each was delivered, this time included, by id; once where it is not named.
    """

    key: str
    entries: list[Entry]
    deliveries: Mapping[bytes, int]


@dataclass(frozen=True, slots=True, eq=False)
class Ack:
    """Acknowledge and count. Answer: Acked.

    Attributes:
        key: Their partition.
        entry_ids: What to acknowledge; may be empty.
        outcome: As what it counts.
        extra: Entries to count besides, which the server has already dropped from the pending ones.
    """

    key: str
    entry_ids: list[bytes]
    outcome: Outcome
    extra: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Claim:
    """Take over entries that were not renewed in time. Answer: EntriesClaimed."""

    key: str
    cursor: bytes
    count: int


@dataclass(frozen=True, slots=True)
class Letter:
    """An entry for the dead letter stream, and why."""

    entry: Entry
    deliveries: int
    reason: Reason.ValueType
    message: str


@dataclass(frozen=True, slots=True, eq=False)
class DeadLetter:
    """Write entries to the dead letter stream; they are acknowledged after it. Answer: DeadLettered."""

    key: str
    letters: tuple[Letter, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Renew:
    """Renew what is held. Answer: Renewed.

    Attributes:
        key: Their partition.
        entry_ids: What to renew.
        deliveries: Number of deliveries to write down for them; 0 leaves it.
    """

    key: str
    entry_ids: list[bytes]
    deliveries: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class HandBack:
    """Let others claim these at once. Answer: HandedBack.

    Attributes:
        key: Their partition.
        deliveries: How often each was delivered to a handler, by id.
    """

    key: str
    deliveries: Mapping[bytes, int]


ServerCommand = Read | Ack | Claim | DeadLetter | Renew | HandBack
"""What Redis commands answer."""
Command = CreateGroups | Dispatch | ServerCommand


# Events.


@dataclass(frozen=True, slots=True)
class Opened:
    """The consumer begins."""


@dataclass(frozen=True, slots=True)
class GroupsReady:
    """The groups are there."""

    command: CreateGroups


@dataclass(frozen=True, slots=True)
class EntriesRead:
    """What a read brought.

    Attributes:
        command: The read.
        entries: By key; a key that brought nothing may be left out.
        deliveries: How often each was delivered, by key and id; once where it is not named.
    """

    command: Read
    entries: Mapping[str, list[Entry]]
    deliveries: Mapping[str, Mapping[bytes, int]]


@dataclass(frozen=True, slots=True)
class EntriesClaimed:
    """What a claim brought.

    Attributes:
        command: The claim.
        cursor: Where the next claim goes on; `0-0` at the end.
        entries: Now the consumer's.
        deliveries: How often each was delivered, this time included, by id.
        deleted: Pending entries that were trimmed, and which the server has dropped.
    """

    command: Claim
    cursor: bytes
    entries: list[Entry]
    deliveries: Mapping[bytes, int]
    deleted: Sequence[bytes]


@dataclass(frozen=True, slots=True)
class Acked:
    """The server has the acknowledgements.

    Attributes:
        command: The acknowledgement.
        count: How many entries were pending until now.
    """

    command: Ack
    count: int


@dataclass(frozen=True, slots=True)
class DeadLettered:
    """The dead letter stream has the entries."""

    command: DeadLetter


@dataclass(frozen=True, slots=True)
class Renewed:
    """What is held was renewed.

    Attributes:
        command: The renewal.
        gone: Ids that are no longer this consumer's.
    """

    command: Renew
    gone: Sequence[bytes]


@dataclass(frozen=True, slots=True)
class HandedBack:
    """Others can claim what was handed back."""

    command: HandBack


@dataclass(frozen=True, slots=True)
class Unanswered:
    """No answer came: what the server did is not known."""

    command: CreateGroups | ServerCommand


@dataclass(frozen=True, slots=True)
class GroupMissing:
    """The server says that the stream or the group is not there."""

    command: CreateGroups | ServerCommand


@dataclass(frozen=True, slots=True)
class Wanted:
    """Somebody can handle entries: one Dispatch of at most so many is due."""

    count: int


@dataclass(frozen=True, slots=True)
class Returned:
    """Dispatched entries whose handling did not begin; next in turn."""

    key: str
    entries: list[Entry]


@dataclass(frozen=True, slots=True)
class Succeeded:
    """Handlers returned, or the entries need none."""

    key: str
    entry_ids: Sequence[bytes]


@dataclass(frozen=True, slots=True)
class Failed:
    """Handlers raised.

    Attributes:
        key: Partition of the entries.
        entries: As dispatched.
        reason: For the dead letter, where `final`.
        message: The error in words.
        final: Whether no further delivery can mend it.
    """

    key: str
    entries: Sequence[Entry]
    reason: Reason.ValueType
    message: str
    final: bool = False


@dataclass(frozen=True, slots=True)
class DrainAsked:
    """The consumer shall end in good order."""


Event = (
    Opened
    | GroupsReady
    | EntriesRead
    | EntriesClaimed
    | Acked
    | DeadLettered
    | Renewed
    | HandedBack
    | Unanswered
    | GroupMissing
    | Wanted
    | Returned
    | Succeeded
    | Failed
    | DrainAsked
)


class State(StrEnum):
    """Where a consumer is in its life."""

    NEW = "new"
    CREATING = "creating groups"
    RECOVERING = "recovering"
    READING = "reading"
    DRAINING = "draining"
    CLOSED = "closed"


_NEW, _CREATING, _RECOVERING = State.NEW, State.CREATING, State.RECOVERING
_READING, _DRAINING, _CLOSED = State.READING, State.DRAINING, State.CLOSED

TRANSITIONS: Final[dict[tuple[State, type[Event]], tuple[State, ...]]] = {
    (_NEW, Opened): (_CREATING,),
    (_NEW, DrainAsked): (_CLOSED,),
    (_CREATING, GroupsReady): (_RECOVERING,),
    (_CREATING, EntriesRead): (_CREATING,),
    (_CREATING, EntriesClaimed): (_CREATING,),
    (_CREATING, Acked): (_CREATING,),
    (_CREATING, DeadLettered): (_CREATING,),
    (_CREATING, Renewed): (_CREATING,),
    (_CREATING, Unanswered): (_CREATING,),
    (_CREATING, GroupMissing): (_CREATING,),
    (_CREATING, Wanted): (_CREATING,),
    (_CREATING, Returned): (_CREATING,),
    (_CREATING, Succeeded): (_CREATING,),
    (_CREATING, Failed): (_CREATING,),
    (_CREATING, DrainAsked): (_DRAINING, _CLOSED),
    (_RECOVERING, EntriesRead): (_RECOVERING, _READING),
    (_RECOVERING, EntriesClaimed): (_RECOVERING,),
    (_RECOVERING, Acked): (_RECOVERING,),
    (_RECOVERING, DeadLettered): (_RECOVERING,),
    (_RECOVERING, Renewed): (_RECOVERING,),
    (_RECOVERING, Unanswered): (_RECOVERING,),
    (_RECOVERING, GroupMissing): (_CREATING,),
    (_RECOVERING, Wanted): (_RECOVERING,),
    (_RECOVERING, Returned): (_RECOVERING,),
    (_RECOVERING, Succeeded): (_RECOVERING,),
    (_RECOVERING, Failed): (_RECOVERING,),
    (_RECOVERING, DrainAsked): (_DRAINING, _CLOSED),
    (_READING, EntriesRead): (_READING,),
    (_READING, EntriesClaimed): (_READING,),
    (_READING, Acked): (_READING,),
    (_READING, DeadLettered): (_READING,),
    (_READING, Renewed): (_READING,),
    (_READING, Unanswered): (_READING, _RECOVERING),
    (_READING, GroupMissing): (_CREATING,),
    (_READING, Wanted): (_READING,),
    (_READING, Returned): (_READING,),
    (_READING, Succeeded): (_READING,),
    (_READING, Failed): (_READING,),
    (_READING, DrainAsked): (_DRAINING, _CLOSED),
    (_DRAINING, GroupsReady): (_DRAINING, _CLOSED),
    (_DRAINING, EntriesRead): (_DRAINING, _CLOSED),
    (_DRAINING, EntriesClaimed): (_DRAINING, _CLOSED),
    (_DRAINING, Acked): (_DRAINING, _CLOSED),
    (_DRAINING, DeadLettered): (_DRAINING,),
    (_DRAINING, Renewed): (_DRAINING, _CLOSED),
    (_DRAINING, HandedBack): (_DRAINING, _CLOSED),
    (_DRAINING, Unanswered): (_DRAINING, _CLOSED),
    (_DRAINING, GroupMissing): (_DRAINING, _CLOSED),
    (_DRAINING, Returned): (_DRAINING,),
    (_DRAINING, Succeeded): (_DRAINING,),
    (_DRAINING, Failed): (_DRAINING, _CLOSED),
    (_DRAINING, DrainAsked): (_DRAINING,),
    (_CLOSED, DrainAsked): (_CLOSED,),
}
"""Each legal pair of state and event, and the states that may follow. Every other pair is a LocalProtocolError."""
