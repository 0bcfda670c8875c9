"""Fields and enums as compilers resolve them, and their reserved ranges."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
)

from orki_contract.descriptors import MessageNode, Schema, is_repeated

_TYPES: Final[Mapping[int, str]] = {
    number: name.removeprefix("TYPE_").lower() for name, number in FieldDescriptorProto.Type.items()
}
# Names and numbers of google.protobuf.FeatureSet.Utf8Validation.
_NO_UTF8_CHECK: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldShape:
    """The properties of a field that affect its encoding or its class.

    Attributes:
        name: Name in the proto.
        number: Number on the wire.
        json: Name in JSON.
        index: Index among the fields of its message.
        kind: Type, such as `string`, `acme.v1.Finding` or `map<string, int32>`.
        cardinality: `single`, `optional` (with presence), `required` or `repeated`.
        oneof: Name of its oneof; empty for none.
        default: Value of an absent field; empty for messages and repeated fields.
        checked: Whether strings must be valid UTF-8; True for other types.
    """

    name: str
    number: int
    json: str
    index: int
    kind: str
    cardinality: str
    oneof: str
    default: str
    checked: bool


def field_shapes(schema: Schema, node: MessageNode) -> Mapping[int, FieldShape]:
    """Return the fields of a message by number."""
    descriptor: Descriptor = schema.pool.FindMessageTypeByName(node.full_name)
    return {
        proto.number: shape_of(node.file, descriptor.fields_by_number[proto.number], proto, index)
        for index, proto in enumerate(node.proto.field)
    }


def shape_of(file: FileDescriptorProto, field: FieldDescriptor, proto: FieldDescriptorProto, index: int) -> FieldShape:
    """Return the shape of one field or extension, as the file's pool resolves it."""
    oneof = field.containing_oneof
    return FieldShape(
        name=field.name,
        number=field.number,
        json=field.json_name,
        index=index,
        kind=_kind(field),
        cardinality=_cardinality(field, proto),
        oneof="" if oneof is None or proto.proto3_optional else oneof.name,
        default="" if field.message_type is not None or is_repeated(field) else repr(field.default_value),
        checked=field.type != FieldDescriptor.TYPE_STRING or _checks_utf8(file, proto),
    )


def names_by_number(proto: EnumDescriptorProto) -> Mapping[int, tuple[str, ...]]:
    """Return the names of each number of an enum; the first one is its primary name, also in JSON."""
    found: dict[int, tuple[str, ...]] = {}
    for value in proto.value:
        found[value.number] = (*found.get(value.number, ()), value.name)
    return found


def closed(schema: Schema, enum: str) -> bool:
    """Whether readers treat unknown values of an enum as an absent field."""
    return bool(schema.pool.FindEnumTypeByName(enum).is_closed)


def _kind(field: FieldDescriptor) -> str:
    message: Any = field.message_type
    if message is not None and message.GetOptions().map_entry:
        key, value = message.fields_by_name["key"], message.fields_by_name["value"]
        return f"map<{_kind(key)}, {_kind(value)}>"
    if message is not None:
        return f"{'group ' if field.type == FieldDescriptor.TYPE_GROUP else ''}{message.full_name}"
    return str(field.enum_type.full_name) if field.enum_type is not None else _TYPES[field.type]


def _cardinality(field: FieldDescriptor, proto: FieldDescriptorProto) -> str:
    if is_repeated(field):
        return "repeated"
    if _required(field):
        return "required"
    # Messages and members of a oneof always have presence.
    if field.message_type is not None or (field.containing_oneof is not None and not proto.proto3_optional):
        return "single"
    return "optional" if field.has_presence else "single"


def _required(field: Any) -> bool:
    # `label` is deprecated where `is_required` exists (protobuf 6.32).
    try:
        return bool(field.is_required)
    except AttributeError:
        return bool(field.label == field.LABEL_REQUIRED)


def _checks_utf8(file: FileDescriptorProto, proto: FieldDescriptorProto) -> bool:
    if file.syntax != "editions":
        return file.syntax == "proto3"
    for options in (proto.options, file.options):
        features = options.features
        if features.utf8_validation:
            return int(features.utf8_validation) != _NO_UTF8_CHECK
    return True


def reserves(proto: DescriptorProto | EnumDescriptorProto, number: int) -> bool:
    """Whether a number is reserved."""
    return any(start <= number < end for start, end in _ranges(proto))


def withdrawn(
    before: DescriptorProto | EnumDescriptorProto, after: DescriptorProto | EnumDescriptorProto
) -> int | None:
    """Return the lowest number that is no longer reserved; None if all still are."""
    kept = _ranges(after)
    for start, end in _ranges(before):
        at = start
        for first, behind in kept:
            if first <= at < behind:
                at = behind
        if at < end:
            return at
    return None


def _ranges(proto: DescriptorProto | EnumDescriptorProto) -> list[tuple[int, int]]:
    """Return the sorted half-open reserved ranges."""
    # An enum's range includes its end, a message's does not.
    more = 1 if proto.DESCRIPTOR.name == "EnumDescriptorProto" else 0
    return sorted((each.start, each.end + more) for each in proto.reserved_range)
