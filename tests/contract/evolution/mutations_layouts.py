"""Edits of frames: many that a careful person makes, and the same with one thing forgotten."""

from __future__ import annotations

__all__ = ["MUTATIONS"]

import random
from collections.abc import Callable
from typing import Any

from drafts import Draft, Spot
from google.protobuf.descriptor_pb2 import FieldDescriptorProto

_Field = FieldDescriptorProto
_WIDTHS = {_Field.TYPE_UINT32: 4, _Field.TYPE_UINT64: 8, _Field.TYPE_BOOL: 1, _Field.TYPE_DOUBLE: 8}


def append(draft: Draft, rng: random.Random) -> bool:
    """Adds a field behind the block, in a gap, or over a field that is there; the version may be forgotten."""
    spot = rng.choice(draft.frames())
    frame = draft.option(spot.proto.options, "frame")
    kind = rng.choice(list(_WIDTHS))
    width = _WIDTHS[kind]
    before = frame.block_length
    behind = rng.random() < 0.5
    offset = before if behind else rng.randrange(0, max(before, 8), width)
    if behind:
        frame.block_length = before + 8
    if rng.random() < 0.8:
        frame.version += 1
    field = spot.proto.field.add(name=f"more{rng.randrange(100)}", number=rng.choice([13, 14, 15, 9]), type=kind)
    field.label = _Field.LABEL_OPTIONAL
    field.json_name = field.name
    field.options.Extensions[draft.extension("offset")] = offset
    if rng.random() < 0.8:
        field.options.Extensions[draft.extension("since")] = frame.version
    draft.told.append(f"{spot.full_name}.{field.name} added at {offset}, block {before}, version {frame.version}")
    return True


def retire(draft: Draft, rng: random.Random) -> bool:
    """Takes a field away; its number may be forgotten, and the version."""
    spot = rng.choice(draft.frames())
    if not len(spot.proto.field):
        return False
    frame = draft.option(spot.proto.options, "frame")
    field = rng.choice(list(spot.proto.field))
    number, name = field.number, field.name
    spot.proto.field.remove(field)
    if rng.random() < 0.7:
        spot.proto.reserved_range.add(start=number, end=number + 1)
    if rng.random() < 0.7:
        frame.version += 1
    draft.told.append(f"{spot.full_name}.{name} retired, version {frame.version}")
    return True


def move(draft: Draft, rng: random.Random) -> bool:
    """Moves a field, or swaps the places of two."""
    found = _block_field(draft, rng)
    if found is None:
        return False
    spot, field = found
    offset = draft.extension("offset")
    frame = draft.option(spot.proto.options, "frame")
    if rng.random() < 0.5:
        frame.version += 1
    others = [each for each in spot.proto.field if each.options.HasExtension(offset) and each.type == field.type]
    other = rng.choice(others)
    if other is not field:
        one, two = field.options.Extensions[offset], other.options.Extensions[offset]
        field.options.Extensions[offset], other.options.Extensions[offset] = two, one
    else:
        field.options.Extensions[offset] = rng.randrange(0, max(frame.block_length, 8), 4)
    draft.told.append(f"{spot.full_name}.{field.name} moved")
    return True


def resize(draft: Draft, rng: random.Random) -> bool:
    """Lengthens or shortens a block; the version may be forgotten."""
    spot = rng.choice(draft.frames())
    frame = draft.option(spot.proto.options, "frame")
    frame.block_length = max(0, frame.block_length + rng.choice([-8, 8, 16]))
    if rng.random() < 0.7:
        frame.version += 1
    draft.told.append(f"{spot.full_name}: block {frame.block_length}, version {frame.version}")
    return True


def retail(draft: Draft, rng: random.Random) -> bool:
    """Adds a tail, takes it away, or makes it of another type; the version may be forgotten."""
    spot = rng.choice(draft.frames())
    frame = draft.option(spot.proto.options, "frame")
    offset = draft.extension("offset")
    tails = [each for each in spot.proto.field if not each.options.HasExtension(offset)]
    if rng.random() < 0.7:
        frame.version += 1
    if not tails:
        kind = rng.choice([_Field.TYPE_STRING, _Field.TYPE_BYTES])
        added = spot.proto.field.add(name="ending", number=16, type=kind, label=_Field.LABEL_OPTIONAL)
        added.json_name = added.name
    elif rng.random() < 0.5:
        spot.proto.field.remove(tails[0])
    else:
        tails[0].type = rng.choice([_Field.TYPE_STRING, _Field.TYPE_BYTES])
    draft.told.append(f"{spot.full_name}: tail changed, version {frame.version}")
    return True


def _block_field(draft: Draft, rng: random.Random) -> tuple[Spot, Any] | None:
    spot = rng.choice(draft.frames())
    fields = [each for each in spot.proto.field if each.options.HasExtension(draft.extension("offset"))]
    return (spot, rng.choice(fields)) if fields else None


Mutation = Callable[[Draft, random.Random], bool]
MUTATIONS: list[tuple[int, Mutation]] = [(6, append), (3, retire), (3, move), (2, resize), (3, retail)]
