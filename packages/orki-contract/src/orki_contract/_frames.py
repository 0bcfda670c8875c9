"""Frame classes: fixed little-endian layouts with an optional tail."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field
from struct import Struct
from struct import error as StructError
from typing import Any, ClassVar, Final, Self, TypeVar, dataclass_transform

from orki_contract.errors import FrameMalformed
from orki_contract.model import Frame, FrameField, Scalar

_CODES: Final = {
    Scalar.BOOL: "?",
    Scalar.U8: "B",
    Scalar.U16: "H",
    Scalar.U32: "I",
    Scalar.U64: "Q",
    Scalar.I8: "b",
    Scalar.I16: "h",
    Scalar.I32: "i",
    Scalar.I64: "q",
    Scalar.F32: "f",
    Scalar.F64: "d",
}


def scalar_code(scalar: Scalar, size: int = 0) -> str:
    """Return the `struct` code of a scalar; `size` is the length of `Scalar.BYTES`."""
    return f"{size}s" if scalar is Scalar.BYTES else _CODES[scalar]


def scalar_size(scalar: Scalar, size: int = 0) -> int:
    """Return the length of a scalar in bytes; `size` is the length of `Scalar.BYTES`."""
    return Struct("<" + scalar_code(scalar, size)).size


_METADATA: Final = "orki_contract.frames"
_UNSET: Final[Any] = dataclasses.MISSING


def at(
    offset: int, scalar: Scalar, *, number: int, size: int = 0, since: int = 1, enum: str = "", default: Any = _UNSET
) -> Any:
    """Declare a field of the block of a generated frame class.

    Args:
        offset: Offset of the first byte from the start of the block.
        scalar: Type of the field.
        number: Number in the proto.
        size: Length in bytes of `Scalar.BYTES`.
        since: Frame version that added the field.
        enum: Full name of its enum; empty for none.
        default: None for a field of a later version: a frame without it can be created but not encoded.
    """
    length = scalar_size(scalar, size)
    field = FrameField(offset=offset, name="", number=number, scalar=scalar, size=length, since=since, enum=enum)
    return dataclasses.field(default=default, metadata={_METADATA: field})


def tail(*, default: str | bytes) -> Any:
    """Declare the field that holds the bytes after the block; it is text if its default is a string."""
    return dataclasses.field(default=default, metadata={_METADATA: None})


_F = TypeVar("_F", bound="FrameBase")


@dataclass_transform(frozen_default=True, field_specifiers=(at, tail))
def frame(message: str, *, version: int, block_length: int) -> Callable[[type[_F]], type[_F]]:
    """Turn a class with `at` and `tail` fields into a frozen dataclass with slots, a layout and a codec.

    `message` is the full name of the frame's message, and `block_length` is in bytes.
    """

    def complete(cls: type[_F]) -> type[_F]:
        made = dataclasses.dataclass(frozen=True, slots=True, init=False)(cls)
        members: tuple[dataclasses.Field[Any], ...] = dataclasses.fields(made)  # type: ignore[arg-type]
        block = []
        behind: dataclasses.Field[Any] | None = None
        for each in members:
            known = each.metadata[_METADATA]
            if known is None:
                behind = each
            else:
                block.append(dataclasses.replace(known, name=each.name))
        made.FRAME = Frame(
            message=message,
            version=version,
            block_length=block_length,
            fields=tuple(sorted(block)),
            tail=behind.name if behind is not None else "",
            tail_text=behind is not None and isinstance(behind.default, str),
        )
        made._CODEC = _Codec(made.FRAME, tuple(each.name for each in members))
        _flatten(made, made.FRAME, members, made._CODEC.struct, FrameBase.encode, vars(FrameBase)["decode"].__func__)
        return made

    return complete


class FrameBase:
    """Base of generated frame classes; the `frame` decorator completes them.

    The fields are in the order of their addition: those of version 1, the tail, those of later versions. Fields that an
    older writer did not know are None.

    Attributes:
        FRAME: The layout.
    """

    __slots__ = ()

    FRAME: ClassVar[Frame]
    _CODEC: ClassVar[_Codec]

    def encode(self) -> bytes:
        """Return the block and the tail.

        Raises:
            FrameMalformed: A value is outside its field's range or of another type; the error message names the field.
        """
        codec = self._CODEC
        try:
            block = codec.pack(*codec.values(self))
            for length, value_of in codec.fixed:
                if len(value_of(self)) != length:
                    raise FrameMalformed(codec.fault(self))
            if codec.tail is None:
                return block
            tail: bytes = codec.tail(self).encode() if codec.text else codec.tail(self)
            return block + tail
        except UNFIT as error:
            raise FrameMalformed(codec.fault(self)) from error

    @classmethod
    def decode(cls, body: bytes | memoryview, block_length: int, version: int = 0) -> Self:
        """Return the frame in `body`.

        Args:
            body: Block and tail.
            block_length: The writer's block length: extra bytes of a longer block are skipped, fields beyond a shorter
                block are None.
            version: The writer's layout version, which distinguishes absent fields inside the block from zeros; 0 for
                the version of this class.

        Raises:
            FrameMalformed: The body is shorter than its block, the block lacks a field of version 1, or the tail is
                not UTF-8.
        """
        codec = cls._CODEC
        if len(body) < block_length:
            raise FrameMalformed(f"{cls.__name__}: expected a block of {block_length} bytes, got {len(body)}")
        if block_length >= codec.size and (version >= codec.version or not version):
            values: tuple[Any, ...] = codec.unpack_from(body)
        else:
            values = codec.unpack_older(body, block_length, version or codec.version)
        if codec.tail is not None:
            try:
                values += (str(body[block_length:], "utf-8") if codec.text else bytes(body[block_length:]),)
            except UnicodeDecodeError as error:
                raise FrameMalformed(f'{cls.__name__}: the tail "{cls.FRAME.tail}" is not UTF-8: {error}') from error
        return cls(*(codec.ordered(values) if codec.ordered else values))


class _Codec:
    """The precomputed layout of a frame class."""

    __slots__ = (
        "fields",
        "fixed",
        "frame",
        "ordered",
        "pack",
        "size",
        "struct",
        "tail",
        "text",
        "unpack_from",
        "values",
        "version",
    )

    def __init__(self, frame: Frame, names: tuple[str, ...]) -> None:
        block = tuple(sorted(frame.fields))
        written = [each.name for each in block]
        # The order of decoded values: by offset, then the tail.
        read = written + [frame.tail] * bool(frame.tail)
        struct = Struct(_format(block, frame.block_length))
        self.frame = frame
        self.fields = block
        self.size = frame.block_length
        self.version = frame.version
        self.struct = struct
        self.pack = struct.pack
        self.unpack_from = struct.unpack_from
        self.values = _getter(written)
        self.fixed = tuple((each.size, operator.attrgetter(each.name)) for each in block if each.scalar is Scalar.BYTES)
        self.tail: Callable[[Any], Any] | None = operator.attrgetter(frame.tail) if frame.tail else None
        self.text = frame.tail_text
        order = [read.index(name) for name in names]
        moved = order != sorted(order)
        self.ordered: Callable[[Any], Any] | None = operator.itemgetter(*order) if moved else None

    def unpack_older(self, body: bytes | memoryview, block_length: int, version: int) -> tuple[Any, ...]:
        """Return the values of an older version's block; None for fields that it lacks."""
        padded = bytes(body[: min(block_length, self.size)]).ljust(self.size, b"\0")
        values = list(self.unpack_from(padded))
        for index, field in enumerate(self.fields):
            if field.since > version or field.offset + field.size > block_length:
                if field.since == 1:
                    raise FrameMalformed(
                        f"{self.frame.message}: a block of {block_length} bytes ends before {field.name} "
                        f"(bytes {field.offset} to {field.offset + field.size - 1})"
                    )
                values[index] = None
        return tuple(values)

    def fault(self, frame: Any) -> str:
        for field in self.fields:
            value = getattr(frame, field.name)
            # Bytes may be a secret, such as a token, so the error shows only their length.
            shown = f"{len(value)} bytes" if isinstance(value, bytes) else f"{value!r:.60}"
            known = f"{self.frame.message}: {field.name} = {shown}"
            if value is None:
                return f"{known}: a frame of version {self.version} requires it"
            if field.scalar is Scalar.BYTES and isinstance(value, bytes) and len(value) != field.size:
                return f"{known}, not {field.size}"
            try:
                Struct("<" + scalar_code(field.scalar, field.size)).pack(value)
            except (StructError, OverflowError, TypeError) as error:
                return f"{known} does not fit {field.scalar}: {error}"
        kind = "valid UTF-8 text" if self.text else "bytes"
        return f"{self.frame.message}: the tail {self.frame.tail} is not {kind}"


