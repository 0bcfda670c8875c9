"""Changes of messages, of their fields, of extensions and of enums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf.descriptor_pb2 import EnumDescriptorProto, FieldDescriptorProto

from orki_contract._findings.comparison import Comparison, Places, Side, left_at, was
from orki_contract._findings.shapes import (
    FieldShape,
    closed,
    field_shapes,
    names_by_number,
    reserves,
    shape_of,
    withdrawn,
)
from orki_contract.descriptors import Location, MessageNode, Path


def compare(comparison: Comparison) -> None:
    """Compare every message and enum; fields of frames have their own rules."""
    old, new = comparison.old, comparison.new
    # The default of a field is the first value of its enum, so a changed enum requires comparing every message.
    alike = _enums(old) == _enums(new)
    for name, before in old.messages.items():
        after = new.messages.get(name)
        if after is None:
            if name not in old.frames:
                place = old.schema.location(before.file.name, before.path)
                _report(comparison, "ORKI_MESSAGE_REMOVED", before, "", "was removed", (place, None))
            continue
        if alike and _content(before) == _content(after):
            continue
        _sensitive(comparison, before, after)
        if name not in old.frames and name not in new.frames:
            _Message(comparison, before, after).compare()
    for name, after in new.messages.items():
        if name not in old.messages and name not in new.frames:
            place = new.schema.location(after.file.name, after.path)
            _report(comparison, "ORKI_MESSAGE_ADDED", after, "", "is new", (None, place))
    _compare_extensions(comparison)
    _compare_enums(comparison)


def _content(node: MessageNode) -> tuple[object, ...]:
    """Return the message, and everything in its file that affects its encoding."""
    features = node.file.options.features if node.file.syntax == "editions" else None
    whole = node.proto.SerializeToString(deterministic=True)
    return whole, node.file.syntax, features.SerializeToString() if features is not None else b""


def _enums(side: Side) -> dict[str, bytes]:
    return {name: side.schema.enums[name][1].SerializeToString(deterministic=True) for name in side.enums}


def _report(comparison: Comparison, rule: str, node: MessageNode, field: str, text: str, places: Places) -> None:
    subject = f"field {node.full_name}.{field}" if field else f"message {node.full_name}"
    comparison.report_users(rule, subject, node.file.package, text, places, node.full_name)


class _Message:
    """A message that exists on both sides and is not a frame."""

    def __init__(self, comparison: Comparison, before: MessageNode, after: MessageNode) -> None:
        self._comparison = comparison
        self._was, self._is = before, after
        self._before = field_shapes(comparison.old.schema, before)
        self._after = field_shapes(comparison.new.schema, after)
        self._numbers = {field.name: number for number, field in self._after.items()}

    def compare(self) -> None:
        for number, field in self._before.items():
            heir = self._after.get(number)
            moved = self._numbers.get(field.name, number)
            if moved != number:
                text = f"changed its number: {was(number, moved)}"
                places = self._old(field), self._new(self._after[moved])
                self._report("ORKI_FIELD_RENUMBERED", field.name, text, places)
            if heir is not None:
                self._pair(field, heir, renamed=moved == number)
            elif moved == number:
                self._removed(field)
        for number, field in self._after.items():
            if number not in self._before:
                self._added(field)
        lost = withdrawn(self._was.proto, self._is.proto)
        if lost is not None:
            places = (_whole(self._comparison.old, self._was), _whole(self._comparison.new, self._is))
            text = f"no longer reserves {lost}: old bytes could be misread"
            self._report("ORKI_MESSAGE_RESERVED_WITHDRAWN", "", text, places)

    def _removed(self, field: FieldShape) -> None:
        place = self._old(field)
        places = (place, _whole(self._comparison.new, self._is))
        reserved = reserves(self._is.proto, field.number)
        text = f"was removed, and its number {field.number} is {'' if reserved else 'not '}reserved{left_at(place)}"
        self._report("ORKI_FIELD_RETIRED" if reserved else "ORKI_FIELD_REMOVED", field.name, text, places)

    def _pair(self, before: FieldShape, after: FieldShape, *, renamed: bool) -> None:
        places = (self._old(before), self._new(after))

        def report(rule: str, text: str) -> None:
            self._report(rule, after.name, text, places)

        if before.name != after.name and renamed:
            report("ORKI_FIELD_RENAMED", f'was called "{before.name}"')
        elif before.name == after.name and before.json != after.json:
            report("ORKI_FIELD_RENAMED", f"changed its JSON name: {was(before.json, after.json)}")
        if before.kind != after.kind:
            report("ORKI_FIELD_RETYPED", f"changed its type: {was(before.kind, after.kind)}")
        elif before.default != after.default and before.cardinality == after.cardinality:
            report("ORKI_FIELD_DEFAULT_CHANGED", f"changed its default: {was(before.default, after.default)}")
        elif before.checked != after.checked:
            text = was(before.checked, after.checked, lambda each: "checked" if each else "not checked")
            report("ORKI_FIELD_UTF8_CHANGED", f"changed its UTF-8 validation: {text}")
        if before.cardinality != after.cardinality:
            report("ORKI_FIELD_CARDINALITY", f"was {before.cardinality} and is {after.cardinality}")
        if before.oneof != after.oneof:
            text = was(before.oneof or "none", after.oneof or "none")
            report("ORKI_FIELD_ONEOF_CHANGED", f"changed its oneof: {text}")

    def _added(self, field: FieldShape) -> None:
        places = (None, self._new(field))
        if field.cardinality == "required":
            text = "is new and required: old data cannot be read"
            self._report("ORKI_FIELD_REQUIRED_ADDED", field.name, text, places)
        self._report("ORKI_FIELD_ADDED", field.name, "is new", places)

    def _report(self, rule: str, field: str, text: str, places: Places) -> None:
        _report(self._comparison, rule, self._is, field, text, places)

    def _old(self, field: FieldShape) -> Location:
        return self._comparison.old.field_place(self._was, field.index)

    def _new(self, field: FieldShape) -> Location:
        return self._comparison.new.field_place(self._is, field.index)


def _sensitive(comparison: Comparison, before: MessageNode, after: MessageNode) -> None:
    marks = _marks(comparison.old, before), _marks(comparison.new, after)
    former = {field.number: field for field in before.proto.field}
    former_names = {field.name: field for field in before.proto.field}
    for index, field in enumerate(after.proto.field):
        # Redaction may use the name or the number, so check both.
        origins = [each for each in (former.get(field.number), former_names.get(field.name)) if each is not None]
        if not origins:
            continue
        was_hidden, is_hidden = any(marks[0][each.name] for each in origins), marks[1][field.name]
        if was_hidden == is_hidden:
            continue
        places = (
            comparison.old.field_place(before, [*before.proto.field].index(origins[0]), "sensitive"),
            comparison.new.field_place(after, index, "sensitive"),
        )
        if was_hidden:
            text = "is no longer sensitive: audit, logs and traces show it"
            _report(comparison, "ORKI_SENSITIVE_WITHDRAWN", after, field.name, text, places)
        else:
            _report(comparison, "ORKI_SENSITIVE_ADDED", after, field.name, "became sensitive", places)


def _marks(side: Side, node: MessageNode) -> Mapping[str, bool]:
    return {field.name: bool(side.schema.option(field.options, "sensitive")) for field in node.proto.field}


def _whole(side: Side, node: MessageNode) -> Location:
    return side.schema.location(node.file.name, node.path)


_FILE_EXTENSION, _MESSAGE_EXTENSION = 7, 6


class _Extension:
    """An extension field."""

    def __init__(self, side: Side, file: str, scope: str, proto: FieldDescriptorProto, path: Path) -> None:
        name = f"{scope}.{proto.name}" if scope else proto.name
        self.name = name
        self.extended = proto.extendee.removeprefix(".")
        self.package = side.files[file]
        self.place: Location = side.schema.location(file, path)
        field: Any = side.schema.pool.FindExtensionByName(name)
        self.shape: FieldShape = shape_of(side.schema.files[file], field, proto, 0)


def _compare_extensions(comparison: Comparison) -> None:
    """Compare every extension by the rules of fields; its extended message and its number identify it."""
    before, after = _extensions(comparison.old), _extensions(comparison.new)
    for key, extension in before.items():
        heir = after.get(key)
        if heir is None:
            # Nothing can reserve the number of an extension.
            text = f"of {extension.extended} is gone"
            _report_extension(comparison, "ORKI_FIELD_REMOVED", extension, text, (extension.place, None))
        else:
            _compare_extension(comparison, extension, heir)
    for key, extension in after.items():
        if key not in before:
            text = f"of {extension.extended} is new"
            _report_extension(comparison, "ORKI_FIELD_ADDED", extension, text, (None, extension.place))


def _compare_extension(comparison: Comparison, before: _Extension, after: _Extension) -> None:
    def report(rule: str, text: str) -> None:
        _report_extension(comparison, rule, after, text, (before.place, after.place))

    if before.name != after.name:
        report("ORKI_FIELD_RENAMED", f'was called "{before.name}"')
    if before.shape.kind != after.shape.kind:
        report("ORKI_FIELD_RETYPED", f"changed its type: {was(before.shape.kind, after.shape.kind)}")
    elif before.shape.cardinality != after.shape.cardinality:
        report("ORKI_FIELD_CARDINALITY", f"was {before.shape.cardinality} and is {after.shape.cardinality}")
    elif before.shape.default != after.shape.default:
        text = was(before.shape.default, after.shape.default)
        report("ORKI_FIELD_DEFAULT_CHANGED", f"changed its default: {text}")
    elif before.shape.checked != after.shape.checked:
        report("ORKI_FIELD_UTF8_CHANGED", "changed its UTF-8 validation")


def _report_extension(comparison: Comparison, rule: str, extension: _Extension, text: str, places: Places) -> None:
    subject = f"extension {extension.name}"
    comparison.report_users(rule, subject, extension.package, text, places, extension.extended)


def _extensions(side: Side) -> dict[tuple[str, int], _Extension]:
    """Return the extensions by extended message and number."""
    scopes: list[tuple[str, str, Sequence[FieldDescriptorProto], Path]] = [
        (path, package, side.schema.files[path].extension, (_FILE_EXTENSION,)) for path, package in side.files.items()
    ]
    for name, node in side.messages.items():
        scopes.append((node.file.name, name, node.proto.extension, (*node.path, _MESSAGE_EXTENSION)))
    found = {}
    for file, scope, extensions, path in scopes:
        for index, proto in enumerate(extensions):
            extension = _Extension(side, file, scope, proto, (*path, index))
            found[extension.extended, proto.number] = extension
    return found


def _compare_enums(comparison: Comparison) -> None:
    old, new = comparison.old, comparison.new
    for name in old.enums:
        if name in new.enums:
            _Enum(comparison, name).compare()
        else:
            places = (_enum_place(old, name), None)
            _report_enum(comparison, "ORKI_ENUM_REMOVED", old, name, "was removed", places)
    for name in new.enums:
        if name not in old.enums:
            _report_enum(comparison, "ORKI_ENUM_ADDED", new, name, "is new", (None, _enum_place(new, name)))


def _report_enum(comparison: Comparison, rule: str, side: Side, name: str, text: str, places: Places) -> None:
    package = side.schema.enums[name][0].package
    comparison.report_users(rule, f"enum {name}", package, text, places, name)


class _Enum:
    """An enum that exists on both sides."""

    def __init__(self, comparison: Comparison, name: str) -> None:
        self._comparison = comparison
        self._name = name
        self._was: EnumDescriptorProto = comparison.old.schema.enums[name][1]
        self._is: EnumDescriptorProto = comparison.new.schema.enums[name][1]

    def compare(self) -> None:
        before, after = names_by_number(self._was), names_by_number(self._is)
        numbers = {value.name: value.number for value in self._is.value}
        for value in self._was.value:
            now = numbers.get(value.name)
            if now is not None and now != value.number:
                text = f"changed the number of {value.name}: {value.number} → {now}"
                self._report("ORKI_ENUM_VALUE_RENUMBERED", text, self._places(value.name, value.name))
            elif value.number not in after:
                places = self._places(value.name, "")
                text = f"lost {value.name} = {value.number}{left_at(places[0])}"
                self._report("ORKI_ENUM_VALUE_REMOVED", text, places)
            elif now is None:
                heir = after[value.number][0]
                text = f"renamed {value.number} from {value.name} to {heir}"
                self._report("ORKI_ENUM_VALUE_RENAMED", text, self._places(value.name, heir))
        self._shown(before, after)
        self._closed([number for number in after if number not in before])
        former = {value.name for value in self._was.value}
        for value in self._is.value:
            if value.name not in former:
                text = f"gained {value.name} = {value.number}"
                self._report("ORKI_ENUM_VALUE_ADDED", text, (None, self._places("", value.name)[1]))
        lost = withdrawn(self._was, self._is)
        if lost is not None:
            text = f"no longer reserves {lost}: old values could be misread"
            self._report("ORKI_ENUM_RESERVED_WITHDRAWN", text, self._places("", ""))

    def _shown(self, before: Mapping[int, tuple[str, ...]], after: Mapping[int, tuple[str, ...]]) -> None:
        """Compare the primary names; the first name of a number is used in JSON."""
        for number, names in before.items():
            heirs = after.get(number, names)
            if heirs[0] != names[0] and names[0] in heirs:
                text = f"changed the primary name of {number} from {names[0]} to {heirs[0]}"
                self._report("ORKI_ENUM_VALUE_RENAMED", text, self._places(names[0], heirs[0]))

    def _closed(self, added: list[int]) -> None:
        closings = [closed(side.schema, self._name) for side in (self._comparison.old, self._comparison.new)]
        if closings[0] != closings[1]:
            text = f"is {'closed' if closings[1] else 'open'} now: readers handle unknown values differently"
            self._report("ORKI_ENUM_CLOSED_CHANGED", text, self._places("", ""))
        elif closings[0] and added:
            text = f"is closed and gained {min(added)}: older readers treat it as an absent field"
            self._report("ORKI_ENUM_CLOSED_GROWN", text, self._places("", ""))

    def _report(self, rule: str, text: str, places: Places) -> None:
        _report_enum(self._comparison, rule, self._comparison.new, self._name, text, places)

    def _places(self, old: str, new: str) -> tuple[Location, Location]:
        """Return the locations of two values; an empty name is the enum itself."""
        return _enum_place(self._comparison.old, self._name, old), _enum_place(self._comparison.new, self._name, new)


def _enum_place(side: Side, name: str, value: str = "") -> Location:
    """Return the location of an enum or of one of its values."""
    file, enum = side.schema.enums[name]
    holder, _, own = name.rpartition(".")
    node = side.schema.messages.get(holder)
    siblings = node.proto.enum_type if node is not None else file.enum_type
    index = next((index for index, each in enumerate(siblings) if each.name == own), 0)
    path = (*node.path, 4, index) if node is not None else (5, index)
    if value:
        path += (2, next(index for index, each in enumerate(enum.value) if each.name == value))
    return side.schema.location(file.name, path)
