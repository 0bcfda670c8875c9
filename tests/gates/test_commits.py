"""The check of commit messages, on good and bad messages and on histories."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nox_sessions import commits

ROOT = Path(__file__).resolve().parents[2]
AREAS = commits.areas((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
GOOD = "events: report trimmed unread entries\n\nA reader could not see that it had lost entries.\n"
GIT = ["git", "-c", "user.name=x", "-c", "user.email=x@localhost", "-c", "commit.gpgsign=false"]


def test_contributing_lists_the_areas() -> None:
    assert {"contract", "gate", "events", "docs", "build"} <= AREAS
    with pytest.raises(LookupError, match=r"CONTRIBUTING\.md"):
        commits.areas("# No list")


@pytest.mark.parametrize(
    "message",
    [
        GOOD,
        f"# A comment.\n{GOOD}",
        "tests: feed the reader\n\nReason.",
        f"gate: {'x' * (commits.LONGEST - 6)}\n\nReason.",
    ],
)
def test_a_good_message_has_no_faults(message: str) -> None:
    assert list(commits.faults(message, AREAS)) == []


@pytest.mark.parametrize(
    ("message", "fault"),
    [
        ("Report trimmed entries\n\nReason.", "not of the form"),
        ("kitchen: report trimmed entries\n\nReason.", 'unknown area "kitchen"'),
        ("events: reported trimmed entries\n\nReason.", "not imperative"),
        ("events: reporting trimmed entries\n\nReason.", "not imperative"),
        ("events: report trimmed entries.\n\nReason.", "ends with a full stop"),
        (f"events: {'x' * commits.LONGEST}\n\nReason.", "at most 72"),
        ("events: report trimmed entries\nReason.", "second line is not empty"),
        ("events: report trimmed entries\n", "body is missing"),
        ("events: report trimmed entries\n\n# Only a comment.\n", "body is missing"),
        ("", "not of the form"),
    ],
)
def test_a_bad_message_is_reported(message: str, fault: str) -> None:
    assert any(fault in each for each in commits.faults(message, AREAS))


def commit(folder: Path, message: str, *options: str) -> str:
    subprocess.run([*GIT, "commit", "--quiet", "--allow-empty", *options, "-m", message], cwd=folder, check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, check=True, capture_output=True, text=True)
    return head.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    subprocess.run([*GIT, "init", "--quiet", "--initial-branch", "main", str(folder)], check=True)
    return folder


def test_only_later_commits_are_checked_and_no_merges(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = commit(repository, "Before the convention")
    subprocess.run([*GIT, "switch", "--quiet", "--create", "side"], cwd=repository, check=True)
    commit(repository, "gate: on a branch")
    subprocess.run([*GIT, "switch", "--quiet", "main"], cwd=repository, check=True)
    commit(repository, GOOD)
    merge = [*GIT, "merge", "--quiet", "--no-edit", "side", "-m", "Merge side"]
    subprocess.run(merge, cwd=repository, check=True)
    monkeypatch.chdir(repository)
    messages = {message for _, message in commits.since(start) or ()}
    assert messages == {GOOD.rstrip("\n"), "gate: on a branch"}


def check(folder: Path, *arguments: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "nox_sessions.commits", *arguments]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_a_clone_without_the_start_passes_with_a_note(repository: Path) -> None:
    (repository / "CONTRIBUTING.md").write_text((ROOT / "CONTRIBUTING.md").read_text("utf-8"), encoding="utf-8")
    commit(repository, "No convention here")
    status, output = check(repository)
    assert (status, "no message was checked" in output) == (0, True)


def test_a_hook_checks_the_message_in_a_file(tmp_path: Path) -> None:
    message = tmp_path / "COMMIT_EDITMSG"
    message.write_text(GOOD, encoding="utf-8")
    assert check(ROOT, str(message))[0] == 0
    message.write_text("Did things.", encoding="utf-8")
    status, output = check(ROOT, str(message))
    assert (status, "full stop" in output) == (1, True)
    message.write_text("Merge main", encoding="utf-8")
    assert check(ROOT, str(message))[0] == 0


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (GOOD.encode(), 0),
        (b"squash! events: x\n", 0),
        (b"amend! events: x\n", 0),
        (b"events: report entries\n\n# ------------------------ >8 ------------------------\ndiff --git\n", 1),
        (b"events: report \xff\n\nReason.\n", 1),
        (None, 1),
    ],
)
def test_a_message_file_is_checked(
    content: bytes | None, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    if content is not None:
        (tmp_path / "message").write_bytes(content)
    assert commits.main([str(tmp_path / "message")]) == status
