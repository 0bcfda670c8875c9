"""Edits of messages, fields, enums, services and files."""

from __future__ import annotations

__all__ = ["KINDS", "MUTATIONS"]

import random
from collections.abc import Callable
from typing import Any

from drafts import Draft, Spot
from google.protobuf.descriptor_pb2 import FeatureSet, FieldDescriptorProto

_Field = FieldDescriptorProto
KINDS = [number for name, number in _Field.Type.items() if name not in ("TYPE_GROUP", "TYPE_MESSAGE", "TYPE_ENUM")]
_NAMES = ("alpha", "beta", "gamma", "delta")


def _spot(draft: Draft, rng: random.Random) -> tuple[Spot, Any] | None:
    found = draft.fields(rng)
    if found is not None:
        _, field = found
        draft.touched.add(f"kind {field.type}")
    return found


def remove_field(draft: Draft, rng: random.Random) -> bool:
    """Takes a field away; with its number reserved, or its name, or neither."""
    found = _spot(draft, rng)
    if found is None:
        return False
    spot, field = found
    number, name = field.number, field.name
    spot.proto.field.remove(field)
    kept = rng.random()
    if kept < 0.6:
        spot.proto.reserved_range.add(start=number, end=number + 1)
    if kept < 0.4:
        spot.proto.reserved_name.append(name)
    _tidy(spot.proto)
    draft.told.append(f"field {spot.full_name}.{name} removed{' and reserved' if kept < 0.6 else ''}")
    return True


def rename_field(draft: Draft, rng: random.Random) -> bool:
    """Gives a field another name, or swaps the names of two."""
    found = _spot(draft, rng)
    if found is None:
        return False
    spot, field = found
    other = rng.choice(list(spot.proto.field))
    if other is not field and rng.random() < 0.5:
        field.name, other.name = other.name, field.name
        field.json_name, other.json_name = other.json_name, field.json_name
        draft.told.append(f"fields {field.name} and {other.name} of {spot.full_name} swap names")
        return True
    draft.told.append(f"field {spot.full_name}.{field.name} renamed")
    field.name = rng.choice(_NAMES)
    field.json_name = field.name
    return True


def renumber_field(draft: Draft, rng: random.Random) -> bool:
    """Gives a field another number, or swaps the numbers of two."""
    found = _spot(draft, rng)
    if found is None:
        return False
    spot, field = found
    other = rng.choice(list(spot.proto.field))
    draft.told.append(f"field {spot.full_name}.{field.name} renumbered")
    if other is not field and rng.random() < 0.5:
        field.number, other.number = other.number, field.number
    else:
        field.number = rng.choice([14, 21, 30, 31])
    return True


def retype_field(draft: Draft, rng: random.Random) -> bool:
    """Gives a field another type."""
    found = _spot(draft, rng)
    if found is None:
        return False
    spot, field = found
    before = field.type
    if rng.random() < 0.25:
        names = [f".{name}" for _, _, name in draft.enums()]
        field.type, field.type_name = _Field.TYPE_ENUM, rng.choice(names)
    elif rng.random() < 0.25:
        names = [f".{each.full_name}" for each in draft.messages() if each.file is spot.file]
        field.type, field.type_name = _Field.TYPE_MESSAGE, rng.choice(names)
    else:
        field.type = rng.choice(KINDS)
        field.ClearField("type_name")
    field.ClearField("default_value")
    draft.told.append(f"field {spot.full_name}.{field.name}: type {before} → {field.type} {field.type_name}")
    return True


def relabel_field(draft: Draft, rng: random.Random) -> bool:
    """Makes a field repeated, single, optional or required."""
    found = _spot(draft, rng)
    if found is None:
        return False
    spot, field = found
    proto = spot.proto
    choice = rng.choice(["repeated", "single", "optional", "required", "implicit"])
    _leave_oneof(proto, field)
    field.ClearField("proto3_optional")
    field.label = _Field.LABEL_OPTIONAL
    if choice == "repeated":
        field.label = _Field.LABEL_REPEATED
        field.ClearField("default_value")
    elif choice == "required":
        field.label = _Field.LABEL_REQUIRED
    elif choice == "optional" and spot.file.syntax == "proto3":
        proto.oneof_decl.add(name=f"_{field.name}")
        field.oneof_index = len(proto.oneof_decl) - 1
        field.proto3_optional = True
    elif choice == "implicit" and spot.file.syntax == "editions":
        field.options.features.field_presence = FeatureSet.IMPLICIT
    _tidy(proto)
    draft.told.append(f"field {spot.full_name}.{field.name}: {choice}")
    return True


def reseat_field(draft: Draft, rng: random.Random) -> bool:
    """Moves a field into a oneof, or out of one."""
    found = _spot(draft, rng)
    if found is None or found[1].label == _Field.LABEL_REPEATED:
        return False
    spot, field = found
    proto = spot.proto
    real = [
        index
        for index in range(len(proto.oneof_decl))
        if not any(each.proto3_optional and each.oneof_index == index for each in proto.field)
    ]
    inside = field.HasField("oneof_index") and not field.proto3_optional
    field.ClearField("proto3_optional")
    if inside:
        _leave_oneof(proto, field)
    elif real and rng.random() < 0.6:
        field.oneof_index = rng.choice(real)
    else:
        proto.oneof_decl.add(name="choice")
        field.oneof_index = len(proto.oneof_decl) - 1
    _tidy(proto)
    draft.told.append(f"field {spot.full_name}.{field.name}: {'out of' if inside else 'into'} a oneof")
    return True


