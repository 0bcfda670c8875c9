"""Changes of frames.

A removed field leaves its number (`reserved 3;`) and its bytes reserved; neither is ever used again. An image does not
show which bytes those were. So a frame with reserved numbers takes new fields only after the previous version's block;
a frame that never lost a field also takes them in gaps. A new field has a `since` above the old version, which tells
readers that older frames lack it. A frame with the option `fixed`, such as a header, never changes.
"""

from __future__ import annotations

from dataclasses import replace

from google.protobuf.descriptor_pb2 import FieldDescriptorProto

from orki_contract._findings.comparison import Comparison, Places, Plane, Side, left_at, was
from orki_contract._findings.shapes import reserves, withdrawn
from orki_contract.descriptors import Location, MessageNode
from orki_contract.model import Frame, FrameField


def compare(comparison: Comparison) -> None:
    """Compare every frame."""
    old, new = comparison.old, comparison.new
    for name, before in old.frames.items():
        place = old.message_place(name, "frame")
        if name in new.frames:
            _Frame(comparison, before, new.frames[name]).compare()
        elif name in new.messages:
            text = f"is no longer a frame{left_at(place)}"
            _report(comparison, "ORKI_FRAME_KIND", before, text, (place, new.message_place(name)))
        elif name in old.messages:
            _report(comparison, "ORKI_FRAME_REMOVED", before, "was removed", (place, None))
    for name, after in new.frames.items():
        if name in old.frames:
            continue
        places = (old.message_place(name) if name in old.messages else None, new.message_place(name, "frame"))
        if name in old.messages:
            _report(comparison, "ORKI_FRAME_KIND", after, "became a frame: its encoding changed", places)
        else:
            _report(comparison, "ORKI_FRAME_ADDED", after, "is new", places)


def _report(comparison: Comparison, rule: str, frame: Frame, text: str, places: Places, subject: str = "") -> None:
    name = frame.message
    side = comparison.new if name in comparison.new.messages else comparison.old
    package = side.schema.messages[name].file.package
    users = comparison.users(name, package)
    comparison.report(rule, subject or f"frame {name}", package, text, places, Plane.HOTPATH, users)


