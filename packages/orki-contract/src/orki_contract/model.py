"""The contract model: streams, groups, tasks, tools and frames as plain values.

The generator, the generated code and the runtimes share these classes. All are frozen and ordered; `dump` converts them
to JSON. Durations are seconds and sizes are bytes. A duration of 0 means "no limit" where a limit is optional.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any, Final

__all__ = [
    "AUDIT_GROUP",
    "DURATIONS",
    "TASK_MESSAGES",
    "Backoff",
    "Budget",
    "BudgetLeft",
    "Contract",
    "Durability",
    "ExternalGroup",
    "Frame",
    "FrameField",
    "Group",
    "Overflow",
    "ProgressPolicy",
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
    """Where a new consumer group starts to read."""

    EARLIEST = "earliest"
    LATEST = "latest"


class Overflow(StrEnum):
    """What a stream does when it reaches its retention."""

    DROP_OLDEST = "drop_oldest"
    """The oldest entries are trimmed, read or not."""
    BLOCK = "block"
    """Entries that a declared group has not settled are kept up to the ceiling; there, publishing waits."""
    FAIL = "fail"
    """As `BLOCK`, but at the ceiling publishing fails at once."""


class Durability(StrEnum):
    """What an event survives once it is published."""

    MEMORY = "memory"
    """The server has it in memory."""
    FSYNC = "fsync"
    """The server has it on its disk."""
    REPLICAS = "replicas"
    """Replicas have it in memory."""


class ProgressPolicy(StrEnum):
    """What happens when a handler sends progress faster than it is stored."""

    BLOCK = "block"
    """The handler waits."""
    KEEP_LATEST = "keep_latest"
    """The newest delta replaces the one that waits to be sent; watchers see a gap."""
    DROP = "drop"
    """The newest delta is dropped; watchers see a gap."""


class Scalar(StrEnum):
    """Little-endian types of a frame's block. The length of `BYTES` is its field's `size`."""

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
        name: Name, unique on its stream.
        start: Where a new group starts to read.
        max_deliveries: Maximum deliveries of an entry; afterwards it becomes a dead letter.
        ack_deadline: Time after which other consumers may claim an entry that was neither acknowledged nor renewed.
        dead_letter: Stream of dead letters; empty for `STREAM.GROUP.dead`.
        max_dead_letters: Maximum number of dead letters; the events of older ones are counted as lost.
        max_dead_letter_age: Maximum age of a dead letter; 0 for no limit.
    """

    name: str
    start: Start = Start.EARLIEST
    max_deliveries: int = 5
    ack_deadline: float = 30.0
    dead_letter: str = ""
    max_dead_letters: int = 10_000
    max_dead_letter_age: float = 0.0


AUDIT_GROUP = Group(name="audit")
"""The group that every stream has implicitly."""


@dataclass(frozen=True, order=True, slots=True, kw_only=True)
class Retention:
    """When entries may be trimmed, for each partition; limits are approximate (Redis `XADD … MAXLEN ~`).

    Attributes:
        max_entries: Maximum number of entries, unless a deployment overrides it.
        max_age: Maximum age of an entry, unless a deployment overrides it; 0 for no limit.
        overflow: What happens when a limit is reached.
        least_entries: Lowest `max_entries` that a deployment may set; 0 for `max_entries` itself.
        most_entries: Highest `max_entries` that a deployment may set; 0 for `max_entries` itself.
        least_age: Lowest `max_age` that a deployment may set; 0 for `max_age` itself.
        most_age: Highest `max_age` that a deployment may set; 0 for `max_age` itself.
        max_bytes: Maximum size of the entries, as estimated; 0 for no limit.
        ceiling_entries: Maximum number of entries that are kept for groups; 0 for ten times `max_entries`.
    """

    max_entries: int
    max_age: float = 0.0
    overflow: Overflow = Overflow.DROP_OLDEST
    least_entries: int = 0
    most_entries: int = 0
    least_age: float = 0.0
    most_age: float = 0.0
    max_bytes: int = 0
    ceiling_entries: int = 0

    @property
    def ceiling(self) -> int:
        """Maximum number of entries that are kept for groups; 0 if unread entries are trimmed like others."""
        if self.overflow is Overflow.DROP_OLDEST:
            return 0
        return max(self.ceiling_entries or 10 * self.max_entries, self.max_entries)

    @property
    def tunable(self) -> bool:
        """Whether a deployment may override any limit."""
        return self.entries_bounds[0] < self.entries_bounds[1] or self.age_bounds[0] < self.age_bounds[1]

    @property
    def entries_bounds(self) -> tuple[int, int]:
        """Lowest and highest `max_entries` that a deployment may set; equal if it may not override it."""
        return self.least_entries or self.max_entries, self.most_entries or self.max_entries

    @property
    def age_bounds(self) -> tuple[float, float]:
        """Lowest and highest `max_age` that a deployment may set; both 0 if the age is not limited."""
        if not self.max_age:
            return 0.0, 0.0
        return self.least_age or self.max_age, self.most_age or self.max_age


