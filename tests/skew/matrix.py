"""Run pairs of old and new versions in every plane: python matrix.py CONFIG [--json FILE].

CONFIG names the interpreter of each environment; the session `skew` makes them. Two planted breaks, a renamed stream
and a moved frame field, must be detected, to prove that the matrix can fail.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import control
import events
import tools
from stage import CaseFailed, Stage

Scenario = Callable[[Stage], str]
TOGETHER = 2
_WIDTH = 118


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One pair in one scenario.

    Attributes:
        plane: The plane.
        pair: The name of the pair.
        scenario: The actions.
        planted: Words that the failure of a planted break must contain; empty without a planted break.
    """

    plane: str
    pair: str
    scenario: Scenario = field(repr=False)
    planted: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The result of a case."""

    plane: str
    pair: str
    verdict: str
    seen: str
    seconds: float


def cases(environments: Mapping[str, str]) -> list[Case]:
    """Return all pairs with existing environments."""
    found = [*_control(), *_events(), *_tools(), *_planted()]
    for extreme in ("lowest", "newest"):
        if f"{extreme}-v2" in environments:
            found += _extreme(f"{extreme}-v2", f"{extreme} dependencies")
    return found


def _control() -> list[Case]:
    old, new = "published-v1", "head-v2"
    mixed = {"new": new, "old": old}
    named: list[tuple[str, Scenario]] = [
        (
            "published agent x HEAD server with v2 live, both submitters",
            partial(control.fleet, server=new, agents=mixed, submitters=[old, new]),
        ),
        (
            "HEAD agent x published server, both submitters",
            partial(control.fleet, server=old, agents={"new": new}, submitters=[old, new]),
        ),
        (
            "HEAD submitter x published agent, HEAD server",
            partial(control.fleet, server=new, agents={"old": old}, submitters=[new]),
        ),
        ("published server beside HEAD server on one store", control.side_by_side),
        ("rolling upgrade of a mixed fleet", control.rolling_upgrade),
        (
            "agent of v3 x HEAD server with v2 live: refused",
            partial(control.refused, server=new, standing=new, newcomer="head-v3", rule="ORKI_FIELD_RETYPED"),
        ),
    ]
    return [Case(plane="control", pair=pair, scenario=scenario) for pair, scenario in named]


def _events() -> list[Case]:
    old, new = "published-v1", "head-v2"
    named: list[tuple[str, Scenario]] = [
        ("published publisher x HEAD consumer", partial(events.meet, publishers=[old], consumers=[new])),
        ("HEAD publisher x published consumer", partial(events.meet, publishers=[new], consumers=[old])),
        ("both publishers x both consumers", partial(events.meet, publishers=[old, new], consumers=[old, new])),
        (
            "publisher and consumer of v3 x stream of v2: refused",
            partial(events.refused, standing=new, newcomer="head-v3", rule="ORKI_STREAM_PARTITIONS_CHANGED"),
        ),
    ]
    return [Case(plane="events", pair=pair, scenario=scenario) for pair, scenario in named]


def _tools() -> list[Case]:
    old, new, rule = "published-v1", "head-v2", "ORKI_FRAME_FIELD_MOVED"
    named: list[tuple[str, Scenario]] = [
        ("published tool client x HEAD bridge", partial(tools.meet, bridge=new, client=old)),
        ("HEAD tool client x published bridge", partial(tools.meet, bridge=old, client=new)),
        ("tool client of v3 x bridge of v2: refused", partial(tools.refused, bridge=new, client="head-v3", rule=rule)),
        ("tool client of v2 x bridge of v3: refused", partial(tools.refused, bridge="head-v3", client=new, rule=rule)),
    ]
    return [Case(plane="tools", pair=pair, scenario=scenario) for pair, scenario in named]


def _planted() -> list[Case]:
    planted, old = "head-planted", "published-v1"
    renamed = partial(events.meet, publishers=[planted], consumers=[old], patience=5.0)
    moved = partial(tools.meet, bridge=planted, client=old)
    return [
        Case(plane="events", pair="planted: HEAD renames a stream", scenario=renamed, planted="the ledger of"),
        Case(
            plane="tools", pair="planted: HEAD moves a frame's field", scenario=moved, planted="head-planted, and read"
        ),
    ]


def _extreme(extreme: str, words: str) -> list[Case]:
    old, new = "published-v1", "head-v2"
    return [
        Case(
            plane="control",
            pair=f"{words}: agent and submitter x HEAD server",
            scenario=partial(control.fleet, server=new, agents={"other": extreme}, submitters=[extreme, old]),
        ),
        Case(
            plane="control",
            pair=f"{words}: server x published agent and submitter",
            scenario=partial(control.fleet, server=extreme, agents={"old": old, "new": new}, submitters=[old]),
        ),
        Case(
            plane="events",
            pair=f"{words}: publishers and consumers x published ones",
            scenario=partial(events.meet, publishers=[old, extreme], consumers=[old, extreme]),
        ),
        Case(
            plane="tools",
            pair=f"{words}: tool client x published bridge",
            scenario=partial(tools.meet, bridge=old, client=extreme),
        ),
        Case(
            plane="tools",
            pair=f"{words}: bridge x published tool client",
            scenario=partial(tools.meet, bridge=extreme, client=old),
        ),
    ]


def run_case(case: Case, environments: Mapping[str, str]) -> Result:
    """Run one case; a planted break that is not detected is a failure."""
    start = time.monotonic()
    try:
        with Stage(environments) as stage:
            seen = case.scenario(stage)
        green = True
    except CaseFailed as error:
        green, seen = False, str(error)
    except Exception as error:
        # An unexpected error must not prevent the other pairs from running.
        green, seen = False, f"{type(error).__name__}: {error}"
    if case.planted:
        red = not green and case.planted in seen
        green, seen = red, f"detected: {seen}" if red else f"the planted break was not detected: {seen}"
    seconds = round(time.monotonic() - start, 1)
    verdict = "ok" if green else "FAILED"
    print(f"{verdict:>6}  {seconds:5.1f} s  {case.plane}: {case.pair}", flush=True)
    return Result(plane=case.plane, pair=case.pair, verdict=verdict, seen=seen, seconds=seconds)


def table(results: Sequence[Result]) -> str:
    """Return a line for each pair, followed by its details."""
    lines = []
    for each in results:
        lines.append(f"{each.verdict:>6}  {each.plane:8} {each.pair}")
        lines += textwrap.wrap(each.seen, _WIDTH, initial_indent=" " * 17, subsequent_indent=" " * 17)
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all cases; return 1 if one failed."""
    parser = argparse.ArgumentParser(prog="matrix.py", description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--only", default="", metavar="TEXT", help="only pairs whose plane or name contains TEXT")
    given = parser.parse_args(arguments)
    config = json.loads(given.config.read_text(encoding="utf-8"))
    environments: dict[str, str] = config["environments"]
    chosen = [case for case in cases(environments) if given.only in f"{case.plane}: {case.pair}"]
    with ThreadPoolExecutor(TOGETHER) as pool:
        results = list(pool.map(lambda case: run_case(case, environments), chosen))
    print(f"\npublished is {config['published']}\n{table(results)}")
    if given.json:
        document = {"published": config["published"], "pairs": [asdict(each) for each in results]}
        given.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    failed = sum(each.verdict != "ok" for each in results)
    print(f"\n{len(results) - failed} of {len(results)} pairs behave as expected" if results else "no such pair")
    return 1 if failed or not results else 0


if __name__ == "__main__":
    sys.exit(main())
