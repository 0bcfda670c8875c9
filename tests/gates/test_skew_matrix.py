"""The skew matrix detects failures and planted breaks, and reports a missing commit."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from nox_sessions.skew import resolve

ROOT = Path(__file__).resolve().parents[2]
SKEW = ROOT / "tests/skew"
MODULES = ("stage", "control", "events", "tools", "matrix", "actors", "actors.values")


@pytest.fixture
def matrix(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The driver, imported from its own folder as the script does."""
    monkeypatch.syspath_prepend(str(SKEW))
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    spec = importlib.util.spec_from_file_location("matrix", SKEW / "matrix.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "matrix", module)
    spec.loader.exec_module(module)
    yield module
    for name in MODULES:
        sys.modules.pop(name, None)


def result_of(matrix: ModuleType, outcome: Any, planted: str = "") -> Any:
    """Return the result of a scenario with this outcome or error."""

    def scenario(stage: Any) -> str:
        if isinstance(outcome, Exception):
            raise outcome
        return str(outcome)

    return matrix.run_case(matrix.Case(plane="p", pair="a x b", scenario=scenario, planted=planted), {})


def test_errors_and_undetected_breaks_fail(matrix: ModuleType) -> None:
    wrong = matrix.CaseFailed("the ledger of dashboard has 0")
    assert result_of(matrix, "fine").verdict == "ok"
    assert result_of(matrix, wrong).verdict == "FAILED"
    assert result_of(matrix, KeyError("surprise")).verdict == "FAILED"
    assert result_of(matrix, wrong, planted="the ledger of").verdict == "ok"
    assert result_of(matrix, "fine", planted="the ledger of").verdict == "FAILED"
    # Another failure does not prove that the planted one was detected.
    assert (
        result_of(matrix, matrix.CaseFailed("a process would not start"), planted="the ledger of").verdict == "FAILED"
    )


def test_wrong_values_are_detected_in_every_plane(matrix: ModuleType) -> None:
    response = {"bed": "bed-0", "poured": 1_000, "agent": "a", "attempt": 1}
    agents = {"a": "head-v1"}
    assert matrix.control.check_responses([response], range(1), agents, "published-v1") == {"a"}
    for change in ({"poured": 999}, {"bed": "bed-1"}, {"agent": "stranger"}, {"attempt": 0}, {"because": ""}):
        with pytest.raises(matrix.CaseFailed):
            matrix.control.check_responses([response | change], range(1), agents, "published-v1")
    with pytest.raises(matrix.CaseFailed):
        matrix.control.check_responses([], range(1), agents, "published-v1")
    event = matrix.events.wanted_event(0, "published-v1", "head-v2", "dashboard")
    assert event["sensor"] == ""
    for events in ([event | {"fraction": 0.5}], [event], [event, event]):
        with pytest.raises(matrix.CaseFailed):
            matrix.events.check_read([events], ["published-v1"], ["head-v2"])
    with pytest.raises(matrix.CaseFailed):
        matrix.events.check_row("dashboard", {"published": 2, "processed": 1}, 2)
    reply = {"fraction": 1 / 1_024, "depth": 1, "probe": "probe 1 ü"}
    with pytest.raises(matrix.CaseFailed):
        matrix.tools.check_measured([reply] * matrix.tools.CALLS, "head-v2", "published-v1")


def test_a_refusal_must_name_both_versions_and_the_rule(matrix: ModuleType) -> None:
    whole = {"type": "ContractMismatch", "message": "3.0 (sha256:aaaaaa1), not 2.0 (sha256:bbbbbb2) [ORKI_X]"}
    assert matrix.control.check_mismatch(whole, "ORKI_X").startswith("ContractMismatch")
    for change in ({"type": "PeerLost"}, {"message": "3.0 does not fit [ORKI_X]"}, {"message": "3.0, not 2.0"}):
        with pytest.raises(matrix.CaseFailed):
            matrix.control.check_mismatch(whole | change, "ORKI_X")


def test_a_dead_or_silent_process_is_reported(matrix: ModuleType, tmp_path: Path) -> None:
    stage = sys.modules["stage"]
    dies = stage.Actor("dies", [sys.executable, "-c", "raise SystemExit('for a reason')"], tmp_path)
    with pytest.raises(matrix.CaseFailed, match="for a reason"):
        dies.expect("ready")
    dies.close()
    mute = stage.Actor("mute", [sys.executable, "-c", "import sys; sys.stdin.read()"], tmp_path)
    with pytest.raises(matrix.CaseFailed, match="did not report ready within 0 s"):
        mute.expect("ready", seconds=0.2)
    mute.close()
    other = stage.Actor("other", [sys.executable, "-c", "print('{\"refused\": 1}')"], tmp_path)
    with pytest.raises(matrix.CaseFailed, match="refused: 1"):
        other.expect("done")
    other.close()


def test_the_command_fails_when_a_pair_does(matrix: ModuleType, tmp_path: Path) -> None:
    config = tmp_path / "matrix.json"
    config.write_text(
        json.dumps({"environments": {"head-v2": sys.executable}, "published": "nobody"}), encoding="utf-8"
    )
    results = tmp_path / "results.json"
    # No environment has the wheels, so every pair must fail.
    assert matrix.main([str(config), "--json", str(results), "--only", "tools: published tool client"]) == 1
    (pair,) = json.loads(results.read_text(encoding="utf-8"))["pairs"]
    assert pair["verdict"] == "FAILED"
    assert matrix.main([str(config), "--only", "no pair has this name"]) == 1


def test_a_commit_missing_in_a_shallow_clone_is_reported(tmp_path: Path) -> None:
    first, clone = tmp_path / "first", tmp_path / "clone"
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@localhost", "-c", "commit.gpgsign=false"]
    subprocess.run([*git, "init", "--quiet", str(first)], check=True)
    for message in ("one", "two"):
        command = [*git, "-C", str(first), "commit", "--quiet", "--allow-empty", "-m", message]
        subprocess.run(command, check=True)
    sha = resolve(first, "HEAD~1")
    assert len(sha) == 40
    subprocess.run([*git, "clone", "--quiet", "--depth", "1", first.as_uri(), str(clone)], check=True)
    with pytest.raises(LookupError, match="shallow: `git fetch --unshallow`"):
        resolve(clone, sha)
    with pytest.raises(LookupError, match="no such commit"):
        resolve(first, "0" * 40)
