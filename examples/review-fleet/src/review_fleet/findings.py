"""The example's consumer: it gathers what the reviewers noticed."""

from __future__ import annotations

import os

from sourcereview.v1.review_orki import REVIEW_FINDINGS, FindingEvent

from orki_events import Consumer, Delivery, consumer

__all__ = ["describe", "gather"]


def gather(into: list[str]) -> Consumer[[FindingEvent, Delivery]]:
    """A consumer of the group `report` that appends one sentence a finding."""

    @consumer(REVIEW_FINDINGS, group="report", concurrency=16)
    async def on_finding(event: FindingEvent, delivery: Delivery) -> None:
        into.append(describe(event))

    return on_finding


def describe(finding: FindingEvent) -> str:
    """One sentence on a finding, fit for a terminal."""
    path = os.fsdecode(finding.path).encode("unicode_escape").decode()
    match finding.WhichOneof("event"):
        case "empty":
            return f"{path}: is empty"
        case "not_python":
            return f"{path}: {finding.not_python.sentence}"
        case "long_function":
            long = finding.long_function
            return f"{path}:{long.line}: function {long.name} spans {long.lines} lines"
        case _:
            return f"{path}: something that a newer reviewer noticed"
