"""`python -m benchmarks NAME…`: run benchmarks and print a ratio for each row.

Each benchmark runs in a process of its own. The exit code is 0 also where a figure is not reached; it is 1 when a
benchmark could not be run to its end, and 2 for wrong usage.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.report import Report
from chaos.rig import die_with_parent

NAMES = (
    "hotpath_call",
    "hotpath_peers",
    "control_cycle",
    "control_peers",
    "control_abuse",
    "control_idle",
    "cancel_ack",
    "events_publish",
    "events_consume",
    "events_recovery",
    "events_peers",
    "generate_tree",
)
_LIMIT = {True: 150.0, False: 1_800.0}
"""Seconds that one benchmark may take, quick and full."""


def _about(name: str) -> str:
    return (importlib.import_module(f"benchmarks.{name}").__doc__ or "").splitlines()[0]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="nox -s bench --", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="benchmarks to run, or `all`")
    parser.add_argument("--list", action="store_true", help="list the benchmarks and what each one asks")
    parser.add_argument("--quick", action="store_true", help="few rounds, for a look; the figures are noisy")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the results as a Markdown page")
    parser.add_argument("--child", metavar="NAME", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.names = NAMES if "all" in options.names else options.names
    if unknown := sorted(set(options.names) - set(NAMES)):
        parser.error(f"unknown benchmark {unknown[0]!r}; --list shows those that exist")
    for path in (options.json, options.page):
        if path is not None and not path.absolute().parent.is_dir():
            parser.error(f"{path}: the directory {path.absolute().parent} does not exist")
    if not options.names and not options.list and not options.child:
        parser.error("name a benchmark, or `all`; --list shows those that exist")
    return options


def _child(name: str, options: argparse.Namespace) -> int:
    """Run one benchmark in this process."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    report = Report(name, options.quick)
    try:
        asyncio.run(importlib.import_module(f"benchmarks.{name}").measure(report))
    finally:
        options.json.write_text(json.dumps([row.dump() for row in report.rows]), encoding="utf-8")
    return 0


def _run(name: str, options: argparse.Namespace, file: Path) -> tuple[list[dict[str, Any]], bool]:
    """Run one benchmark in a process of its own; return its rows and whether it came to its end."""
    command = [sys.executable, "-m", "benchmarks", "--child", name, "--json", str(file)]
    # Children are started by fork and exec while gRPC runs, which needs none of its fork handlers.
    environment = {**os.environ, "GRPC_ENABLE_FORK_SUPPORT": "0"}
    command += ["--quick"] if options.quick else []
    process = subprocess.Popen(command, env=environment, preexec_fn=die_with_parent)
    try:
        code = process.wait(_LIMIT[options.quick])
    except subprocess.TimeoutExpired:
        print(f"{name}: did not end within {_LIMIT[options.quick]:g} s", file=sys.stderr)
        code = 1
    finally:
        process.terminate()
        process.wait()
    return (json.loads(file.read_text(encoding="utf-8")) if file.exists() else []), code == 0


def machine() -> str:
    """Describe this machine in one line."""
    model = ""
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    system = f"{platform.system()} {platform.release()}, Python {platform.python_version()}"
    return f"{model or platform.machine()}, {cores} cores, {system}"


def _page(rows: list[dict[str, Any]], quick: bool) -> str:
    """Render the results page."""
    lines = [
        "# Benchmark results",
        "",
        "`./noxw -s bench -- all --page docs/benchmarks.md` writes this page. Each baseline was measured in turns with",
        "orki, in the same run. Absolute figures depend on the machine; compare ratios.",
        "[testing.md](testing.md#benchmarks) explains the columns; `reach` is the target of the ratio, or of",
        "the median if there is no baseline.",
        "",
        f"- Date: {time.strftime('%Y-%m-%d', time.gmtime())}{' (quick run)' if quick else ''}",
        f"- Machine: {machine()}",
        "",
        "| benchmark | row | median | p99 | baseline | baseline median | ratio | reach | met |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        unit = row["unit"]
        base = "" if row["baseline_median"] is None else f"{row['baseline_median']:,.4g} {unit}"
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        reach = "" if row["reach"] is None else f"{row['reach']['op']} {row['reach']['value']:g}"
        met = {True: "yes", False: "no", None: ""}[row["met"]]
        cells = (
            row["bench"],
            row["row"],
            f"{row['median']:,.4g} {unit}",
            f"{row['p99']:,.4g} {unit}",
            row["baseline"],
            base,
            ratio,
            reach,
            met,
        )
        lines.append("| " + " | ".join(cells) + " |")
    used = [row for row in rows if row["cpu_us"]]
    if used:
        lines += ["", "## CPU per operation", "", "| benchmark | row | microseconds by process |", "|---|---|---|"]
        for row in used:
            figures = ", ".join(f"{name} {value:,.0f}" for name, value in row["cpu_us"].items())
            lines.append(f"| {row['bench']} | {row['row']} | {figures} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the benchmarks and return the exit code."""
    options = _arguments()
    if options.child:
        return _child(options.child, options)
    if options.list:
        for name in NAMES:
            print(f"{name:16} {_about(name)}")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    rows: list[dict[str, Any]] = []
    failed = []
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="orki-bench-") as folder:
        for number, name in enumerate(options.names, 1):
            print(f"--- {name} ({number} of {len(options.names)}, {time.monotonic() - begun:.0f} s so far)", flush=True)
            found, finished = _run(name, options, Path(folder) / f"{name}.json")
            rows += found
            if not finished:
                failed.append(name)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    if options.page:
        options.page.write_text(_page(rows, options.quick), encoding="utf-8")
    print(f"{len(rows)} rows of {len(options.names)} benchmarks in {time.monotonic() - begun:.0f} s")
    if failed:
        print(f"not run to the end: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