def _format(fields: tuple[FrameField, ...], length: int) -> str:
    """Return the block as a little-endian `struct` format with its reserved bytes."""
    parts, end = ["<"], 0
    for field in fields:
        if field.offset > end:
            parts.append(f"{field.offset - end}x")
        parts.append(scalar_code(field.scalar, field.size))
        end = field.offset + field.size
    return "".join(parts) + (f"{length - end}x" if length > end else "")


def _getter(names: list[str]) -> Callable[[Any], tuple[Any, ...]]:
    if len(names) > 1:
        return operator.attrgetter(*names)
    if names:
        only = operator.attrgetter(names[0])
        return lambda frame: (only(frame),)
    return lambda frame: ()


# Exceptions for a value that does not fit its field.
UNFIT: Final = (StructError, OverflowError, UnicodeEncodeError, TypeError, AttributeError)

# `twin` is a mutable copy of the frozen class `mine`. A frame is filled as a twin, since plain assignments are much
# faster than those that bypass a frozen class, and then gets the class `mine`.
_SOURCE: Final = """
def __init__(_orki_self{parameters}):
    {sets}

def encode(self):
    try:
        {lengths}
        return {written}
    except unfit:
        return general_encode(self)

def decode(cls, body, block_length, version=0):
    if cls is mine and block_length == {size} and (version == {version} or not version) and len(body) >= {size}:
        made = new(twin)
        {block}
        {tail}
        made.__class__ = cls
        return made
    return general_decode(cls, body, block_length, version)
"""
_TEXT: Final = """try:
            made.{name} = str(body[{size}:], "utf-8")
        except UnicodeDecodeError:
            return general_decode(cls, body, block_length, version)"""


