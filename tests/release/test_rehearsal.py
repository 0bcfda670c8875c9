"""The rehearsal in its short form, and the versions and ranges that it raises."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.version import Version

from nox_sessions.release.scenarios import SCENARIOS, Edit, Rewrite
from nox_sessions.release.versions import Versions, breaking, raised
from tests.release.conftest import ROOT


@pytest.mark.timeout(900)
def test_a_first_release_and_a_change(tmp_path: Path) -> None:
    """From a clone, by the session itself: published, refused without a version, and published with it."""
    command = [sys.executable, "-m", "nox_sessions.release.rehearsal", str(ROOT), str(tmp_path / "play"), "--only", "a"]
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
    assert "all went as it must" in done.stdout
    shutil.rmtree(tmp_path / "play")


@pytest.mark.parametrize(
    ("version", "major", "minor", "patch"),
    [("0.1.3", "0.2.0", "0.1.4", "0.1.4"), ("1.2.3", "2.0.0", "1.3.0", "1.2.4")],
)
def test_what_a_bump_means(version: str, major: str, minor: str, patch: str) -> None:
    given = Version(version)
    assert [str(raised(given, bump)) for bump in ("major", "minor", "patch")] == [major, minor, patch]
    assert str(breaking(given)) == major


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
    assert versions.raise_for("orki-control", "minor") == ("orki-control",)
    rose = versions.raise_for("orki-server", "major")
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


def test_each_change_of_the_rehearsal_can_still_be_made(tmp_path: Path) -> None:
    """The protos move on; a change that no longer finds its place would be found out late otherwise."""
    shutil.copytree(ROOT / "proto", tmp_path / "proto")
    shutil.copytree(ROOT / "packages", tmp_path / "packages", ignore=shutil.ignore_patterns("tests", "gen"))
    for scenario in SCENARIOS:
        for follower in scenario.follow:
            follower.apply(tmp_path)
        for edit in scenario.edits:
            before = (tmp_path / edit.file).read_text(encoding="utf-8")
            edit.apply(tmp_path)
            assert (tmp_path / edit.file).read_text(encoding="utf-8") != before, scenario.name
    with pytest.raises(SystemExit, match="no module holds"):
        Rewrite("nowhere to be found", "else").apply(tmp_path)
    with pytest.raises(SystemExit, match="holds 0 times"):
        Edit(SCENARIOS[0].edits[0].file, "nowhere", "else").apply(tmp_path)
