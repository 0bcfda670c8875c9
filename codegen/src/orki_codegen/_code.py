"""Lays out Python source: on one line if it fits, else one element per line with a trailing comma.

`ruff format` does not change the result. Widths are terminal columns, as in ruff.
"""

from __future__ import annotations

import dataclasses
import re
import textwrap
import unicodedata
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

WIDTH: Final = 120
_STEP: Final = 4


@dataclass(frozen=True, slots=True)
class Raw:
    """Source text of one line that cannot be broken."""

    text: str


@dataclass(frozen=True, slots=True)
class Call:
    """`name(argument, key=argument)`."""

    name: str
    positional: tuple[Code, ...] = ()
    named: tuple[tuple[str, Code], ...] = ()


@dataclass(frozen=True, slots=True)
class Sequence:
    """`(a, b)`, or with a name `Name[a, b]`."""

    items: tuple[Code, ...]
    name: str = ""


Code = Raw | Call | Sequence


def expression(value: Any, vocabulary: str) -> Code:
    """Return the source of a model value, without fields that have their defaults.

    `vocabulary` is the alias of `orki_contract`.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        named = tuple(
            (field.name, expression(getattr(value, field.name), vocabulary))
            for field in dataclasses.fields(value)
            if getattr(value, field.name) != field.default
        )
        return Call(f"{vocabulary}.{type(value).__name__}", named=named)
    if isinstance(value, tuple):
        return Sequence(tuple(expression(item, vocabulary) for item in value))
    if isinstance(value, StrEnum):
        return Raw(f"{vocabulary}.{type(value).__name__}.{value.name}")
    if isinstance(value, str):
        return Raw(quote(value))
    if isinstance(value, int | float) and not isinstance(value, bool):
        return Raw(f"{value:_}")
    return Raw(repr(value))


def quote(text: str) -> str:
    """Return a string literal, in double quotes if that needs no escape."""
    plain = repr(text)
    return f'"{plain[1:-1]}"' if '"' not in text and plain[0] == "'" else plain


def lay(prefix: str, code: Code, suffix: str = "", indent: int = 0) -> str:
    """Return the lines of `prefix` + code + `suffix` at column `indent`; the first line is not indented."""
    flat = _flat(code)
    if indent + width(prefix) + width(flat) + width(suffix) <= WIDTH or isinstance(code, Raw):
        return f"{prefix}{flat}{suffix}"
    opening, closing, parts = _parts(code)
    if not parts:
        return f"{prefix}{flat}{suffix}"
    inner = indent + _STEP
    lines = [f"{' ' * inner}{lay(key, each, ',', inner)}" for key, each in parts]
    return "\n".join([f"{prefix}{opening}", *lines, f"{' ' * indent}{closing}{suffix}"])


def assigned(prefix: str, value: Code, indent: int = 0) -> str:
    """Return the lines of `prefix` + value, such as `name = value`; in parentheses if the opening does not fit."""
    column = indent + width(prefix)
    if column + width(_parts(value)[0]) <= WIDTH or column + 1 > WIDTH:
        return lay(prefix, value, "", indent)
    inner = indent + _STEP
    return f"{prefix}(\n{' ' * inner}{lay('', value, '', inner)}\n{' ' * indent})"


def annotated(name: str, annotation: Sequence, value: Code, indent: int = 0) -> str:
    """Return the lines of `name: annotation = value`; the annotation is broken if no parenthesis fits behind it."""
    prefix = f"{name}: {_flat(annotation)} = "
    if indent + width(prefix) + 1 <= WIDTH:
        return assigned(prefix, value, indent)
    inner = indent + _STEP
    # A comma behind a single element would make a tuple.
    comma = "" if len(annotation.items) == 1 else ","
    lines = [f"{' ' * inner}{lay('', each, comma, inner)}" for each in annotation.items]
    opened = "\n".join([f"{name}: {annotation.name}[", *lines])
    return f"{opened}\n{' ' * indent}{assigned('] = ', value, indent)}"


def signature(head: str, parameters: tuple[tuple[str, Code], ...], result: str, indent: int, body: str = "") -> str:
    """Return the head of a function, such as `def name(self, a: int) -> int:`, at column `indent`.

    Args:
        head: Start of the definition, such as `async def name`.
        parameters: Names with their annotations; that of `self` is empty.
        result: The annotation of the result.
        indent: Column of the first line.
        body: Text after the head on its last line.
    """
    named = [f"{name}: " if _flat(annotation) else name for name, annotation in parameters]
    flat = ", ".join(f"{name}{_flat(annotation)}" for name, (_, annotation) in zip(named, parameters, strict=True))
    tail = f") -> {result}:{body}"
    if indent + width(f"{head}({flat}{tail}") <= WIDTH:
        return f"{head}({flat}{tail}"
    inner = indent + _STEP
    if inner + width(flat) <= WIDTH:
        lines = [f"{' ' * inner}{flat}"]
    else:
        pairs = zip(named, parameters, strict=True)
        lines = [f"{' ' * inner}{lay(name, annotation, ',', inner)}" for name, (_, annotation) in pairs]
    return "\n".join([f"{head}(", *lines, f"{' ' * indent}{tail}"])


def docstring(comment: str, indent: int, otherwise: str) -> str:
    """Return a proto comment, or `otherwise` without one, as a docstring at column `indent`."""
    lines = [_clean(line) for line in textwrap.dedent(comment.replace("\t", "    ")).splitlines()]
    text = "\n".join(lines).strip("\n") or otherwise
    text = text.replace("\\", "\\\\").replace('"""', '\\"\\"\\"')
    if re.search(r'(?<!\\)(?:\\\\)*"$', text):
        text = text[:-1] + '\\"'
    text = "\n\n".join(_fitted(paragraph, WIDTH - indent) for paragraph in text.split("\n\n"))
    rows = text.split("\n")
    body = "\n".join([rows[0], *((" " * indent + row).rstrip() for row in rows[1:])])
    return f'"""{body}"""' if len(rows) == 1 else f'"""{body}\n{" " * indent}"""'


def width(text: str) -> int:
    """Return the columns of a text: two for wide characters, none for combining ones."""
    if text.isascii():
        return len(text)
    return sum(_columns(character) for character in text)


def _columns(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _flat(code: Code) -> str:
    if isinstance(code, Raw):
        return code.text
    opening, closing, parts = _parts(code)
    inner = ", ".join(f"{key}{_flat(each)}" for key, each in parts)
    # A tuple of one element needs a comma.
    comma = "," if isinstance(code, Sequence) and not code.name and len(parts) == 1 else ""
    return f"{opening}{inner}{comma}{closing}"


def _parts(code: Code) -> tuple[str, str, list[tuple[str, Code]]]:
    if isinstance(code, Call):
        named = [(f"{key}=", each) for key, each in code.named]
        return f"{code.name}(", ")", [("", each) for each in code.positional] + named
    if isinstance(code, Sequence):
        brackets = "[]" if code.name else "()"
        return f"{code.name}{brackets[0]}", brackets[1], [("", each) for each in code.items]
    return code.text, "", []


def _clean(line: str) -> str:
    """Remove control and formatting characters."""
    kept = (" " if unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp") else character for character in line)
    return "".join(kept).rstrip()


def _fitted(paragraph: str, room: int) -> str:
    """Return the paragraph, wrapped if a line is too long for the width less the quotes."""
    longest = room - 6
    if all(width(line) <= longest for line in paragraph.split("\n")):
        return paragraph
    lines: list[str] = []
    line = ""
    for word in paragraph.split():
        if line and width(line) + 1 + width(word) > longest:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}" if line else word
    return "\n".join([*lines, line])
