"""Whether two versions of one service, or of one stream, may be in use side by side.

Processes meet without knowing which of them is the newer: an old agent comes back during a rolling upgrade, a new one
is the first of its kind. So two versions fit when either is a compatible evolution of the other. Findings count that
concern the service or the stream, and by which running processes would misunderstand or fail each other (`wire`).
"""

from __future__ import annotations

__all__ = ["Fit", "service_fit", "stream_fit"]

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from orki_contract.findings.compare import findings
from orki_contract.findings.finding import Finding
from orki_contract.findings.reach import Reach
from orki_contract.read import ReadContract

_SHOWN: Final = 3


@dataclass(frozen=True, slots=True)
class Fit:
    """How two versions stand to each other.

    Attributes:
        forward: What breaks if the second one follows the first; empty: the second is a compatible evolution.
        backward: What breaks if the first one follows the second.
    """

    forward: tuple[Finding, ...]
    backward: tuple[Finding, ...]

    @property
    def compatible(self) -> bool:
        """Whether either is a compatible evolution of the other."""
        return not self.forward or not self.backward

    @property
    def breaks(self) -> tuple[Finding, ...]:
        """Why they do not fit, in the direction in which less breaks; empty where they fit."""
        return min(self.forward, self.backward, key=len)

    def reversed(self) -> Fit:
        """The same with the versions exchanged."""
        return Fit(self.backward, self.forward)

    def told(self, *, forward: bool) -> str:
        """The first breaks in one direction with their rules and subjects, or `compatible`."""
        if self.compatible:
            return "compatible"
        breaks = self.forward if forward else self.backward
        told = [f"{each.message} [{each.rule}]" for each in breaks[:_SHOWN]]
        more = len(breaks) - _SHOWN
        return "; ".join([*told, f"and {more} more"] if more > 0 else told)

    def __str__(self) -> str:
        """The first breaks with their rules and subjects, in the direction in which less breaks, or `compatible`."""
        return self.told(forward=self.breaks is self.forward)


def service_fit(service: str, first: ReadContract, second: ReadContract) -> Fit:
    """How two versions of a task or tool service stand to each other: its methods, and all messages that they reach.

    Args:
        service: Full name.
        first: A contract that declares it.
        second: Another one.
    """
    return _fit({f"task service {service}", f"tool service {service}", f"service {service}"}, first, second)


def stream_fit(stream: str, first: ReadContract, second: ReadContract) -> Fit:
    """How two versions of a stream stand to each other: itself, its owner's groups, and all messages that it reaches.

    Args:
        stream: Its name.
        first: A contract that declares it.
        second: Another one.
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
    # An option that nobody knows names its bearer behind "of": `option (…) of field acme.v1.Note.3`.
    kind, _, name = finding.subject.rpartition(" of ")[2].partition(" ")
    if kind in ("service", "method"):
        return f"service {name.partition('/')[0]}" in uses
    if kind == "field":
        name = name.rpartition(".")[0]
    if kind in ("message", "field", "enum"):
        return any(use.name in uses for reach in reaches for use in reach.uses(name))
    # What a whole file says concerns everybody in it.
    return kind == "file"
