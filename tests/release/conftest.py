"""A local index, and the workspace's distributions, built once for all tests."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = [str(path.parent.relative_to(ROOT)) for path in sorted(ROOT.glob("packages/*/pyproject.toml"))]
EXAMPLES = [str(path.parent.relative_to(ROOT)) for path in sorted(ROOT.glob("examples/*/pyproject.toml"))]


class LocalIndex:
    """A pypiserver over a folder."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        self.port = port

    @property
    def url(self) -> str:
        """Its upload URL; the simple API is below `simple/`."""
        return f"http://127.0.0.1:{self.port}/"

    def files(self) -> set[str]:
        """Return the names of its files."""
        return {path.name for path in self.folder.iterdir()}


def build(folders: list[str], out: Path) -> None:
    """Build distributions as `nox -s build` does."""
    again = out.with_name(f"{out.name}-again")
    for folder in (out, again):
        folder.mkdir(parents=True)
    command = [sys.executable, "-m", "nox_sessions.wheels", str(out), str(again), *folders]
    done = subprocess.run(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, timeout=120
    )
    assert done.returncode == 0, done.stdout


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[LocalIndex]:
    """Start an index on a free port for the duration of the block."""
    folder.mkdir(exist_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    command = [sys.executable, "-m", "pypiserver", "run", "--port", str(port), "--interface", "127.0.0.1"]
    command += ["--authenticate", ".", "--passwords", ".", "--disable-fallback", *options, str(folder)]
    log = folder.with_name(f"{folder.name}.log")
    with log.open("wb") as sink, subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT) as server:
        try:
            index = LocalIndex(folder, port)
            _answers(index, server, log)
            yield index
        finally:
            server.kill()


def _answers(index: LocalIndex, server: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(f"{index.url}simple/", timeout=10):
                return
        except (urllib.error.URLError, OSError):
            assert server.poll() is None, log.read_text(encoding="utf-8")
            assert time.monotonic() < end, f"no answer: {log.read_text(encoding='utf-8')}"
            time.sleep(0.05)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and sdist of each distribution, the example's included."""
    out = tmp_path_factory.mktemp("built") / "dist"
    build([*FOLDERS, "codegen", *EXAMPLES], out)
    return out


@pytest.fixture
def index(tmp_path: Path) -> Iterator[LocalIndex]:
    """An empty index."""
    with serving(tmp_path / "index") as found:
        yield found
