"""The distributions of a workspace: what each promises, owns and depends on."""

from __future__ import annotations

__all__ = ["Dependency", "Member", "find_members"]

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from orki_codegen.workspace import PLACES
from orki_contract.descriptors import Location
from orki_contract.errors import InvalidSetting

_PRIVATE: Final = "Private :: Do Not Upload"


@dataclass(frozen=True, slots=True, kw_only=True)
class Dependency:
    """A dependency of a distribution, as its pyproject.toml writes it."""

    requirement: Requirement
    place: Location

    @property
    def name(self) -> str:
        """The name in the one form that indexes compare."""
        return canonicalize_name(self.requirement.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One distribution.

    Attributes:
        name: In the form that indexes compare.
        folder: Where its pyproject.toml lies, relative to the root, with slashes; empty for the root itself.
        version: What its pyproject.toml promises.
        place: Where it does.
        contracts: The proto packages that it owns.
        api: Its public modules, as `[tool.orki] api` lists them; None where it lists none, and all are public.
        commands: The commands that it installs.
        dependencies: All of them, those of extras included.
        private: Whether it is never uploaded (classifier `Private :: Do Not Upload`).
        extras: Where each of its extras is written, by its name in the form that indexes compare.
        extras_place: Where all of them are, or would be.
        python: The Pythons that it admits.
        python_place: Where it says so, or would.
    """

    name: str
    folder: str
    version: Version
    place: Location
    contracts: frozenset[str]
    api: frozenset[str] | None
    commands: frozenset[str]
    dependencies: tuple[Dependency, ...]
    private: bool
    extras: Mapping[str, Location]
    extras_place: Location
    python: SpecifierSet
    python_place: Location


def find_members(root: Path) -> dict[str, Member]:
    """Every distribution below a root, by name.

    Raises:
        InvalidSetting: A pyproject.toml cannot be read, or two distributions have one name.
    """
    found: dict[str, Member] = {}
    for file in sorted({file for place in PLACES for file in root.glob(place)}):
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
        raise InvalidSetting(f"{path}: [project] must have a name and a static version, for the gate to judge it")
    try:
        version = Version(project["version"])
        python = SpecifierSet(project.get("requires-python", ""))
    except (InvalidVersion, InvalidSpecifier) as error:
        raise InvalidSetting(f"{path}: {error}") from error
    orki = table.get("tool", {}).get("orki", {})
    optional = project.get("optional-dependencies", {})
    lists = [project.get("dependencies", []), *optional.values()]
    top = _place(path, text, r"^\[project\]")
    extras: dict[str, Location] = {
        canonicalize_name(each): _place(path, text, rf'^"?{re.escape(each)}"?\s*=') for each in optional
    }
    return Member(
        name=canonicalize_name(project["name"]),
        folder=folder,
        version=version,
        place=_place(path, text, r"^version\s*="),
        contracts=frozenset(orki.get("contracts", [])),
        api=frozenset(orki["api"]) if "api" in orki else None,
        commands=frozenset(project.get("scripts", {})),
        dependencies=tuple(_dependencies(path, text, (each for listed in lists for each in listed))),
        private=_PRIVATE in project.get("classifiers", []),
        extras=extras,
        extras_place=_place(path, text, r"^\[project\.optional-dependencies\]", top),
        python=python,
        python_place=_place(path, text, r"^requires-python\s*=", top),
    )


def _dependencies(path: str, text: str, listed: Iterable[str]) -> Iterable[Dependency]:
    for each in listed:
        try:
            yield Dependency(requirement=Requirement(each), place=_place(path, text, re.escape(each)))
        except InvalidRequirement as error:
            raise InvalidSetting(f'{path}: "{each}" is no requirement: {error}') from error


def _place(path: str, text: str, pattern: str, otherwise: Location | None = None) -> Location:
    for number, line in enumerate(text.splitlines(), 1):
        if match := re.search(pattern, line):
            return Location(path, number, match.start() + 1)
    return otherwise or Location(path)
