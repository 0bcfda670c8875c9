"""What serves as published: the last wheels on an index, or those of a commit while nothing is there."""

from __future__ import annotations

__all__ = ["published_side"]

import json
import shutil
import subprocess
from pathlib import Path

import nox

from nox_sessions.environments import Environment
from nox_sessions.skew_environments import RUNTIME, TOOLCHAIN, Side
from nox_sessions.skew_wheels import CACHE, commit_wheels


def published_side(session: nox.Session, builder: Environment, wanted: str) -> Side:
    """The published side.

    Args:
        session: Told when there is none.
        builder: Environment with the pinned hatchling, and with orki-codegen.
        wanted: A commit, the address of an index, or empty for what published.toml says.
    """
    if wanted and "://" not in wanted:
        return _of_commit(session, builder, wanted)
    out = (CACHE / "wheels" / "index").absolute()
    shutil.rmtree(out, ignore_errors=True)
    names = sorted({*RUNTIME, *TOOLCHAIN})
    command = [builder.python, "-m", "nox_sessions.skew_release", str(out), *names]
    command += ["--index", wanted] if wanted else []
    asked = subprocess.run(command, capture_output=True, text=True, check=False)
    if asked.returncode:
        session.error(asked.stderr.strip())
    answer = json.loads(asked.stdout)
    standing = _of_commit(session, builder, answer["commit"]) if answer["commit"] else None
    if not answer["wheels"]:
        assert standing is not None, "without wheels there is a commit"
        return standing
    wheels = [Path(each) for each in answer["wheels"].values()]
    label = answer["index"]
    if standing is not None:
        wheels += [standing.wheel(name) for name in answer["missing"]]
        label = f"{label}, and of {standing.name} {', '.join(answer['missing'])}"
    return Side(name=label, wheels=tuple(wheels))


def _of_commit(session: nox.Session, builder: Environment, commit: str) -> Side:
    wheels = tuple(commit_wheels(session, builder, commit))
    return Side(name=f"commit {wheels[0].parent.name[:12]}", wheels=wheels)
