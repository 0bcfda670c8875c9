"""The workspace: its distributions and the proto packages that they own."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from orki_contract.descriptors import Location
from orki_contract.errors import InvalidSetting

_SETTINGS: Final = frozenset({"api", "contracts"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Project:
    """The pyproject.toml of a distribution; `folder` is relative to the root, with slashes."""

    folder: str
    text: str
    table: Mapping[str, Any]

    @property
    def path(self) -> str:
        """The path of the file, relative to the root."""
        return f"{self.folder}/pyproject.toml"

    @property
    def settings(self) -> Mapping[str, Any]:
        """The table `[tool.orki]`."""
        settings: Mapping[str, Any] = self.table.get("tool", {}).get("orki", {})
        return settings

    def locate(self, pattern: str, default: Location | None = None) -> Location:
        """Return the location of the first match of a pattern within a line, else the default or the file."""
        for number, line in enumerate(self.text.splitlines(), 1):
            if match := re.search(pattern, line):
                return Location(self.path, number, match.start() + 1)
        return default or Location(self.path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """A distribution that contains generated code of proto packages.

    Attributes:
        folder: The folder of its pyproject.toml, relative to the root, with slashes.
        packages: The proto packages, sorted, each with the location of its declaration.
    """

    name: str
    folder: str
    packages: tuple[tuple[str, Location], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workspace:
    """A repository with a buf.yaml, a buf.gen.yaml and owners.

    Attributes:
        owners: The owners, sorted by folder.
        former: Folders of distributions that own no packages but still contain generated code.
    """

    root: Path
    owners: tuple[Owner, ...]
    former: tuple[str, ...]

    def declared(self) -> dict[str, list[Location]]:
        """Return each owned proto package with the locations of its declarations."""
        found: dict[str, list[Location]] = {}
        for owner in self.owners:
            for package, place in owner.packages:
                found.setdefault(package, []).append(place)
        return found


def find_workspace(root: Path) -> Workspace:
    """Read `[tool.orki] contracts` of every distribution below the root.

    Raises:
        InvalidSetting: The root is not a workspace, or a pyproject.toml is invalid.
    """
    for name in ("buf.yaml", "buf.gen.yaml"):
        if not (root / name).is_file():
            raise InvalidSetting(f"{root} has no {name}: start from the root of the repository")
    owners, former = [], []
    for project in find_projects(root):
        owner = _owner(project)
        if owner.packages:
            owners.append(owner)
        elif any((root / project.folder / "gen").glob("**/contract.binpb")):
            former.append(project.folder)
    return Workspace(root=root, owners=tuple(owners), former=tuple(former))


def find_projects(root: Path) -> Iterator[Project]:
    """Read the pyproject.toml files one or two folders below the root, sorted; hidden folders are skipped.

    Raises:
        InvalidSetting: A file is not valid TOML.
    """
    for file in sorted([*root.glob("*/pyproject.toml"), *root.glob("*/*/pyproject.toml")]):
        folder = file.parent.relative_to(root)
        if not any(part.startswith(".") for part in folder.parts):
            yield read_project(root, folder.as_posix())


def read_project(root: Path, folder: str) -> Project:
    """Read the pyproject.toml of a folder.

    Raises:
        InvalidSetting: The file is not valid TOML.
    """
    text = (root / folder / "pyproject.toml").read_text(encoding="utf-8")
    try:
        return Project(folder=folder, text=text, table=tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise InvalidSetting(f"{folder}/pyproject.toml: {error}") from error


def _owner(project: Project) -> Owner:
    path, settings = project.path, project.settings
    unknown = sorted(set(settings) - _SETTINGS)
    if unknown:
        raise InvalidSetting(f'{path}: [tool.orki] has no key "{unknown[0]}", only "api" and "contracts"')
    for key, kind in (("api", "Python modules"), ("contracts", "proto packages")):
        value = settings.get(key, [])
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise InvalidSetting(f'{path}: "{key}" of [tool.orki] must be a list of {kind}')
    contracts = settings.get("contracts", [])
    packages = sorted(zip(contracts, _locations(project, contracts), strict=True))
    name = project.table.get("project", {}).get("name", project.folder)
    return Owner(name=name, folder=project.folder, packages=tuple(packages))


def _locations(project: Project, contracts: list[str]) -> list[Location]:
    """Return the location of each package, in the order of the list; a package listed twice has two locations."""
    lines = project.text.splitlines()
    start = next((index for index, line in enumerate(lines) if line.strip().startswith("[tool.orki]")), 0)
    seen: dict[str, int] = {}
    found = []
    for package in contracts:
        spots = [
            (number, column)
            for number, line in enumerate(lines[start:], start + 1)
            for column in (match.start() + 1 for match in re.finditer(f"[\"']{re.escape(package)}[\"']", line))
        ]
        index = seen.get(package, 0)
        seen[package] = index + 1
        found.append(Location(project.path, *(spots[index] if index < len(spots) else (start + 1, 1))))
    return found
