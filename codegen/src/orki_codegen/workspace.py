"""The repository around the protos: which distributions own which proto packages, and where buf finds the files."""

from __future__ import annotations

__all__ = ["PLACES", "Owner", "Workspace", "find_workspace"]

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from orki_contract.descriptors import Location
from orki_contract.errors import InvalidSetting

# A distribution lies one or two folders below the root.
PLACES: Final = ("*/pyproject.toml", "*/*/pyproject.toml")
# What generated code a distribution carries, and which of its modules the version gate takes for public.
_SETTINGS: Final = frozenset({"api", "contracts"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """A distribution, and the proto packages whose generated code it carries.

    Attributes:
        name: Its name on an index.
        folder: Where its pyproject.toml lies, relative to the root, with slashes.
        packages: Proto packages, sorted, each with the place where it is declared.
    """

    name: str
    folder: str
    packages: tuple[tuple[str, Location], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workspace:
    """A repository with a buf.yaml, a buf.gen.yaml and owners.

    Attributes:
        root: Its folder.
        owners: By folder.
        former: Folders of distributions that own nothing any more and still carry generated code.
    """

    root: Path
    owners: tuple[Owner, ...]
    former: tuple[str, ...]

    def declared(self) -> dict[str, list[Location]]:
        """Each proto package that somebody owns, with the places that say so."""
        found: dict[str, list[Location]] = {}
        for owner in self.owners:
            for package, place in owner.packages:
                found.setdefault(package, []).append(place)
        return found


def find_workspace(root: Path) -> Workspace:
    """Reads the `[tool.orki] contracts` of every distribution below the root.

    Raises:
        InvalidSetting: The root is no workspace, or a pyproject.toml cannot be read.
    """
    for name in ("buf.yaml", "buf.gen.yaml"):
        if not (root / name).is_file():
            raise InvalidSetting(f"{root} holds no {name}: start from the root of the repository")
    owners, former = [], []
    files = {file for place in PLACES for file in root.glob(place)}
    for file in sorted(files):
        folder = file.parent.relative_to(root).as_posix()
        if any(part.startswith(".") for part in Path(folder).parts):
            continue
        owner = _owner(root, folder)
        if owner.packages:
            owners.append(owner)
        elif any((root / folder / "gen").glob("**/contract.binpb")):
            former.append(folder)
    return Workspace(root=root, owners=tuple(owners), former=tuple(former))


def _owner(root: Path, folder: str) -> Owner:
    path = f"{folder}/pyproject.toml"
    text = (root / path).read_text(encoding="utf-8")
    try:
        project: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidSetting(f"{path}: {error}") from error
    settings = project.get("tool", {}).get("orki", {})
    unknown = sorted(set(settings) - _SETTINGS)
    if unknown:
        raise InvalidSetting(f'{path}: [tool.orki] has no key "{unknown[0]}", only "api" and "contracts"')
    api = settings.get("api", [])
    if not isinstance(api, list) or not all(isinstance(each, str) for each in api):
        raise InvalidSetting(f'{path}: "api" of [tool.orki] must be a list of Python modules')
    contracts = settings.get("contracts", [])
    if not isinstance(contracts, list) or not all(isinstance(each, str) for each in contracts):
        raise InvalidSetting(f'{path}: "contracts" of [tool.orki] must be a list of proto packages')
    places = _places(path, text, contracts)
    name = project.get("project", {}).get("name", folder)
    return Owner(name=name, folder=folder, packages=tuple(sorted(zip(contracts, places, strict=True))))


def _places(path: str, text: str, contracts: list[str]) -> list[Location]:
    """Where each package is written, in the order of the list; a package listed twice has two places."""
    lines = text.splitlines()
    start = next((index for index, line in enumerate(lines) if line.strip().startswith("[tool.orki]")), 0)
    seen: dict[str, int] = {}
    found = []
    for package in contracts:
        spots = [
            (number, column)
            for number, line in enumerate(lines[start:], start + 1)
            for column in _columns(line, package)
        ]
        index = seen.get(package, 0)
        seen[package] = index + 1
        found.append(Location(path, *(spots[index] if index < len(spots) else (start + 1, 1))))
    return found


def _columns(line: str, package: str) -> list[int]:
    return [match.start() + 1 for match in re.finditer(f"[\"']{re.escape(package)}[\"']", line)]
