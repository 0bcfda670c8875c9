"""The workflows run existing sessions, pin their actions, and pass tools that detect mistakes."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / ".github/workflows").glob("*.yml"))
NAMES = [path.name for path in FILES]
RUN = re.compile(r"^ +(?:- )?run: (.*)$", re.MULTILINE)
USES = re.compile(r"^ +(?:- )?uses: (.*)$", re.MULTILINE)
PINNED = re.compile(r"[\w.-]+/[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+")
SESSION = re.compile(r"\./noxw(?: -s ([a-z_]+)(?: -- .*)?)?")


def sessions() -> set[str]:
    """Return the names of all sessions in noxfile.py."""
    body = ast.parse((ROOT / "noxfile.py").read_text(encoding="utf-8")).body
    functions = [node for node in body if isinstance(node, ast.FunctionDef)]
    return {node.name for node in functions if any("nox.session" in ast.unparse(each) for each in node.decorator_list)}


def test_there_are_two_workflows() -> None:
    assert NAMES == ["pull-request.yml", "release.yml"]


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_each_step_is_a_session(path: Path) -> None:
    steps = RUN.findall(path.read_text(encoding="utf-8"))
    assert steps
    for step in steps:
        match = SESSION.fullmatch(step)
        assert match, f"{step}: a step is one session of nox"
        assert match[1] is None or match[1] in sessions(), f"{step}: noxfile.py has no such session"


def test_a_pull_request_runs_each_default_session() -> None:
    text = (ROOT / "noxfile.py").read_text(encoding="utf-8")
    listed = re.search(r"^nox\.options\.sessions = (\[.*?\])", text, re.MULTILINE | re.DOTALL)
    assert listed
    run = set(re.findall(r"noxw -s ([a-z_]+)", FILES[0].read_text(encoding="utf-8")))
    assert set(ast.literal_eval(listed[1])) | {"breaking", "diff", "generate"} <= run


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_each_action_is_pinned_with_its_version(path: Path) -> None:
    used = USES.findall(path.read_text(encoding="utf-8"))
    assert used
    assert [each for each in used if not PINNED.fullmatch(each)] == []


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("@08c6903cd8c0fde910a37f88322edcfb5dd907a8 # v5.0.0", "@v5", "unpinned-uses"),
        ("needs: verify", "needs: verfiy", 'needs job "verfiy" which does not exist'),
    ],
    ids=["zizmor", "actionlint"],
)
@pytest.mark.timeout(300)
def test_a_mistake_fails_the_session(tmp_path: Path, before: str, after: str, words: str) -> None:
    """One mistake is detected only by zizmor, the other only by actionlint."""
    shutil.copytree(ROOT / ".github", tmp_path / ".github")
    release = tmp_path / ".github/workflows/release.yml"
    text = release.read_text(encoding="utf-8")
    assert before in text
    release.write_text(text.replace(before, after, 1), encoding="utf-8")
    output = check(tmp_path, status=1)
    assert words in output


def test_a_folder_without_workflows_fails(tmp_path: Path) -> None:
    assert "nothing was checked" in check(tmp_path, status=1)


def check(folder: Path, status: int) -> str:
    """Run the check of the session `workflows` on another folder."""
    command = [sys.executable, "-m", "nox_sessions.workflows", str(ROOT / ".nox/actionlint"), str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, timeout=280
    )
    assert done.returncode == status, done.stdout
    return done.stdout
