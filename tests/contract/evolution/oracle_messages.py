"""Messages of two versions, run against each other: what one writes the other one reads, old code on new classes."""

from __future__ import annotations

__all__ = ["judge", "message_class", "read_alike"]

import random
from collections.abc import Iterator
from typing import Any

from google.protobuf import message_factory
from google.protobuf.message import DecodeError
from oracle_values import NOTHING, fill, seen, value_of

from orki_contract.descriptors import is_repeated
from orki_contract.read import ReadContract

Break = tuple[bool, str]
"""Whether running processes are hurt, or else whoever's code must change; and what broke."""


def judge(old: ReadContract, new: ReadContract, rng: random.Random) -> Iterator[Break]:
    """Every way in which messages and enums of the two versions do not fit."""
    frames = {each.message for each in (*old.contract.frames, *new.contract.frames)}
    for name in _own(old):
        if name in frames:
            continue
        if name not in new.schema.messages:
            yield True, f"{name} is not there"
            continue
        if _same(old, new, name):
            continue
        yield from (
            (False, f"{name}: {each}") for each in _old_code(message_class(old, name), message_class(new, name), rng)
        )
        yield from ((True, f"{name}: {each}") for each in read_alike(old, name, new, name, rng))
    yield from _enums(old, new)
    yield from ((True, f"extension {each}") for each in _extensions(old, new))
    yield from _modules(old, new)


def message_class(read: ReadContract, name: str) -> Any:
    """A message's class, in the pool of its version."""
    return message_factory.GetMessageClass(read.schema.pool.FindMessageTypeByName(name))


def read_alike(
    old: ReadContract, was: str, new: ReadContract, now: str, rng: random.Random, rounds: int = 3
) -> Iterator[str]:
    """What readers get wrong of messages that the other version wrote, in both directions."""
    one, other = message_class(old, was), message_class(new, now)
    for writer, reader, way in ((one, other, "new reads old"), (other, one, "old reads new")):
        for _ in range(rounds):
            message = writer()
            fill(rng, message)
            if not message.IsInitialized():
                yield f"{way}: it requires itself, so nobody can write one"
                break
            yield from (f"{way}: {each}" for each in _misread(message, reader))
        empty = writer()
        if empty.IsInitialized():
            yield from (f"{way}, empty: {each}" for each in _misread(empty, reader))
        yield from (f"{way}: {each}" for each in _strangers(writer, reader))


def _misread(message: Any, reader: Any) -> Iterator[str]:
    raw = message.SerializeToString()
    # The measure is what the writer's own class reads: closed enums put values aside there as well.
    written = seen(type(message).FromString(raw))
    try:
        parsed = reader.FromString(raw)
    except DecodeError as error:
        yield f"not readable: {error}"
        return
    yield from _differences(written, seen(parsed), "")


def _differences(written: Any, read: Any, path: str) -> Iterator[str]:
    """Where two views differ, in fields that both have; and what was read that nobody wrote."""
    if isinstance(written, dict) and isinstance(read, dict) and _fields(written) and _fields(read):
        for name in sorted(written.keys() & read.keys()):
            yield from _differences(written[name], read[name], f"{path}.{name}")
        for name in sorted(read.keys() - written.keys()):
            if not _unset(read[name]):
                yield f"{path}.{name} reads {read[name]!r:.60}, and nobody wrote it"
    elif isinstance(written, list) and isinstance(read, list) and len(written) == len(read):
        for index, (one, other) in enumerate(zip(written, read, strict=True)):
            yield from _differences(one, other, f"{path}[{index}]")
    elif isinstance(written, dict) and isinstance(read, dict) and written.keys() == read.keys():
        for key in written:
            yield from _differences(written[key], read[key], f"{path}[{key}]")
    elif not _equal(written, read):
        yield f"{path}: {written!r:.60} reads {read!r:.60}"


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, tuple) and isinstance(other, tuple) and one[:1] == ("enum",) == other[:1]:
        return one[1] == other[1] and (one[2] == other[2] or None in (one[2], other[2]))
    if isinstance(one, tuple) and isinstance(other, tuple) and one[0] == "nothing" == other[0] and len(one) == 2:
        return one[1] is None or other[1] is None or _equal(one[1], other[1])
    return bool(one == other)


