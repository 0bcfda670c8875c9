"""What is known about positions in one partition: snapshots, records, and the position machine's events and table.

An *ordinal* is the number of entries that a partition had received when an entry was the newest one. The ordinal of an
id is known without counting if the id is the newest one, or older than all entries; otherwise the server counts the
entries before or after it. No I/O.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from typing import Any, Final, Self

from orki_contract.transitions import Transitions

Id = tuple[int, int]
"""An entry id: milliseconds and sequence number."""
ZERO: Final[Id] = (0, 0)
_MAX_LOSSES: Final = 16
_MAX_PART: Final = 2**64 - 1


def id_text(value: Id) -> str:
    """Return an id as the server writes it."""
    return f"{value[0]}-{value[1]}"


def id_before(value: Id) -> Id:
    """Return the largest smaller id; for 0-0, the id itself."""
    if value[1] > 0:
        return (value[0], value[1] - 1)
    return (value[0] - 1, _MAX_PART) if value[0] > 0 else value


def _parse_id(text: str) -> Id:
    first, _, second = text.partition("-")
    return (int(first), int(second or 0))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Record:
    """A record as the text `name=value name=value`; an absent or unreadable field has its default."""

    def text(self) -> str:
        """Return the value in the hash."""
        return " ".join(f"{each.name}={_written(getattr(self, each.name))}" for each in fields(self))

    @classmethod
    def parse(cls, raw: bytes | None) -> Self | None:
        """Read a value of the hash; None if it is absent. Fields that a newer version added are ignored."""
        if not raw:
            return None
        words = dict(word.split("=", 1) for word in raw.decode("ascii", "replace").split(" ") if "=" in word)
        values: dict[str, Any] = {}
        for each in fields(cls):
            if each.name in words:
                try:
                    values[each.name] = _read(each.default, words[each.name])
                except ValueError:
                    continue
        return cls(**values)


def _written(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value)) if value and isinstance(value[0], Loss) else id_text(value) if value else ""
    return str(value)


def _read(default: Any, text: str) -> Any:
    if default == ():
        return tuple(Loss.parse(each) for each in text.split(",") if each)
    if isinstance(default, tuple):
        return _parse_id(text)
    return int(text) if isinstance(default, int) else text


@dataclass(frozen=True, slots=True)
class Loss:
    """Entries that the server lost although it had accepted them: their ids are after `after`, up to `until`."""

    after: Id
    until: Id
    count: int

    def __str__(self) -> str:
        return f"{id_text(self.after)}:{id_text(self.until)}:{self.count}"

    @classmethod
    def parse(cls, text: str) -> Loss:
        after, until, count = text.split(":")
        return cls(_parse_id(after), _parse_id(until), int(count))


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamRecord(_Record):
    """The furthest position of a partition that any process saw.

    Attributes:
        added: Number of entries that it had ever received.
        length: Number of entries then.
        last: Id of its newest entry.
        first: Id of its oldest entry; 0-0 without one.
        deleted: Highest id that was deleted by hand.
        server: The server's run id and replication id.
        rolled_back: Number of accepted entries that the server lost, for example by a restart with older files.
        losses: The newest of these losses.
    """

    added: int = 0
    length: int = 0
    last: Id = ZERO
    first: Id = ZERO
    deleted: Id = ZERO
    server: str = ""
    rolled_back: int = 0
    losses: tuple[Loss, ...] = ()

    def lost_before(self, position: Id) -> int:
        """Return how many entries before a position the server lost."""
        return self.rolled_back - sum(each.count for each in self.losses if each.after >= position)

    def with_loss(self, loss: Loss) -> StreamRecord:
        """Return the record with one more loss."""
        recent = (*self.losses, loss)[-_MAX_LOSSES:]
        return replace(self, rolled_back=self.rolled_back + loss.count, losses=recent)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRecord(_Record):
    """A group's position in a partition.

    Attributes:
        read: Id of the last entry that the group received.
        reach: Number of entries that it has received or cannot receive any more.
        received: Number of entries that it received.
        lost: Number of entries that were trimmed or deleted before it received them.
        kept: Number of entries that it had settled before the server lost them.
        kept_until: Ordinal, lost entries included, up to which `kept` counts.
        told_trimmed: How many of `lost` a consumer of the group was told about.
        told_rolled_back: The same of the entries that the server lost.
    """

    read: Id = ZERO
    reach: int = 0
    received: int = 0
    lost: int = 0
    kept: int = 0
    kept_until: int = 0
    told_trimmed: int = 0
    told_rolled_back: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupState:
    """A group on the server.

    Attributes:
        read: Id of the last entry that was delivered to the group.
        pending: Number of pending entries.
        oldest: Id of the oldest one; None without one.
        consumers: Number of consumers that the server knows.
        lag: The server's own figure; None if it has none.
        processed, dead_lettered, declared_lost: Counters of settled entries.
        start: Id after which the group began, and number of entries that it never sees; None if unknown.
        base: Number of entries that the server had lost before the group was created.
        cursor: The saved settled position, as text; None if absent.
        record: The group's record; None if absent.
        raw: Its text.
        acknowledged: Number of lost entries that an operator has acknowledged.
    """

    read: Id = ZERO
    pending: int = 0
    oldest: Id | None = None
    consumers: int = 0
    lag: int | None = None
    processed: int = 0
    dead_lettered: int = 0
    declared_lost: int = 0
    start: tuple[Id, int] | None = None
    base: int = 0
    cursor: bytes | None = None
    record: GroupRecord | None = None
    raw: bytes | None = None
    acknowledged: int = 0

    @property
    def received(self) -> int:
        """Number of entries that the group received."""
        return self.processed + self.dead_lettered + self.declared_lost + self.pending

    @property
    def settled(self) -> Id:
        """Id up to which the group has settled everything."""
        return id_before(self.oldest) if self.oldest is not None else self.read


@dataclass(frozen=True, slots=True)
class Counted:
    """Entries on both sides of an id: up to it, and after it; None if there are too many to count.

    `floor` is the newest entry up to the id; 0-0 without one.
    """

    upto: int | None
    after: int | None
    floor: Id = ZERO


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """One partition at one instant.

    Attributes:
        exists: Whether the key exists.
        length, last, first, deleted, server: As in `StreamRecord`.
        added: Number of entries that it ever received; None before Redis 7, which does not count them.
        groups: The groups on the server, by name.
        record: The partition's record; None if absent.
        raw: Its text.
        counted: Counts that were asked for, by id.
        acknowledged: Number of entries lost by the server that an operator has acknowledged.
    """

    exists: bool = True
    length: int = 0
    added: int | None = 0
    last: Id = ZERO
    first: Id = ZERO
    deleted: Id = ZERO
    server: str = ""
    groups: Mapping[str, GroupState] = field(default_factory=dict)
    record: StreamRecord | None = None
    raw: bytes | None = None
    counted: Mapping[Id, Counted] = field(default_factory=dict)
    acknowledged: int = 0


class LossKind(StrEnum):
    """How entries were lost; the names are those of `GapKind`."""

    TRIMMED_UNREAD = "trimmed_unread"
    ROLLED_BACK = "rolled_back"


@dataclass(frozen=True, slots=True)
class Declared:
    """A loss to report: `group` is empty for the stream itself. Lost ids are after `after`, up to `until`.

    `total` is the group's loss of this kind so far; it tells repetitions apart.
    """

    kind: LossKind
    group: str
    count: int
    exact: bool
    after: Id
    until: Id
    total: int


# Commands.


@dataclass(frozen=True, slots=True)
class Measure:
    """Take another snapshot after `pause` seconds, with entries counted. Reply: Observed.

    The entries around `ids` are counted and, with `position`, those around the position that the group has then.
    """

    ids: tuple[Id, ...]
    position: bool = False
    pause: float = 0.0


@dataclass(frozen=True, slots=True)
class Change:
    """A field of one of the partition's hashes, its expected value (None if absent), and its new value."""

    settled: bool
    name: str
    expected: bytes | None
    value: str


