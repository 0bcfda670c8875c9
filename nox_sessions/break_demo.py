"""`nox -s breaking -- --show`: break a contract in a copy, show the lost events, and run the gate on it.

The demo renames a stream. Old and new code then publish and consume on different streams.
"""

from __future__ import annotations

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

from nox_sessions.environments import Environment, install

ACTORS = Path(__file__).with_name("break_demo_actors.py").absolute()
COPIED = ("proto", "packages", "examples", "docs/reference", "buf.yaml", "buf.gen.yaml")
LEFT_OUT = shutil.ignore_patterns("tests", "__pycache__", ".*")
PROTO = "proto/orki/events/v1/usage.proto"
RULE = "ORKI_STREAM_REMOVED"
COUNT = 5
LONGEST_S = 120


@dataclass(frozen=True, slots=True)
class Demo:
    """The session and folders of one demo; `dev` holds the generator, the gate and the embedded server."""

    session: nox.Session
    dev: Environment
    top: Path

    @property
    def tree(self) -> Path:
        """The copy of the workspace."""
        return self.top / "tree"

    def run(self, *command: str, cwd: Path | None = None) -> str:
        """Run a command and return its output; the session fails with the output if the command fails."""
        done = self.attempt(*command, cwd=cwd)
        if done.returncode != 0:
            self.session.error(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
        return done.stdout.strip()

    def attempt(self, *command: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command and return its result, also if it fails."""
        variables = {name: value for name, value in os.environ.items() if not name.startswith(("GIT_", "PYTHON"))}
        return subprocess.run(
            command, cwd=cwd or self.tree, env=variables, text=True, capture_output=True, timeout=LONGEST_S, check=False
        )


def show(session: nox.Session, dev: Environment) -> None:
    """Run the demo; the session fails if a step has another outcome than the expected one."""
    with tempfile.TemporaryDirectory(prefix="orki-demo-") as folder:
        demo = Demo(session, dev, Path(folder))
        _copy(demo)
        session.log("[1/5] building the wheels that users have")
        old = _environment(demo, "old")
        before, after = _rename(demo)
        session.log(f'[2/5] the stream "{before}" is renamed to "{after}" and its code is generated again')
        session.log("[3/5] building the wheels of the change, with the same version")
        new = _environment(demo, "new")
        session.log(f"[4/5] a rolling upgrade: old and new publish {COUNT} events each, old and new consume")
        _upgrade(demo, {"old": old, "new": new})
        session.log("[5/5] the gate: orki-codegen gate --against HEAD")
        _run_gate(demo)


def _copy(demo: Demo) -> None:
    for name in COPIED:
        source, target = Path(name), demo.tree / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=LEFT_OUT)
        else:
            shutil.copy(source, target)
    identity = ("-c", "user.name=show", "-c", "user.email=show@localhost", "-c", "commit.gpgsign=false")
    for command in (("init", "--quiet"), ("add", "--all"), ("commit", "--quiet", "--message", "what users have")):
        demo.run("git", *identity, *command)


def _environment(demo: Demo, name: str) -> Path:
    """Build the event plane's wheels, install them into an environment and return its interpreter."""
    wheels, folder = demo.top / f"{name}-wheels", demo.top / f"{name}-environment"
    for package in ("orki-contract", "orki-events"):
        build = ("-m", "build", "--wheel", "--no-isolation", "--skip-dependency-check", "--outdir", str(wheels))
        demo.run(demo.dev.python, *build, f"packages/{package}")
    install(demo.session, folder, demo.dev.python, "--constraints", "constraints.txt", *map(str, wheels.iterdir()))
    return folder / "bin" / "python"


def _rename(demo: Demo) -> tuple[str, str]:
    proto = demo.tree / PROTO
    text = proto.read_text(encoding="utf-8")
    found = re.search(r'^    name: "([^"]+)"', text, re.MULTILINE)
    if found is None:
        demo.session.error(f"{PROTO} declares no stream: name another file in {Path(__file__).name}")
    before, after = found[1], f"{found[1]}.renamed"
    proto.write_text(text.replace(found[0], f'    name: "{after}"'), encoding="utf-8")
    demo.run(demo.dev.python, "-m", "orki_codegen.cli", "generate")
    return before, after


@contextmanager
def _server(demo: Demo) -> Iterator[str]:
    command = [demo.dev.python, str(ACTORS), "serve"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("the server was started without pipes")
        try:
            yield process.stdout.readline().strip()
        finally:
            process.stdin.close()
            process.wait(LONGEST_S)


def _upgrade(demo: Demo, sides: Mapping[str, Path]) -> None:
    with _server(demo) as url:
        streams = {
            who: demo.run(str(python), "-I", str(ACTORS), "publish", url, who, str(COUNT), cwd=demo.top)
            for who, python in sides.items()
        }
        read = {
            who: json.loads(demo.run(str(python), "-I", str(ACTORS), "consume", url, who, str(COUNT), cwd=demo.top))
            for who, python in sides.items()
        }
    for who in sides:
        cells = [f"{each} consumer read {read[each].get(who, 0)}" for each in sides]
        demo.session.log(f'      {who} publisher → "{streams[who]}": {COUNT} published, {", ".join(cells)}')
    lost = {who: sum(COUNT - read[each].get(who, 0) for each in sides if each != who) for who in sides}
    if lost != dict.fromkeys(sides, COUNT):
        demo.session.error(f"old and new should have missed all events of each other, and missed {lost}")
    demo.session.log(f"      {sum(lost.values())} events never reached the other half of the fleet, without any error")


def _run_gate(demo: Demo) -> None:
    done = demo.attempt(demo.dev.python, "-m", "orki_codegen.cli", "gate", "--against", "HEAD")
    for line in f"{done.stdout}{done.stderr}".splitlines():
        demo.session.log(f"      {line}")
    if done.returncode != 1 or RULE not in done.stdout:
        demo.session.error(f"the gate should have refused this with {RULE}, and exited with {done.returncode}")
    demo.session.log("The gate refused the change. In CI the step `breaking` fails with these lines.")
