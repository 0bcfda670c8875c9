"""A copy of the workspace into which is planted what must not pass, and how its sessions are started.

The copy lies beside nox's environments and stays, so that its own environment and caches serve the next run.
"""

from __future__ import annotations

__all__ = ["COPY", "ROOT", "assert_green", "assert_red", "equal_copy", "planted", "run"]

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COPY = ROOT / ".nox" / "gates" / "a copy"  # the space is meant: a path may have one
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
    """Every file of a workspace that is not made by a session, by its path below the top."""
    found = {}
    for folder, folders, files in os.walk(top):
        folders[:] = [name for name in folders if name not in LEFT_OUT]
        found.update({(Path(folder) / name).relative_to(top): Path(folder) / name for name in files})
    return found


def equal_copy() -> Path:
    """Makes a copy that equals the workspace; what did not change keeps its times, so caches stay good."""
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
    """Start sessions in the copy, as a contributor would; only the launcher's environment is the original's."""
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
    """Add a line at the end of a file, and take it away again."""
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
