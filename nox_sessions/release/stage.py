"""The stage of the rehearsal: a clone of the workspace, an index on this machine, and a stranger's environment."""

from __future__ import annotations

__all__ = ["Published", "Stage", "clear", "local_index"]

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nox_sessions.release.versions import Versions

# Ample for a machine that does other things as well: what takes longer hangs.
LIMIT = 1800.0


@contextmanager
def local_index(folder: Path) -> Iterator[str]:
    """Serve a folder as an index on a free port of this machine, and yield its address."""
    folder.mkdir(parents=True)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}/"
    command = [sys.executable, "-m", "pypiserver", "run", "--port", str(port), "--interface", "127.0.0.1"]
    command += ["--authenticate", ".", "--passwords", ".", "--disable-fallback", str(folder)]
    with (
        folder.with_name("index.log").open("wb") as log,
        subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT) as server,
    ):
        try:
            end = time.monotonic() + 60
            while True:
                try:
                    urllib.request.urlopen(f"{url}simple/", timeout=10).close()
                    break
                except OSError:
                    if server.poll() is not None or time.monotonic() > end:
                        raise SystemExit(f"the index does not start: see {log.name}") from None
                    time.sleep(0.1)
            yield url
        finally:
            server.kill()


@dataclass(frozen=True, slots=True)
class Published:
    """How a publish ended: its status, its output, its document, and the files that it brought to the index."""

    status: int
    output: str
    document: Mapping[str, Any]
    brought: frozenset[str]


class Stage:
    """Where the rehearsal plays; nothing of the workspace itself is touched."""

    def __init__(self, workspace: Path, folder: Path, url: str) -> None:
        self.workspace = workspace
        self.clone = folder / "a clone"
        self.files = folder / "index"
        self.url = url
        self._folder = folder

    def build(self) -> str:
        """Clone what is committed; what is published first is then this commit itself. Returns its id."""
        self.git("clone", "--quiet", str(self.workspace), str(self.clone), cwd=self.workspace)
        commit = self.git("rev-parse", "HEAD")
        reason = "the rehearsal publishes for the first time"
        (self.clone / "published.toml").write_text(f'commit = "{commit}"\nreason = "{reason}"\n', encoding="utf-8")
        return commit

    def git(self, *arguments: str, cwd: Path | None = None) -> str:
        """Run git, in the clone unless elsewhere is said, and return what it prints."""
        identity = ["-c", "user.name=rehearsal", "-c", "user.email=rehearsal@localhost", "-c", "commit.gpgsign=false"]
        command = ["git", *identity, *arguments]
        return subprocess.run(
            command, cwd=cwd or self.clone, check=True, stdout=subprocess.PIPE, text=True, timeout=LIMIT
        ).stdout.strip()

    def commit(self, message: str) -> None:
        """Commit all that the clone holds."""
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "--message", message)

    def versions(self) -> Versions:
        """The versions and ranges of the clone's distributions."""
        return Versions(self.clone)

    def publish(self, *arguments: str) -> Published:
        """Publish from the clone, as anyone would."""
        told = self._folder / "publish.json"
        told.unlink(missing_ok=True)
        before = self.listed()
        status, output = self._session("publish", "--index", self.url, "--json", str(told), *arguments)
        document = json.loads(told.read_text(encoding="utf-8")) if told.is_file() else {}
        return Published(status, output, document, frozenset(self.listed() - before))

    def publish_and_die(self) -> frozenset[str]:
        """Publish, and kill all of it without warning once the index has got something; return what it has got."""
        command = self._noxw("publish", "--index", self.url)
        with (self._folder / "killed.log").open("wb") as log:
            process = subprocess.Popen(
                command,
                cwd=self.clone,
                env=self._environment(),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                end = time.monotonic() + LIMIT
                while process.poll() is None and time.monotonic() < end and not self.listed():
                    time.sleep(0.002)
            finally:
                # The whole group, which this process itself began: an orphan would go on uploading.
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait(60)
        return self.listed()

    def listed(self) -> frozenset[str]:
        """The names of the files on the index."""
        return frozenset(path.name for path in self.files.iterdir() if not path.name.startswith("."))

    def generate(self) -> None:
        """Generate anew in the clone; its environment stands since the first publish."""
        self.python("-m", "orki_codegen.generate")

    def python(self, *arguments: str) -> str:
        """Run the Python of the clone's environment, and return what it prints; its status must be 0 or 1."""
        (python,) = self.clone.glob(".nox/dev-*/bin/python")
        environment = {
            **self._environment(),
            "PATH": f"{python.parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        }
        done = _run([str(python), *arguments], self.clone, environment)
        if done.returncode not in {0, 1}:
            raise SystemExit(f"{' '.join(arguments)} ended with {done.returncode}:\n{done.stdout}")
        return done.stdout

    def stranger(self) -> Path:
        """Install the agent and the server from the index, the example from its wheel; return the environment.

        uv asks the indexes in their order and takes each package from the first that knows it: ours from here.
        """
        home = self._folder / "stranger"
        uv = str(Path(sys.executable).parent / "uv")
        python = str(home / "bin" / "python")
        (example,) = (self.clone / "dist").glob("review_fleet-*.whl")
        install = [uv, "pip", "install", "--quiet", "--python", python, "--index", f"{self.url}simple/"]
        install += ["--constraints", str(self.workspace / "constraints.txt"), "orki-agent", "orki-server"]
        for command in ([uv, "venv", "--quiet", str(home)], install, [*install, str(example)]):
            done = _run(command, self._folder, self._environment())
            if done.returncode:
                raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}")
        return home

    def _session(self, name: str, *arguments: str) -> tuple[int, str]:
        done = _run(self._noxw(name, *arguments), self.clone, self._environment())
        return done.returncode, done.stdout

    def _noxw(self, session: str, *arguments: str) -> list[str]:
        return [sys.executable, str(self.clone / "noxw"), "-s", session, "--", *arguments]

    def _environment(self) -> dict[str, str]:
        """This process's variables, without those that speak of the session in which it runs."""
        spoken = ("NOX", "PYTEST", "COV", "VIRTUAL_ENV", "UV_PUBLISH_", "ORKI_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(spoken)}
        return {**kept, "NOXW_HOME": os.environ.get("NOXW_HOME") or str(self.workspace / ".noxw")}


def _run(command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=folder,
        env=environment,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
        timeout=LIMIT,
    )


def clear(folder: Path) -> None:
    """Remove what an earlier rehearsal left."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
