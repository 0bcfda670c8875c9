"""Values for messages of any contract, and what a reader sees of them."""

from __future__ import annotations

__all__ = ["NOTHING", "fill", "seen", "value_of"]

import random
from typing import Any, Final

from google.protobuf.descriptor import FieldDescriptor

from orki_contract.descriptors import is_repeated

NOTHING: Final = ("nothing",)
"""What a reader sees of a field that is not set and knows it."""

_F = FieldDescriptor
_RANGES: Final = {
    _F.TYPE_INT32: (-(2**31), 2**31 - 1),
    _F.TYPE_SINT32: (-(2**31), 2**31 - 1),
    _F.TYPE_SFIXED32: (-(2**31), 2**31 - 1),
    _F.TYPE_INT64: (-(2**63), 2**63 - 1),
    _F.TYPE_SINT64: (-(2**63), 2**63 - 1),
    _F.TYPE_SFIXED64: (-(2**63), 2**63 - 1),
    _F.TYPE_UINT32: (0, 2**32 - 1),
    _F.TYPE_FIXED32: (0, 2**32 - 1),
    _F.TYPE_UINT64: (0, 2**64 - 1),
    _F.TYPE_FIXED64: (0, 2**64 - 1),
}


def fill(rng: random.Random, message: Any, depth: int = 0) -> None:
    """Sets most fields of a message, to the ends of their ranges more often than not; required ones always."""
    for field in message.DESCRIPTOR.fields if depth < 9 else ():
        if rng.random() < 0.15 and not _required(field):
            continue
        if field.message_type is not None and depth >= 2 and not _required(field):
            continue
        if _is_map(field):
            _fill_map(rng, message, field, depth)
        elif is_repeated(field):
            _fill_list(rng, message, field, depth)
        elif field.message_type is not None:
            inner = getattr(message, field.name)
            inner.SetInParent()
            fill(rng, inner, depth + 1)
        else:
            setattr(message, field.name, value_of(rng, field))


def value_of(rng: random.Random, field: FieldDescriptor) -> Any:
    """A value that a field of its type may hold."""
    if field.enum_type is not None:
        return rng.choice([value.number for value in field.enum_type.values])
    if field.type in _RANGES:
        low, high = _RANGES[field.type]
        return rng.choice([low, high, 1, rng.randint(low, high)])
    if field.type == _F.TYPE_BOOL:
        return rng.random() < 0.8
    if field.type == _F.TYPE_FLOAT:
        return rng.choice([0.5, -1.25, 3.0e38])
    if field.type == _F.TYPE_DOUBLE:
        return rng.choice([0.1, -1.0e300, 12345.678901])
    text = f"text {rng.randrange(10**6)} é"
    return text if field.type == _F.TYPE_STRING else rng.choice([text.encode(), b"\xff\xfe\x00\x80"])


def seen(message: Any) -> dict[str, Any]:
    """What code that reads a message sees: each field by its name, at every depth."""
    found: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        if _is_map(field):
            entry = field.message_type.fields_by_name["value"]
            value = getattr(message, field.name)
            found[field.name] = {("key", type(key).__name__, key): _one(entry, value[key]) for key in value}
        elif is_repeated(field):
            found[field.name] = [_one(field, each) for each in getattr(message, field.name)]
        elif field.has_presence and not message.HasField(field.name):
            # A message that is not set has nothing to read; of other fields the default is read.
            shown = None if field.message_type is not None else _one(field, getattr(message, field.name))
            found[field.name] = (*NOTHING, shown)
        else:
            found[field.name] = _one(field, getattr(message, field.name))
    return found


def _one(field: FieldDescriptor, value: Any) -> Any:
    if field.message_type is not None:
        return seen(value)
    if field.enum_type is not None:
        known = field.enum_type.values_by_number.get(value)
        return ("enum", value, known.name if known is not None else None)
    # 1, 1.0 and True are equal, and no reader takes them for the same.
    return (type(value).__name__, value)


def _fill_map(rng: random.Random, message: Any, field: FieldDescriptor, depth: int) -> None:
    entry = field.message_type
    held = getattr(message, field.name)
    for _ in range(2):
        key = value_of(rng, entry.fields_by_name["key"])
        value = entry.fields_by_name["value"]
        if value.message_type is not None:
            fill(rng, held[key], depth + 1)
        else:
            held[key] = value_of(rng, value)


def _fill_list(rng: random.Random, message: Any, field: FieldDescriptor, depth: int) -> None:
    held = getattr(message, field.name)
    for _ in range(rng.choice([1, 3])):
        if field.message_type is not None:
            fill(rng, held.add(), depth + 1)
        else:
            held.append(value_of(rng, field))


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and bool(field.message_type.GetOptions().map_entry)


def _required(field: Any) -> bool:
    try:
        return bool(field.is_required)
    except AttributeError:
        return bool(field.label == field.LABEL_REQUIRED)