@dataclass(frozen=True, slots=True)
class Write:
    """Write all changes and losses, unless any field has another value meanwhile. Replies: Written, Outdated."""

    changes: tuple[Change, ...]
    losses: tuple[Declared, ...]


@dataclass(frozen=True, slots=True)
class Tell:
    """Report losses in this process."""

    losses: tuple[Declared, ...]


Command = Measure | Write | Tell


class Event:
    """Base of all events."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Observed(Event):
    """A snapshot of the partition."""

    snapshot: Snapshot


@dataclass(frozen=True, slots=True)
class Written(Event):
    """The server has the changes."""


@dataclass(frozen=True, slots=True)
class Outdated(Event):
    """Another process wrote in between; nothing was written."""


@dataclass(frozen=True, slots=True)
class Unanswered(Event):
    """No reply came."""


@dataclass(frozen=True, slots=True)
class Reopened(Event):
    """A connection to the server was opened again: it may be another server, or have older data."""


@dataclass(frozen=True, slots=True)
class Arrived(Event):
    """This process published or received entries: the ids of the oldest and the newest one, and their number."""

    first: Id
    last: Id
    count: int


@dataclass(frozen=True, slots=True)
class Settled(Event):
    """This process settled entries of the group."""

    count: int


# Conclusions of the machine itself.


@dataclass(frozen=True, slots=True)
class CountNeeded(Event):
    """A snapshot does not suffice."""


@dataclass(frozen=True, slots=True)
class ChangeFound(Event):
    """The records must be written."""


@dataclass(frozen=True, slots=True)
class Agreed(Event):
    """The records agree with the server."""


class State(StrEnum):
    """Stages of a comparison.

    NEW: nothing is known. DOUBTFUL: what is known must be compared before it is used. FOLLOWING: it agrees with the
    server. COMPARING: a snapshot is judged. MEASURING, WRITING: a reply is due.
    """

    NEW = "new"
    DOUBTFUL = "doubtful"
    FOLLOWING = "following"
    COMPARING = "comparing"
    MEASURING = "measuring"
    WRITING = "writing"


TRANSITIONS: Final = Transitions(
    "position",
    State.NEW,
    {
        State.NEW: {
            Observed: State.COMPARING,
            Reopened: State.NEW,
            Arrived: State.NEW,
            Settled: State.NEW,
        },
        State.DOUBTFUL: {
            Observed: State.COMPARING,
            Reopened: State.DOUBTFUL,
            Arrived: State.DOUBTFUL,
            Settled: State.DOUBTFUL,
        },
        State.FOLLOWING: {
            Observed: State.COMPARING,
            Reopened: State.DOUBTFUL,
            Arrived: State.FOLLOWING,
            Settled: State.FOLLOWING,
        },
        State.COMPARING: {
            CountNeeded: State.MEASURING,
            ChangeFound: State.WRITING,
            Agreed: State.FOLLOWING,
        },
        State.MEASURING: {
            Observed: State.COMPARING,
            Unanswered: State.DOUBTFUL,
            Reopened: State.MEASURING,
            Arrived: State.MEASURING,
            Settled: State.MEASURING,
        },
        State.WRITING: {
            Written: State.FOLLOWING,
            Outdated: State.DOUBTFUL,
            Unanswered: State.DOUBTFUL,
            Reopened: State.WRITING,
            Arrived: State.WRITING,
            Settled: State.WRITING,
        },
    },
)
"""Each state, its legal events and the next state. Any other pair is a LocalProtocolError."""
