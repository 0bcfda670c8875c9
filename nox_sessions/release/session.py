"""The sessions `publish`, `diff` and `breaking`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import nox

from nox_sessions import wheels
from nox_sessions.environments import Environment
from nox_sessions.release.upload import Options
from nox_sessions.workspace import distributions


def publish(session: nox.Session, environment: Environment) -> None:
    """Run the gate, build, check and upload; exit with the status of the first step that fails."""
    options = Options.parse(session.posargs)
    if options.folder != Path("dist"):
        session.error("--dist is an option of the upload alone: this session uploads the files that it builds in dist/")
    findings = Path(session.create_tmp()).absolute() / "gate.json"
    findings.unlink(missing_ok=True)
    gate = [environment.python, "-m", "orki_codegen.cli", "gate", "--against", "index"]
    gate += ["--index", options.address.simple, "--json", str(findings)]
    session.log("gate: checking that the versions fit the changes since the last release")
    if status := _status(environment, gate):
        _write(options, status, "the gate failed", findings)
        session.warn("the gate exited with %d: nothing was built or uploaded", status)
        sys.exit(status)
    try:
        wheels.build(session, environment, distributions(Path.cwd()))
    except Exception:
        _write(options, 1, "the built files did not pass their checks", findings)
        raise
    status = _status(environment, [environment.python, "-m", "nox_sessions.release.upload", *session.posargs])
    if status:
        sys.exit(status)


def diff(session: nox.Session, environment: Environment) -> None:
    """Show contract changes; a break (status 1) is no failure here, an unreadable contract (2) is."""
    status = _status(environment, [environment.python, "-m", "orki_contract", "diff", *session.posargs])
    if status not in {0, 1}:
        sys.exit(status)


def breaking(session: nox.Session, environment: Environment) -> None:
    """Run the gate alone; status 1 fails the session, and status 2 exits the process with 2."""
    status = _status(environment, [environment.python, "-m", "orki_codegen.cli", "gate", *session.posargs])
    if status == 1:
        # nox then runs the other sessions and exits with 1.
        session.error("a version is too low, or a range or an accepted break is wrong: see above")
    if status:
        sys.exit(status)


def _status(environment: Environment, command: list[str]) -> int:
    """Run a command in an environment and return its exit status, which `session.run` does not return."""
    path = os.pathsep.join([str(environment.folder / "bin"), os.environ.get("PATH", os.defpath)])
    variables = {**os.environ, "PATH": path, "VIRTUAL_ENV": str(environment.folder)}
    return subprocess.run(command, env=variables, check=False).returncode


def _write(options: Options, status: int, text: str, findings: Path) -> None:
    """Write the outcome and the gate's findings to the file of the upload's outcome."""
    gate = json.loads(findings.read_text(encoding="utf-8")) if findings.is_file() else None
    options.outcome("refused" if status == 1 else "failed", text, status, gate=gate)
