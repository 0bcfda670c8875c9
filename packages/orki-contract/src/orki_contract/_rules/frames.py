"""Rules for frames and the positions of their fields."""

from __future__ import annotations

from functools import partial
from typing import Any, Final

from google.protobuf.descriptor_pb2 import FieldDescriptorProto

from orki_contract._rules.report import Report, Rule
from orki_contract.descriptors import Location, MessageNode, field_path, is_repeated
from orki_contract.model import Frame, FrameField, Scalar

RULES: Final[dict[Rule, str]] = {
    "ORKI_FRAME_VERSION": "A frame's version is between 1 and 65535.",
    "ORKI_FRAME_BLOCK_LENGTH": "A frame's block length is a multiple of 8, at most 65528 bytes.",
    "ORKI_FRAME_FIELD_TYPE": "A frame's field is a single number, bool, enum, bytes or string outside a oneof.",
    "ORKI_FRAME_FIELD_OFFSET": "A frame's field has an offset, unless it is the tail.",
    "ORKI_FRAME_FIELD_OUTSIDE": "A frame's field is within the block.",
    "ORKI_FRAME_FIELD_OVERLAP": "No two fields of a frame share a byte.",
    "ORKI_FRAME_FIELD_ALIGNED": "A number in a frame is aligned to its size.",
    "ORKI_FRAME_ONE_TAIL": "A frame has at most one tail.",
    "ORKI_FRAME_SCALAR": "A scalar option matches the field's proto type.",
    "ORKI_FRAME_SIZE": "Only bytes fields in a frame's block have a size, and each of them has one.",
    "ORKI_FRAME_SINCE": "A frame field's `since` is between 1 and the frame's version.",
    "ORKI_FRAME_OPTION_STRAY": "Options of frame fields are used only on fields of a frame's block.",
}

_Field = FieldDescriptorProto
_BLOCK_OPTIONS: Final = ("offset", "scalar", "size", "since")
_UNSUPPORTED: Final = frozenset({_Field.TYPE_MESSAGE, _Field.TYPE_GROUP})
_UNSIGNED: Final = frozenset({_Field.TYPE_UINT32, _Field.TYPE_FIXED32, _Field.TYPE_ENUM})
_SIGNED: Final = frozenset({_Field.TYPE_INT32, _Field.TYPE_SINT32, _Field.TYPE_SFIXED32, _Field.TYPE_ENUM})
# By the numbers of orki.options.v1.Scalar: name, proto types, least and greatest value.
_SCALARS: Final = {
    1: ("SCALAR_U8", _UNSIGNED, 0, 0xFF),
    2: ("SCALAR_U16", _UNSIGNED, 0, 0xFFFF),
    3: ("SCALAR_I8", _SIGNED, -0x80, 0x7F),
    4: ("SCALAR_I16", _SIGNED, -0x8000, 0x7FFF),
}


def check(report: Report) -> None:
    """Check every frame, and stray frame options on other fields."""
    layouts = {frame.message: frame for frame in report.read.contract.frames}
    for node in report.schema.messages.values():
        option = report.schema.option(node.proto.options, "frame")
        if option is None:
            for index, field in enumerate(node.proto.field):
                _stray(report, node, index, field, _BLOCK_OPTIONS, f"{node.full_name} is no frame")
        else:
            _frame(report, node, option, layouts[node.full_name])


def _frame(report: Report, node: MessageNode, option: Any, layout: Frame) -> None:
    place = partial(report.schema.locate, node.file.name, node.path, node.proto.options, "frame")
    if not 1 <= option.version <= 0xFFFF:
        text = f"frame {node.full_name} has the version {option.version}: use 1 to 65535"
        report.add("ORKI_FRAME_VERSION", place("version"), text)
    if option.block_length % 8 or option.block_length > 65528:
        text = f"the block of {node.full_name} has {option.block_length} bytes: use a multiple of 8, at most 65528"
        report.add("ORKI_FRAME_BLOCK_LENGTH", place("block_length"), text)
    fields = {field.name: field for field in layout.fields}
    tail = ""
    for index, field in enumerate(node.proto.field):
        if not _supported(report, node, index, field):
            continue
        if report.schema.option(field.options, "offset") is not None:
            _block_field(report, node, index, field, fields[field.name], option)
        elif field.type in (_Field.TYPE_BYTES, _Field.TYPE_STRING):
            reason = f'field "{field.name}" has no offset, so it is the tail'
            _stray(report, node, index, field, ("scalar", "size", "since"), reason)
            if tail:
                text = f'frame field "{field.name}" is a second tail besides "{tail}": add an offset and a size'
                report.add("ORKI_FRAME_ONE_TAIL", report.schema.location(node.file.name, field_path(node, index)), text)
            tail = tail or field.name
        else:
            text = f'frame field "{field.name}" has no offset: add one'
            report.add("ORKI_FRAME_FIELD_OFFSET", report.schema.location(node.file.name, field_path(node, index)), text)
    _overlaps(report, node, layout)


