"""Rows of a benchmark: what was measured, the baseline, their ratio, and whether it reaches the design's figure."""

from __future__ import annotations

import operator
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

_COMPARE = {"<=": operator.le, ">=": operator.ge, "<": operator.lt}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of a report, as `--json` writes it.

    Attributes:
        bench: Name of the benchmark.
        row: What was measured.
        unit: Unit of the figures; `…/s` is a rate, where more is better.
        median: Median of the measured values.
        p99: The worst one per cent of the values begins here.
        baseline: What the ratio is against; empty for a row without a baseline.
        baseline_median: Median of the baseline's values.
        ratio: `median / baseline_median`; None without a baseline.
        reach: `{"op", "value"}`, for the ratio, or for the median where there is no baseline. None: reported only.
        met: Whether the reach is met; None for a row that is reported only.
        cpu_us: CPU microseconds per operation of each process.
    """

    bench: str
    row: str
    unit: str
    median: float
    p99: float
    baseline: str
    baseline_median: float | None
    ratio: float | None
    reach: dict[str, Any] | None
    met: bool | None
    cpu_us: dict[str, float]

    def dump(self) -> dict[str, Any]:
        """Return the row as a JSON object."""
        return asdict(self)

    def __str__(self) -> str:
        text = f"{self.row}: {self.median:,.4g} {self.unit} (p99 {self.p99:,.4g})"
        if self.ratio is not None:
            text += f"; {self.baseline}: {self.baseline_median:,.4g}; ratio {self.ratio:.2f}"
        if self.reach is not None:
            text += f", reach {self.reach['op']} {self.reach['value']:g}: {'met' if self.met else 'NOT met'}"
        if self.cpu_us:
            text += "; CPU us/op: " + ", ".join(f"{name} {value:,.0f}" for name, value in self.cpu_us.items())
        return text


@dataclass
class Report:
    """The rows of one benchmark.

    Attributes:
        bench: Name of the benchmark.
        quick: Whether to measure little, for a look.
        rows: Rows so far.
    """

    bench: str
    quick: bool
    rows: list[Row] = field(default_factory=list)

    def add(
        self,
        row: str,
        unit: str,
        values: Sequence[float],
        *,
        baseline: str = "",
        against: Sequence[float] = (),
        reach: tuple[str, float] | None = None,
        cpu_us: dict[str, float] | None = None,
    ) -> None:
        """Add and print one row.

        Args:
            row: What was measured.
            unit: Unit of the values.
            values: One value for each operation, or for each round of a rate.
            baseline: Name of what `against` measured.
            against: The baseline's values.
            reach: Comparison and figure of the design's table.
            cpu_us: CPU microseconds per operation of each process.
        """
        median = statistics.median(values)
        base = statistics.median(against) if against else None
        ratio = median / base if base else None
        judged = ratio if ratio is not None else median
        self.rows.append(
            Row(
                bench=self.bench,
                row=row,
                unit=unit,
                median=round(median, 3),
                p99=round(worst_percent(values, unit), 3),
                baseline=baseline,
                baseline_median=None if base is None else round(base, 3),
                ratio=None if ratio is None else round(ratio, 3),
                reach=None if reach is None else {"op": reach[0], "value": reach[1]},
                met=None if reach is None else bool(_COMPARE[reach[0]](judged, reach[1])),
                cpu_us=cpu_us or {},
            )
        )
        print(self.rows[-1], flush=True)


def worst_percent(values: Sequence[float], unit: str) -> float:
    """Return the 99th percentile: of durations the high end, of rates the low end."""
    ordered = sorted(values, reverse=unit.endswith("/s"))
    return ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