@dataclass(frozen=True, order=True, slots=True, kw_only=True)
class Stream:
    """A Redis stream and the groups that its owner declares, including `audit`.

    Attributes:
        name: Name, unique in the fleet.
        message: Full name of the entry's message.
        retention: When entries may be trimmed.
        partitions: Number of Redis keys.
        partition_key: Field whose value selects the partition; empty for a single partition.
        groups: The groups, sorted by name.
        durability: What a published event survives.
        replicas: Number of replicas that have a published event; 0 without that durability.
    """

    name: str
    message: str
    retention: Retention
    partitions: int = 1
    partition_key: str = ""
    groups: tuple[Group, ...] = (AUDIT_GROUP,)
    durability: Durability = Durability.MEMORY
    replicas: int = 0

    def group(self, name: str) -> Group:
        """Return the declared group of that name.

        Raises:
            UnknownGroup: There is no such group; the message lists the declared ones.
        """
        for group in self.groups:
            if group.name == name:
                return group
        from orki_contract.errors import UnknownGroup

        declared = ", ".join(group.name for group in self.groups)
        raise UnknownGroup(f'stream "{self.name}" declares no group "{name}" (declared: {declared})')

    def dead_letter(self, group: Group) -> str:
        """Return the name of the group's dead-letter stream."""
        return group.dead_letter or f"{self.name}.{group.name}.dead"


@dataclass(frozen=True, order=True, slots=True, kw_only=True)
class ExternalGroup:
    """A group that a package declares on another package's stream.

    Attributes:
        package: Proto package that declares the group.
        stream: Name of the stream.
        message: Full name of the stream's message.
    """

    package: str
    stream: str
    message: str
    group: Group


@dataclass(frozen=True, order=True, slots=True, kw_only=True)
class Backoff:
    """Delay before attempt n+1: `min(initial * multiplier ** (n - 1), maximum)`."""

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
class Budget:
    """Usage of language models. As the limit of a tree of tasks, an amount of 0 is not limited.

    Attributes:
        tokens: Tokens read and written.
        cost_micros: Cost in millionths of a US dollar.
        calls: Calls of models.
    """

    tokens: int = 0
    cost_micros: int = 0
    calls: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetLeft:
    """What is left of the budgets that a task is charged to; None for what is not limited.

    Attributes:
        tokens: Tokens.
        cost_micros: Millionths of a US dollar.
        calls: Calls of models.
    """

    tokens: int | None = None
    cost_micros: int | None = None
    calls: int | None = None


TASK_MESSAGES: Final = ("progress", "directive", "checkpoint", "answer")
"""The optional messages of a task, as options of the method name them."""


@dataclass(frozen=True, order=True, kw_only=True)
class TaskMethod:
    """A task that an orchestrator assigns to an agent. Message names are full; an empty name means "none".

    Attributes:
        service: Full name of the service.
        name: Name of the method in the proto.
        heartbeat_timeout: Lease of an attempt.
        attempt_timeout: Maximum time of one attempt.
        stall_timeout: Maximum time without progress; 0 for no limit.
        total_timeout: Maximum time over all attempts; 0 for no limit.
        backoff: Delay between attempts.
        cancel_grace: Time for a cancelled handler to end by itself.
        progress_policy: What happens when the handler sends progress faster than it is stored.
        checkpoint: Message of the checkpoints; without one they are bytes.
        answer: Message that answers a suspended task; without one, answers are bytes.
        budget: Budget of a submission that names none; without amounts for no limit.
        durability: Durability of a submission that names none: `memory`, `fsync` or `replicas:N`; empty for the
            orchestrator's setting.
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
    progress_policy: ProgressPolicy = ProgressPolicy.BLOCK
    checkpoint: str = ""
    answer: str = ""
    budget: Budget = Budget()
    durability: str = ""

    @property
    def messages(self) -> list[str]:
        """Full names of the messages besides request and response."""
        return [name for each in TASK_MESSAGES if (name := getattr(self, each))]

    @cached_property
    def full_name(self) -> str:
        """`package.Service/Method`, the name on the wire."""
        return f"{self.service}/{self.name}"


@dataclass(frozen=True, order=True, slots=True, kw_only=True)
class ToolMethod:
    """A tool call on the hot path.

    Attributes:
        service: Full name of the service.
        name: Name of the method in the proto.
        opcode: Number of the call, 0x0100 to 0xffff.
        request: Full name of the request: a frame, or a message that is sent in a frame's tail.
        response: Full name of the response: a frame or a message.
        timeout: Maximum time of a call.
        idempotent: Whether a call whose outcome is unknown may be repeated.
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
        """`package.Service/Method`, the name in events and traces."""
        return f"{self.service}/{self.name}"


@dataclass(frozen=True, order=True, slots=True, kw_only=True)
class FrameField:
    """One field of a frame's block.

    Attributes:
        offset: Offset of the first byte from the start of the block.
        name: Name in the proto.
        number: Number in the proto.
        scalar: Type of the field.
        size: Length in bytes.
        since: Frame version that added the field; older frames lack it.
        enum: Full name of its enum; empty for none.
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
        fields: The fields, sorted by offset.
        tail: Name of the field that holds the bytes after the block; empty for none.
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
    """A field that audit events, logs and traces redact."""

    message: str
    field: str


@dataclass(frozen=True, order=True, slots=True, kw_only=True)
class Contract:
    """All declarations of a set of proto files, each part sorted."""

    streams: tuple[Stream, ...] = ()
    external_groups: tuple[ExternalGroup, ...] = ()
    tasks: tuple[TaskMethod, ...] = ()
    tools: tuple[ToolMethod, ...] = ()
    frames: tuple[Frame, ...] = ()
    sensitive: tuple[SensitiveField, ...] = field(default=())


DURATIONS: Final = frozenset(
    {
        *("ack_deadline", "max_age", "least_age", "most_age", "max_dead_letter_age"),
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
    """Convert a value to JSON types: dataclasses to objects, tuples to arrays, enums to strings."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {entry.name: dump(getattr(value, entry.name)) for entry in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [dump(item) for item in value]
    if isinstance(value, StrEnum):
        return value.value
    return value


def to_json(value: Any) -> str:
    """Return `dump` as indented text with a final newline."""
    return json.dumps(dump(value), indent=2) + "\n"
