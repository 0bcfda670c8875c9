"""Annotations as text, so that two that say the same in other words are equal."""

from __future__ import annotations

__all__ = ["normalised"]

import ast
from collections.abc import Iterator, Mapping
from typing import Any, Final

_MODULES: Final = frozenset({"typing", "typing_extensions", "collections.abc"})
_BUILTINS: Final[Mapping[str, str]] = {
    "Dict": "dict",
    "FrozenSet": "frozenset",
    "List": "list",
    "Set": "set",
    "Tuple": "tuple",
    "Type": "type",
}


def normalised(annotation: Any) -> str | None:
    """The text of an annotation; None where there is none.

    Quotes, white space, `typing.` and `collections.abc.` in front, `List` for `list`, and how and in which order a
    union is written make no difference. What a name stands for is not followed.
    """
    if annotation is None:
        return None
    text = str(annotation)
    try:
        return _text(ast.parse(text.strip(), mode="eval").body)
    except SyntaxError:
        return " ".join(text.split())


def _text(node: ast.expr) -> str:
    alternatives = sorted(set(_alternatives(node)))
    return " | ".join(alternatives)


def _alternatives(node: ast.expr) -> Iterator[str]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield from _quoted(node.value)
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        yield from _alternatives(node.left)
        yield from _alternatives(node.right)
    elif isinstance(node, ast.Subscript):
        yield from _subscript(node)
    elif isinstance(node, ast.List):
        yield f"[{', '.join(_text(each) for each in node.elts)}]"
    elif isinstance(node, ast.Starred):
        yield f"*{_text(node.value)}"
    else:
        yield _name(node)


def _quoted(text: str) -> Iterator[str]:
    try:
        yield from _alternatives(ast.parse(text.strip(), mode="eval").body)
    except SyntaxError:
        yield repr(text)


def _subscript(node: ast.Subscript) -> Iterator[str]:
    outer = _name(node.value)
    inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    if outer == "Union":
        for each in inner:
            yield from _alternatives(each)
    elif outer == "Optional":
        yield from _alternatives(inner[0])
        yield "None"
    elif outer == "Literal":
        # Its texts are values, and stay in quotes.
        yield from (f"Literal[{ast.unparse(each)}]" for each in inner)
    elif outer == "Annotated":
        yield f"Annotated[{_text(inner[0])}, {', '.join(ast.unparse(each) for each in inner[1:])}]"
    else:
        yield f"{outer}[{', '.join(_text(each) for each in inner)}]"


def _name(node: ast.expr) -> str:
    text = ast.unparse(node)
    module, _, name = text.rpartition(".")
    plain = name if module in _MODULES else text
    return _BUILTINS.get(plain, plain)