def _fields(view: dict[Any, Any]) -> bool:
    return all(isinstance(key, str) for key in view)


def _unset(value: Any) -> bool:
    """Whether a reader sees that a field was not written."""
    if isinstance(value, tuple):
        return value[0] == NOTHING[0] or value[1] in (0, 0.0, "", b"", False)
    return not value


def _strangers(writer: Any, reader: Any) -> Iterator[str]:
    """Strings that are no UTF-8, as a writer in another language may send where nobody checks."""
    for field in writer.DESCRIPTOR.fields:
        if field.type != field.TYPE_STRING or _required_holder(writer):
            continue
        raw = bytes(((field.number << 3 | 2) & 0x7F | (0x80 if field.number > 15 else 0),))
        raw += bytes((field.number >> 4,)) if field.number > 15 else b""
        raw += b"\x02\xff\xfe"
        twin = reader.DESCRIPTOR.fields_by_number.get(field.number)
        if twin is None or twin.type != twin.TYPE_STRING or is_repeated(twin) != is_repeated(field):
            continue
        if _takes(writer, raw) != _takes(reader, raw):
            yield f".{field.name} is held to UTF-8 by one side only"


def _takes(kind: Any, raw: bytes) -> bool:
    try:
        kind.FromString(raw)
    except DecodeError:
        return False
    return True


def _required_holder(kind: Any) -> bool:
    return not kind().IsInitialized()


def _old_code(old: Any, new: Any, rng: random.Random) -> Iterator[str]:
    """Code that names the fields of the old class, run on the new one."""
    message = new()
    filled = old()
    fill(rng, filled)
    for field in old.DESCRIPTOR.fields:
        twin = new.DESCRIPTOR.fields_by_name.get(field.name)
        if twin is None:
            yield f"has no {field.name} to name"
            continue
        if field.message_type is None and not is_repeated(field):
            for value in (getattr(filled, field.name), getattr(old(), field.name)):
                try:
                    setattr(message, field.name, value)
                except (TypeError, ValueError, AttributeError) as error:
                    yield f".{field.name} does not take {value!r:.40}: {error}"
                    break
                if type(getattr(message, field.name)) is not type(value):
                    yield f".{field.name} is of another type"
                    break
        elif field.message_type is not None:
            name = twin.message_type.full_name if twin.message_type is not None else ""
            if is_repeated(twin) != is_repeated(field) or name != field.message_type.full_name:
                yield f".{field.name} is of another type"
        elif is_repeated(twin) != is_repeated(field):
            yield f".{field.name} is repeated, or not"
        if twin.json_name != field.json_name:
            yield f".{field.name} is called otherwise in JSON"
        if field.has_presence and not twin.has_presence:
            yield f".{field.name} cannot tell whether it is set"
    for oneof in old.DESCRIPTOR.oneofs:
        synthetic = len(oneof.fields) == 1 and oneof.name == f"_{oneof.fields[0].name}"
        if oneof.name not in new.DESCRIPTOR.oneofs_by_name and not synthetic:
            yield f"has no oneof {oneof.name} to ask"


def _enums(old: ReadContract, new: ReadContract) -> Iterator[Break]:
    for name, (file, enum) in old.schema.enums.items():
        if not file.name.startswith("acme/"):
            continue
        if name not in new.schema.enums:
            yield True, f"enum {name} is not there"
            continue
        numbers = {value.name: value.number for value in new.schema.enums[name][1].value}
        names: dict[int, set[str]] = {}
        for value in new.schema.enums[name][1].value:
            names.setdefault(value.number, set()).add(value.name)
        for value in enum.value:
            if value.number not in names:
                yield True, f"enum {name}: {value.number} means nothing"
            elif value.name not in numbers:
                yield False, f"enum {name}: no {value.name} to name"
            elif numbers[value.name] != value.number:
                yield True, f"enum {name}: {value.name} is another number"


