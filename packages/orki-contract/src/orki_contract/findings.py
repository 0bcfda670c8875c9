"""The changes between two versions of a contract, and the version bump that they require."""

from __future__ import annotations

__all__ = [
    "CATEGORIES",
    "RULES",
    "Bump",
    "Category",
    "Finding",
    "Fit",
    "Plane",
    "Rule",
    "findings",
    "required_bump",
    "service_fit",
    "stream_fit",
]

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from orki_contract._findings import frames, messages, options, services, streams
from orki_contract._findings.comparison import Comparison, Finding, Plane, Reach
from orki_contract._findings.rules import CATEGORIES, RULES, Bump, Category, Rule
from orki_contract.read import ReadContract


def findings(old: ReadContract, new: ReadContract) -> tuple[Finding, ...]:
    """Return every change from one contract to another, sorted by location.

    The packages of the options and of protobuf are ignored. Locations have lines if the image has source information.
    """
    comparison = Comparison(old, new)
    for part in (streams, frames, services, messages, options):
        part.compare(comparison)
    return tuple(sorted(set(comparison.found)))


def required_bump(found: Iterable[Finding]) -> Bump:
    """Return the version bump that the findings require; `PATCH` if there are none."""
    bumps = {finding.bump for finding in found}
    return Bump.MAJOR if Bump.MAJOR in bumps else Bump.MINOR if bumps else Bump.PATCH


_SHOWN: Final = 3


@dataclass(frozen=True, slots=True)
class Fit:
    """The compatibility of two versions.

    Attributes:
        forward: Breaking changes from the first to the second version; empty if the second is compatible.
        backward: Breaking changes from the second to the first version.
    """

    forward: tuple[Finding, ...]
    backward: tuple[Finding, ...]

    @property
    def compatible(self) -> bool:
        """Whether one version is a compatible evolution of the other."""
        return not self.forward or not self.backward

    @property
    def breaks(self) -> tuple[Finding, ...]:
        """The breaking changes of the direction with fewer of them; empty if compatible."""
        return min(self.forward, self.backward, key=len)

    def describe(self, *, forward: bool) -> str:
        """Return the first breaks in one direction with their rules, or `compatible`."""
        if self.compatible:
            return "compatible"
        breaks = self.forward if forward else self.backward
        shown = [f"{each.message} [{each.rule}]" for each in breaks[:_SHOWN]]
        more = len(breaks) - _SHOWN
        return "; ".join([*shown, f"and {more} more"] if more > 0 else shown)

    def __str__(self) -> str:
        """Return `describe` for the direction with fewer breaks."""
        return self.describe(forward=self.breaks is self.forward)


def service_fit(service: str, first: ReadContract, second: ReadContract) -> Fit:
    """Return the compatibility of two versions of a task or tool service, including all messages that it uses.

    `service` is the full name of the service; both contracts declare it.
    """
    return _fit({f"task service {service}", f"tool service {service}", f"service {service}"}, first, second)


def stream_fit(stream: str, first: ReadContract, second: ReadContract) -> Fit:
    """Return the compatibility of two versions of a stream, including its owner's groups and all messages it uses.

    Both contracts declare the stream.
    """
    return _fit({f'stream "{stream}"'}, first, second)


def _fit(uses: set[str], first: ReadContract, second: ReadContract) -> Fit:
    reaches = (Reach(first), Reach(second))

    def breaks(old: ReadContract, new: ReadContract) -> tuple[Finding, ...]:
        return tuple(each for each in findings(old, new) if each.wire and _concerns(each, uses, reaches))

    return Fit(breaks(first, second), breaks(second, first))


def _concerns(finding: Finding, uses: set[str], reaches: Iterable[Reach]) -> bool:
    if finding.subject in uses or not uses.isdisjoint(finding.affected):
        return True
    # The subject of an unknown option ends with its element after "of": `option (…) of field acme.v1.Note.3`.
    kind, _, name = finding.subject.rpartition(" of ")[2].partition(" ")
    if kind in ("service", "method"):
        return f"service {name.partition('/')[0]}" in uses
    if kind == "field":
        name = name.rpartition(".")[0]
    if kind in ("message", "field", "enum"):
        return any(use.name in uses for reach in reaches for use in reach.uses(name))
    # A change of a file affects everything in it.
    return kind == "file"
