"""How public functions are called and what they and attributes are annotated with: griffe compares neither."""

from __future__ import annotations

__all__ = ["RULES", "signature_changes"]

import ast
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from orki_codegen.gate.annotations import normalised

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


def signature_changes(old: Any, new: Any, path: str) -> Iterator[tuple[str, str]]:
    """Every such change of one public object, as rule and sentence.

    An annotation that is new promises more than before, and one that is written otherwise may promise less: which of
    two types is the wider one cannot be told from text.

    Args:
        old: The object that users have.
        new: The object of the same name now.
        path: What to call it.
    """
    if old.is_function and new.is_function:
        yield from _function(old, new, path)
    elif old.is_attribute and new.is_attribute:
        yield from _attribute(old, new, path)


def _function(old: Any, new: Any, path: str) -> Iterator[tuple[str, str]]:
    before, after = _shape(old), _shape(new)
    if before != after:
        yield _CALLED, f"{path} is called in another way: {before} → {after}"
    if _differ(old.returns, new.returns):
        yield _RETURNS, f"{path} returns another type: {_shown(old.returns)} → {_shown(new.returns)}"
    if _is_made(old) and _is_made(new):
        # A dataclass's fields tell of their types themselves.
        return
    now = {each.name: each for each in new.parameters}
    for each in old.parameters:
        if each.name in now and _differ(each.annotation, now[each.name].annotation):
            shown = f"{_shown(each.annotation)} → {_shown(now[each.name].annotation)}"
            yield _TAKES, f"{path}({each.name}) takes another type: {shown}"


def _attribute(old: Any, new: Any, path: str) -> Iterator[tuple[str, str]]:
    if _differ(old.annotation, new.annotation):
        yield _IS, f"{path} is of another type: {_shown(old.annotation)} → {_shown(new.annotation)}"
    elif str(old.annotation).rpartition(".")[2] == "TypeAlias" and _differ(old.value, new.value):
        yield _IS, f"{path} stands for another type: {_shown(old.value)} → {_shown(new.value)}"
    if "property" in new.labels and "writable" in old.labels - new.labels:
        yield _READ_ONLY, f"{path} cannot be set any more"


def _differ(old: Any, new: Any) -> bool:
    return old is not None and normalised(old) != normalised(new)


def _shown(annotation: Any) -> str:
    return "nothing said" if annotation is None else str(annotation)


def _is_made(function: Any) -> bool:
    """Whether griffe made it up, as the constructor of a dataclass."""
    return not function.lineno


def _shape(function: Any) -> str:
    """How a function is called, for people."""
    names = {each.callable_path.rpartition(".")[2] for each in function.decorators}
    binding = next((f"{each}, " for each in ("classmethod", "staticmethod") if each in names), "")
    context = next((said for name, said in _CONTEXTS.items() if name in names), None)
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
    """The functions of a module that yield, each by its name and its first line, that of a decorator included."""
    tree = ast.parse(source)
    found: set[tuple[str, int]] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and any(map(_is_yield, _own(node))):
            lines = [node.lineno, *(each.lineno for each in node.decorator_list)]
            found.update((node.name, line) for line in lines)
    return frozenset(found)


def _is_yield(node: ast.AST) -> bool:
    return isinstance(node, ast.Yield | ast.YieldFrom)


def _own(function: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a function, without those of functions and classes within."""
    for node in ast.iter_child_nodes(function):
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef):
            yield from _own(node)
