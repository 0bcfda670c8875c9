"""`python -m chaos NAME… --seeds N`: run suites under seeded faults and check their histories.

Exit codes: 0 no violation; 1 a violation, or a run that could not be finished; 2 wrong usage.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from chaos.control import ControlSuite
from chaos.events import EventsSuite
from chaos.rig import ChildFailed
from chaos.schedule import Fault, draw, length

_SUITES: dict[str, type[ControlSuite] | type[EventsSuite]] = {"control": ControlSuite, "events": EventsSuite}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="nox -s chaos --", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", choices=sorted(_SUITES), metavar="NAME", help=", ".join(sorted(_SUITES)))
    parser.add_argument("--seeds", type=_positive, default=3, metavar="N", help="seeds of each suite (default: 3)")
    parser.add_argument("--seed", type=int, metavar="S", help="run this seed alone, to replay a schedule")
    parser.add_argument("--faults", type=_positive, default=10, metavar="N", help="faults of each seed (default: 10)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write one object for each seed to this file")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep histories and logs in this directory")
    options = parser.parse_args()
    for path in (options.json, options.keep):
        if path is not None and not path.absolute().parent.is_dir():
            parser.error(f"{path}: the directory {path.absolute().parent} does not exist")
    return options


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError
    return number


async def _run(name: str, seed: int, faults: list[Fault], folder: Path, progress: Progress) -> dict[str, Any]:
    """Run one seed of one suite and return its JSON object."""
    task = progress.add_task(f"{name} seed {seed}", total=len(faults) + 2)
    row: dict[str, Any] = {"suite": name, "seed": seed, "faults": [fault.dump() for fault in faults]}
    suite = _SUITES[name](folder, seed, length(faults))
    try:
        async with suite:
            progress.advance(task)
            loop = asyncio.get_running_loop()
            begun = loop.time()
            for fault in faults:
                await asyncio.sleep(max(0.0, begun + fault.at - loop.time()))
                await suite.inject(fault)
                progress.advance(task)
            await suite.settle()
            progress.advance(task)
    except (ChildFailed, OSError) as error:
        row["violations"] = [f"the run did not finish: {error}"]
    report = suite.check()
    row |= {
        "published": report.published,
        "processed": report.processed,
        "dead_lettered": report.dead_lettered,
        "declared_lost": report.declared_lost,
        "violations": row.get("violations", []) + report.violations,
        "history": str(suite.history_path),
    }
    return row


async def _all(options: argparse.Namespace, folder: Path, console: Console) -> list[dict[str, Any]]:
    seeds = [options.seed] if options.seed is not None else range(1, options.seeds + 1)
    rows = []
    with Progress(console=console, transient=True) as progress:
        for name in options.names:
            suite = _SUITES[name]
            for seed in seeds:
                faults = draw(seed, suite.kinds_of(seed), options.faults, suite.spacing)
                row = await _run(name, seed, faults, folder / f"{name}-{seed}", progress)
                rows.append(row)
                verdict = "no violation" if not row["violations"] else f"{len(row['violations'])} violations"
                figures = f"{row['published']} published, {row['processed']} processed"
                figures += f", {row['dead_lettered']} dead-lettered, {row['declared_lost']} declared lost"
                console.print(f"{name} seed {seed}: {len(faults)} faults, {figures}: {verdict}")
                for violation in row["violations"]:
                    console.print(f"  {violation}", markup=False)
                if row["violations"]:
                    console.print(f"  replay: nox -s chaos -- {name} --seed {seed} --faults {options.faults}")
    return rows


def main() -> int:
    """Run the suites and return the exit code."""
    options = _arguments()
    console = Console(stderr=False)
    folder = (options.keep or Path(tempfile.mkdtemp(prefix="orki-chaos-"))).resolve()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    failed = True
    try:
        rows = asyncio.run(_all(options, folder, console))
        failed = any(row["violations"] for row in rows)
        if options.json:
            options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
        return int(failed)
    finally:
        if options.keep is None and not failed:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            console.print(f"histories and logs: {folder}")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
