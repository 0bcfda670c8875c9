"""What a bump asks of a version, before 1.0 and from then on."""

from __future__ import annotations

__all__ = ["heavier", "is_promised", "least", "next_break"]

from collections.abc import Iterable
from typing import Final

from packaging.version import Version

from orki_contract.findings import Bump

_WEIGHT: Final = {Bump.PATCH: 0, Bump.MINOR: 1, Bump.MAJOR: 2}


def heavier(bumps: Iterable[Bump]) -> Bump:
    """The heaviest of some bumps; `PATCH` for none."""
    return max(bumps, key=_WEIGHT.__getitem__, default=Bump.PATCH)


def least(base: Version, bump: Bump) -> Version:
    """The least version that tells of a change since another version.

    From 1.0 on as Semantic Versioning 2.0.0 says. Before 1.0 a major change raises the second number, and a minor one
    the third, as installers and ranges such as `>=0.3.1,<0.4` take it.
    """
    major, minor, patch = base.major, base.minor, base.micro
    if bump is Bump.MAJOR:
        return Version(f"{major + 1}.0.0" if major else f"0.{minor + 1}.0")
    if bump is Bump.MINOR and major:
        return Version(f"{major}.{minor + 1}.0")
    # A final release is what a pre-release of it may become without another number.
    return Version(f"{major}.{minor}.{patch}") if base.is_prerelease else Version(f"{major}.{minor}.{patch + 1}")


def next_break(base: Version) -> Version:
    """The first version that may break with this one."""
    return least(base, Bump.MAJOR)


def is_promised(promised: Version, base: Version, bump: Bump) -> bool:
    """Whether a version tells of a change since another one; a pre-release tells what its final version will."""
    return promised > base and Version(promised.base_version) >= least(base, bump)