def add_field(draft: Draft, rng: random.Random) -> bool:
    """Adds a field: a harmless one, or one that is required, or in a oneof."""
    spot = rng.choice(draft.messages())
    proto = spot.proto
    number = rng.choice([15, 22, 40, 41])
    field = proto.field.add(name=rng.choice(_NAMES), number=number, type=rng.choice(KINDS))
    field.json_name = field.name
    field.label = rng.choice([_Field.LABEL_OPTIONAL, _Field.LABEL_OPTIONAL, _Field.LABEL_REPEATED])
    if spot.file.syntax == "proto2" and rng.random() < 0.3:
        field.label = _Field.LABEL_REQUIRED
    draft.told.append(f"field {spot.full_name}.{field.name} = {number} added")
    return True


def touch_field(draft: Draft, rng: random.Random) -> bool:
    """Changes what else may stand on a field: its name in JSON, its default, its packing, its check of UTF-8."""
    found = _spot(draft, rng)
    if found is None:
        return False
    spot, field = found
    choice = rng.choice(["json", "default", "packed", "deprecated", "utf8", "encoding", "presence"])
    edition = spot.file.syntax == "editions"
    if choice == "json":
        field.json_name = rng.choice(["other", "thing", field.json_name])
    elif choice == "default" and spot.file.syntax == "proto2" and field.type == _Field.TYPE_UINT32:
        field.default_value = rng.choice(["0", "5", "6"])
    elif choice == "packed" and field.label == _Field.LABEL_REPEATED and not edition:
        field.options.packed = not field.options.packed
    elif choice == "utf8" and edition and field.type == _Field.TYPE_STRING:
        field.options.features.utf8_validation = rng.choice([FeatureSet.VERIFY, FeatureSet.NONE])
    elif choice == "encoding" and edition and field.type == _Field.TYPE_MESSAGE:
        field.options.features.message_encoding = rng.choice([FeatureSet.LENGTH_PREFIXED, FeatureSet.DELIMITED])
    elif choice == "presence" and edition and field.type != _Field.TYPE_MESSAGE:
        kinds = [FeatureSet.EXPLICIT, FeatureSet.IMPLICIT, FeatureSet.LEGACY_REQUIRED]
        field.options.features.field_presence = rng.choice(kinds)
    else:
        field.options.deprecated = not field.options.deprecated
    draft.told.append(f"field {spot.full_name}.{field.name}: {choice}")
    return True


def edit_message(draft: Draft, rng: random.Random) -> bool:
    """Removes a message, renames one, adds one, or moves one to another file."""
    spot = rng.choice(draft.messages())
    choice = rng.choice(["remove", "rename", "rename", "add", "file"])
    draft.told.append(f"message {spot.full_name}: {choice}")
    if choice == "remove":
        spot.siblings.remove(spot.proto)
    elif choice == "rename":
        before, after = spot.full_name, f"{spot.full_name.rpartition('.')[0]}.Renamed"
        spot.proto.name = "Renamed"
        draft.renamed(before, after)
    elif choice == "add":
        spot.file.message_type.add(name=rng.choice(["Fresh", "Newer"]))
    else:
        old = spot.file.name
        spot.file.name = old.replace(".proto", "_moved.proto")
        draft.files[spot.file.name] = draft.files.pop(old)
        for file in draft.files.values():
            for index, path in enumerate(file.dependency):
                if path == old:
                    file.dependency[index] = spot.file.name
    return True


def edit_enum(draft: Draft, rng: random.Random) -> bool:
    """Adds, removes, renames, renumbers or swaps values; closes or opens; renames the enum."""
    file, enum, name = rng.choice(draft.enums())
    choice = rng.choice(["add", "remove", "rename", "renumber", "swap", "alias", "closed", "whole", "order"])
    value = rng.choice(list(enum.value))
    draft.told.append(f"enum {name}: {choice} {value.name}")
    if choice == "add":
        enum.value.add(name=f"{enum.name.upper()}_MORE", number=rng.choice([4, 5, 7, 11]))
    elif choice == "remove":
        number = value.number
        enum.value.remove(value)
        if rng.random() < 0.5:
            enum.reserved_range.add(start=number, end=number)
    elif choice == "rename":
        value.name = f"{enum.name.upper()}_OTHER"
    elif choice == "renumber":
        value.number = rng.choice([4, 5, 6, 12])
    elif choice == "swap":
        other = rng.choice(list(enum.value))
        value.name, other.name = other.name, value.name
    elif choice == "alias":
        enum.options.allow_alias = True
        enum.value.add(name=f"{enum.name.upper()}_ALIAS", number=value.number)
    elif choice == "closed" and file.syntax == "editions":
        closed = enum.options.features.enum_type == FeatureSet.CLOSED
        enum.options.features.enum_type = FeatureSet.OPEN if closed else FeatureSet.CLOSED
    elif choice == "order" and file.syntax == "proto2":
        first = type(enum.value[0])()
        first.CopyFrom(enum.value[0])
        del enum.value[0]
        enum.value.append(first)
    elif choice == "whole":
        enum.name = "Renamed"
        draft.renamed(name, f"{name.rpartition('.')[0]}.Renamed")
    else:
        return False
    return True