class _Frame:
    """A frame that exists on both sides."""

    def __init__(self, comparison: Comparison, before: Frame, after: Frame) -> None:
        self._comparison = comparison
        self._old, self._new = comparison.old, comparison.new
        self._before, self._after = before, after
        self._was = comparison.old.schema.messages[before.message]
        self._is = comparison.new.schema.messages[after.message]
        self._names = {field.name: field for field in after.fields}
        self._numbers = {field.number: field for field in after.fields}

    def compare(self) -> None:
        before, after = self._before, self._after
        self._fixed()
        if after.block_length < before.block_length:
            text = f"has a shorter block: {was(before.block_length, after.block_length)} bytes"
            self._report("ORKI_FRAME_BLOCK_SHRUNK", text, "block_length")
        changed = _layout(before) != _layout(after)
        if after.version < before.version or (changed and after.version == before.version):
            text = f"changed its layout but not its version {after.version}: increase the version"
            if after.version < before.version:
                text = f"lowered its version from {before.version} to {after.version}"
            self._report("ORKI_FRAME_VERSION_KEPT", text, "version")
        elif after.version > before.version and not changed:
            self._report("ORKI_FRAME_GROWN", f"has version {was(before.version, after.version)}", "version")
        for field in before.fields:
            self._field(field)
        known = {field.name for field in before.fields} | {field.number for field in before.fields}
        for field in after.fields:
            if field.name not in known and field.number not in known:
                self._added(field)
        if after.block_length > before.block_length:
            text = f"has a longer block: {was(before.block_length, after.block_length)} bytes"
            self._report("ORKI_FRAME_GROWN", text, "block_length")
        self._tail()
        if lost := withdrawn(self._was.proto, self._is.proto):
            self._report("ORKI_FRAME_RESERVED_WITHDRAWN", f"no longer reserves {lost}: old bytes could be misread")

    def _fixed(self) -> None:
        sides = ((self._old, self._was), (self._new, self._is))
        options = [side.schema.option(node.proto.options, "frame") for side, node in sides]
        fixed = [bool(getattr(option, "fixed", False)) for option in options]
        if not fixed[0] and fixed[1]:
            self._report("ORKI_FRAME_GROWN", "became fixed")
        if not fixed[0]:
            return
        if not fixed[1]:
            self._report("ORKI_FRAME_FIXED_CHANGED", "is no longer fixed")
        elif _frozen(self._before) != _frozen(self._after):
            self._report("ORKI_FRAME_FIXED_CHANGED", "is fixed, but its layout changed: all versions rely on it")

    def _field(self, field: FrameField) -> None:
        """Compare a field of the old layout with the new field of the same name, or else of the same number."""
        heir = self._names.get(field.name) or self._numbers.get(field.number)
        if heir is None:
            self._removed(field)
            return

        def report(rule: str, text: str, option: str) -> None:
            places = (_field_place(self._old, self._was, field.name, option), self._field_place(heir.name, option))
            self._report_field(rule, heir.name, text, places)

        if heir.name != field.name:
            report("ORKI_FRAME_FIELD_RENAMED", f'was called "{field.name}"', "")
        if heir.offset != field.offset:
            report("ORKI_FRAME_FIELD_MOVED", f"moved: offset {was(field.offset, heir.offset)}", "offset")
        if heir.number != field.number:
            report("ORKI_FRAME_FIELD_MOVED", f"changed its number: {was(field.number, heir.number)}", "")
        if (heir.scalar, heir.size) != (field.scalar, field.size):
            text = f"changed its type: {was(field, heir, lambda each: f'{each.scalar} of {each.size} bytes')}"
            report("ORKI_FRAME_FIELD_RETYPED", text, "scalar")
        elif (now := _new_scalar(self._new, self._is, heir)) != (former := _new_scalar(self._old, self._was, field)):
            report(
                "ORKI_FRAME_FIELD_RETYPED",
                f"changed to a scalar that this version does not know: {was(former, now)}",
                "scalar",
            )
        elif heir.enum != field.enum:
            text = f"changed its enum: {was(field.enum or 'none', heir.enum or 'none')}"
            report("ORKI_FRAME_FIELD_RETYPED", text, "")
        if heir.since != field.since:
            report("ORKI_FRAME_SINCE_WRONG", f"changed its since: {was(field.since, heir.since)}", "since")

    def _removed(self, field: FrameField) -> None:
        place = _field_place(self._old, self._was, field.name)
        places = place, self._new.message_place(self._after.message)
        others = [each for each in self._after.fields if _overlap(each, field)]
        end = field.offset + field.size - 1
        if self._after.tail == field.name or any(each.name == field.name for each in self._is.proto.field):
            # The field still exists, as the tail or with an unsupported type.
            places = place, self._field_place(field.name)
            self._report_field("ORKI_FRAME_FIELD_RETYPED", field.name, "is no longer in the block", places)
        elif others or not reserves(self._is.proto, field.number):
            reason = f'"{others[0].name}" uses its bytes' if others else f"{field.number} is not reserved"
            text = f"was removed, and {reason} (bytes {field.offset}..{end}){left_at(place)}"
            self._report_field("ORKI_FRAME_FIELD_REMOVED", field.name, text, places)
        else:
            text = f"was removed: older readers find zeros in bytes {field.offset}..{end}{left_at(place)}"
            self._report_field("ORKI_FRAME_FIELD_RETIRED", field.name, text, places)

    def _added(self, field: FrameField) -> None:
        def report(rule: str, text: str, option: str) -> None:
            self._report_field(rule, field.name, text, (None, self._field_place(field.name, option)))

        if field.since <= self._before.version:
            text = f"is new, but its since = {field.since} is not above version {self._before.version}, which lacks it"
            report("ORKI_FRAME_SINCE_WRONG", text, "since")
        inside = field.offset < self._before.block_length
        before = [each.name for each in self._before.fields if _overlap(each, field)]
        if before or (inside and self._was.proto.reserved_range):
            reason = f'"{before[0]}" used these bytes' if before else "a reserved field used bytes of that block"
            text = f"is at offset {field.offset}, and {reason}: move it to {self._before.block_length} or higher"
            report("ORKI_FRAME_FIELD_PLACED", text, "offset")
        report("ORKI_FRAME_GROWN", "is new", "")

    def _tail(self) -> None:
        before, after = _tail(self._was, self._before), _tail(self._is, self._after)
        if before is None and after is not None:
            self._report("ORKI_FRAME_GROWN", f'gained the tail "{after.name}"')
        elif before is not None and after is None:
            self._report("ORKI_FRAME_TAIL_CHANGED", f'lost its tail "{before.name}"')
        elif before is not None and after is not None:
            places = (_field_place(self._old, self._was, before.name), self._field_place(after.name))
            if (before.type, before.number) != (after.type, after.number):
                text = "is the tail, and its type or number changed"
                self._report_field("ORKI_FRAME_TAIL_CHANGED", after.name, text, places)
            if before.name != after.name:
                self._report_field("ORKI_FRAME_FIELD_RENAMED", after.name, f'was called "{before.name}"', places)

    def _report(self, rule: str, text: str, *inside: str) -> None:
        name = self._after.message
        places = (self._old.message_place(name, "frame", *inside), self._new.message_place(name, "frame", *inside))
        _report(self._comparison, rule, self._after, text, places)

    def _report_field(self, rule: str, field: str, text: str, places: Places) -> None:
        _report(self._comparison, rule, self._after, text, places, f"frame field {self._after.message}.{field}")

    def _field_place(self, name: str, option: str = "") -> Location:
        return _field_place(self._new, self._is, name, option)


def _layout(frame: Frame) -> tuple[object, ...]:
    """Return everything that affects the positions of a frame's bytes."""
    fields = tuple((each.offset, each.scalar, each.size) for each in frame.fields)
    return fields, frame.block_length, bool(frame.tail), frame.tail_text


def _frozen(frame: Frame) -> Frame:
    """Return what must not change in a fixed frame: everything but the names."""
    return replace(frame, fields=tuple(replace(each, name="") for each in frame.fields), tail="x" * bool(frame.tail))


def _new_scalar(side: Side, node: MessageNode, field: FrameField) -> int:
    """Return the number of a scalar that is newer than this code; 0 for a known scalar."""
    proto = next(each for each in node.proto.field if each.name == field.name)
    number = int(side.schema.option(proto.options, "scalar") or 0)
    return 0 if number <= 4 else number


def _tail(node: MessageNode, frame: Frame) -> FieldDescriptorProto | None:
    return next((each for each in node.proto.field if each.name == frame.tail), None)


def _overlap(one: FrameField, other: FrameField) -> bool:
    return one.offset < other.offset + other.size and other.offset < one.offset + one.size


def _field_place(side: Side, node: MessageNode, name: str, option: str = "") -> Location:
    """Return the location of a field or of one of its options."""
    for index, field in enumerate(node.proto.field):
        if field.name == name:
            return side.field_place(node, index, option)
    return side.schema.location(node.file.name, node.path)
