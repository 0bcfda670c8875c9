"""The distributions of a workspace, and earlier releases of them."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from orki_codegen.workspace import PLACES
from orki_contract.descriptors import Location
from orki_contract.errors import InvalidSetting
from orki_contract.versions import ContractVersion

_PRIVATE: Final = "Private :: Do Not Upload"


@dataclass(frozen=True, slots=True, kw_only=True)
class Dependency:
    """A dependency of a distribution and its location in pyproject.toml."""

    requirement: Requirement
    location: Location

    @property
    def name(self) -> str:
        """The canonical name."""
        return canonicalize_name(self.requirement.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One distribution of the workspace.

    Attributes:
        name: Its canonical name.
        folder: The folder of its pyproject.toml, relative to the root, with slashes; empty for the root itself.
        version: The version in its pyproject.toml.
        location: The location of that version.
        contracts: The proto packages that it owns.
        api: The public modules in `[tool.orki] api`; None if there is no such list, and all modules are public.
        commands: Its console commands.
        dependencies: All dependencies, those of extras included.
        private: Whether it is never uploaded (classifier `Private :: Do Not Upload`).
        extras: The location of each extra, by its canonical name.
        extras_location: The location of the table of extras, or of `[project]` without one.
        python: The supported Python versions.
        python_location: The location of `requires-python`, or of `[project]` without one.
    """

    name: str
    folder: str
    version: Version
    location: Location
    contracts: frozenset[str]
    api: frozenset[str] | None
    commands: frozenset[str]
    dependencies: tuple[Dependency, ...]
    private: bool
    extras: Mapping[str, Location]
    extras_location: Location
    python: SpecifierSet
    python_location: Location


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """One version of one distribution, unpacked.

    Attributes:
        name: Its canonical name.
        version: Its version.
        origin: Its source for messages: the index, or a commit.
        packages: The proto packages that it owns.
        imports: The folders from which its modules are imported.
        commands: Its console commands.
        wheel: The wheel; None for a release from a commit.
        api: The public modules in its pyproject.toml; a wheel does not contain the list.
        folder: The folder of its sources; None for a release from a wheel.
        extras: The canonical names of its extras.
        python: The supported Python versions.
    """

    name: str
    version: Version
    origin: str
    packages: frozenset[str]
    imports: tuple[Path, ...]
    commands: frozenset[str] = frozenset()
    wheel: Path | None = None
    api: frozenset[str] = frozenset()
    folder: Path | None = None
    extras: frozenset[str] = frozenset()
    python: SpecifierSet = field(default_factory=SpecifierSet)

    @property
    def label(self) -> str:
        """The release for messages."""
        return f"{self.name} {self.version} of {self.origin}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """Releases to compare the tree with, and their combined contract.

    Attributes:
        releases: The releases by name.
        contract: The contract of all of them.
        streams_only: Whether to evaluate only entries that may remain in streams, because newer releases exist.
        unpublished: Whether nothing of it was published, so that one version may have different contents.
    """

    releases: Mapping[str, Release]
    contract: ContractVersion
    streams_only: bool = False
    unpublished: bool = False


def find_members(root: Path) -> dict[str, Member]:
    """Return every distribution below a root, by name.

    Raises:
        InvalidSetting: A pyproject.toml cannot be read, or two distributions have the same name.
    """
    found: dict[str, Member] = {}
    for file in sorted({file for pattern in PLACES for file in root.glob(pattern)}):
        folder = file.parent.relative_to(root).as_posix()
        if any(part.startswith(".") for part in Path(folder).parts):
            continue
        member = _member(file.read_text(encoding="utf-8"), folder)
        if member is None:
            continue
        if member.name in found:
            raise InvalidSetting(f"{folder} and {found[member.name].folder} are both called {member.name}")
        found[member.name] = member
    return found


def _member(text: str, folder: str) -> Member | None:
    path = f"{folder}/pyproject.toml"
    try:
        table: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidSetting(f"{path}: {error}") from error
    project = table.get("project")
    if project is None:
        return None
    if "name" not in project or "version" not in project:
        raise InvalidSetting(f"{path}: the gate needs a name and a static version in [project]")
    try:
        version = Version(project["version"])
        python = SpecifierSet(project.get("requires-python", ""))
    except (InvalidVersion, InvalidSpecifier) as error:
        raise InvalidSetting(f"{path}: {error}") from error
    orki = table.get("tool", {}).get("orki", {})
    optional = project.get("optional-dependencies", {})
    lists = [project.get("dependencies", []), *optional.values()]
    top = _location(path, text, r"^\[project\]")
    extras: dict[str, Location] = {
        canonicalize_name(each): _location(path, text, rf'^"?{re.escape(each)}"?\s*=') for each in optional
    }
    return Member(
        name=canonicalize_name(project["name"]),
        folder=folder,
        version=version,
        location=_location(path, text, r"^version\s*="),
        contracts=frozenset(orki.get("contracts", [])),
        api=frozenset(orki["api"]) if "api" in orki else None,
        commands=frozenset(project.get("scripts", {})),
        dependencies=tuple(_dependencies(path, text, (each for listed in lists for each in listed))),
        private=_PRIVATE in project.get("classifiers", []),
        extras=extras,
        extras_location=_location(path, text, r"^\[project\.optional-dependencies\]", top),
        python=python,
        python_location=_location(path, text, r"^requires-python\s*=", top),
    )


def _dependencies(path: str, text: str, listed: Iterable[str]) -> Iterable[Dependency]:
    for each in listed:
        try:
            yield Dependency(requirement=Requirement(each), location=_location(path, text, re.escape(each)))
        except InvalidRequirement as error:
            raise InvalidSetting(f'{path}: "{each}" is not a valid requirement: {error}') from error


def _location(path: str, text: str, pattern: str, default: Location | None = None) -> Location:
    for number, line in enumerate(text.splitlines(), 1):
        if match := re.search(pattern, line):
            return Location(path, number, match.start() + 1)
    return default or Location(path)
