"""The benchmark session: rows, exit codes, and no child left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.__main__ import NAMES
from benchmarks.report import Report

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60
    )


def test_a_duration_meets_its_reach_when_the_ratio_is_small_enough() -> None:
    report = Report("bench", quick=True)
    report.add("row", "us", [3.0, 1.0, 2.0], baseline="other", against=[4.0], reach=("<=", 0.5))
    report.add("row", "us", [3.0, 1.0, 2.1], baseline="other", against=[4.0], reach=("<=", 0.5))
    assert [row.met for row in report.rows] == [True, False]
    assert report.rows[0].ratio == 0.5
    assert report.rows[0].p99 == 3.0


def test_a_rate_meets_its_reach_when_the_ratio_is_large_enough() -> None:
    report = Report("bench", quick=True)
    report.add("row", "tasks/s", [300.0, 100.0, 200.0], baseline="other", against=[100.0], reach=(">=", 2.0))
    report.add("row", "tasks/s", [199.0], baseline="other", against=[100.0], reach=(">=", 2.0))
    assert [row.met for row in report.rows] == [True, False]
    assert report.rows[0].p99 == 100.0


def test_a_row_without_a_baseline_is_held_to_its_median() -> None:
    report = Report("bench", quick=True)
    report.add("row", "s", [0.5], reach=("<", 1.0))
    report.add("row", "s", [0.5])
    assert [(row.ratio, row.met) for row in report.rows] == [(None, True), (None, None)]
    assert set(report.rows[0].dump()) >= {
        *("bench", "row", "unit", "median", "p99", "baseline", "baseline_median", "ratio", "reach", "met")
    }


def test_the_list_names_every_benchmark_with_its_question() -> None:
    done = run("--list")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(NAMES)
    assert all(line.endswith("?") for line in lines)


@pytest.mark.parametrize(
    "arguments", [["nothing"], [], ["hotpath_call", "--unknown"], ["all", "--json", "/no/such/directory/rows.json"]]
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_a_benchmark_writes_its_rows_as_json(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    done = run("events_recovery", "--quick", "--json", str(file))
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text())
    assert {row["bench"] for row in rows} == {"events_recovery"}
    assert all(row["met"] in (True, False) for row in rows)


def descendants(pid: int) -> set[int]:
    found = set()
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, children.read_text().split()):
            found |= {child} | descendants(child)
    return found


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(
    sys.platform != "linux",
    reason="only Linux has the parent-death signal; elsewhere an orderly end stops the children",
)
def test_no_child_is_left_behind_when_the_session_is_killed() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks", "control_cycle", "--quick"],
        cwd=ROOT,
        env={**os.environ},
        stdout=subprocess.DEVNULL,
    )
    until = time.monotonic() + 40
    while len(found := descendants(process.pid)) < 4 and time.monotonic() < until:
        time.sleep(0.05)
    assert len(found) >= 4
    process.send_signal(signal.SIGKILL)
    process.wait(20)
    until = time.monotonic() + 20
    while any(map(running, found)) and time.monotonic() < until:
        time.sleep(0.05)
    assert [pid for pid in found if running(pid)] == []
