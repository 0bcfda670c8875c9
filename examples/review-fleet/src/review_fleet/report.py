"""Formats the output of the demo: pure functions of the observations."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["FileResult", "Killed", "latency_summary", "totals"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileResult:
    """The review of one file; `path` is relative to the tree, `error` is None or a sentence."""

    path: bytes
    lines: int
    functions: int
    classes: int
    attempt: int
    fence: int
    error: str | None

    def to_json(self) -> dict[str, Any]:
        """The object that scripts read. Bytes of the path that are no UTF-8 appear as surrogate escapes (PEP 383)."""
        return {
            "path": os.fsdecode(self.path),
            "lines": self.lines,
            "functions": self.functions,
            "classes": self.classes,
            "attempt": self.attempt,
            "fence": self.fence,
            "error": self.error,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Killed:
    """The agent that was killed, a task that it held, and the fence under which that task ran again."""

    agent: str
    task: str
    fence: int
    successor_fence: int | None = None
    trace_id: str = ""


def latency_summary(samples_ms: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float | None]]:
    """Median and 99th percentile of each plane in milliseconds; None where nothing was observed."""
    return {plane: {"p50": _quantile(values, 50), "p99": _quantile(values, 99)} for plane, values in samples_ms.items()}


def _quantile(values: Sequence[float], percent: int) -> float | None:
    if len(values) < 2:
        return round(values[0], 4) if values else None
    return round(statistics.quantiles(values, n=100, method="inclusive")[percent - 1], 4)


def totals(files: Sequence[FileResult]) -> dict[str, int]:
    """Sums over all files."""
    return {
        "files": len(files),
        "lines": sum(each.lines for each in files),
        "functions": sum(each.functions for each in files),
        "classes": sum(each.classes for each in files),
        "errors": sum(each.error is not None for each in files),
    }