def _extensions(old: ReadContract, new: ReadContract) -> Iterator[str]:
    """What one side writes into its extensions of a message, the other one reads out of the field of that name."""
    for file in old.schema.files.values():
        for proto in file.extension:
            name, extended = f"{file.package}.{proto.name}", proto.extendee.removeprefix(".")
            if not file.name.startswith("acme/") or extended not in new.schema.messages:
                continue
            try:
                keys = [read.schema.pool.FindExtensionByName(name) for read in (old, new)]
            except KeyError:
                yield f"{name} is not there"
                continue
            sides = [(message_class(old, extended), keys[0]), (message_class(new, extended), keys[1])]
            for (writer, key), (reader, twin) in (sides, sides[::-1]):
                yield from (f"{name}: {each}" for each in _extended(writer, key, reader, twin))


def _extended(writer: Any, key: Any, reader: Any, twin: Any) -> Iterator[str]:
    message = writer()
    value = value_of(random.Random(3), key)
    if is_repeated(key):
        message.Extensions[key].extend([value, value])
    else:
        message.Extensions[key] = value
    try:
        read = reader.FromString(message.SerializePartialToString())
    except DecodeError:
        # Only required fields are missing, or else the field cannot be read.
        read = reader()
        try:
            read.MergeFromString(message.SerializePartialToString())
        except DecodeError as error:
            yield f"not readable: {error}"
            return
    if is_repeated(key) != is_repeated(twin):
        yield "repeated, or not"
        return
    back = read.Extensions[twin]
    expected = [value, value] if is_repeated(key) else value
    found = list(back) if is_repeated(key) else back
    if found != expected or str(type(found)) != str(type(expected)):
        yield f"{expected!r:.40} reads {found!r:.40}"


def _modules(old: ReadContract, new: ReadContract) -> Iterator[Break]:
    """Old imports: every declaration is found in the module of its file."""
    for name, node in old.schema.messages.items():
        moved = new.schema.messages.get(name)
        if moved is not None and moved.file.name != node.file.name:
            yield False, f"{name} is in another module"
    for name, (file, _) in old.schema.enums.items():
        if name in new.schema.enums and new.schema.enums[name][0].name != file.name:
            yield False, f"{name} is in another module"


def _own(read: ReadContract) -> list[str]:
    return [
        name
        for name, node in read.schema.messages.items()
        if node.file.name.startswith("acme/") and not node.proto.options.map_entry
    ]


def _same(old: ReadContract, new: ReadContract, name: str) -> bool:
    """Whether nothing that the message reaches has changed, so that running it would show nothing."""
    seen_names: set[str] = set()
    waiting = [name]
    while waiting:
        each = waiting.pop()
        if each in seen_names:
            continue
        seen_names.add(each)
        if each in old.schema.enums or each in new.schema.enums:
            one, other = old.schema.enums.get(each), new.schema.enums.get(each)
            if one is None or other is None or one[1] != _as(one[1], other[1]) or _ground(one[0]) != _ground(other[0]):
                return False
            continue
        was, now = old.schema.messages.get(each), new.schema.messages.get(each)
        if was is None or now is None or _ground(was.file) != _ground(now.file):
            return False
        if was.proto.SerializeToString(deterministic=True) != now.proto.SerializeToString(deterministic=True):
            return False
        waiting += [field.type_name.removeprefix(".") for field in was.proto.field if field.type_name]
    return True


def _as(one: Any, other: Any) -> Any:
    """A descriptor of another pool as one of this pool's class."""
    return type(one).FromString(other.SerializeToString())


def _ground(file: Any) -> tuple[str, str, bytes]:
    return file.syntax, str(file.edition), file.options.features.SerializeToString()
