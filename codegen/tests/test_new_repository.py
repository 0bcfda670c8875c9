"""`orki-codegen init`: what it writes is clean whatever it is called, and what was there stays."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from orki_codegen._new_repository import RELEASED, lay_out, names_for
from orki_codegen.cli import main
from orki_contract.errors import InvalidSetting

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = ROOT / "codegen/src/orki_codegen/templates/repository"
LONGEST = "a-23456789-123456789-123456789-123456789"


def run(folder: Path, *command: str) -> str:
    """Runs a program of this environment; what it said, where it failed."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr if done.returncode else ""


@pytest.mark.parametrize(
    ("name", "package"),
    [("acme-review", ""), ("shop", ""), (LONGEST, "abcdefghij.bcdefghij.bcdefghij.bcdefghi.v1"), ("b", "z.v1beta1")],
)
def test_what_is_written_is_clean(tmp_path: Path, name: str, package: str) -> None:
    folder = tmp_path / "not there yet"
    chosen = ["--package", package] if package else []
    assert main(["init", str(folder), "--name", name, *chosen]) == 0
    assert (folder / f"packages/{name}/gen").is_dir()
    assert os.access(folder / "noxw", os.X_OK)
    for command in (
        ("ruff", "check", "--no-cache", "."),
        ("ruff", "format", "--no-cache", "--check", "."),
        ("buf", "lint"),
        ("buf", "format", "--diff", "--exit-code", "proto"),
        ("zizmor", "--offline", "--no-progress", "--persona", "pedantic", ".github/workflows"),
    ):
        assert run(folder, *command) == ""


def test_a_reader_that_goes_away_leaves_a_whole_repository(tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "orki_codegen.cli", "init", str(tmp_path / "shop")]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    reads, writes = os.pipe()
    os.close(reads)
    try:
        ended = subprocess.run(
            arguments, env={**os.environ, "PATH": path}, stdout=writes, stderr=subprocess.PIPE, check=False
        )
    finally:
        os.close(writes)
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert list((tmp_path / "shop/packages/shop/gen").glob("**/contract.binpb"))


def test_its_code_is_typed_and_its_tests_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["init", str(tmp_path), "--name", "acme-review"]) == 0
    home = tmp_path / "packages/acme-review"
    roots = [str(home / name) for name in ("gen", "src")]
    assert run(tmp_path, sys.executable, "-m", "mypy", *roots, str(home / "tests")) == ""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(roots))
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    assert run(tmp_path, sys.executable, "-m", "pytest", "-p", "no:cacheprovider") == ""


def test_the_name_comes_from_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "Acme Review_2"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert main(["init"]) == 0
    said = capsys.readouterr().out
    assert "distribution acme-review-2, proto package acme.review_2.v1" in said
    assert said.splitlines()[-1].startswith("next, in .:")


def test_what_is_there_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "README.md").write_text("mine", encoding="utf-8")
    assert main(["init", str(tmp_path), "--name", "acme-review"]) == 0
    assert "README.md is there already, and stays as it is" in capsys.readouterr().out
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "mine"
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert main(["init", str(tmp_path), "--name", "acme-review"]) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("name", "package", "words"),
    [
        ("", "", "no name for a distribution"),
        ("Acme", "", "no name for a distribution"),
        ("acme--review", "", "no name for a distribution"),
        ("../acme", "", "no name for a distribution"),
        ("a" * 41, "", "40 at the most"),
        ("acme", "acme.review", "a version at the end"),
        ("acme", "Acme.v1", "no name for a proto package"),
        ("acme", "v1", "no name for a proto package"),
        ("acme", "a." * 30 + "v1", "no name for a proto package"),
        ("class", "acme.v1", "is a Python keyword"),
        ("json", "acme.v1", "another module under the name"),
        ("acme", "json.v1", "another module under the name"),
        ("orki-agent", "acme.v1", "another module under the name"),
        ("acme", "orki.mine.v1", "another module under the name"),
        ("acme", "acme.class.v1", "is a Python keyword"),
    ],
)
def test_names_that_cannot_be_used(name: str, package: str, words: str) -> None:
    with pytest.raises(InvalidSetting, match=words):
        names_for(name, package)


def test_places_that_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert main(["init", str(tmp_path / "file"), "--name", "acme"]) == 1
    assert "is a file: name a folder" in capsys.readouterr().err
    assert main(["init", str(tmp_path / "file" / "below"), "--name", "acme"]) == 1
    assert "cannot be written" in capsys.readouterr().err
    (tmp_path / "noxfile.py").mkdir()
    with pytest.raises(InvalidSetting, match="noxfile.py is in the way"):
        lay_out(tmp_path, names_for("acme"))


def test_a_wrong_contract_that_is_there_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "proto").mkdir()
    (tmp_path / "proto/mine.proto").write_text("nonsense", encoding="utf-8")
    assert main(["init", str(tmp_path), "--name", "acme"]) == 1
    assert "proto/mine.proto:1:1" in capsys.readouterr().err


def test_the_launcher_is_this_workspaces_own() -> None:
    assert (TEMPLATES / "noxw.j2").read_bytes() == (ROOT / "noxw").read_bytes()


def test_the_pins_are_this_workspaces_own() -> None:
    """`nox -s pin` writes the workspace's: take these from there."""
    known = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = (TEMPLATES / "constraints.txt.j2").read_text(encoding="utf-8").splitlines()
    assert pins
    assert [pin for pin in pins if pin not in known] == []


def test_the_ranges_admit_what_is_here() -> None:
    for path in [*ROOT.glob("packages/*/pyproject.toml"), ROOT / "codegen/pyproject.toml"]:
        project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
        oldest, newest = (
            tuple(map(int, re.findall(r"\d+", each))) for each in (RELEASED[project["name"]], project["version"])
        )
        assert oldest <= newest
        assert newest[:1] == oldest[:1]
        assert newest[0] or newest[1] == oldest[1]
