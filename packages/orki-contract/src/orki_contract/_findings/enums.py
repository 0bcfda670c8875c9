"""Changes of enums."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from google.protobuf.descriptor_pb2 import EnumDescriptorProto

from orki_contract._findings.comparison import Category, Comparison, Places, Rule, Side, additive, breaking, left_at
from orki_contract._findings.shapes import closed, names_by_number, withdrawn
from orki_contract.descriptors import Location, Path

_MESSAGE: Final = Category.MESSAGE

RULES: Final[tuple[Rule, ...]] = (
    breaking(_MESSAGE, "ORKI_ENUM_REMOVED", "An enum is not removed or renamed."),
    breaking(_MESSAGE, "ORKI_ENUM_VALUE_REMOVED", "A number of an enum keeps its meaning."),
    breaking(_MESSAGE, "ORKI_ENUM_VALUE_RENUMBERED", "A name of an enum keeps its number."),
    breaking(
        _MESSAGE, "ORKI_ENUM_VALUE_RENAMED", "A number of an enum keeps its names; a new name may have another meaning."
    ),
    breaking(_MESSAGE, "ORKI_ENUM_RESERVED_WITHDRAWN", "An enum's reserved numbers stay reserved."),
    breaking(_MESSAGE, "ORKI_ENUM_CLOSED_CHANGED", "An enum stays open or closed."),
    breaking(_MESSAGE, "ORKI_ENUM_CLOSED_GROWN", "A closed enum gets no new value."),
    additive(_MESSAGE, "ORKI_ENUM_ADDED", "An enum is added."),
    additive(_MESSAGE, "ORKI_ENUM_VALUE_ADDED", "An enum value is added."),
)


def compare(comparison: Comparison) -> None:
    """Compare every enum."""
    old, new = comparison.old, comparison.new
    for name in old.enums:
        if name in new.enums:
            _Enum(comparison, name).compare()
        else:
            _report(comparison, "ORKI_ENUM_REMOVED", old, name, "was removed", (_place(old, name), None))
    for name in new.enums:
        if name not in old.enums:
            _report(comparison, "ORKI_ENUM_ADDED", new, name, "is new", (None, _place(new, name)))


def _report(comparison: Comparison, rule: str, side: Side, name: str, text: str, places: Places) -> None:
    package = side.schema.enums[name][0].package
    comparison.report(
        rule,
        f"enum {name}",
        package,
        f"enum {name} {text}",
        plane=comparison.plane(name),
        places=places,
        affected=comparison.users(name, package),
    )


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
            place = self._value(self._comparison.old, self._was, value.name)
            now = numbers.get(value.name)
            if now is not None and now != value.number:
                text = f"changed the number of {value.name}: {value.number} → {now}"
                self._report(
                    "ORKI_ENUM_VALUE_RENUMBERED", text, (place, self._value(self._comparison.new, self._is, value.name))
                )
            elif value.number not in after:
                text = f"lost {value.name} = {value.number}{left_at(place)}"
                self._report("ORKI_ENUM_VALUE_REMOVED", text, (place, _place(self._comparison.new, self._name)))
            elif now is None:
                heir = after[value.number][0]
                text = f"renamed {value.number} from {value.name} to {heir}"
                self._report(
                    "ORKI_ENUM_VALUE_RENAMED", text, (place, self._value(self._comparison.new, self._is, heir))
                )
        self._shown(before, after)
        self._closed([number for number in after if number not in before])
        former = {value.name for value in self._was.value}
        for value in self._is.value:
            if value.name not in former:
                place = self._value(self._comparison.new, self._is, value.name)
                self._report("ORKI_ENUM_VALUE_ADDED", f"gained {value.name} = {value.number}", (None, place))
        lost = withdrawn(self._was, self._is)
        if lost is not None:
            text = f"no longer reserves {lost}: old values could be misread"
            self._report("ORKI_ENUM_RESERVED_WITHDRAWN", text, self._whole())

    def _shown(self, before: Mapping[int, tuple[str, ...]], after: Mapping[int, tuple[str, ...]]) -> None:
        """Compare the primary names; the first name of a number is used in JSON."""
        for number, names in before.items():
            heirs = after.get(number, names)
            if heirs[0] != names[0] and names[0] in heirs:
                places = (
                    self._value(self._comparison.old, self._was, names[0]),
                    self._value(self._comparison.new, self._is, heirs[0]),
                )
                text = f"changed the primary name of {number} from {names[0]} to {heirs[0]}"
                self._report("ORKI_ENUM_VALUE_RENAMED", text, places)

    def _closed(self, added: list[int]) -> None:
        closings = [closed(side.schema, self._name) for side in (self._comparison.old, self._comparison.new)]
        if closings[0] != closings[1]:
            text = f"is {'closed' if closings[1] else 'open'} now: readers handle unknown values differently"
            self._report("ORKI_ENUM_CLOSED_CHANGED", text, self._whole())
        elif closings[0] and added:
            text = f"is closed and gained {min(added)}: older readers treat it as an absent field"
            self._report("ORKI_ENUM_CLOSED_GROWN", text, self._whole())

    def _report(self, rule: str, text: str, places: Places) -> None:
        _report(self._comparison, rule, self._comparison.new, self._name, text, places)

    def _whole(self) -> Places:
        return _place(self._comparison.old, self._name), _place(self._comparison.new, self._name)

    def _value(self, side: Side, proto: EnumDescriptorProto, name: str) -> Location:
        index = next(index for index, value in enumerate(proto.value) if value.name == name)
        return side.schema.location(side.enums[self._name], (*_path(side, self._name), 2, index))


def _place(side: Side, name: str) -> Location:
    return side.schema.location(side.enums[name], _path(side, name))


def _path(side: Side, name: str) -> Path:
    """Source path of an enum."""
    file, _ = side.schema.enums[name]
    holder, _, own = name.rpartition(".")
    node = side.schema.messages.get(holder)
    siblings = node.proto.enum_type if node is not None else file.enum_type
    index = next((index for index, each in enumerate(siblings) if each.name == own), 0)
    return (*node.path, 4, index) if node is not None else (5, index)
