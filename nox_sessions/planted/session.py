"""`nox -s breaking -- --show`: renames a stream in a copy, lets old and new code miss each other, and asks the gate."""

from __future__ import annotations

__all__ = ["show"]

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import nox

from nox_sessions.environments import Environment, uv

HERE = Path(__file__).parent.absolute()
COPIED = ("proto", "packages", "examples", "docs/reference", "buf.yaml", "buf.gen.yaml")
LEFT_OUT = shutil.ignore_patterns("tests", "__pycache__", ".*")
PROTO = "proto/orki/events/v1/usage.proto"
RULE = "ORKI_STREAM_REMOVED"
COUNT = 5
LONGEST_S = 120


@dataclass(frozen=True, slots=True)
class Stage:
    """Where it plays.

    Attributes:
        session: Prints.
        dev: Holds the generator, the gate and the embedded server.
        top: A temporary folder.
    """

    session: nox.Session
    dev: Environment
    top: Path

    @property
    def tree(self) -> Path:
        """The copy of the workspace."""
        return self.top / "tree"

    def run(self, *command: str, cwd: Path | None = None) -> str:
        """Run a command to its end; what it says is shown only if it fails."""
        done = self.attempt(*command, cwd=cwd)
        if done.returncode != 0:
            self.session.error(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
        return done.stdout.strip()

    def attempt(self, *command: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command to its end, whatever that is."""
        variables = {name: value for name, value in os.environ.items() if not name.startswith(("GIT_", "PYTHON"))}
        return subprocess.run(
            command,
            cwd=cwd or self.tree,
            env=variables,
            text=True,
            capture_output=True,
            timeout=LONGEST_S,
            check=False,
        )


def show(session: nox.Session, dev: Environment) -> None:
    """Play it; fail if anything goes otherwise than told."""
    with tempfile.TemporaryDirectory(prefix="orki-show-") as folder:
        stage = Stage(session, dev, Path(folder))
        _copy(stage)
        session.log("[1/5] building the wheels that users have")
        old = _environment(stage, "old")
        before, after = _rename(stage)
        session.log(f'[2/5] planted: the stream "{before}" is called "{after}" now, and its code is generated again')
        session.log("[3/5] building the wheels of the change, with the same version")
        new = _environment(stage, "new")
        session.log(f"[4/5] a rolling upgrade: old and new publish {COUNT} events each, old and new consume")
        _play(stage, {"old": old, "new": new})
        session.log("[5/5] the gate: orki-codegen gate --against HEAD")
        _ask(stage)


def _copy(stage: Stage) -> None:
    for name in COPIED:
        source, target = Path(name), stage.tree / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=LEFT_OUT)
        else:
            shutil.copy(source, target)
    identity = ("-c", "user.name=show", "-c", "user.email=show@localhost", "-c", "commit.gpgsign=false")
    for command in (("init", "--quiet"), ("add", "--all"), ("commit", "--quiet", "--message", "what users have")):
        stage.run("git", *identity, *command)


def _environment(stage: Stage, name: str) -> Path:
    """Build the event plane's wheels, and install them into an environment; return its interpreter."""
    wheels, folder = stage.top / f"{name}-wheels", stage.top / f"{name}-environment"
    for package in ("orki-contract", "orki-events"):
        build = ("-m", "build", "--wheel", "--no-isolation", "--skip-dependency-check", "--outdir", str(wheels))
        stage.run(stage.dev.python, *build, f"packages/{package}")
    stage.run(uv(), "venv", "--quiet", "--no-project", "--python", stage.dev.python, str(folder))
    install = (uv(), "pip", "install", "--quiet", "--python", str(folder), "--constraints")
    stage.run(*install, str(Path("constraints.txt").absolute()), *(str(each) for each in sorted(wheels.iterdir())))
    return folder / "bin" / "python"


def _rename(stage: Stage) -> tuple[str, str]:
    proto = stage.tree / PROTO
    text = proto.read_text(encoding="utf-8")
    found = re.search(r'^    name: "([^"]+)"', text, re.MULTILINE)
    if found is None:
        stage.session.error(f"{PROTO} declares no stream: name another file in {Path(__file__).name}")
    before, after = found[1], f"{found[1]}.renamed"
    proto.write_text(text.replace(found[0], f'    name: "{after}"'), encoding="utf-8")
    stage.run(stage.dev.python, "-m", "orki_codegen.cli", "generate")
    return before, after


@contextmanager
def _server(stage: Stage) -> Iterator[str]:
    command = [stage.dev.python, str(HERE / "server.py")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("pipes were asked for")
        try:
            yield process.stdout.readline().strip()
        finally:
            process.stdin.close()
            process.wait(LONGEST_S)


def _play(stage: Stage, sides: Mapping[str, Path]) -> None:
    with _server(stage) as url:
        streams = {
            who: stage.run(str(python), "-I", str(HERE / "publisher.py"), url, who, str(COUNT), cwd=stage.top)
            for who, python in sides.items()
        }
        read = {
            who: json.loads(
                stage.run(str(python), "-I", str(HERE / "consumer.py"), url, who, str(COUNT), cwd=stage.top)
            )
            for who, python in sides.items()
        }
    for who in sides:
        cells = [f"{each} consumer read {read[each].get(who, 0)}" for each in sides]
        stage.session.log(f'      {who} publisher → "{streams[who]}": {COUNT} published, {", ".join(cells)}')
    lost = {who: sum(COUNT - read[each].get(who, 0) for each in sides if each != who) for who in sides}
    if lost != dict.fromkeys(sides, COUNT):
        stage.session.error(f"old and new were to miss all of each other's events, and missed {lost}")
    stage.session.log(
        f"      {sum(lost.values())} events never reached the other half of the fleet, and nobody was told"
    )


def _ask(stage: Stage) -> None:
    done = stage.attempt(stage.dev.python, "-m", "orki_codegen.cli", "gate", "--against", "HEAD")
    for line in f"{done.stdout}{done.stderr}".splitlines():
        stage.session.log(f"      {line}")
    if done.returncode != 1 or RULE not in done.stdout:
        stage.session.error(f"the gate was to refuse this with {RULE}, and ended with {done.returncode}")
    stage.session.log("That is the gate doing its work: in CI, the step `breaking` would be red with these lines.")
