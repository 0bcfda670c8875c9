"""The sessions `publish` (gate, build, checks, upload; each green before the next begins), `diff` and `breaking`."""

from __future__ import annotations

__all__ = ["breaking", "diff", "publish"]

import json
import os
import subprocess
import sys
from pathlib import Path

import nox

from nox_sessions import wheels
from nox_sessions.environments import Environment
from nox_sessions.layout import distributions
from nox_sessions.release.options import Options


def publish(session: nox.Session, environment: Environment) -> None:
    """Publish as the session's arguments say; ends the process with the status of the step that ended it."""
    options = Options.parse(session.posargs)
    if options.folder != Path("dist"):
        session.error("--dist is for the upload alone: this session uploads what it has just built, in dist/")
    verdict = Path(session.create_tmp()).absolute() / "gate.json"
    verdict.unlink(missing_ok=True)
    gate = [environment.python, "-m", "orki_codegen.cli", "gate", "--against", "index"]
    gate += ["--index", options.address.simple, "--json", str(verdict)]
    session.log("gate: do the versions promise what changed since the last release?")
    if status := _status(environment, gate):
        _write(options, status, "the gate did not let it through", verdict)
        session.warn("the gate ended with %d: nothing was built, and nothing uploaded", status)
        sys.exit(status)
    try:
        wheels.build(session, environment, distributions(Path.cwd()))
    except Exception:
        _write(options, 1, "what was built did not pass its checks", verdict)
        raise
    status = _status(environment, [environment.python, "-m", "nox_sessions.release.upload", *session.posargs])
    if status:
        sys.exit(status)


def diff(session: nox.Session, environment: Environment) -> None:
    """Tell what changed in the contract; a break (1) is no failure here, what cannot be read (2) is."""
    status = _status(environment, [environment.python, "-m", "orki_contract", "diff", *session.posargs])
    if status not in {0, 1}:
        sys.exit(status)


def breaking(session: nox.Session, environment: Environment) -> None:
    """Run the gate alone: what it refuses (1) fails the session; what cannot be read (2) ends the process with 2."""
    status = _status(environment, [environment.python, "-m", "orki_codegen.cli", "gate", *session.posargs])
    if status == 1:
        # nox makes a 1 of it by itself, after the sessions that follow.
        session.error("a version promises too little, or something that was accepted is stale: see above")
    if status:
        sys.exit(status)


def _status(environment: Environment, command: list[str]) -> int:
    """Run a command in an environment and return its status, which nox would only take for good or bad."""
    path = os.pathsep.join([str(environment.folder / "bin"), os.environ.get("PATH", os.defpath)])
    variables = {**os.environ, "PATH": path, "VIRTUAL_ENV": str(environment.folder)}
    return subprocess.run(command, env=variables, check=False).returncode


def _write(options: Options, status: int, text: str, verdict: Path) -> None:
    """Write how it ended, and what the gate found, where the upload would have written its outcome."""
    if options.json is None:
        return
    document: dict[str, object] = {
        "outcome": "refused" if status == 1 else "failed",
        "status": status,
        "text": text,
        "index": options.address.simple,
        "upload": options.address.upload,
        "dry_run": options.dry_run,
        "files": [],
        "gate": json.loads(verdict.read_text(encoding="utf-8")) if verdict.is_file() else None,
    }
    options.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
