"""The workspace of the rehearsal: a clone, a local index, and an environment that installs from it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.version import Version

from nox_sessions.workspace import distributions
from orki_codegen._gate.evaluate import least
from orki_contract.findings import Bump

# Longest time of one command, in seconds; generous for a busy machine.
LIMIT = 1800.0


@contextmanager
def local_index(folder: Path) -> Iterator[str]:
    """Serve a folder as an index on a free local port and yield its URL."""
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
    """The result of a publish: its status, output, outcome document and new files on the index."""

    status: int
    output: str
    document: Mapping[str, Any]
    brought: frozenset[str]


class Rehearsal:
    """A clone of the workspace and its index; the workspace itself is not changed."""

    def __init__(self, workspace: Path, folder: Path, url: str) -> None:
        self.workspace = workspace
        self.clone = folder / "a clone"
        self.files = folder / "index"
        self.url = url
        self._folder = folder

    def build(self) -> str:
        """Clone the last commit and declare it published; return its id."""
        self.git("clone", "--quiet", str(self.workspace), str(self.clone), cwd=self.workspace)
        commit = self.git("rev-parse", "HEAD")
        reason = "the rehearsal publishes for the first time"
        (self.clone / "published.toml").write_text(f'commit = "{commit}"\nreason = "{reason}"\n', encoding="utf-8")
        # What the workspace changes is part of the published commit, so there is nothing to accept.
        accepted = self.clone / "accepted-breaks.toml"
        accepted.write_text(accepted.read_text(encoding="utf-8").partition("\n[[break]]")[0] + "\n", encoding="utf-8")
        return commit

    def git(self, *arguments: str, cwd: Path | None = None) -> str:
        """Run git, by default in the clone, and return its output."""
        identity = ["-c", "user.name=rehearsal", "-c", "user.email=rehearsal@localhost", "-c", "commit.gpgsign=false"]
        command = ["git", *identity, *arguments]
        return subprocess.run(
            command, cwd=cwd or self.clone, check=True, stdout=subprocess.PIPE, text=True, timeout=LIMIT
        ).stdout.strip()

    def commit(self, message: str) -> None:
        """Commit everything in the clone."""
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "--message", message)

    def versions(self) -> Versions:
        """Return the versions and ranges of the clone's distributions."""
        return Versions(self.clone)

    def publish(self, *arguments: str) -> Published:
        """Run the session `publish` in the clone."""
        told = self._folder / "publish.json"
        told.unlink(missing_ok=True)
        before = self.listed()
        status, output = self._session("publish", "--index", self.url, "--json", str(told), *arguments)
        document = json.loads(told.read_text(encoding="utf-8")) if told.is_file() else {}
        return Published(status, output, document, frozenset(self.listed() - before))

    def publish_and_kill(self) -> frozenset[str]:
        """Publish, kill the session once the index has a file, and return the files of the index."""
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
                # Kill the process group that was started here: an orphan would continue the upload.
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait(60)
        return self.listed()

    def listed(self) -> frozenset[str]:
        """Return the names of the files on the index."""
        return frozenset(path.name for path in self.files.iterdir() if not path.name.startswith("."))

    def generate(self) -> None:
        """Generate the code in the clone, in the environment that the first publish made."""
        self.python("-m", "orki_codegen.generate")

    def python(self, *arguments: str) -> str:
        """Run the Python of the clone's environment and return its output; its status must be 0 or 1."""
        (python,) = self.clone.glob(".nox/dev-*/bin/python")
        environment = {
            **self._environment(),
            "PATH": f"{python.parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        }
        done = _run([str(python), *arguments], self.clone, environment)
        if done.returncode not in {0, 1}:
            raise SystemExit(f"{' '.join(arguments)} ended with {done.returncode}:\n{done.stdout}")
        return done.stdout

    def install(self) -> Path:
        """Install the agent and server from the index and the example from its wheel; return the environment.

        uv takes each package from the first index that has it, so orki's distributions come from the local one.
        """
        home = self._folder / "installed"
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
        """Return the environment variables without those of the running session."""
        spoken = ("NOX", "PYTEST", "COV", "VIRTUAL_ENV", "UV_PUBLISH_", "ORKI_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(spoken)}
        return {**kept, "NOXW_HOME": os.environ.get("NOXW_HOME") or str(self.workspace / ".noxw")}


class Versions:
    """The versions and ranges in the pyproject.toml files of a workspace."""

    def __init__(self, root: Path) -> None:
        self._files = {each.name: root / each.folder / "pyproject.toml" for each in distributions(root)}

    def of(self, name: str) -> Version:
        """Return the version of a distribution."""
        project = tomllib.loads(self._files[name].read_text(encoding="utf-8"))["project"]
        return Version(project["version"])

    def all(self) -> dict[str, Version]:
        """Return every distribution's version."""
        return {name: self.of(name) for name in self._files}

    def set(self, name: str, version: Version) -> None:
        """Set the version of a distribution."""
        file = self._files[name]
        text = file.read_text(encoding="utf-8")
        file.write_text(re.sub(r'(?m)^version = ".*"$', f'version = "{version}"', text, count=1), encoding="utf-8")

    def dependants(self, name: str) -> tuple[str, ...]:
        """Return the distributions with a range on a distribution."""
        return tuple(each for each, file in self._files.items() if self._range(name).search(file.read_text("utf-8")))

    def admit(self, name: str) -> None:
        """Set every range on a distribution to its version and later ones before the next break."""
        version = self.of(name)
        allowed = f">={version},<{least(version, Bump.MAJOR)}"
        for each in self.dependants(name):
            text = self._files[each].read_text(encoding="utf-8")
            self._files[each].write_text(self._range(name).sub(rf'"\g<1>{allowed}"', text), encoding="utf-8")

    def raise_for(self, name: str, bump: Bump) -> tuple[str, ...]:
        """Raise a version for a change, and for a break the ranges on it; return the raised distributions."""
        self.set(name, least(self.of(name), bump))
        if bump is not Bump.MAJOR:
            return (name,)
        self.admit(name)
        return (name, *self._patched(self.dependants(name)))

    def _patched(self, names: Iterable[str]) -> tuple[str, ...]:
        """Raise each by a patch, because a requirement is part of a release."""
        found = tuple(names)
        for each in found:
            self.set(each, least(self.of(each), Bump.PATCH))
        return found

    @staticmethod
    def _range(name: str) -> re.Pattern[str]:
        return re.compile(rf'"({re.escape(name)}(?:\[[\w,]+\])?)[<>=!~][^"]*"')


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
    """Remove the files of an earlier rehearsal."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
