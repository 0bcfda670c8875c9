"""Fault schedules: which fault hits which target, when and for how long, all drawn from one seed."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

QUIET = 1.0
"""Seconds before the first fault."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of fault.

    Attributes:
        targets: Names that the fault may hit.
        shortest: Least duration in seconds.
        longest: Greatest duration in seconds; 0 for a fault without a duration.
        weight: How often the kind is drawn, relative to the others.
    """

    targets: Sequence[str]
    shortest: float = 0.0
    longest: float = 0.0
    weight: int = 1


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault of a schedule.

    Attributes:
        at: Seconds since the start of the run.
        kind: Name of the kind.
        target: Name of a process, server or proxy.
        duration: Seconds until the fault is healed.
    """

    at: float
    kind: str
    target: str
    duration: float

    def dump(self) -> dict[str, Any]:
        """Return the fault as a JSON object."""
        return asdict(self)


def draw(seed: int, kinds: Mapping[str, Kind], count: int, spacing: float) -> list[Fault]:
    """Return the schedule of a seed.

    Faults follow one another and do not overlap: the next one starts after the previous one is healed.

    Args:
        seed: Any number; the same seed gives the same schedule.
        kinds: Kinds by name.
        count: Number of faults.
        spacing: Mean time in seconds between the end of one fault and the start of the next.
    """
    chance = random.Random(seed)
    names = sorted(kinds)
    weights = [kinds[name].weight for name in names]
    faults: list[Fault] = []
    at = QUIET
    for _ in range(count):
        (name,) = chance.choices(names, weights)
        kind = kinds[name]
        duration = round(chance.uniform(kind.shortest, kind.longest), 3)
        faults.append(Fault(round(at, 3), name, chance.choice(sorted(kind.targets)), duration))
        at += duration + chance.uniform(0.5, 1.5) * spacing
    return faults


def length(faults: Sequence[Fault]) -> float:
    """Return the seconds from the start of a run until its last fault is healed."""
    return max((fault.at + fault.duration for fault in faults), default=QUIET)
