"""Versions and ranges in the pyproject.toml files of a workspace, read and raised."""

from __future__ import annotations

__all__ = ["Versions", "breaking", "raised"]

import re
import tomllib
from collections.abc import Iterable
from pathlib import Path

from packaging.version import Version

from nox_sessions.layout import distributions


class Versions:
    """The distributions of one workspace, by name."""

    def __init__(self, root: Path) -> None:
        self._files = {each.name: root / each.folder / "pyproject.toml" for each in distributions(root)}

    def of(self, name: str) -> Version:
        """Return the version that a distribution promises."""
        project = tomllib.loads(self._files[name].read_text(encoding="utf-8"))["project"]
        return Version(project["version"])

    def all(self) -> dict[str, Version]:
        """Return every distribution's version."""
        return {name: self.of(name) for name in self._files}

    def set(self, name: str, version: Version) -> None:
        """Promise another version."""
        file = self._files[name]
        text = file.read_text(encoding="utf-8")
        file.write_text(re.sub(r'(?m)^version = ".*"$', f'version = "{version}"', text, count=1), encoding="utf-8")

    def dependants(self, name: str) -> tuple[str, ...]:
        """Return who has a range on a distribution."""
        return tuple(each for each, file in self._files.items() if self._range(name).search(file.read_text("utf-8")))

    def admit(self, name: str) -> None:
        """Let every range on a distribution begin at its version, and end before the next breaking one."""
        version = self.of(name)
        allowed = f">={version},<{breaking(version)}"
        for each in self.dependants(name):
            text = self._files[each].read_text(encoding="utf-8")
            self._files[each].write_text(self._range(name).sub(rf'"\g<1>{allowed}"', text), encoding="utf-8")

    def raise_for(self, name: str, bump: str) -> tuple[str, ...]:
        """Raise a version as a change asks, and with a break the ranges on it; return all whose version rose."""
        self.set(name, raised(self.of(name), bump))
        if bump != "major":
            return (name,)
        self.admit(name)
        return (name, *self._patched(self.dependants(name)))

    def _patched(self, names: Iterable[str]) -> tuple[str, ...]:
        """Raise each by a patch: what they ask for is part of what they are."""
        found = tuple(names)
        for each in found:
            self.set(each, raised(self.of(each), "patch"))
        return found

    @staticmethod
    def _range(name: str) -> re.Pattern[str]:
        return re.compile(rf'"({re.escape(name)}(?:\[[\w,]+\])?)[<>=!~][^"]*"')


def raised(version: Version, bump: str) -> Version:
    """Return the next version for a bump; before 1.0, a break raises the second number, and all else the third."""
    if bump == "major":
        return breaking(version)
    if bump == "minor" and version.major:
        return Version(f"{version.major}.{version.minor + 1}.0")
    return Version(f"{version.major}.{version.minor}.{version.micro + 1}")


def breaking(version: Version) -> Version:
    """Return the next version that may break with this one."""
    return Version(f"{version.major + 1}.0.0" if version.major else f"0.{version.minor + 1}.0")
