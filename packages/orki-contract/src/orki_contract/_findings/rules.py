"""Every rule of change, and the version bump that it requires."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class Bump(StrEnum):
    """A version bump."""

    MAJOR = "major"
    MINOR = "minor"
    PATCH = "patch"


class Category(StrEnum):
    """Groups of rules; buf's configuration uses these names."""

    STREAM = "ORKI_STREAM"
    FRAME = "ORKI_FRAME"
    TASK = "ORKI_TASK"
    TOOL = "ORKI_TOOL"
    SERVICE = "ORKI_SERVICE"
    MESSAGE = "ORKI_MESSAGE"
    OPTION = "ORKI_OPTION"
    NAME = "ORKI_NAME"


@dataclass(frozen=True, order=True, slots=True, kw_only=True)
class Rule:
    """A kind of contract change.

    Attributes:
        id: Id of the rule, such as `ORKI_STREAM_REMOVED`.
        purpose: A sentence that states the requirement or describes the change.
        bump: The version bump that the change requires.
        wire: Whether processes of the two versions are incompatible; False if at most source code must change.
    """

    id: str
    purpose: str
    category: Category
    bump: Bump
    wire: bool


CATEGORIES: Final[Mapping[Category, str]] = {
    Category.STREAM: "Streams and groups of the event plane.",
    Category.FRAME: "Frames of the hot path.",
    Category.TASK: "Tasks of the control plane.",
    Category.TOOL: "Tools of the hot path.",
    Category.SERVICE: "Services of any kind, and plain gRPC.",
    Category.MESSAGE: "Messages, fields and enums that travel.",
    Category.OPTION: "Values of options in general.",
    Category.NAME: "Names, and the files that hold them.",
}
"""The subject of each category of rules."""


def _breaking(category: Category, rule: str, purpose: str) -> Rule:
    """Create a rule for changes that break running processes."""
    return Rule(id=rule, purpose=purpose, category=category, bump=Bump.MAJOR, wire=True)


def _source_breaking(category: Category, rule: str, purpose: str) -> Rule:
    """Create a rule for changes that break source code but not the wire."""
    return Rule(id=rule, purpose=purpose, category=category, bump=Bump.MAJOR, wire=False)


def _additive(category: Category, rule: str, purpose: str) -> Rule:
    """Create a rule for additions and relaxations that are compatible with old processes."""
    return Rule(id=rule, purpose=purpose, category=category, bump=Bump.MINOR, wire=False)


