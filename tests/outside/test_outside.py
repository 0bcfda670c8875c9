"""A repository outside of this one, made by `orki-codegen init` from wheels: green at once, and red when it must be.

What it needs of orki comes out of a folder of wheels, the rest from the package index, as for anybody.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DISTRIBUTIONS = [*sorted(ROOT.glob("packages/*/pyproject.toml")), ROOT / "codegen/pyproject.toml"]
NAME = "acme-review"
SOURCES = Path("packages/acme-review/src/acme_review")

pytestmark = pytest.mark.timeout(900)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outside:
    """A repository of a user's.

    Attributes:
        folder: Where it lies.
        wheels: The folder of wheels that stands for the index of orki's distributions.
    """

    folder: Path
    wheels: Path

    def noxw(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Starts its sessions, as its README says."""
        return run(self.folder, "./noxw", *arguments, environment={"PIP_FIND_LINKS": str(self.wheels)})


def run(folder: Path, *command: str, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a command as somebody would who knows nothing of this workspace."""
    private = ("COV", "NOX", "PYTEST", "PYTHON", "VIRTUAL_ENV", "MYPYPATH", "UV_FIND_LINKS")
    variables = {name: value for name, value in os.environ.items() if not name.startswith(private)}
    variables |= {"PYTHONDONTWRITEBYTECODE": "1", **(environment or {})}
    return subprocess.run(
        command,
        cwd=folder,
        env=variables,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )


def assert_green(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 0, done.stdout
    for word in words:
        assert word in done.stdout, done.stdout


def assert_red(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode != 0, done.stdout
    for word in words:
        assert word in done.stdout, done.stdout


def wheel(folder: Path, into: Path) -> None:
    """Builds one distribution's wheel."""
    assert_green(run(folder, sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(into)))


def git(folder: Path, *arguments: str) -> None:
    who = ("-c", "user.name=A User", "-c", "user.email=user@example.invalid", "-c", "commit.gpgsign=false")
    assert_green(run(folder, "git", *who, *arguments))


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Outside:
    """What `init` makes of an empty folder, run from an environment into which the wheels were installed."""
    top = tmp_path_factory.mktemp("outside")
    wheels, installed, folder = top / "wheels", top / "installed", top / "a user's"
    for path in DISTRIBUTIONS:
        wheel(path.parent, wheels)
    uv = shutil.which("uv") or str(Path(sys.executable).with_name("uv"))
    assert_green(run(top, uv, "venv", "--quiet", "--no-project", "--python", sys.executable, str(installed)))
    install = (uv, "pip", "install", "--quiet", "--python", str(installed), "--find-links", str(wheels))
    assert_green(run(top, *install, "--constraints", str(ROOT / "constraints.txt"), "orki-codegen"))
    folder.mkdir()
    made = run(folder, str(installed / "bin/orki-codegen"), "init", "--name", NAME)
    assert_green(made, "next, in .: ./noxw -s demo")
    return Outside(folder=folder, wheels=wheels)


def test_its_two_commands_are_green_at_once(outside: Outside) -> None:
    assert_green(outside.noxw("-s", "demo"), "the agent counted 11 words", "the report says: a sentence: 11 words")
    assert_green(outside.noxw(), "nothing is committed yet", "Session tests was successful")
    built = sorted(path.name for path in (outside.folder / "dist").iterdir())
    assert built == ["acme_review-0.1.0-py3-none-any.whl", "acme_review-0.1.0.tar.gz"]


def test_its_contract_changes_and_its_gate_is_red_for_a_break(outside: Outside) -> None:
    proto = outside.folder / "proto/acme/review/v1/text.proto"
    for arguments in (("init", "--quiet", "--initial-branch=main"), ("add", "."), ("commit", "--quiet", "-m", "begin")):
        git(outside.folder, *arguments)
    assert_green(outside.noxw("-s", "breaking"))

    replace(proto, "  uint32 words = 1;\n}", "  uint32 words = 1;\n  // Lines.\n  uint32 lines = 2;\n}")
    assert_red(outside.noxw("-s", "contract"), "text_pb2.py differs")
    assert_green(
        outside.noxw("-s", "generate"), "+ field acme.review.v1.CountWordsResponse.lines: number 2, type uint32"
    )
    assert_green(outside.noxw("-s", "contract"))
    project = outside.folder / f"packages/{NAME}/pyproject.toml"
    replace(project, 'version = "0.1.0"', 'version = "0.1.1"')
    git(outside.folder, "commit", "--quiet", "--all", "-m", "lines")

    replace(proto, 'name: "acme_review_counts"', 'name: "counts"')
    assert_red(outside.noxw("-s", "breaking"), "ORKI_STREAM_REMOVED", "acme_review_counts")
    git(outside.folder, "checkout", "--quiet", ".")
    assert_green(outside.noxw("-s", "breaking"))


def test_a_field_that_orki_takes_away_is_missed_at_its_own_line(outside: Outside, tmp_path: Path) -> None:
    """Another orki-events, whose TaskEvent has no agent_id any more, is installed over the one of before."""
    copy, wheels = tmp_path / "orki", tmp_path / "wheels"
    shutil.copytree(outside.wheels, wheels)
    shutil.copytree(ROOT / "proto", copy / "proto", ignore=shutil.ignore_patterns("sourcereview"))
    for name in ("buf.yaml", "buf.gen.yaml"):
        shutil.copy(ROOT / name, copy)
    for path in ROOT.glob("packages/*/pyproject.toml"):
        shutil.copytree(
            path.parent, copy / path.parent.relative_to(ROOT), ignore=shutil.ignore_patterns("__pycache__", "tests")
        )
    replace(copy / "proto/orki/events/v1/task.proto", "  string agent_id = 5;", "  reserved 5;")
    assert_green(run(copy, sys.executable, "-m", "orki_codegen.generate"), "- field orki.events.v1.TaskEvent.agent_id")
    project = copy / "packages/orki-events/pyproject.toml"
    version = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"]
    replace(project, f'version = "{version}"', f'version = "{version}.1"')
    wheel(project.parent, wheels)

    assert_green(outside.noxw("-s", "types"))
    later = Outside(folder=outside.folder, wheels=wheels)
    assert_green(later.noxw("-s", "upgrade"))
    lines = (outside.folder / SOURCES / "report.py").read_text(encoding="utf-8").splitlines()
    (line,) = (number for number, text in enumerate(lines, 1) if "event.agent_id" in text)
    done = later.noxw("-s", "types")
    assert_red(done, f'{SOURCES}/report.py:{line}: error: "TaskEvent" has no attribute "agent_id"')
    assert {each.partition(":")[0] for each in re.findall(r"^\S+:\d+: error", done.stdout, re.MULTILINE)} == {
        f"{SOURCES}/report.py",
        f"packages/{NAME}/tests/test_report.py",
    }
