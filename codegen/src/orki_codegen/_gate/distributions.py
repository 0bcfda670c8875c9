"""The distributions of a workspace, and earlier releases of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from orki_codegen._workspace import Project, find_projects
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
        location: The location of its version.
        contracts: The proto packages that it owns.
        api: The public modules in `[tool.orki] api`; None if there is no such list, and all modules are public.
        dependencies: All dependencies, those of extras included.
        private: Whether it is never uploaded (classifier `Private :: Do Not Upload`).
        extras: The location of each extra, by its canonical name.
        extras_location: The location of the table of extras, or of `[project]` without one.
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
        origin: Its source for messages: the index, or a commit.
        packages: The proto packages that it owns.
        imports: The folders from which its modules are imported.
        wheel: The wheel; None for a release from a commit.
        api: The public modules in its pyproject.toml; a wheel does not contain the list.
        folder: The folder of its sources; None for a release from a wheel.
        extras: The canonical names of its extras.
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
        unpublished: Whether no release of it was published, so that one version may have different contents.
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
    for project in find_projects(root):
        member = _member(project)
        if member is None:
            continue
        if member.name in found:
            raise InvalidSetting(f"{member.folder} and {found[member.name].folder} are both called {member.name}")
        found[member.name] = member
    return found


def _member(file: Project) -> Member | None:
    path, orki = file.path, file.settings
    project = file.table.get("project")
    if project is None:
        return None
    if "name" not in project or "version" not in project:
        raise InvalidSetting(f"{path}: the gate needs a name and a static version in [project]")
    try:
        version = Version(project["version"])
        python = SpecifierSet(project.get("requires-python", ""))
    except (InvalidVersion, InvalidSpecifier) as error:
        raise InvalidSetting(f"{path}: {error}") from error
    optional = project.get("optional-dependencies", {})
    lists = [project.get("dependencies", []), *optional.values()]
    top = file.locate(r"^\[project\]")
    extras: dict[str, Location] = {
        canonicalize_name(each): file.locate(rf'^"?{re.escape(each)}"?\s*=') for each in optional
    }
    return Member(
        name=canonicalize_name(project["name"]),
        folder=file.folder,
        version=version,
        location=file.locate(r"^version\s*="),
        contracts=frozenset(orki.get("contracts", [])),
        api=frozenset(orki["api"]) if "api" in orki else None,
        commands=frozenset(project.get("scripts", {})),
        dependencies=tuple(_dependencies(file, (each for listed in lists for each in listed))),
        private=_PRIVATE in project.get("classifiers", []),
        extras=extras,
        extras_location=file.locate(r"^\[project\.optional-dependencies\]", top),
        python=python,
        python_location=file.locate(r"^requires-python\s*=", top),
    )


def _dependencies(file: Project, listed: Iterable[str]) -> Iterable[Dependency]:
    for each in listed:
        try:
            yield Dependency(requirement=Requirement(each), location=file.locate(re.escape(each)))
        except InvalidRequirement as error:
            raise InvalidSetting(f'{file.path}: "{each}" is not a valid requirement: {error}') from error
