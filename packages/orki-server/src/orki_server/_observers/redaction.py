"""Converts messages to JSON with sensitive fields redacted, and text to safe forms for output.

The JSON follows the proto3 mapping (https://protobuf.dev/programming-guides/json/) with the field names of the proto:
64-bit integers are strings, enums are names, bytes are base64, and unset fields are omitted. A sensitive field becomes
`REDACTED`, whatever its value and at any depth: in nested messages, repeated fields, map values, oneofs and
`google.protobuf.Any`. Fields that the contract does not know may be sensitive in a newer contract, so only their
numbers are shown, under `UNKNOWN_FIELDS`.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Any, Final, cast

from google.protobuf import json_format
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

from orki.errors.v1.errors_pb2 import Reason
from orki_contract.model import SensitiveField

REDACTED: Final = "[redacted]"
"""Replaces a sensitive value."""

UNKNOWN_FIELDS: Final = "(unknown fields)"
"""Key for the numbers of unknown fields; no proto field can have this name."""

_WIDE: Final = (FieldDescriptor.CPPTYPE_INT64, FieldDescriptor.CPPTYPE_UINT64)
_OWN_JSON: Final = (
    *("Duration", "FieldMask", "ListValue", "Struct", "Timestamp", "Value"),
    *("BoolValue", "BytesValue", "DoubleValue", "FloatValue", "StringValue"),
    *("Int32Value", "Int64Value", "UInt32Value", "UInt64Value"),
)
"""Messages of `google.protobuf` with a JSON form of their own."""


def safe_json(value: Any) -> str:
    """Return `value` as one line of JSON in printable ASCII, free of control characters and bidirectional marks."""
    return json.dumps(value, ensure_ascii=True, separators=(",", ":")).replace("\x7f", "\\u007f")


def safe_text(text: str) -> str:
    """Return `text` for a terminal, with unprintable characters escaped."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


class Redaction:
    """Converts messages to JSON with the sensitive fields of a contract redacted."""

    def __init__(
        self, sensitive: Iterable[SensitiveField], message_class: Callable[[str], type[Message] | None] | None = None
    ) -> None:
        """Create a redaction.

        Args:
            sensitive: The sensitive fields, such as `Contract.sensitive`.
            message_class: Returns the class of a message by its full name, or None if unknown; used to decode
                `google.protobuf.Any`. Without it, no `Any` is decoded.
        """
        self._sensitive = frozenset((each.message, each.field) for each in sensitive)
        self._message_class = message_class or (lambda _: None)

    def redacted(self, message: Message) -> dict[str, Any]:
        """Return the message as JSON values with sensitive fields replaced."""
        name = message.DESCRIPTOR.full_name
        if name == "google.protobuf.Any":
            return self._any(message)
        shown: dict[str, Any] = {}
        for field, value in message.ListFields():
            key = f"[{field.full_name}]" if field.is_extension else field.name
            shown[key] = REDACTED if (name, field.name) in self._sensitive else self._field(field, value)
        unknown = UnknownFieldSet(message)
        if numbers := sorted({unknown[index].field_number for index in range(len(unknown))}):
            shown[UNKNOWN_FIELDS] = numbers
        return shown

    def _field(self, field: FieldDescriptor, value: Any) -> Any:
        entry = field.message_type
        if entry is not None and entry.GetOptions().map_entry:
            of_value = entry.fields_by_name["value"]
            return {
                str(key).lower() if isinstance(key, bool) else str(key): self._value(of_value, each)
                for key, each in sorted(value.items())
            }
        if not isinstance(value, str | bytes | int | float | Message):
            return [self._value(field, each) for each in value]
        return self._value(field, value)

    def _value(self, field: FieldDescriptor, value: Any) -> Any:
        if field.message_type is not None:
            return self._message(value)
        if field.enum_type is not None:
            named = field.enum_type.values_by_number.get(value)
            return named.name if named is not None else value
        if field.type == FieldDescriptor.TYPE_BYTES:
            return base64.b64encode(value).decode("ascii")
        if field.cpp_type in _WIDE:
            return str(value)
        if isinstance(value, float) and not math.isfinite(value):
            return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
        return value

    def _message(self, message: Message) -> Any:
        package, _, name = message.DESCRIPTOR.full_name.rpartition(".")
        if package == "google.protobuf" and name in _OWN_JSON:
            try:
                return json_format.MessageToDict(message)
            except (ValueError, json_format.Error):
                pass  # out of range for its JSON form: shown field by field
        return self.redacted(message)

    def _any(self, message: Message) -> dict[str, Any]:
        packed = cast("Any", message)
        url = packed.type_url
        known = self._message_class(url.rpartition("/")[2])
        if known is not None:
            try:
                return {"@type": url, **self.redacted(known.FromString(packed.value))}
            except DecodeError:
                pass  # shown like an unknown type
        return {"@type": url, "value": f"[{len(packed.value)} bytes of an unknown type]"}


def reason_text(reason: int) -> str:
    """Return a reason's name without its prefix, such as `LEASE_EXPIRED`; the number of an unknown one."""
    try:
        return Reason.Name(cast("Reason.ValueType", reason)).removeprefix("REASON_")
    except ValueError:
        return str(reason)


def time_text(time_us: int) -> str:
    """Return a time in RFC 3339, UTC, with microseconds; the plain number if it is out of range."""
    try:
        seconds, rest = divmod(time_us, 1_000_000)
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{rest:06d}Z"
    except (OverflowError, ValueError, OSError):
        return f"{time_us} µs"
