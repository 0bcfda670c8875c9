"""Fields that a file adds to messages declared elsewhere (`extend`): they travel like any other."""

from __future__ import annotations

__all__ = ["compare"]

from collections.abc import Iterator, Sequence
from typing import Any

from google.protobuf.descriptor_pb2 import FieldDescriptorProto

from orki_contract.descriptors import Location, Path
from orki_contract.findings.comparison import Comparison, Places, Side, was
from orki_contract.findings.shapes import FieldShape, shape_of

_FILE_EXTENSION, _MESSAGE_EXTENSION = 7, 6


class _Extension:
    """One such field."""

    def __init__(self, side: Side, file: str, scope: str, proto: FieldDescriptorProto, path: Path) -> None:
        name = f"{scope}.{proto.name}" if scope else proto.name
        self.name = name
        self.extended = proto.extendee.removeprefix(".")
        self.package = side.files[file]
        self.place: Location = side.schema.location(file, path)
        field: Any = side.schema.pool.FindExtensionByName(name)
        self.shape: FieldShape = shape_of(side.schema.files[file], field, proto, 0)


def compare(comparison: Comparison) -> None:
    """Judges every extension by the rules of fields; which message it extends and its number are what it is."""
    before, after = _extensions(comparison.old), _extensions(comparison.new)
    for key, extension in before.items():
        heir = after.get(key)
        if heir is None:
            # Nothing can reserve the number of an extension.
            _say(
                comparison, "ORKI_FIELD_REMOVED", extension, f"of {extension.extended} is gone", (extension.place, None)
            )
        else:
            _pair(comparison, extension, heir)
    for key, extension in after.items():
        if key not in before:
            _say(comparison, "ORKI_FIELD_ADDED", extension, f"of {extension.extended} is new", (None, extension.place))


def _pair(comparison: Comparison, before: _Extension, after: _Extension) -> None:
    def say(rule: str, text: str) -> None:
        _say(comparison, rule, after, text, (before.place, after.place))

    if before.name != after.name:
        say("ORKI_FIELD_RENAMED", f'was called "{before.name}"')
    if before.shape.kind != after.shape.kind:
        say("ORKI_FIELD_RETYPED", f"is of another type: {was(before.shape.kind, after.shape.kind)}")
    elif before.shape.cardinality != after.shape.cardinality:
        say("ORKI_FIELD_CARDINALITY", f"was {before.shape.cardinality} and is {after.shape.cardinality}")
    elif before.shape.default != after.shape.default:
        text = was(before.shape.default, after.shape.default)
        say("ORKI_FIELD_DEFAULT_CHANGED", f"reads otherwise when absent: {text}")
    elif before.shape.checked != after.shape.checked:
        say("ORKI_FIELD_UTF8_CHANGED", "is held to UTF-8 otherwise")


def _say(comparison: Comparison, rule: str, extension: _Extension, text: str, places: Places) -> None:
    subject = f"extension {extension.name}"
    comparison.say(
        rule,
        subject,
        extension.package,
        f"{subject} {text}",
        plane=comparison.plane(extension.extended),
        places=places,
        affected=comparison.users(extension.extended, extension.package),
    )


def _extensions(side: Side) -> dict[tuple[str, int], _Extension]:
    """By the extended message and the number."""
    found = {}
    for file, scope, proto, path in _written(side):
        extension = _Extension(side, file, scope, proto, path)
        found[extension.extended, proto.number] = extension
    return found


def _written(side: Side) -> Iterator[tuple[str, str, FieldDescriptorProto, Path]]:
    for path, package in side.files.items():
        yield from _each(path, package, side.schema.files[path].extension, (_FILE_EXTENSION,))
    for name, node in side.messages.items():
        yield from _each(node.file.name, name, node.proto.extension, (*node.path, _MESSAGE_EXTENSION))


def _each(
    file: str, scope: str, extensions: Sequence[FieldDescriptorProto], path: Path
) -> Iterator[tuple[str, str, FieldDescriptorProto, Path]]:
    for index, proto in enumerate(extensions):
        yield file, scope, proto, (*path, index)
