"""What users have: earlier versions of distributions, from wheels of an index or from a git commit."""

from __future__ import annotations

__all__ = ["Past", "Release"]

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from orki_contract.versions import ContractVersion


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """One version of one distribution, unpacked.

    Attributes:
        name: In the form that indexes compare.
        version: Its version.
        origin: Where it comes from, for people: `the index`, or a commit.
        packages: The proto packages that it owns.
        imports: The folders from which its modules are imported.
        commands: The commands that it installs.
        wheel: The wheel; None where it comes from a commit.
        api: The public modules that its pyproject.toml lists; a wheel does not tell.
        folder: The folder of its sources; None where it comes from a wheel.
        extras: Its extras, in the form that indexes compare.
        python: The Pythons that it admits.
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
        """For people."""
        return f"{self.name} {self.version} of {self.origin}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Past:
    """Some releases, and the contract that they make together.

    Attributes:
        releases: By name.
        contract: Of all of them.
        streams_only: Whether only entries that may still lie in streams are judged: newer releases are out.
        stands_in: Whether it stands for what was never published, so that equal contracts may differ in content.
    """

    releases: Mapping[str, Release]
    contract: ContractVersion
    streams_only: bool = False
    stands_in: bool = False
