"""Rules that a contract must follow, and their violations."""

from __future__ import annotations

__all__ = ["OWNER_RULES", "RULES", "Owners", "Violation", "check", "validate"]

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from orki_contract._rules import frames, names, services, streams
from orki_contract._rules.report import Report, Rule, Violation, quoted
from orki_contract.descriptors import OPTIONS_PACKAGE, Location
from orki_contract.errors import InvalidContract
from orki_contract.read import ReadContract

OWNER_RULES: Final[dict[Rule, str]] = {
    "ORKI_OWNER_ONE": "A proto package belongs to one distribution.",
    "ORKI_OWNER_MISSING": "Every proto package of the tree belongs to a distribution.",
    "ORKI_OWNER_UNKNOWN": "A distribution owns proto packages that exist.",
    "ORKI_OWNER_OPTIONS": "No distribution owns the options package.",
}


def _check_owners(report: Report, owners: Mapping[str, Sequence[Location]], files: Collection[str]) -> None:
    """Check the owners of the proto packages of the tree's own files; imported files need no owner."""
    packages: dict[str, str] = {}
    for path in sorted(files):
        if path in report.schema.files:
            packages.setdefault(report.schema.files[path].package, path)
    for package, places in sorted(owners.items()):
        if package == OPTIONS_PACKAGE:
            report.add("ORKI_OWNER_OPTIONS", places[0], f"{package} is never generated: remove it from contracts")
        elif package not in packages:
            known = quoted(sorted(set(packages) - {OPTIONS_PACKAGE}))
            text = f'no proto file has the package "{package}": correct or remove it (known: {known})'
            report.add("ORKI_OWNER_UNKNOWN", places[0], text)
        for place in places[1:]:
            report.add("ORKI_OWNER_ONE", place, f"{package} already belongs to {places[0].file}: remove one")
    for package, path in sorted(packages.items()):
        if package != OPTIONS_PACKAGE and package not in owners:
            text = (
                f'no distribution owns the package "{package}": add it to one pyproject.toml, '
                f'under [tool.orki], contracts = ["{package}"]'
            )
            report.add("ORKI_OWNER_MISSING", report.schema.location(path, (2,)), text)


RULES: Final[Mapping[str, str]] = {
    **streams.RULES,
    **services.RULES,
    **frames.RULES,
    **names.RULES,
    **OWNER_RULES,
    "ORKI_DURATION": "A duration is 1 ms to 3,650 days.",
}
"""The purpose of each rule, by its id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Owners:
    """The source tree of a contract.

    Attributes:
        packages: Locations of the declarations of owners, by proto package.
        files: Paths of the tree's own files, by import path.
    """

    packages: Mapping[str, Sequence[Location]]
    files: Mapping[str, str]


def validate(read: ReadContract, tree: Owners | None = None) -> tuple[Violation, ...]:
    """Return every violation, sorted by location.

    Args:
        read: The contract. Locations have lines if its image has source information.
        tree: Owners and paths of the source tree; without it, ownership is not checked and files have import paths.
    """
    report = Report(read, RULES, tree.files if tree is not None else {})
    streams.check(report)
    services.check(report)
    frames.check(report)
    names.check(report)
    if tree is not None:
        _check_owners(report, tree.packages, tree.files.keys())
    return tuple(sorted(set(report.found)))


def check(read: ReadContract, tree: Owners | None = None) -> None:
    """Raise an error if the contract violates a rule.

    Raises:
        InvalidContract: The message has one line per violation.
    """
    found = validate(read, tree)
    if found:
        raise InvalidContract("\n".join(map(str, found)))
