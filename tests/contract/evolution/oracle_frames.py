"""Frames of two versions, run against each other by the codec that generated classes have."""

from __future__ import annotations

__all__ = ["frame_class", "judge", "random_values"]

import random
from collections.abc import Iterator, Mapping
from typing import Any, Final

from orki_contract import FrameBase, at, frame, tail
from orki_contract.errors import FrameMalformed
from orki_contract.model import Frame, Scalar
from orki_contract.read import ReadContract

Break = tuple[bool, str]

_RANGES: Final = {
    Scalar.U8: (0, 2**8 - 1),
    Scalar.U16: (0, 2**16 - 1),
    Scalar.U32: (0, 2**32 - 1),
    Scalar.U64: (0, 2**64 - 1),
    Scalar.I8: (-(2**7), 2**7 - 1),
    Scalar.I16: (-(2**15), 2**15 - 1),
    Scalar.I32: (-(2**31), 2**31 - 1),
    Scalar.I64: (-(2**63), 2**63 - 1),
}
_classes: dict[Frame, Any] = {}


def judge(old: ReadContract, new: ReadContract, rng: random.Random) -> Iterator[Break]:
    """Every way in which frames of the two versions do not fit."""
    after = {each.message: each for each in new.contract.frames}
    for before in old.contract.frames:
        name = before.message
        if name not in after:
            yield True, f"frame {name} is not there"
            continue
        if before == after[name]:
            continue
        fixed = bool(_option(old, name).fixed)
        yield from ((True, f"frame {name}: {each}") for each in _alike(before, after[name], fixed, rng))
        yield from ((False, f"frame {name}: {each}") for each in _old_code(before, after[name]))
        yield from ((True, f"frame {name}: {each}") for each in _meaning(old, new, before, after[name]))
    for name in after:
        if name in old.schema.messages and name not in {each.message for each in old.contract.frames}:
            yield True, f"{name} is a frame now"


def frame_class(layout: Frame) -> Any:
    """The class that the generator would write for a layout."""
    known = _classes.get(layout)
    if known is None:
        first = [each for each in layout.fields if each.since == 1]
        later = [each for each in layout.fields if each.since > 1]
        members: dict[str, Any] = {}
        for each in first:
            members[each.name] = _member(each)
        if layout.tail:
            members[layout.tail] = tail(default="" if layout.tail_text else b"")
        for each in later:
            members[each.name] = _member(each, default=None)
        space = {"__annotations__": dict.fromkeys(members, object), "__module__": __name__, **members}
        made = type("Made", (FrameBase,), space)
        known = _classes[layout] = frame(layout.message, version=layout.version, block_length=layout.block_length)(made)
    return known


def _member(field: Any, **default: Any) -> Any:
    size = field.size if field.scalar is Scalar.BYTES else 0
    return at(field.offset, field.scalar, number=field.number, size=size, since=field.since, enum=field.enum, **default)


def random_values(layout: Frame, rng: random.Random) -> dict[str, Any]:
    """Values for every field, to the ends of their ranges more often than not, and never zero."""
    values: dict[str, Any] = {}
    for field in layout.fields:
        if field.scalar in _RANGES:
            low, high = _RANGES[field.scalar]
            values[field.name] = rng.choice([low or 1, high, rng.randint(1, high)])
        elif field.scalar is Scalar.BOOL:
            values[field.name] = True
        elif field.scalar is Scalar.BYTES:
            values[field.name] = rng.randbytes(field.size)
        else:
            values[field.name] = rng.choice([0.5, -1.25, 3.0])
    if layout.tail:
        values[layout.tail] = "some text é" if layout.tail_text else b"\xff\x00some bytes"
    return values


def _alike(before: Frame, after: Frame, fixed: bool, rng: random.Random) -> Iterator[str]:
    for writer, reader, way in ((before, after, "new reads old"), (after, before, "old reads new")):
        for _ in range(3):
            values = random_values(writer, rng)
            body = frame_class(writer)(**values).encode()
            block, version = writer.block_length, writer.version
            if fixed:
                # Whoever reads a header knows its own layout only, and what follows is not the header's.
                body += b"\xff" * 64
                block, version = reader.block_length, 0
            try:
                read = frame_class(reader).decode(body, block, version)
            except FrameMalformed as error:
                yield f"{way}: {error}"
                continue
            yield from (f"{way}: {each}" for each in _misread(writer, reader, values, read))
    if fixed and before.block_length != after.block_length:
        yield "what follows it begins elsewhere"


def _misread(writer: Frame, reader: Frame, values: Mapping[str, Any], read: Any) -> Iterator[str]:
    for field in reader.fields:
        value = getattr(read, field.name)
        if field.name in values and field.name != writer.tail:
            if value != values[field.name] or type(value) is not type(values[field.name]):
                yield f".{field.name}: {values[field.name]!r:.40} reads {value!r:.40}"
        elif value is not None:
            yield f".{field.name} reads {value!r:.40}, and nobody wrote it"
    if reader.tail and writer.tail:
        value = getattr(read, reader.tail)
        if reader.tail == writer.tail and value != values[writer.tail]:
            yield f".{reader.tail}: {values[writer.tail]!r:.40} reads {value!r:.40}"


def _old_code(before: Frame, after: Frame) -> Iterator[str]:
    """Code that names the fields of the old class, run on the new one."""
    names = {field.name for field in after.fields} | {after.tail}
    for name in [field.name for field in before.fields] + [before.tail] * bool(before.tail):
        if name not in names:
            yield f"has no {name} to name"


def _meaning(old: ReadContract, new: ReadContract, before: Frame, after: Frame) -> Iterator[str]:
    """Numbers that are values of an enum mean the same on both sides."""
    heirs = {field.name: field for field in after.fields}
    for field in before.fields:
        heir = heirs.get(field.name)
        if heir is None or heir.enum == field.enum:
            continue
        if not (heir.enum and field.enum):
            yield f".{field.name} is a value of an enum, or is none any more"
            continue
        one, other = (_names(read, enum) for read, enum in ((old, field.enum), (new, heir.enum)))
        if any(one[number] != other[number] for number in one.keys() & other.keys()) or one.keys() - other.keys():
            yield f".{field.name} means something else"


def _names(read: ReadContract, enum: str) -> dict[int, str]:
    return {value.number: value.name for value in read.schema.enums[enum][1].value}


def _option(read: ReadContract, name: str) -> Any:
    return read.schema.option(read.schema.messages[name].proto.options, "frame")
