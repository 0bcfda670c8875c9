"""Messages: bytes that one version writes and another one reads, and the classes that users name."""

from __future__ import annotations

__all__ = ["RULES", "compare"]

from collections.abc import Mapping
from typing import Final

from orki_contract.descriptors import Location, MessageNode, field_path
from orki_contract.findings.comparison import Comparison, Places, Side, left_at, was
from orki_contract.findings.finding import Category, Rule, additive, breaking, source_breaking
from orki_contract.findings.reserved import reserves, withdrawn
from orki_contract.findings.shapes import FieldShape, field_shapes

_MESSAGE: Final = Category.MESSAGE

RULES: Final[tuple[Rule, ...]] = (
    breaking(_MESSAGE, "ORKI_MESSAGE_REMOVED", "A message stays, under its name."),
    breaking(_MESSAGE, "ORKI_MESSAGE_RESERVED_WITHDRAWN", "A message's reserved numbers stay reserved."),
    breaking(_MESSAGE, "ORKI_FIELD_REMOVED", "A field that goes leaves its number reserved."),
    source_breaking(_MESSAGE, "ORKI_FIELD_RETIRED", "A field stays for those whose code names it."),
    breaking(_MESSAGE, "ORKI_FIELD_RENUMBERED", "A field's name stays with its number."),
    breaking(_MESSAGE, "ORKI_FIELD_RENAMED", "A field keeps its name, as another name may mean another thing."),
    breaking(_MESSAGE, "ORKI_FIELD_RETYPED", "A field keeps its type."),
    breaking(_MESSAGE, "ORKI_FIELD_CARDINALITY", "A field stays single, optional, required or repeated."),
    breaking(_MESSAGE, "ORKI_FIELD_ONEOF_CHANGED", "A field stays in its oneof, or in none."),
    breaking(_MESSAGE, "ORKI_FIELD_DEFAULT_CHANGED", "An absent field reads as before."),
    breaking(_MESSAGE, "ORKI_FIELD_UTF8_CHANGED", "A string is held to UTF-8 as before."),
    breaking(_MESSAGE, "ORKI_FIELD_REQUIRED_ADDED", "A new field is not required."),
    breaking(_MESSAGE, "ORKI_SENSITIVE_WITHDRAWN", "A sensitive field stays sensitive."),
    additive(_MESSAGE, "ORKI_MESSAGE_ADDED", "A message is new."),
    additive(_MESSAGE, "ORKI_FIELD_ADDED", "A field is new."),
    additive(_MESSAGE, "ORKI_SENSITIVE_ADDED", "A field is sensitive now."),
)


def compare(comparison: Comparison) -> None:
    """Judges every message; what lies inside of frames has rules of its own."""
    old, new = comparison.old, comparison.new
    # The default of a field is the first value of its enum: where an enum changed, every message is looked at.
    alike = _enums(old) == _enums(new)
    for name, before in old.messages.items():
        after = new.messages.get(name)
        if after is None:
            if name not in old.frames:
                place = old.schema.location(before.file.name, before.path)
                _say(comparison, "ORKI_MESSAGE_REMOVED", before, "", "is gone", (place, None))
            continue
        if alike and _content(before) == _content(after):
            continue
        _sensitive(comparison, before, after)
        if name not in old.frames and name not in new.frames:
            _Message(comparison, before, after).compare()
    for name, after in new.messages.items():
        if name not in old.messages and name not in new.frames:
            place = new.schema.location(after.file.name, after.path)
            _say(comparison, "ORKI_MESSAGE_ADDED", after, "", "is new", (None, place))


def _content(node: MessageNode) -> tuple[object, ...]:
    """All of a message, and of its file what decides how it is read."""
    features = node.file.options.features if node.file.syntax == "editions" else None
    whole = node.proto.SerializeToString(deterministic=True)
    return whole, node.file.syntax, features.SerializeToString() if features is not None else b""


def _enums(side: Side) -> dict[str, bytes]:
    return {name: side.schema.enums[name][1].SerializeToString(deterministic=True) for name in side.enums}


def _say(comparison: Comparison, rule: str, node: MessageNode, field: str, text: str, places: Places) -> None:
    subject = f"field {node.full_name}.{field}" if field else f"message {node.full_name}"
    comparison.say(
        rule,
        subject,
        node.file.package,
        f"{subject} {text}",
        plane=comparison.plane(node.full_name),
        places=places,
        affected=comparison.users(node.full_name, node.file.package),
    )


