"""Compare how functions are called, and the annotations of functions and attributes; griffe compares neither."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

_CALLED: Final = "API_FUNCTION_CHANGED_KIND"
_RETURNS: Final = "API_RETURN_CHANGED_TYPE"
_TAKES: Final = "API_PARAMETER_CHANGED_TYPE"
_IS: Final = "API_ATTRIBUTE_CHANGED_TYPE"
_READ_ONLY: Final = "API_ATTRIBUTE_READ_ONLY"

RULES: Final = (_CALLED, _RETURNS, _TAKES, _IS, _READ_ONLY)

_CONTEXTS: Final[Mapping[str, str]] = {
    "contextmanager": "a context manager",
    "asynccontextmanager": "an asynchronous context manager",
}
_MODULES: Final = frozenset({"typing", "typing_extensions", "collections.abc"})
_BUILTINS: Final[Mapping[str, str]] = {
    "Dict": "dict",
    "FrozenSet": "frozenset",
    "List": "list",
    "Set": "set",
    "Tuple": "tuple",
    "Type": "type",
}


def signature_changes(old: Any, new: Any, path: str) -> Iterator[tuple[str, str]]:
    """Yield every change of one public object as (rule, message).

    A new annotation is no break. A changed one is, because text does not show which of two types is wider.
    """
    if old.is_function and new.is_function:
        yield from _function(old, new, path)
    elif old.is_attribute and new.is_attribute:
        yield from _attribute(old, new, path)


def _function(old: Any, new: Any, path: str) -> Iterator[tuple[str, str]]:
    before, after = _shape(old), _shape(new)
    if before != after:
        yield _CALLED, f"{path} is called differently: {before} → {after}"
    if _differ(old.returns, new.returns):
        yield _RETURNS, f"{path} returns a different type: {_shown(old.returns)} → {_shown(new.returns)}"
    if _is_generated(old) and _is_generated(new):
        # The fields of a dataclass are compared themselves.
        return
    now = {each.name: each for each in new.parameters}
    for each in old.parameters:
        if each.name in now and _differ(each.annotation, now[each.name].annotation):
            shown = f"{_shown(each.annotation)} → {_shown(now[each.name].annotation)}"
            yield _TAKES, f"{path}({each.name}) takes a different type: {shown}"


def _attribute(old: Any, new: Any, path: str) -> Iterator[tuple[str, str]]:
    if _differ(old.annotation, new.annotation):
        yield _IS, f"{path} has a different type: {_shown(old.annotation)} → {_shown(new.annotation)}"
    elif str(old.annotation).rpartition(".")[2] == "TypeAlias" and _differ(old.value, new.value):
        yield _IS, f"{path} is an alias of a different type: {_shown(old.value)} → {_shown(new.value)}"
    if "property" in new.labels and "writable" in old.labels - new.labels:
        yield _READ_ONLY, f"{path} can no longer be set"


def _differ(old: Any, new: Any) -> bool:
    return old is not None and normalised(old) != normalised(new)


def _shown(annotation: Any) -> str:
    return "no annotation" if annotation is None else str(annotation)


def _is_generated(function: Any) -> bool:
    """Return whether griffe generated it, such as the constructor of a dataclass."""
    return not function.lineno


def _shape(function: Any) -> str:
    """Return how a function is called, for messages."""
    names = {each.callable_path.rpartition(".")[2] for each in function.decorators}
    binding = next((f"{each}, " for each in ("classmethod", "staticmethod") if each in names), "")
    context = next((text for name, text in _CONTEXTS.items() if name in names), None)
    if context is not None:
        return f"{binding}{context}"
    yields = _yields(function)
    if "async" in function.labels:
        return f"{binding}{'an asynchronous generator' if yields else 'async def'}"
    return f"{binding}{'a generator' if yields else 'def'}"


def _yields(function: Any) -> bool:
    file = function.filepath
    return isinstance(file, Path) and (function.name, function.lineno) in _generators(file.read_bytes())


@lru_cache(maxsize=256)
def _generators(source: bytes) -> frozenset[tuple[str, int]]:
    """Return the generator functions of a module as (name, line), with a pair also for the line of each decorator."""
    tree = ast.parse(source)
    found: set[tuple[str, int]] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and any(
            isinstance(each, ast.Yield | ast.YieldFrom) for each in _own(node)
        ):
            lines = [node.lineno, *(each.lineno for each in node.decorator_list)]
            found.update((node.name, line) for line in lines)
    return frozenset(found)


def _own(function: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes of a function, without those of nested functions and classes."""
    for node in ast.iter_child_nodes(function):
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef):
            yield from _own(node)


def normalised(annotation: Any) -> str | None:
    """Return the text of an annotation in a normal form; None for no annotation.

    Quotes, white space, the prefixes `typing.` and `collections.abc.`, `List` for `list`, and the form and order of a
    union make no difference. Aliases are not resolved.
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
        # The strings of a Literal are values and keep their quotes.
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
