"""Where the workspace's distributions are: read from the folders, so that a new one needs no list to be edited."""

from __future__ import annotations

__all__ = ["Distribution", "distributions", "source_roots"]

import tomllib
from dataclasses import dataclass
from pathlib import Path

PLACES = ("packages/*", "codegen", "examples/*")


@dataclass(frozen=True, slots=True, order=True)
class Distribution:
    """One distribution of the workspace.

    Attributes:
        name: its name on an index, as `orki-agent`.
        folder: where its pyproject.toml lies, relative to the workspace's root.
        extras: the names of its optional dependency sets.
    """

    name: str
    folder: Path
    extras: tuple[str, ...]

    @property
    def requirement(self) -> str:
        """What to hand to an installer, from the workspace's root, for this distribution with every extra."""
        extras = f"[{','.join(self.extras)}]" if self.extras else ""
        return f"./{self.folder}{extras}"


def distributions(root: Path, places: tuple[str, ...] = PLACES) -> tuple[Distribution, ...]:
    """Find the distributions below the workspace's root, sorted by name."""
    found = []
    for place in places:
        for file in root.glob(f"{place}/pyproject.toml"):
            project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
            extras = tuple(sorted(project.get("optional-dependencies", {})))
            found.append(Distribution(project["name"], file.parent.relative_to(root), extras))
    return tuple(sorted(found))


def source_roots(root: Path) -> tuple[Path, ...]:
    """Every import root that holds a module, relative to the workspace's root and sorted: each `src` and each `gen`."""
    candidates = (each.folder / name for each in distributions(root) for name in ("gen", "src"))
    return tuple(sorted(path for path in candidates if any((root / path).rglob("*.py"))))
