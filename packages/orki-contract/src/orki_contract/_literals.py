"""Locations of the parts of an option's value, such as `{name: "x" groups: [{name: "y"}]}`, in a proto file.

Compilers record where an option starts but not where the elements of its lists are. This module finds them in the text.
The text has already been compiled, so unreadable parts are skipped instead of raising an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from google.protobuf.descriptor import Descriptor
from google.protobuf.descriptor_pb2 import FieldDescriptorProto

Path = tuple[int, ...]

_TOKEN: Final = re.compile(
    r"""(?P<skip>\s+|//[^\n]*|/\*.*?\*/)
      | (?P<text>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')
      | (?P<word>[A-Za-z0-9_.+-]+)
      | (?P<mark>.)""",
    re.VERBOSE | re.DOTALL,
)
_OPENING: Final = {"{": "}", "<": ">"}


def literal_places(text: str, start: int, message: Descriptor) -> Mapping[Path, tuple[int, int]]:
    """Return line and column, from 1, of each field and list element of the first literal after `start`, by path.

    A path consists of field numbers, each followed by an index if the field is repeated.
    """
    reader = _Reader(text, start)
    while reader.kind and reader.value != "=":
        reader.advance()
    reader.advance()
    found: dict[Path, int] = {}
    if reader.value in _OPENING:
        _message(reader, message, (), found)
    return {path: _line_and_column(text, index) for path, index in found.items()}


class _Reader:
    """The tokens of a text, one at a time."""

    def __init__(self, text: str, start: int) -> None:
        self._tokens = self._scan(text, start)
        self.kind: str = ""
        self.value: str = ""
        self.index: int = start
        self.advance()

    def advance(self) -> None:
        """Advance to the next token; at the end, `kind` and `value` are empty."""
        self.kind, self.value, self.index = next(self._tokens, ("", "", self.index))

    @staticmethod
    def _scan(text: str, start: int) -> Iterator[tuple[str, str, int]]:
        for match in _TOKEN.finditer(text, start):
            if match.lastgroup and match.lastgroup != "skip":
                yield match.lastgroup, match.group(), match.start()


def _message(reader: _Reader, message: Descriptor | None, path: Path, found: dict[Path, int]) -> None:
    closing = _OPENING[reader.value]
    reader.advance()
    counts: dict[Path, int] = {}
    while reader.kind and reader.value != closing:
        begin, name = reader.index, reader.value
        reader.advance()
        if name in (",", ";"):
            continue
        if name == "[":  # an extension or an Any, which orki's options do not have
            while reader.kind and reader.value != "]":
                reader.advance()
            reader.advance()
        field = message.fields_by_name.get(name) if message is not None else None
        if reader.value == ":":
            reader.advance()
        inner = field.message_type if field is not None else None
        here = (*path, field.number if field is not None else 0)
        found.setdefault(here, begin)
        if reader.value == "[":
            reader.advance()
            while reader.kind and reader.value != "]":
                element = _element(here, counts)
                found[element] = reader.index
                _value(reader, inner, element, found)
                if reader.value == ",":
                    reader.advance()
            reader.advance()
        elif field is not None and is_repeated(field):
            element = _element(here, counts)
            found[element] = begin
            _value(reader, inner, element, found)
        else:
            _value(reader, inner, here, found)
    reader.advance()


def _element(field: Path, counts: dict[Path, int]) -> Path:
    counts[field] = counts.get(field, -1) + 1
    return (*field, counts[field])


def _value(reader: _Reader, message: Descriptor | None, path: Path, found: dict[Path, int]) -> None:
    """Read one value, and always at least one token, so that the reader terminates on any text."""
    if reader.value in _OPENING:
        _message(reader, message, path, found)
        return
    text = reader.kind == "text"
    reader.advance()
    # Adjacent strings are one value; after anything else the next word is the next field.
    while text and reader.kind == "text":
        reader.advance()


def is_repeated(field: Any) -> bool:
    """Whether a field or an extension, as a descriptor or a proto, is repeated."""
    # `label` is deprecated where `is_repeated` exists (protobuf 6.32).
    try:
        return bool(field.is_repeated)
    except AttributeError:
        return bool(field.label == FieldDescriptorProto.LABEL_REPEATED)


def _line_and_column(text: str, index: int) -> tuple[int, int]:
    begin = text.rfind("\n", 0, index) + 1
    return text.count("\n", 0, begin) + 1, index - begin + 1
