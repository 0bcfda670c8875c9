"""Which modules of the workspace its distributions import from each other: those are promises too."""

from __future__ import annotations

__all__ = ["imported_modules"]

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

from orki_codegen.gate.members import Member
from orki_contract.errors import InvalidSetting


def imported_modules(root: Path, members: Mapping[str, Member]) -> frozenset[str]:
    """Every module that a hand-written module of another distribution imports, or imports something from.

    Raises:
        InvalidSetting: A module cannot be read.
    """
    found: set[str] = set()
    for member in members.values():
        sources = root / member.folder / "src"
        own = {path.name for path in sources.glob("*")}
        for path in sorted(sources.rglob("*.py")):
            found.update(name for name in _imports(path) if name.partition(".")[0] not in own)
    return frozenset(found)


def _imports(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes(), str(path))
    except (SyntaxError, ValueError) as error:
        raise InvalidSetting(f"{path} cannot be read: {error}") from error
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            # What is imported from a package may be a module.
            yield from (f"{node.module}.{each.name}" for each in node.names)
