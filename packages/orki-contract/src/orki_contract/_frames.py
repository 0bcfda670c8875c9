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
    """The `struct` code of a scalar; `size` is the length of `Scalar.BYTES`."""
    return f"{size}s" if scalar is Scalar.BYTES else _CODES[scalar]


def scalar_size(scalar: Scalar, size: int = 0) -> int:
    """Length of a scalar in bytes; `size` is the length of `Scalar.BYTES`."""
    return Struct("<" + scalar_code(scalar, size)).size


_METADATA: Final = "orki_contract.frames"
_UNSET: Final[Any] = dataclasses.MISSING


def at(
    offset: int,
    scalar: Scalar,
    *,
    number: int,
    size: int = 0,
    since: int = 1,
    enum: str = "",
    default: Any = _UNSET,
) -> Any:
    """A field of the block, as generated frame classes write it down.

    Args:
        offset: First byte, from the start of the block.
        scalar: Its type.
        number: Number in the proto.
        size: Length in bytes of `Scalar.BYTES`.
        since: Frame version that brought it.
        enum: Full name of the enum that it holds.
        default: None for a field of a later version: a frame can be made without it, but not written.
    """
    length = scalar_size(scalar, size)
    field = FrameField(offset=offset, name="", number=number, scalar=scalar, size=length, since=since, enum=enum)
    return dataclasses.field(default=default, metadata={_METADATA: field})


def tail(*, default: str | bytes) -> Any:
    """The field that takes the bytes behind the block: text where its default is a string."""
    return dataclasses.field(default=default, metadata={_METADATA: None})


_F = TypeVar("_F", bound="FrameBase")


@dataclass_transform(frozen_default=True, field_specifiers=(at, tail))
def frame(message: str, *, version: int, block_length: int) -> Callable[[type[_F]], type[_F]]:
    """Makes a frozen dataclass with slots, a layout and a codec of a class whose fields are made by `at` and `tail`.

    Args:
        message: Full name of the message.
        version: Version of the layout.
        block_length: Length of the block in bytes.
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
    """Base of generated frame classes, which `frame` completes.

    The fields stand in the order in which they came to be: those of version 1, the tail, those of later versions, which
    are None where the writer was too old to know them.

    Attributes:
        FRAME: The layout.
    """

    __slots__ = ()

    FRAME: ClassVar[Frame]
    _CODEC: ClassVar[_Codec]

    def encode(self) -> bytes:
        """Block and tail.

        Raises:
            FrameMalformed: A value is outside its field's range or of another type; the message names it.
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
        """The frame in `body`.

        Args:
            body: Block and tail.
            block_length: Length of the block as its writer gave it: bytes of a longer block are skipped, fields behind
                a shorter one are None.
            version: Version of the layout as its writer gave it, which tells absent fields inside the block from zeros;
                0 for this class's own.

        Raises:
            FrameMalformed: The body is shorter than its block, the block lacks a field of version 1, or the tail is no
                UTF-8.
        """
        codec = cls._CODEC
        if len(body) < block_length:
            raise FrameMalformed(f"{cls.__name__}: a block of {block_length} bytes, of which {len(body)} came")
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
    """The layout of one frame class, ready to use."""

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
        # Where the values stand when read: by offset, the tail behind them.
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
        """Values of a block that an older version wrote: None where it had no such field."""
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
        """Which value cannot be written, in words."""
        for field in self.fields:
            value = getattr(frame, field.name)
            # A value of bytes may be a secret, such as a token: its length is all that an error may show.
            shown = f"{len(value)} bytes" if isinstance(value, bytes) else f"{value!r:.60}"
            known = f"{self.frame.message}: {field.name} = {shown}"
            if value is None:
                return f"{known}: a frame of version {self.version} must carry it"
            if field.scalar is Scalar.BYTES and isinstance(value, bytes) and len(value) != field.size:
                return f"{known}, not {field.size}"
            try:
                Struct("<" + scalar_code(field.scalar, field.size)).pack(value)
            except (StructError, OverflowError, TypeError) as error:
                return f"{known} does not fit {field.scalar}: {error}"
        kind = "text that UTF-8 can write" if self.text else "bytes"
        return f"{self.frame.message}: the tail {self.frame.tail} is not {kind}"


def _format(fields: tuple[FrameField, ...], length: int) -> str:
    """The block as a `struct` format, little-endian, with its reserved bytes."""
    parts, end = ["<"], 0
    for field in fields:
        if field.offset > end:
            parts.append(f"{field.offset - end}x")
        parts.append(scalar_code(field.scalar, field.size))
        end = field.offset + field.size
    return "".join(parts) + (f"{length - end}x" if length > end else "")


def _getter(names: list[str]) -> Callable[[Any], tuple[Any, ...]]:
    """A function that gives the attributes of these names as a tuple."""
    if len(names) > 1:
        return operator.attrgetter(*names)
    if names:
        only = operator.attrgetter(names[0])
        return lambda frame: (only(frame),)
    return lambda frame: ()


UNFIT: Final = (StructError, OverflowError, UnicodeEncodeError, TypeError, AttributeError)
"""What Python raises for a value that its field cannot hold."""

# `mine` and `twin` differ in one thing: a twin's fields can be set. So a frame is filled as a twin, by plain
# assignments, which cost a fraction of what gets past a frozen class, and becomes a frame when it is whole.
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
    """Gives a class its `__init__`, `encode` and `decode`.

    Args:
        cls: The class, frozen, with slots.
        frame: Its layout, the fields in the order of their offsets.
        members: Its fields in the order of its parameters.
        struct: The block.
        general_encode: Encodes any frame, or says why not.
        general_decode: Decodes any block, or says why not; takes class, body, length of the block, version.
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
        # Names that no field can have, as the fields' own names are parameters beside them.
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
