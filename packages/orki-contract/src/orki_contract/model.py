"""The contract as plain values: what streams, groups, tasks, tools and frames are.

The generator renders these classes, generated code instantiates them, and the runtimes read them: there is no second
model. All are frozen, totally ordered among their own kind, and turned into JSON by `dump`. Durations are
seconds, sizes are bytes; 0 in a duration that may be absent means "no limit".
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

__all__ = [
    "AUDIT_GROUP",
    "DURATIONS",
    "Backoff",
    "Contract",
    "ExternalGroup",
    "Frame",
    "FrameField",
    "Group",
    "Overflow",
    "Retention",
    "Scalar",
    "SensitiveField",
    "Start",
    "Stream",
    "TaskMethod",
    "ToolMethod",
    "dump",
    "duration_text",
    "milliseconds",
    "to_json",
]


class Start(StrEnum):
    """Where a new consumer group begins to read."""

    EARLIEST = "earliest"
    LATEST = "latest"


class Overflow(StrEnum):
    """What a stream does when its retention is reached."""

    DROP_OLDEST = "drop_oldest"


class Scalar(StrEnum):
    """Little-endian types of a frame's block. `BYTES` has the length of its field's `size`."""

    BOOL = "bool"
    U8 = "u8"
    U16 = "u16"
    U32 = "u32"
    U64 = "u64"
    I8 = "i8"
    I16 = "i16"
    I32 = "i32"
    I64 = "i64"
    F32 = "f32"
    F64 = "f64"
    BYTES = "bytes"


@dataclass(frozen=True, order=True, slots=True, kw_only=True)
class Group:
    """A consumer group: one cursor over a stream, shared by all consumers of that name.

    Attributes:
        name: Unique on its stream.
        start: Where the group begins when it is created.
        max_deliveries: Deliveries of one entry before it is dead-lettered.
        ack_deadline: A delivered entry neither acknowledged nor renewed for this long is claimed by others.
        dead_letter: Stream for what could not be processed; empty means `STREAM.GROUP.dead`.
    """

    name: str
    start: Start = Start.EARLIEST
    max_deliveries: int = 5
    ack_deadline: float = 30.0
    dead_letter: str = ""


AUDIT_GROUP = Group(name="audit")
"""The group that every stream has without being asked."""


@dataclass(frozen=True, order=True, slots=True, kw_only=True)
class Retention:
    """When entries may be trimmed, for each partition; limits are approximate (Redis `XADD … MAXLEN ~`).

    Attributes:
        max_entries: Most entries kept, unless a deployment sets another number.
        max_age: Longest time that an entry is kept, likewise; 0 for no limit.
        overflow: What happens when a limit is reached.
        least_entries: Fewest entries that a deployment may set; 0: none may set fewer than `max_entries`.
        most_entries: Most entries that a deployment may set; 0: none may set more than `max_entries`.
        least_age: Shortest age that a deployment may set; 0: none may set a shorter one than `max_age`.
        most_age: Longest age that a deployment may set; 0: none may set a longer one than `max_age`.
    """

    max_entries: int
    max_age: float = 0.0
    overflow: Overflow = Overflow.DROP_OLDEST
    least_entries: int = 0
    most_entries: int = 0
    least_age: float = 0.0
    most_age: float = 0.0

    @property
    def tunable(self) -> bool:
        """Whether a deployment may set anything at all."""
        return self.entries_bounds[0] < self.entries_bounds[1] or self.age_bounds[0] < self.age_bounds[1]

    @property
    def entries_bounds(self) -> tuple[int, int]:
        """Fewest and most entries that a deployment may set, both `max_entries` where nothing may be set."""
        return self.least_entries or self.max_entries, self.most_entries or self.max_entries

    @property
    def age_bounds(self) -> tuple[float, float]:
        """Shortest and longest age that a deployment may set, likewise; 0 and 0 where no age limits the stream."""
        if not self.max_age:
            return 0.0, 0.0
        return self.least_age or self.max_age, self.most_age or self.max_age


@dataclass(frozen=True, order=True, slots=True, kw_only=True)
class Stream:
    """One Redis stream and the groups that its owner declares, `audit` among them.

    Attributes:
        name: Unique over the fleet.
        message: Full name of the entry's message.
        retention: When entries may be trimmed.
        partitions: Number of Redis keys.
        partition_key: Field whose value picks the partition; empty when there is one partition.
        groups: By name.
    """

    name: str
    message: str
    retention: Retention
    partitions: int = 1
    partition_key: str = ""
    groups: tuple[Group, ...] = (AUDIT_GROUP,)

    def group(self, name: str) -> Group:
        """The declared group of that name.

        Raises:
            UnknownGroup: No such group; the message lists those that are.
        """
        for group in self.groups:
            if group.name == name:
                return group
        from orki_contract.errors import UnknownGroup

        declared = ", ".join(group.name for group in self.groups)
        raise UnknownGroup(f'stream "{self.name}" declares no group "{name}" (declared: {declared})')

    def dead_letter(self, group: Group) -> str:
        """Name of the stream that takes what this group could not process."""
        return group.dead_letter or f"{self.name}.{group.name}.dead"


@dataclass(frozen=True, order=True, slots=True, kw_only=True)
class ExternalGroup:
    """A group that a reader's package declares on a stream of somebody else.

    Attributes:
        package: Proto package of the reader.
        stream: Name of the stream.
        message: Full name of the stream's message.
        group: The group.
    """

    package: str
    stream: str
    message: str
    group: Group


@dataclass(frozen=True, order=True, slots=True, kw_only=True)
class Backoff:
    """Wait before attempt n+1: `min(initial * multiplier ** (n - 1), maximum)`."""

    initial: float = 1.0
    maximum: float = 60.0
    multiplier: float = 2.0

    def delay(self, failed_attempts: int) -> float:
        """Delay in seconds after `failed_attempts` (at least 1) attempts have failed."""
        try:
            grown = self.initial * self.multiplier ** (failed_attempts - 1)
        except OverflowError:
            return self.maximum
        return min(grown, self.maximum)


@dataclass(frozen=True, order=True, slots=True, kw_only=True)
class TaskMethod:
    """Work that an orchestrator hands to an agent. Message names are full; an empty one means "none".

    Attributes:
        service: Full name of the service.
        name: Name of the method in the proto.
        request: Request message.
        response: Response message.
        progress: Progress message.
        directive: Directive message.
        heartbeat_timeout: Lease of an attempt.
        attempt_timeout: Longest time of one attempt.
        stall_timeout: Longest time without progress; 0 for no limit.
        total_timeout: Longest time over all attempts; 0 for no limit.
        max_attempts: Attempts before the task fails for good.
        backoff: Wait between attempts.
        cancel_grace: Time that a cancelled handler has to end by itself.
    """

    service: str
    name: str
    request: str
    response: str
    progress: str = ""
    directive: str = ""
    heartbeat_timeout: float = 10.0
    attempt_timeout: float = 600.0
    stall_timeout: float = 0.0
    total_timeout: float = 0.0
    max_attempts: int = 3
    backoff: Backoff = Backoff()
    cancel_grace: float = 5.0

    @property
    def full_name(self) -> str:
        """`package.Service/Method`, the name that travels."""
        return f"{self.service}/{self.name}"


@dataclass(frozen=True, order=True, slots=True, kw_only=True)
class ToolMethod:
    """A call on the hot path.

    Attributes:
        service: Full name of the service.
        name: Name of the method in the proto.
        opcode: Number of the call, 0x0100 to 0xffff.
        request: Full name of the request: a frame, or a message that travels in a frame's tail.
        response: Full name of the response, likewise.
        timeout: Longest time for one call.
        idempotent: Whether a call of unknown fate may be repeated.
    """

    service: str
    name: str
    opcode: int
    request: str
    response: str
    timeout: float = 1.0
    idempotent: bool = False

    @property
    def full_name(self) -> str:
        """`package.Service/Method`, the name that events and traces show."""
        return f"{self.service}/{self.name}"


@dataclass(frozen=True, order=True, slots=True, kw_only=True)
class FrameField:
    """One field of a frame's block.

    Attributes:
        offset: First byte, from the start of the block.
        name: Name in the proto.
        number: Number in the proto.
        scalar: Its type.
        size: Length in bytes.
        since: Frame version that brought it; frames of older versions lack it.
        enum: Full name of the enum that it holds; empty for none.
    """

    offset: int
    name: str
    number: int
    scalar: Scalar
    size: int
    since: int = 1
    enum: str = ""


@dataclass(frozen=True, order=True, slots=True, kw_only=True)
class Frame:
    """A fixed little-endian layout.

    Attributes:
        message: Full name of the message.
        version: Version of the layout.
        block_length: Length of the block in bytes.
        fields: By offset.
        tail: Name of the field that takes the bytes behind the block; empty for none.
        tail_text: Whether the tail is UTF-8 text.
    """

    message: str
    version: int
    block_length: int
    fields: tuple[FrameField, ...] = ()
    tail: str = ""
    tail_text: bool = False


@dataclass(frozen=True, order=True, slots=True, kw_only=True)
class SensitiveField:
    """A field that audit, logs and traces redact."""

    message: str
    field: str


@dataclass(frozen=True, order=True, slots=True, kw_only=True)
class Contract:
    """All that a set of proto files declares, each part sorted."""

    streams: tuple[Stream, ...] = ()
    external_groups: tuple[ExternalGroup, ...] = ()
    tasks: tuple[TaskMethod, ...] = ()
    tools: tuple[ToolMethod, ...] = ()
    frames: tuple[Frame, ...] = ()
    sensitive: tuple[SensitiveField, ...] = field(default=())


DURATIONS: Final = frozenset(
    {
        *("ack_deadline", "max_age", "least_age", "most_age"),
        *("heartbeat_timeout", "attempt_timeout", "stall_timeout", "total_timeout", "cancel_grace"),
        *("initial", "maximum", "timeout"),
    }
)
"""Names of the model's fields that hold seconds."""


def milliseconds(seconds: float) -> int:
    """Convert a duration to whole milliseconds, as they travel on the wire and in Redis."""
    return round(seconds * 1_000)


def duration_text(seconds: float) -> str:
    """Return a duration in the largest unit that gives a whole number, such as `7 d` or `250 ms`; 0 is `no limit`."""
    total = milliseconds(seconds)
    if not total:
        return "no limit"
    for unit, length in (("d", 86_400_000), ("h", 3_600_000), ("min", 60_000), ("s", 1_000)):
        if total % length == 0:
            return f"{total // length} {unit}"
    return f"{total} ms"


def dump(value: Any) -> Any:
    """The value as JSON types: dataclasses as objects, tuples as arrays, enums as strings."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {entry.name: dump(getattr(value, entry.name)) for entry in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [dump(item) for item in value]
    if isinstance(value, StrEnum):
        return value.value
    return value


def to_json(value: Any) -> str:
    """`dump` as text, indented, with a newline at the end."""
    return json.dumps(dump(value), indent=2) + "\n"