def _stray(
    report: Report, node: MessageNode, index: int, field: FieldDescriptorProto, options: tuple[str, ...], reason: str
) -> None:
    for name in options:
        if report.schema.option(field.options, name) is not None:
            place = report.schema.locate(node.file.name, field_path(node, index), field.options, name)
            report.add("ORKI_FRAME_OPTION_STRAY", place, f'{reason}: remove the option {name} from "{field.name}"')


def _supported(report: Report, node: MessageNode, index: int, field: FieldDescriptorProto) -> bool:
    offset = report.schema.option(field.options, "offset")
    if field.type in _UNSUPPORTED or is_repeated(field):
        what = "repeated" if is_repeated(field) else "a message"
    elif field.proto3_optional:
        what = "optional"
    elif field.HasField("oneof_index"):
        what = "in a oneof"
    elif field.type == _Field.TYPE_STRING and offset is not None:
        what = "a string in the block"
    else:
        return True
    text = (
        f'frame field "{field.name}" is {what}: a block holds single numbers, bools, enums and bytes of fixed length, '
        "and one string or bytes may follow as the tail"
    )
    report.add("ORKI_FRAME_FIELD_TYPE", report.schema.location(node.file.name, field_path(node, index)), text)
    return False


def _block_field(
    report: Report, node: MessageNode, index: int, field: FieldDescriptorProto, layout: FrameField, option: Any
) -> None:
    place = partial(report.schema.locate, node.file.name, field_path(node, index), field.options)
    if layout.offset + layout.size > option.block_length:
        text = (
            f'frame field "{field.name}" {_bytes(layout)} ends after the block of {option.block_length} bytes: '
            "move it or enlarge the block"
        )
        report.add("ORKI_FRAME_FIELD_OUTSIDE", place("offset"), text)
    if layout.scalar is not Scalar.BYTES and layout.offset % layout.size:
        text = (
            f'frame field "{field.name}" has {layout.size} bytes and the offset {layout.offset}: '
            f"use an offset that is a multiple of {layout.size}"
        )
        report.add("ORKI_FRAME_FIELD_ALIGNED", place("offset"), text)
    size = report.schema.option(field.options, "size")
    if layout.scalar is Scalar.BYTES and not size:
        text = f'frame field "{field.name}" has no size: add its number of bytes'
        report.add("ORKI_FRAME_SIZE", place("size" if size is not None else "offset"), text)
    elif layout.scalar is not Scalar.BYTES and size is not None:
        text = f'frame field "{field.name}" always has {layout.size} bytes: remove its size'
        report.add("ORKI_FRAME_SIZE", place("size"), text)
    since = report.schema.option(field.options, "since")
    if since is not None and not 1 <= since <= option.version:
        text = (
            f'frame field "{field.name}" has since = {since} but the frame has version {option.version}: '
            "increase the frame's version or correct since"
        )
        report.add("ORKI_FRAME_SINCE", place("since"), text)
    _scalar(report, field, place("scalar"))


def _scalar(report: Report, field: FieldDescriptorProto, place: Location) -> None:
    number = report.schema.option(field.options, "scalar")
    if number is None or number == 0:
        return
    known = _SCALARS.get(number)
    if known is None:
        message = f'frame field "{field.name}" has a scalar that this version does not know: {number}'
        report.add("ORKI_FRAME_SCALAR", place, message)
        return
    name, types, least, greatest = known
    if field.type not in types:
        kind = "uint32, fixed32" if types is _UNSIGNED else "int32, sint32, sfixed32"
        text = f'{name} does not match the proto type of frame field "{field.name}": use {kind} or an enum'
        report.add("ORKI_FRAME_SCALAR", place, text)
    elif field.type == _Field.TYPE_ENUM:
        enum = report.schema.enums[field.type_name.removeprefix(".")][1]
        for value in enum.value:
            if not least <= value.number <= greatest:
                text = (
                    f'{value.name} = {value.number} does not fit {name} of frame field "{field.name}": '
                    "use a wider scalar"
                )
                report.add("ORKI_FRAME_SCALAR", place, text)


def _overlaps(report: Report, node: MessageNode, layout: Frame) -> None:
    indexes = {field.name: index for index, field in enumerate(node.proto.field)}
    end, holder = 0, ""
    for field in layout.fields:
        if field.offset < end:
            first, last = field.offset, min(end, field.offset + field.size) - 1
            index = indexes[field.name]
            options = node.proto.field[index].options
            place = report.schema.locate(node.file.name, field_path(node, index), options, "offset")
            text = f'frame field "{field.name}" overlaps "{holder}" (bytes {first}..{last}): move one of them'
            report.add("ORKI_FRAME_FIELD_OVERLAP", place, text)
        if field.offset + field.size > end:
            end, holder = field.offset + field.size, field.name


def _bytes(field: FrameField) -> str:
    return f"(bytes {field.offset}..{field.offset + field.size - 1})"
