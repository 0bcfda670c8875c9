"""The tags of the events' protobuf fields, from which the scripts encode events."""

from __future__ import annotations

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from orki.events.v1.audit_pb2 import AuditEvent
from orki.events.v1.envelope_pb2 import Envelope
from orki.events.v1.task_pb2 import TaskEvent


def lua_tags() -> str:
    """Return the Lua table of tags by field name: of the envelope, of both events, and of each kind of task event."""
    messages = (("envelope", Envelope), ("task_event", TaskEvent), ("audit_event", AuditEvent))
    lines = [f"  {name} = {_table(message.DESCRIPTOR)}," for name, message in messages]
    kinds = TaskEvent.DESCRIPTOR.oneofs_by_name["event"].fields
    lines += ["  kinds = {", *(f"    {kind.name} = {_table(kind.message_type)}," for kind in kinds), "  },"]
    return "\n".join(["local TAGS = {", *lines, "}", ""])


def _table(message: Descriptor | None) -> str:
    assert message is not None
    return "{ " + ", ".join(f"{field.name} = '{_tag(field)}'" for field in message.fields) + " }"


def _tag(field: FieldDescriptor) -> str:
    """Return the tag of a field as the characters of a Lua string."""
    is_length_delimited = field.type in (field.TYPE_STRING, field.TYPE_BYTES, field.TYPE_MESSAGE)
    value, found = field.number << 3 | (2 if is_length_delimited else 0), ""
    while value > 0x7F:
        found += f"\\{value & 0x7F | 0x80:03d}"
        value >>= 7
    return f"{found}\\{value:03d}"