class _Message:
    """One message that is there on both sides, and is no frame on either."""

    def __init__(self, comparison: Comparison, before: MessageNode, after: MessageNode) -> None:
        self._comparison = comparison
        self._was, self._is = before, after
        self._before = field_shapes(comparison.old.schema, before)
        self._after = field_shapes(comparison.new.schema, after)
        self._numbers = {field.name: number for number, field in self._after.items()}

    def compare(self) -> None:
        """Judges it."""
        for number, field in self._before.items():
            heir = self._after.get(number)
            moved = self._numbers.get(field.name, number)
            if moved != number:
                text = f"has another number: {was(number, moved)}"
                self._say("ORKI_FIELD_RENUMBERED", field.name, text, (self._old(field), self._new(self._after[moved])))
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
            text = f"reserves {lost} no more: bytes of before could be taken for something else"
            self._say("ORKI_MESSAGE_RESERVED_WITHDRAWN", "", text, places)

    def _removed(self, field: FieldShape) -> None:
        place = self._old(field)
        places = (place, _whole(self._comparison.new, self._is))
        if reserves(self._is.proto, field.number):
            text = f"is gone, and its number {field.number} is reserved{left_at(place)}"
            self._say("ORKI_FIELD_RETIRED", field.name, text, places)
        else:
            text = f"is gone, and its number {field.number} is not reserved{left_at(place)}"
            self._say("ORKI_FIELD_REMOVED", field.name, text, places)

    def _pair(self, before: FieldShape, after: FieldShape, *, renamed: bool) -> None:
        places = (self._old(before), self._new(after))

        def say(rule: str, text: str) -> None:
            self._say(rule, after.name, text, places)

        if before.name != after.name and renamed:
            say("ORKI_FIELD_RENAMED", f'was called "{before.name}"')
        elif before.name == after.name and before.json != after.json:
            say("ORKI_FIELD_RENAMED", f"is called otherwise in JSON: {was(before.json, after.json)}")
        if before.kind != after.kind:
            say("ORKI_FIELD_RETYPED", f"is of another type: {was(before.kind, after.kind)}")
        elif before.default != after.default and before.cardinality == after.cardinality:
            say("ORKI_FIELD_DEFAULT_CHANGED", f"reads otherwise when absent: {was(before.default, after.default)}")
        elif before.checked != after.checked:
            text = was(before.checked, after.checked, lambda each: "checked" if each else "not checked")
            say("ORKI_FIELD_UTF8_CHANGED", f"is held to UTF-8 otherwise: {text}")
        if before.cardinality != after.cardinality:
            say("ORKI_FIELD_CARDINALITY", f"was {before.cardinality} and is {after.cardinality}")
        if before.oneof != after.oneof:
            text = was(before.oneof or "none", after.oneof or "none")
            say("ORKI_FIELD_ONEOF_CHANGED", f"is in another oneof: {text}")

    def _added(self, field: FieldShape) -> None:
        places = (None, self._new(field))
        if field.cardinality == "required":
            text = "is new and required: what was written before cannot be read"
            self._say("ORKI_FIELD_REQUIRED_ADDED", field.name, text, places)
        self._say("ORKI_FIELD_ADDED", field.name, "is new", places)

    def _say(self, rule: str, field: str, text: str, places: Places) -> None:
        _say(self._comparison, rule, self._is, field, text, places)

    def _old(self, field: FieldShape) -> Location:
        return self._comparison.old.schema.location(self._was.file.name, field_path(self._was, field.index))

    def _new(self, field: FieldShape) -> Location:
        return self._comparison.new.schema.location(self._is.file.name, field_path(self._is, field.index))


def _sensitive(comparison: Comparison, before: MessageNode, after: MessageNode) -> None:
    marks = _marks(comparison.old, before), _marks(comparison.new, after)
    former = {field.number: field for field in before.proto.field}
    former_names = {field.name: field for field in before.proto.field}
    for index, field in enumerate(after.proto.field):
        # Whoever redacts by the name, or by the number: neither may show what was hidden.
        origins = [each for each in (former.get(field.number), former_names.get(field.name)) if each is not None]
        if not origins:
            continue
        was_hidden, is_hidden = any(marks[0][each.name] for each in origins), marks[1][field.name]
        if was_hidden == is_hidden:
            continue
        places = (
            _field_place(comparison.old, before, [*before.proto.field].index(origins[0])),
            _field_place(comparison.new, after, index),
        )
        if was_hidden:
            text = "is not sensitive any more: audit, logs and traces show it"
            _say(comparison, "ORKI_SENSITIVE_WITHDRAWN", after, field.name, text, places)
        else:
            _say(comparison, "ORKI_SENSITIVE_ADDED", after, field.name, "is sensitive now", places)


def _marks(side: Side, node: MessageNode) -> Mapping[str, bool]:
    return {field.name: bool(side.schema.option(field.options, "sensitive")) for field in node.proto.field}


def _field_place(side: Side, node: MessageNode, index: int) -> Location:
    path = field_path(node, index)
    options = node.proto.field[index].options
    if side.schema.option(options, "sensitive") is not None:
        return side.place(node.file.name, path, options, "sensitive")
    return side.schema.location(node.file.name, path)


def _whole(side: Side, node: MessageNode) -> Location:
    return side.schema.location(node.file.name, node.path)