def _flatten(
    cls: type[Any],
    frame: Frame,
    members: Sequence[Field[Any]],
    struct: Struct,
    general_encode: Callable[[Any], bytes],
    general_decode: Callable[..., Any],
) -> None:
    """Generate `__init__`, `encode` and `decode` without loops for one frame class.

    Values and blocks that the generated code does not handle are passed to the general functions. `members` are the
    fields in the order of the parameters.
    """
    names = [each.name for each in frame.fields]
    known: dict[str, Any] = {
        "mine": cls,
        "twin": type(cls.__name__, cls.__bases__, {"__slots__": cls.__slots__}),
        "new": object.__new__,
        "pack": struct.pack,
        "unpack": struct.unpack_from,
        "unfit": UNFIT,
        "general_encode": general_encode,
        "general_decode": general_decode,
    }
    parameters, sets = [], []
    for number, each in enumerate(members):
        # These names cannot clash with field names, which are parameters too.
        known |= {f"_orki_set_{number}": getattr(cls, each.name).__set__, f"_orki_default_{number}": each.default}
        parameters.append(each.name if each.default is MISSING else f"{each.name}=_orki_default_{number}")
        sets.append(f"_orki_set_{number}(_orki_self, {each.name})")
    fixed = [each for each in frame.fields if each.scalar is Scalar.BYTES]
    lengths = [f"if len(self.{each.name}) != {each.size}: return general_encode(self)" for each in fixed]
    written = f"pack({', '.join(f'self.{name}' for name in names)})"
    source = _SOURCE.format(
        parameters="".join(f", {each}" for each in parameters),
        sets="\n    ".join(sets) or "pass",
        lengths="\n        ".join(lengths) or "pass",
        written=written + (f" + self.{frame.tail}" + ".encode()" * frame.tail_text if frame.tail else ""),
        size=frame.block_length,
        version=frame.version,
        block=f"{' '.join(f'made.{name},' for name in names)} = unpack(body)" if names else "pass",
        tail=_tail_code(frame),
    )
    exec(compile(source, f"<frame {frame.message}>", "exec"), known)
    for name in ("__init__", "encode", "decode"):
        made = known[name]
        made.__qualname__ = f"{cls.__qualname__}.{name}"
        made.__module__ = cls.__module__
        made.__doc__ = getattr(cls, name).__doc__
        setattr(cls, name, classmethod(made) if name == "decode" else made)


def _tail_code(frame: Frame) -> str:
    if not frame.tail:
        return "pass"
    if frame.tail_text:
        return _TEXT.format(name=frame.tail, size=frame.block_length)
    return f"made.{frame.tail} = bytes(body[{frame.block_length}:])"
