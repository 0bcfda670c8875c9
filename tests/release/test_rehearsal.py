"""A short rehearsal, and the versions and ranges that it raises."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.version import Version

from orki_codegen._gate.evaluate import is_sufficient, least
from orki_contract.findings import Bump
from tests.release.conftest import ROOT
from tests.release.rehearsal_scenarios import SCENARIOS, Edit, Rewrite
from tests.release.rehearsal_workspace import Versions


@pytest.mark.timeout(900)
def test_a_first_release_and_a_change(tmp_path: Path) -> None:
    """A change is refused with the old version and published with the new one."""
    command = [sys.executable, "-m", "tests.release.rehearsal", str(ROOT), str(tmp_path / "play"), "--only", "a"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
        timeout=850,
    )
    assert done.returncode == 0, done.stdout
    assert "refused by ORKI_FIELD_ADDED, published as orki-events" in done.stdout
    assert "every step was as expected" in done.stdout
    shutil.rmtree(tmp_path / "play")


@pytest.mark.parametrize(
    ("version", "major", "minor", "patch"),
    [("0.1.3", "0.2.0", "0.1.4", "0.1.4"), ("1.2.3", "2.0.0", "1.3.0", "1.2.4")],
)
def test_a_bump_raises_one_number(version: str, major: str, minor: str, patch: str) -> None:
    bumps = (Bump.MAJOR, Bump.MINOR, Bump.PATCH)
    assert [str(least(Version(version), bump)) for bump in bumps] == [major, minor, patch]


def test_a_rehearsal_raises_a_pre_release_as_the_gate_requires(versions: Versions) -> None:
    """A second implementation of the version steps once raised 1.2.0rc1 by a patch to 1.2.1, not to 1.2.0."""
    versions.set("orki-server", Version("1.2.0rc1"))
    versions.raise_for("orki-server", Bump.PATCH)
    assert versions.of("orki-server") == Version("1.2.0")
    assert is_sufficient(versions.of("orki-server"), Version("1.2.0rc1"), Bump.PATCH)


@pytest.fixture
def versions(tmp_path: Path) -> Versions:
    for path in [*ROOT.glob("packages/*/pyproject.toml"), *ROOT.glob("examples/*/pyproject.toml")]:
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(parents=True)
        shutil.copy(path, target)
    for name in (found := Versions(tmp_path)).all():
        found.set(name, Version("0.1.0"))
    return found


def test_a_break_moves_the_ranges_of_its_siblings(versions: Versions, tmp_path: Path) -> None:
    assert versions.raise_for("orki-control", Bump.MINOR) == ("orki-control",)
    rose = versions.raise_for("orki-server", Bump.MAJOR)
    assert rose == ("orki-server", "review-fleet")
    assert {name: str(version) for name, version in versions.all().items()} == {
        "orki-agent": "0.1.0",
        "orki-contract": "0.1.0",
        "orki-control": "0.1.1",
        "orki-events": "0.1.0",
        "orki-server": "0.2.0",
        "review-fleet": "0.1.1",
    }
    project = tomllib.loads((tmp_path / "examples/review-fleet/pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert "orki-server[embedded]>=0.2.0,<0.3.0" in project["dependencies"]


def test_each_scenario_still_applies(tmp_path: Path) -> None:
    """The protos change; without this test a stale edit would be found only by the next rehearsal."""
    shutil.copytree(ROOT / "proto", tmp_path / "proto")
    shutil.copytree(ROOT / "packages", tmp_path / "packages", ignore=shutil.ignore_patterns("tests", "gen"))
    for scenario in SCENARIOS:
        for follower in scenario.follow:
            follower.apply(tmp_path)
        for edit in scenario.edits:
            before = (tmp_path / edit.file).read_text(encoding="utf-8")
            edit.apply(tmp_path)
            assert (tmp_path / edit.file).read_text(encoding="utf-8") != before, scenario.name
    with pytest.raises(SystemExit, match="no module contains"):
        Rewrite("nowhere to be found", "else").apply(tmp_path)
    with pytest.raises(SystemExit, match="contains 0 times"):
        Edit(SCENARIOS[0].edits[0].file, "nowhere", "else").apply(tmp_path)
