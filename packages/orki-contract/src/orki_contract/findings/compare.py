"""Old against new: every rule, sorted findings."""

from __future__ import annotations

__all__ = ["CATEGORIES", "RULES", "findings", "required_bump"]

from collections.abc import Iterable, Mapping
from typing import Final

from orki_contract.findings import enums, extensions, frames, groups, messages, rest, services, streams
from orki_contract.findings.comparison import Comparison
from orki_contract.findings.finding import Bump, Category, Finding, Rule
from orki_contract.read import ReadContract

RULES: Final[Mapping[str, Rule]] = {
    rule.id: rule for part in (streams, groups, frames, services, messages, enums, rest) for rule in part.RULES
}
"""Every rule of change, by its id."""

CATEGORIES: Final[Mapping[Category, str]] = {
    Category.STREAM: "Streams and groups of the event plane.",
    Category.FRAME: "Frames of the hot path.",
    Category.TASK: "Tasks of the control plane.",
    Category.TOOL: "Tools of the hot path.",
    Category.SERVICE: "Services of any kind, and plain gRPC.",
    Category.MESSAGE: "Messages, fields and enums that travel.",
    Category.OPTION: "Values of options in general.",
    Category.NAME: "Names, and the files that hold them.",
}
"""What each category of rules is about."""


def findings(old: ReadContract, new: ReadContract) -> tuple[Finding, ...]:
    """Every change from one contract to another, sorted by place.

    A pure function of the two. Packages of the options and of protobuf itself are left out. Locations have lines where
    an image was read with source information.
    """
    comparison = Comparison(old, new, RULES)
    streams.compare(comparison)
    groups.compare(comparison)
    frames.compare(comparison)
    services.compare(comparison)
    messages.compare(comparison)
    extensions.compare(comparison)
    enums.compare(comparison)
    rest.compare(comparison)
    return tuple(sorted(set(comparison.found)))


def required_bump(found: Iterable[Finding]) -> Bump:
    """What a version must promise at the least, for these findings; `PATCH` for none."""
    bumps = {finding.bump for finding in found}
    return Bump.MAJOR if Bump.MAJOR in bumps else Bump.MINOR if bumps else Bump.PATCH
