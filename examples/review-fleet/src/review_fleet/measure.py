"""Measures Python files: pure functions of bytes."""

from __future__ import annotations

import ast
import warnings
from dataclasses import dataclass

__all__ = ["LARGE_BYTES", "LONG_FUNCTION_LINES", "MOST_BYTES", "Definition", "Measured", "measure_source"]

LARGE_BYTES = 200_000
"""Above this size parsing takes long enough to be noticed by whatever shares the process."""
MOST_BYTES = 4_000_000
"""Above this size a file is not parsed: its tree may take a thousand times its size in memory."""
LONG_FUNCTION_LINES = 80
"""A function that spans more lines than this is worth a finding."""


@dataclass(frozen=True, slots=True)
class Definition:
    """A function and the lines that it spans; `line` counts from 1."""

    name: str
    line: int
    lines: int


@dataclass(frozen=True, slots=True)
class Measured:
    """Counts of one file; `error` is empty, or one sentence that says why it could not be parsed."""

    functions: int
    classes: int
    long_functions: tuple[Definition, ...]
    error: str = ""


def measure_source(source: bytes) -> Measured:
    """Counts definitions in Python source, nested ones too. Never raises for what the bytes may be."""
    if len(source) > MOST_BYTES:
        return Measured(0, 0, (), f"was not parsed: it has more than {MOST_BYTES:,} bytes")
    try:
        with warnings.catch_warnings():
            # What the compiler thinks of somebody's escapes is not this fleet's business.
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except SyntaxError as error:
        where = f" (line {error.lineno})" if error.lineno else ""
        return Measured(0, 0, (), f"does not parse: {error.msg}{where}")
    except (ValueError, RecursionError, MemoryError) as error:
        return Measured(0, 0, (), f"does not parse: {type(error).__name__}: {error}")
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    classes = sum(isinstance(node, ast.ClassDef) for node in ast.walk(tree))
    spans = (
        Definition(node.name, node.lineno, (node.end_lineno or node.lineno) - node.lineno + 1) for node in functions
    )
    return Measured(len(functions), classes, tuple(span for span in spans if span.lines > LONG_FUNCTION_LINES))