_STREAM, _FRAME, _TASK, _TOOL, _SERVICE, _MESSAGE, _OPTION, _NAME = Category
_ALL: Final = (
    _breaking(_STREAM, "ORKI_STREAM_REMOVED", "A stream is not removed or renamed."),
    _breaking(_STREAM, "ORKI_STREAM_MOVED", "A stream keeps its message."),
    _breaking(_STREAM, "ORKI_STREAM_ENTRIES_LOWERED", "A stream's maximum number of entries does not decrease."),
    _breaking(_STREAM, "ORKI_STREAM_AGE_LOWERED", "A stream's maximum age does not decrease."),
    _breaking(_STREAM, "ORKI_STREAM_LIMITS", "A stream does not gain or lose a limit of age or size."),
    _breaking(
        _STREAM, "ORKI_STREAM_LEAST_LOWERED", "The lowest retention that a deployment may set does not decrease."
    ),
    _source_breaking(_STREAM, "ORKI_STREAM_BOUNDS_NARROWED", "The range that a deployment may set does not narrow."),
    _breaking(_STREAM, "ORKI_STREAM_OVERFLOW_CHANGED", "A stream keeps its overflow policy."),
    _breaking(_STREAM, "ORKI_STREAM_BYTES_LOWERED", "A stream's maximum size does not decrease."),
    _breaking(_STREAM, "ORKI_STREAM_CEILING_LOWERED", "A stream keeps as many entries for groups that lag."),
    _breaking(_STREAM, "ORKI_STREAM_DURABILITY_CHANGED", "A stream keeps its durability."),
    _breaking(_STREAM, "ORKI_STREAM_PARTITIONS_CHANGED", "A stream keeps its number of partitions."),
    _breaking(_STREAM, "ORKI_STREAM_KEY_CHANGED", "A stream keeps its partition key."),
    _additive(_STREAM, "ORKI_STREAM_ADDED", "A stream is added."),
    _additive(_STREAM, "ORKI_STREAM_RELAXED", "A stream's retention, its ceiling or its upper bound increases."),
    _breaking(_STREAM, "ORKI_GROUP_REMOVED", "A group is not removed, renamed or moved to another package."),
    _breaking(_STREAM, "ORKI_GROUP_START_CHANGED", "A group keeps its start position."),
    _breaking(_STREAM, "ORKI_GROUP_DELIVERIES_LOWERED", "A group's maximum number of deliveries does not decrease."),
    _breaking(_STREAM, "ORKI_GROUP_DEADLINE_LOWERED", "A group's acknowledgement deadline does not decrease."),
    _breaking(_STREAM, "ORKI_GROUP_DEAD_LETTER_CHANGED", "A group keeps its dead-letter stream."),
    _breaking(_STREAM, "ORKI_GROUP_LETTERS_LOWERED", "A group does not keep fewer or younger dead letters."),
    _additive(_STREAM, "ORKI_GROUP_ADDED", "A group is added."),
    _additive(_STREAM, "ORKI_GROUP_RELAXED", "A group allows more deliveries, more time or more dead letters."),
    _breaking(_FRAME, "ORKI_FRAME_REMOVED", "A frame is not removed or renamed."),
    _breaking(_FRAME, "ORKI_FRAME_KIND", "A frame stays a frame, and a plain message stays plain."),
    _breaking(_FRAME, "ORKI_FRAME_FIXED_CHANGED", "A fixed frame never changes."),
    _breaking(_FRAME, "ORKI_FRAME_BLOCK_SHRUNK", "A frame's block does not shrink."),
    _breaking(_FRAME, "ORKI_FRAME_VERSION_KEPT", "A frame's version increases with every layout change."),
    _breaking(_FRAME, "ORKI_FRAME_FIELD_MOVED", "A frame's field keeps its offset and its number."),
    _breaking(_FRAME, "ORKI_FRAME_FIELD_RETYPED", "A frame's field keeps its type and its length."),
    _breaking(_FRAME, "ORKI_FRAME_FIELD_REMOVED", "A removed frame field leaves its number and its bytes reserved."),
    _breaking(_FRAME, "ORKI_FRAME_FIELD_RETIRED", "A frame's field is not removed; older readers would read zeros."),
    _breaking(
        _FRAME, "ORKI_FRAME_FIELD_RENAMED", "A frame's field keeps its name; a new name may have another meaning."
    ),
    _breaking(_FRAME, "ORKI_FRAME_FIELD_PLACED", "A new frame field uses bytes that no earlier field used."),
    _breaking(_FRAME, "ORKI_FRAME_SINCE_WRONG", "A frame field's `since` names the version that added it."),
    _breaking(_FRAME, "ORKI_FRAME_RESERVED_WITHDRAWN", "A frame's reserved numbers stay reserved."),
    _breaking(_FRAME, "ORKI_FRAME_TAIL_CHANGED", "A frame's tail keeps its type and number."),
    _additive(_FRAME, "ORKI_FRAME_ADDED", "A frame is added."),
    _additive(_FRAME, "ORKI_FRAME_GROWN", "A frame is extended."),
    _breaking(_TASK, "ORKI_TASK_REMOVED", "A task is not removed, renamed or turned into another kind of method."),
    _breaking(_TASK, "ORKI_TASK_REQUEST_CHANGED", "A task keeps its request message."),
    _breaking(_TASK, "ORKI_TASK_RESPONSE_CHANGED", "A task keeps its response message."),
    _breaking(_TASK, "ORKI_TASK_PROGRESS_CHANGED", "A task keeps its progress message."),
    _breaking(_TASK, "ORKI_TASK_PROGRESS_LOSSY", "A task whose handlers wait does not begin to drop progress."),
    _breaking(_TASK, "ORKI_TASK_DIRECTIVE_CHANGED", "A task keeps its directive message."),
    _breaking(_TASK, "ORKI_TASK_CHECKPOINT_CHANGED", "A task keeps its checkpoint message."),
    _breaking(_TASK, "ORKI_TASK_ANSWER_CHANGED", "A task keeps its answer message."),
    _breaking(_TASK, "ORKI_TASK_LEASE_SHORTENED", "A task's heartbeat timeout does not decrease."),
    _breaking(_TASK, "ORKI_TASK_TIMEOUT_SHORTENED", "A task's timeouts do not decrease."),
    _breaking(_TASK, "ORKI_TASK_ATTEMPTS_LOWERED", "A task's number of attempts does not decrease."),
    _breaking(_TASK, "ORKI_TASK_BUDGET_LOWERED", "A task's budget does not decrease."),
    _breaking(_TASK, "ORKI_TASK_DURABILITY_LOWERED", "A task's durability does not become another or a lower one."),
    _breaking(_TASK, "ORKI_TASK_REPEATED", "A task with one attempt does not get retries."),
    _additive(_TASK, "ORKI_TASK_ADDED", "A task is added."),
    _additive(_TASK, "ORKI_TASK_RELAXED", "A task gets more time, more attempts, or additional messages."),
    _breaking(_TOOL, "ORKI_TOOL_REMOVED", "A tool is not removed, renamed or turned into another kind of method."),
    _breaking(_TOOL, "ORKI_TOOL_OPCODE_CHANGED", "A tool keeps its opcode."),
    _breaking(_TOOL, "ORKI_TOOL_OPCODE_REUSED", "An opcode is not reused by another tool."),
    _breaking(_TOOL, "ORKI_TOOL_REQUEST_CHANGED", "A tool keeps its request message."),
    _breaking(_TOOL, "ORKI_TOOL_RESPONSE_CHANGED", "A tool keeps its response message."),
    _breaking(_TOOL, "ORKI_TOOL_TIMEOUT_SHORTENED", "A tool's timeout does not decrease."),
    _breaking(_TOOL, "ORKI_TOOL_IDEMPOTENCY_WITHDRAWN", "An idempotent tool stays idempotent."),
    _breaking(_TOOL, "ORKI_TOOL_IDEMPOTENCY_CLAIMED", "A tool that is not idempotent does not become idempotent."),
    _additive(_TOOL, "ORKI_TOOL_ADDED", "A tool is added."),
    _additive(_TOOL, "ORKI_TOOL_RELAXED", "A tool's timeout increases."),
    _breaking(_SERVICE, "ORKI_RPC_REMOVED", "A plain rpc is not removed, renamed or turned into a task or tool."),
    _breaking(_SERVICE, "ORKI_RPC_REQUEST_CHANGED", "A plain rpc keeps its request message."),
    _breaking(_SERVICE, "ORKI_RPC_RESPONSE_CHANGED", "A plain rpc keeps its response message."),
    _breaking(_SERVICE, "ORKI_RPC_STREAMING_CHANGED", "A plain rpc keeps its streaming mode."),
    _additive(_SERVICE, "ORKI_RPC_ADDED", "A plain rpc is added."),
    _breaking(_MESSAGE, "ORKI_MESSAGE_REMOVED", "A message is not removed or renamed."),
    _breaking(_MESSAGE, "ORKI_MESSAGE_RESERVED_WITHDRAWN", "A message's reserved numbers stay reserved."),
    _breaking(_MESSAGE, "ORKI_FIELD_REMOVED", "A removed field leaves its number reserved."),
    _source_breaking(_MESSAGE, "ORKI_FIELD_RETIRED", "A field is not removed while code may use it."),
    _breaking(_MESSAGE, "ORKI_FIELD_RENUMBERED", "A field's name keeps its number."),
    _breaking(_MESSAGE, "ORKI_FIELD_RENAMED", "A field keeps its name; a new name may have another meaning."),
    _breaking(_MESSAGE, "ORKI_FIELD_RETYPED", "A field keeps its type."),
    _breaking(_MESSAGE, "ORKI_FIELD_CARDINALITY", "A field stays single, optional, required or repeated."),
    _breaking(_MESSAGE, "ORKI_FIELD_ONEOF_CHANGED", "A field does not move into or out of a oneof."),
    _breaking(_MESSAGE, "ORKI_FIELD_DEFAULT_CHANGED", "A field keeps its default value."),
    _breaking(_MESSAGE, "ORKI_FIELD_UTF8_CHANGED", "A string keeps its UTF-8 validation."),
    _breaking(_MESSAGE, "ORKI_FIELD_REQUIRED_ADDED", "A new field is not required."),
    _breaking(_MESSAGE, "ORKI_SENSITIVE_WITHDRAWN", "A sensitive field stays sensitive."),
    _additive(_MESSAGE, "ORKI_MESSAGE_ADDED", "A message is added."),
    _additive(_MESSAGE, "ORKI_FIELD_ADDED", "A field is added."),
    _additive(_MESSAGE, "ORKI_SENSITIVE_ADDED", "A field becomes sensitive."),
    _breaking(_MESSAGE, "ORKI_ENUM_REMOVED", "An enum is not removed or renamed."),
    _breaking(_MESSAGE, "ORKI_ENUM_VALUE_REMOVED", "A number of an enum keeps its meaning."),
    _breaking(_MESSAGE, "ORKI_ENUM_VALUE_RENUMBERED", "A name of an enum keeps its number."),
    _breaking(
        _MESSAGE, "ORKI_ENUM_VALUE_RENAMED", "A number of an enum keeps its names; a new name may have another meaning."
    ),
    _breaking(_MESSAGE, "ORKI_ENUM_RESERVED_WITHDRAWN", "An enum's reserved numbers stay reserved."),
    _breaking(_MESSAGE, "ORKI_ENUM_CLOSED_CHANGED", "An enum stays open or closed."),
    _breaking(_MESSAGE, "ORKI_ENUM_CLOSED_GROWN", "A closed enum gets no new value."),
    _additive(_MESSAGE, "ORKI_ENUM_ADDED", "An enum is added."),
    _additive(_MESSAGE, "ORKI_ENUM_VALUE_ADDED", "An enum value is added."),
    _breaking(_OPTION, "ORKI_OPTION_UNKNOWN", "An option that this version does not know is not changed."),
    _source_breaking(_NAME, "ORKI_DECLARATION_MOVED", "A message, enum or service stays in its file."),
    _additive(_NAME, "ORKI_FILE_CHANGED", "A file changes in a way that no other rule covers."),
)

RULES: Final[Mapping[str, Rule]] = {rule.id: rule for rule in _ALL}
"""Every rule of change, by its id."""
