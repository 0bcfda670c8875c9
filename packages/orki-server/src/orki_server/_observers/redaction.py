"""Messages as JSON without what their contracts call sensitive.

The shape is that of the proto3 JSON mapping (https://protobuf.dev/programming-guides/json/) with the field names of the
proto: 64-bit integers are strings, enums are names, bytes are base64, fields that are not set are left out. A sensitive
field becomes `REDACTED`, whatever it holds and at every depth: in nested messages, repeated fields, map values, oneofs
and `google.protobuf.Any`. Of fields that the contract at hand does not know only the numbers are told, under
`UNKNOWN_FIELDS`: they may come from a newer contract that calls them sensitive.
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

from orki_contract.model import SensitiveField

REDACTED: Final = "[redacted]"
"""Stands where a sensitive value stood."""

UNKNOWN_FIELDS: Final = "(unknown fields)"
"""Key of the numbers of unknown fields; no proto field can have this name."""

_WIDE: Final = frozenset(
    {
        FieldDescriptor.TYPE_INT64,
        FieldDescriptor.TYPE_UINT64,
        FieldDescriptor.TYPE_SINT64,
        FieldDescriptor.TYPE_FIXED64,
        FieldDescriptor.TYPE_SFIXED64,
    }
)

_OWN_JSON: Final = frozenset(
    f"google.protobuf.{name}"
    for name in (
        "BoolValue",
        "BytesValue",
        "DoubleValue",
        "Duration",
        "FieldMask",
        "FloatValue",
        "Int32Value",
        "Int64Value",
        "ListValue",
        "StringValue",
        "Struct",
        "Timestamp",
        "UInt32Value",
        "UInt64Value",
        "Value",
    )
)


def safe_json(value: Any) -> str:
    """`value` as one line of printable ASCII: no newline, escape sequence or bidirectional mark survives in it."""
    return json.dumps(value, ensure_ascii=True, separators=(",", ":")).replace("\x7f", "\\u007f")


def safe_text(text: str) -> str:
    """`text` for a terminal: whatever is not printable is shown as an escape."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


class Redaction:
    """What is sensitive, and how messages look without it."""

    def __init__(
        self, sensitive: Iterable[SensitiveField], message_class: Callable[[str], type[Message] | None] | None = None
    ) -> None:
        """Knows the contract.

        Args:
            sensitive: The sensitive fields, such as `Contract.sensitive`.
            message_class: Finds the class of a message by its full name, for `google.protobuf.Any`; None where it is
                not known. Left out: no `Any` is opened.
        """
        self._sensitive = frozenset((each.message, each.field) for each in sensitive)
        self._message_class = message_class or (lambda _: None)

    def redacted(self, message: Message) -> dict[str, Any]:
        """The message as JSON values, sensitive fields replaced."""
        name = message.DESCRIPTOR.full_name
        if name == "google.protobuf.Any":
            return self._any(message)
        shown: dict[str, Any] = {}
        for field, value in message.ListFields():
            key = f"[{field.full_name}]" if field.is_extension else field.name
            shown[key] = REDACTED if (name, field.name) in self._sensitive else self._field(field, value)
        unknown = _unknown_numbers(message)
        if unknown:
            shown[UNKNOWN_FIELDS] = unknown
        return shown

    def _field(self, field: FieldDescriptor, value: Any) -> Any:
        entry = field.message_type
        if entry is not None and entry.GetOptions().map_entry:
            of_value = entry.fields_by_name["value"]
            return {_map_key(key): self._value(of_value, each) for key, each in sorted(value.items())}
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
        if field.type in _WIDE:
            return str(value)
        if isinstance(value, float) and not math.isfinite(value):
            return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
        return value

    def _message(self, message: Message) -> Any:
        if message.DESCRIPTOR.full_name in _OWN_JSON:
            try:
                return json_format.MessageToDict(message)
            except (ValueError, json_format.Error):
                pass  # out of the range that its JSON form has: shown field by field
        return self.redacted(message)

    def _any(self, message: Message) -> dict[str, Any]:
        packed = cast("Any", message)
        url = packed.type_url
        known = self._message_class(url.rpartition("/")[2])
        if known is not None:
            try:
                return {"@type": url, **self.redacted(known.FromString(packed.value))}
            except DecodeError:
                pass  # shown like one of a type that nobody knows
        return {"@type": url, "value": f"[{len(packed.value)} bytes of a type that is not known here]"}


def _unknown_numbers(message: Message) -> list[int]:
    found = UnknownFieldSet(message)
    return sorted({found[index].field_number for index in range(len(found))})


def _map_key(key: Any) -> str:
    return ("true" if key else "false") if isinstance(key, bool) else str(key)


def time_text(time_us: int) -> str:
    """RFC 3339 in UTC to the microsecond; the bare number where no calendar has that time."""
    try:
        seconds, rest = divmod(time_us, 1_000_000)
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{rest:06d}Z"
    except (OverflowError, ValueError, OSError):
        return f"{time_us} µs"
