"""The README's blocks are true: the generated file is the generator's, and the users' files type-check and run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"<!-- (proto|generated|file): (\S+) -->\n```\w+\n(.*?)```", re.DOTALL)
MARKED = {(kind, name): text for kind, name, text in BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))}
FILES = [name for kind, name in MARKED if kind == "file"]
OWNER = '[project]\nname = "greenhouse"\nversion = "0.1.0"\n\n[tool.orki]\ncontracts = ["greenhouse.v1"]\n'


def run(folder: Path, *arguments: str, **environment: str) -> str:
    """Run this Python in a folder; the output of a failure is the test's message."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def greenhouse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace of a user's own: the README's proto, generated; and the users' files beside it."""
    root = tmp_path_factory.mktemp("greenhouse")
    for name in ("buf.yaml", "buf.gen.yaml"):
        shutil.copy(ROOT / name, root)
    shutil.copytree(ROOT / "proto/orki/options", root / "proto/orki/options")
    package = root / "packages/greenhouse"
    (package / "src").mkdir(parents=True)
    (package / "pyproject.toml").write_text(OWNER, encoding="utf-8")
    for (kind, name), text in MARKED.items():
        target = root / "proto" / name if kind == "proto" else package / "src" / name
        if kind != "generated":
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
    run(root, "-m", "orki_codegen.generate")
    return package


def test_the_generated_file_is_what_the_generator_makes(greenhouse: Path) -> None:
    shown = {name: text for (kind, name), text in MARKED.items() if kind == "generated"}
    assert shown
    for name, text in shown.items():
        assert (greenhouse / "gen" / name).read_text(encoding="utf-8") == text


@pytest.mark.parametrize("name", FILES)
def test_a_users_file_runs(greenhouse: Path, name: str) -> None:
    path = os.pathsep.join([str(greenhouse / "gen"), str(greenhouse / "src")])
    assert "done" in run(greenhouse, "-W", "error", "-c", f"import {Path(name).stem}; print('done')", PYTHONPATH=path)


def test_the_users_files_are_strictly_typed(greenhouse: Path) -> None:
    roots = [str(greenhouse / "gen"), str(greenhouse / "src")]
    installed = sorted(str(path) for path in ROOT.glob("packages/*/[gs][er][nc]"))
    search = {"MYPYPATH": os.pathsep.join([*roots, *installed])}
    options = ["--strict", "--namespace-packages", "--explicit-package-bases", "--follow-imports", "silent"]
    assert "Success" in run(greenhouse, "-m", "mypy", *options, *roots, **search)
