"""A copy of the workspace for planted faults, and a runner of its sessions.

The copy is kept beside nox's environments, so that the next run reuses its environment and caches.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COPY = ROOT / ".nox" / "gates" / "a copy"  # with a space, because a path may contain one
LEFT_OUT = {
    ".git",
    ".hypothesis",
    ".mypy_cache",
    ".nox",
    ".noxw",
    ".pytest_cache",
    ".ruff_cache",
    "__pycache__",
    "dist",
}


def contents(top: Path) -> dict[Path, Path]:
    """Return every file of a workspace that no session creates, by its relative path."""
    found = {}
    for folder, folders, files in os.walk(top):
        folders[:] = [name for name in folders if name not in LEFT_OUT]
        found.update({(Path(folder) / name).relative_to(top): Path(folder) / name for name in files})
    return found


def equal_copy() -> Path:
    """Update the copy; unchanged files keep their times, so caches stay valid."""
    COPY.mkdir(parents=True, exist_ok=True)
    wanted = contents(ROOT)
    for name, path in contents(COPY).items():
        if name not in wanted:
            path.unlink()
    for name, path in wanted.items():
        target = COPY / name
        if (
            not target.is_file()
            or target.read_bytes() != path.read_bytes()
            or target.stat().st_mode != path.stat().st_mode
        ):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target)
    return COPY


def run(workspace: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run sessions in the copy, with the launcher's environment of the original."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("NOX", "PYTEST", "COV"))}
    environment["NOXW_HOME"] = str(ROOT / ".noxw")
    environment.update(variables)
    command = [sys.executable, str(workspace / "noxw"), *arguments]
    return subprocess.run(
        command,
        cwd=workspace,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )


@contextmanager
def planted(path: Path, line: str) -> Iterator[None]:
    """Add a line at the end of a file for the duration of the block."""
    before = path.read_bytes()
    path.write_bytes(before + f"\n{line}\n".encode())
    try:
        yield
    finally:
        path.write_bytes(before)


def assert_red(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode != 0, done.stdout
    for word in words:
        assert word in done.stdout, done.stdout


def assert_green(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stdout
