"""Changes of enums."""

from __future__ import annotations

from collections.abc import Mapping

from google.protobuf.descriptor_pb2 import EnumDescriptorProto

from orki_contract._findings.comparison import Comparison, Places, Side, left_at
from orki_contract._findings.shapes import closed, names_by_number, withdrawn
from orki_contract.descriptors import Location, Path


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
            place = self._old_value(value.name)
            now = numbers.get(value.name)
            if now is not None and now != value.number:
                text = f"changed the number of {value.name}: {value.number} → {now}"
                self._report("ORKI_ENUM_VALUE_RENUMBERED", text, (place, self._new_value(value.name)))
            elif value.number not in after:
                text = f"lost {value.name} = {value.number}{left_at(place)}"
                self._report("ORKI_ENUM_VALUE_REMOVED", text, (place, _place(self._comparison.new, self._name)))
            elif now is None:
                heir = after[value.number][0]
                text = f"renamed {value.number} from {value.name} to {heir}"
                self._report("ORKI_ENUM_VALUE_RENAMED", text, (place, self._new_value(heir)))
        self._shown(before, after)
        self._closed([number for number in after if number not in before])
        former = {value.name for value in self._was.value}
        for value in self._is.value:
            if value.name not in former:
                text = f"gained {value.name} = {value.number}"
                self._report("ORKI_ENUM_VALUE_ADDED", text, (None, self._new_value(value.name)))
        lost = withdrawn(self._was, self._is)
        if lost is not None:
            text = f"no longer reserves {lost}: old values could be misread"
            self._report("ORKI_ENUM_RESERVED_WITHDRAWN", text, self._whole())

    def _shown(self, before: Mapping[int, tuple[str, ...]], after: Mapping[int, tuple[str, ...]]) -> None:
        """Compare the primary names; the first name of a number is used in JSON."""
        for number, names in before.items():
            heirs = after.get(number, names)
            if heirs[0] != names[0] and names[0] in heirs:
                text = f"changed the primary name of {number} from {names[0]} to {heirs[0]}"
                places = self._old_value(names[0]), self._new_value(heirs[0])
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

    def _old_value(self, name: str) -> Location:
        return _place(self._comparison.old, self._name, name)

    def _new_value(self, name: str) -> Location:
        return _place(self._comparison.new, self._name, name)


def _place(side: Side, name: str, value: str = "") -> Location:
    """Return the location of an enum or of one of its values."""
    path = _path(side, name)
    if value:
        path += (2, next(index for index, each in enumerate(side.schema.enums[name][1].value) if each.name == value))
    return side.schema.location(side.enums[name], path)


def _path(side: Side, name: str) -> Path:
    file, _ = side.schema.enums[name]
    holder, _, own = name.rpartition(".")
    node = side.schema.messages.get(holder)
    siblings = node.proto.enum_type if node is not None else file.enum_type
    index = next((index for index, each in enumerate(siblings) if each.name == own), 0)
    return (*node.path, 4, index) if node is not None else (5, index)
