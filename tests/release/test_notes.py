"""Release notes from fragments, and what is no fragment."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.release.conftest import ROOT

KINDS = ("removed", "changed", "added", "fixed", "security")


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A workspace with one of our distributions, and a fragment of each kind."""
    folder = tmp_path / "packages/orki-events"
    shutil.copytree(ROOT / "packages/orki-events/changes", folder / "changes")
    for path in (folder / "changes").glob("*.*.md"):
        path.unlink()
    project = (ROOT / "packages/orki-events/pyproject.toml").read_text(encoding="utf-8")
    project = re.sub(r'^version = ".*"', 'version = "0.1.0"', project, flags=re.MULTILINE)
    (folder / "pyproject.toml").write_text(project, encoding="utf-8")
    shutil.copy(ROOT / "towncrier.toml", tmp_path)
    for kind in KINDS:
        (folder / f"changes/a-thing.{kind}.md").write_text(f"Something is {kind}.\nIt matters.\n", encoding="utf-8")
    return tmp_path


def notes(workspace: Path, *arguments: str, status: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "nox_sessions.release.notes", *arguments],
        cwd=workspace,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
        timeout=60,
    )
    assert done.returncode == status, done.stdout
    return done.stdout


def test_a_draft_prints_all_fragments_and_changes_nothing(workspace: Path) -> None:
    before = sorted(workspace.rglob("*"))
    output = notes(workspace, "orki-events", "0.2.0", "--draft")
    assert "## 0.2.0 (" in output
    places = [output.index(f"### {kind.capitalize()}\n\n- Something is {kind}.\n  It matters.\n") for kind in KINDS]
    assert places == sorted(places), "removals come first"
    assert sorted(workspace.rglob("*")) == before


@pytest.mark.parametrize("name", [path.parent.name for path in sorted(ROOT.glob("*/*/changes"))] + ["orki-codegen"])
def test_the_fragments_of_each_distribution_render(name: str) -> None:
    """A folder without fragments is refused."""
    (folder,) = [*ROOT.glob(f"packages/{name}"), *([ROOT / "codegen"] if name == "orki-codegen" else [])]
    waiting = [path for path in (folder / "changes").iterdir() if path.name != "README.md"]
    output = notes(ROOT, name, "9.9.9", "--draft", status=0 if waiting else 1)
    assert ("## 9.9.9 (" in output) == bool(waiting)


def test_a_release_joins_and_removes_the_fragments(workspace: Path) -> None:
    notes(workspace, "orki-events", "0.1.0")
    folder = workspace / "packages/orki-events"
    assert [path.name for path in (folder / "changes").iterdir()] == ["README.md"]
    (folder / "changes/more.fixed.md").write_text("One more.\n", encoding="utf-8")
    assert "already has notes of 0.1.0" in notes(workspace, "orki-events", "0.1.0", status=1)
    project = folder / "pyproject.toml"
    project.write_text(project.read_text(encoding="utf-8").replace('version = "0.1.0"', 'version = "0.1.1"', 1))
    notes(workspace, "orki-events", "0.1.1")
    text = (folder / "CHANGELOG.md").read_text(encoding="utf-8")
    assert text.startswith("# Changes of orki-events\n")
    assert text.index("## 0.1.1 (") < text.index("One more.") < text.index("## 0.1.0 (") < text.index("is security")


@pytest.mark.parametrize("name", ["a-thing.feature.md", "a-thing.md", "notes.txt"])
def test_an_invalid_fragment_is_refused(workspace: Path, name: str) -> None:
    (workspace / "packages/orki-events/changes" / name).write_text("A thing.\n", encoding="utf-8")
    assert name in notes(workspace, "orki-events", "0.1.0", "--draft", status=1)


def test_a_version_other_than_that_of_the_project_is_refused(workspace: Path) -> None:
    assert "pyproject.toml has version 0.1.0" in notes(workspace, "orki-events", "0.2.0", status=1)


def test_a_distribution_without_fragments_is_refused(workspace: Path) -> None:
    for path in workspace.glob("packages/*/changes/*.*.md"):
        path.unlink()
    assert "has no fragment" in notes(workspace, "orki-events", "0.1.0", status=1)


@pytest.mark.parametrize("arguments", [("orki-gone", "1.0"), ("orki-events", "one"), ("orki-events",), ("--force",)])
def test_a_wrong_command_is_refused(workspace: Path, arguments: tuple[str, ...]) -> None:
    assert "notes: error:" in notes(workspace, *arguments, status=2)
