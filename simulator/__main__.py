"""`python -m simulator --seeds A:B`: run simulated fleets under faults, and check their histories.

Exit codes: 0 no violation; 1 a violation, or a run that failed; 2 wrong usage.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from itertools import islice
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from simulator.run import Chunk, draw, run, run_chunk, shrink, story

_CHUNK: Final = 50
"""Seeds that a process runs before it reports."""
_SHOWN: Final = 5
"""Maximum number of failing seeds whose stories are printed."""


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="nox -s simulate --", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--seeds", type=_seeds, default=(0, 1000), metavar="A:B", help="seeds A to B-1 (default: 0:1000)"
    )
    parser.add_argument("--seed", type=int, metavar="S", help="run this seed alone, and print what happened")
    parser.add_argument(
        "--shrink", action="store_true", help="with --seed: look for the shortest plan that fails as it does"
    )
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (default: one a core)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the outcome to this file")
    options = parser.parse_args()
    if options.jobs < 1:
        parser.error("--jobs: use 1 or more")
    if options.shrink and options.seed is None:
        parser.error("--shrink needs --seed")
    if options.json is not None and not options.json.absolute().parent.is_dir():
        parser.error(f"{options.json}: the directory {options.json.absolute().parent} does not exist")
    return options


def _seeds(text: str) -> tuple[int, int]:
    first, _, end = text.partition(":")
    if not 0 <= int(first) < int(end):
        raise ValueError
    return int(first), int(end)


def _run_one(seed: int, shorten: bool) -> int:
    outcome = run(draw(seed))
    if shorten and outcome.violations:
        outcome = shrink(outcome)
    print(story(outcome))
    return 1 if outcome.violations else 0


def _run_many(first: int, end: int, jobs: int, console: Console) -> Chunk:
    total = Chunk()
    chunks = iter((at, min(at + _CHUNK, end)) for at in range(first, end, _CHUNK))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    context = multiprocessing.get_context("spawn")
    with Progress(*columns, console=console) as progress, ProcessPoolExecutor(jobs, mp_context=context) as pool:
        shown = progress.add_task("runs", total=end - first)
        waiting: set[Future[Chunk]] = {pool.submit(run_chunk, *chunk) for chunk in islice(chunks, 2 * jobs)}
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for each in done:
                chunk = each.result()
                total.runs, total.steps = total.runs + chunk.runs, total.steps + chunk.steps
                total.failures.update(chunk.failures)
                progress.update(shown, completed=total.runs)
                waiting.update(_next(pool, chunks))
    return total


def _next(pool: ProcessPoolExecutor, chunks: Iterator[tuple[int, int]]) -> list[Future[Chunk]]:
    return [pool.submit(run_chunk, *chunk) for chunk in islice(chunks, 1)]


def main() -> int:
    """Run the command; return the exit code."""
    options = _arguments()
    if options.seed is not None:
        return _run_one(options.seed, options.shrink)
    console = Console(stderr=True)
    first, end = options.seeds
    total = _run_many(first, end, options.jobs, console)
    for seed, violations in sorted(total.failures.items())[:_SHOWN]:
        console.print(f"seed {seed}: " + "; ".join(violations[:3]), markup=False)
        console.print(f"  replay: nox -s simulate -- --seed {seed} --shrink", markup=False)
    print(f"{total.runs} runs, {total.steps} steps, {len(total.failures)} with a violation")
    if options.json is not None:
        document: dict[str, Any] = {"seeds": [first, end], "runs": total.runs, "steps": total.steps}
        document["failures"] = {str(seed): found for seed, found in sorted(total.failures.items())}
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 1 if total.failures else 0


if __name__ == "__main__":
    sys.exit(main())