def edit_extension(draft: Draft, rng: random.Random) -> bool:
    """Removes, renames, renumbers or retypes an extension, or adds one."""
    file = draft.files.get("acme/legacy/v1/legacy.proto")
    if file is None or not len(file.extension):
        return False
    extension = rng.choice(list(file.extension))
    choice = rng.choice(["remove", "rename", "renumber", "retype", "add"])
    draft.told.append(f"extension {extension.name}: {choice}")
    if choice == "remove":
        file.extension.remove(extension)
    elif choice == "rename":
        extension.name = "other"
    elif choice == "renumber":
        extension.number = 150
    elif choice == "retype":
        extension.type = rng.choice(KINDS)
    else:
        added = file.extension.add()
        added.CopyFrom(extension)
        added.name, added.number = "fresh", 160
    return True


def edit_file(draft: Draft, rng: random.Random) -> bool:
    """Changes what a whole file says of its fields and enums: its features, or its syntax."""
    file = rng.choice(draft.own)
    draft.told.append(f"file {file.name}: features or syntax")
    if file.syntax == "editions":
        features = file.options.features
        choice = rng.randrange(3)
        if choice == 0:
            features.utf8_validation = FeatureSet.NONE
        elif choice == 1:
            features.field_presence = FeatureSet.IMPLICIT
        else:
            features.enum_type = FeatureSet.CLOSED
    elif file.syntax == "proto3":
        file.ClearField("syntax")
    else:
        file.syntax = "proto3"
    return True


def edit_reserved(draft: Draft, rng: random.Random) -> bool:
    """Reserves more numbers, or fewer."""
    holders = [spot.proto for spot in draft.messages()] + [enum for _, enum, _ in draft.enums()]
    reserving = [proto for proto in holders if len(proto.reserved_range)]
    if reserving and rng.random() < 0.6:
        proto = rng.choice(reserving)
        each = rng.choice(list(proto.reserved_range))
        draft.told.append(f"{proto.name}: reserved {each.start} narrowed")
        if rng.random() < 0.5:
            proto.reserved_range.remove(each)
        else:
            each.end -= 1
            if each.end <= each.start:
                proto.reserved_range.remove(each)
    else:
        proto = rng.choice(holders)
        proto.reserved_range.add(start=50, end=52)
        draft.told.append(f"{proto.name}: 50 reserved")
    return True


def edit_service(draft: Draft, rng: random.Random) -> bool:
    """Removes, renames, adds or retypes rpcs; renames services."""
    file, service, method = rng.choice(draft.methods())
    choice = rng.choice(["remove", "rename", "input", "output", "stream", "add", "service"])
    draft.told.append(f"{service.name}/{method.name}: {choice}")
    names = [f".{spot.full_name}" for spot in draft.messages() if spot.file is file]
    if choice == "remove":
        service.method.remove(method)
    elif choice == "rename":
        method.name = "Renamed"
    elif choice == "input":
        method.input_type = rng.choice(names)
    elif choice == "output":
        method.output_type = rng.choice(names)
    elif choice == "stream":
        method.server_streaming = not method.server_streaming
    elif choice == "service":
        service.name = "RenamedService"
    else:
        added = service.method.add()
        added.CopyFrom(method)
        added.name = "Added"
        if added.options.HasExtension(draft.extension("tool")):
            added.options.Extensions[draft.extension("tool")].opcode = rng.choice([258, 300, 301])
    return True


def _leave_oneof(proto: Any, field: Any) -> None:
    field.ClearField("oneof_index")
    field.ClearField("proto3_optional")


def _tidy(proto: Any) -> None:
    """Drops oneofs that nothing is in."""
    used = sorted({field.oneof_index for field in proto.field if field.HasField("oneof_index")})
    kept = [proto.oneof_decl[index].name for index in used]
    for field in proto.field:
        if field.HasField("oneof_index"):
            field.oneof_index = used.index(field.oneof_index)
    del proto.oneof_decl[:]
    for name in kept:
        proto.oneof_decl.add(name=name)


Mutation = Callable[[Draft, random.Random], bool]
MUTATIONS: list[tuple[int, Mutation]] = [
    (5, remove_field),
    (4, rename_field),
    (4, renumber_field),
    (7, retype_field),
    (6, relabel_field),
    (4, reseat_field),
    (5, add_field),
    (5, touch_field),
    (4, edit_message),
    (7, edit_enum),
    (3, edit_reserved),
    (6, edit_service),
    (2, edit_extension),
    (2, edit_file),
]
