"""Flat code for one frame class: what `FrameBase` does for any layout, without a loop, a tuple or a look-up per field.

It is made once, when the class is, as `dataclasses` makes an `__init__`. Whatever is not the plain case (a value that
does not fit, a block of another version, a subclass) is left to the general form, which also words the error.
"""

from __future__ import annotations

__all__ = ["flatten"]

from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field
from struct import Struct
from struct import error as StructError
from typing import Any, Final

from orki_contract.model import Frame, Scalar

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


def flatten(
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
        tail=_tail(frame),
    )
    exec(compile(source, f"<frame {frame.message}>", "exec"), known)
    for name in ("__init__", "encode", "decode"):
        made = known[name]
        made.__qualname__ = f"{cls.__qualname__}.{name}"
        made.__module__ = cls.__module__
        made.__doc__ = getattr(cls, name).__doc__
        setattr(cls, name, classmethod(made) if name == "decode" else made)


def _tail(frame: Frame) -> str:
    if not frame.tail:
        return "pass"
    if frame.tail_text:
        return _TEXT.format(name=frame.tail, size=frame.block_length)
    return f"made.{frame.tail} = bytes(body[{frame.block_length}:])"
