"""What serves as published: wheels on an index, or those of a commit while nothing is there."""

from __future__ import annotations

__all__ = ["published_side"]

import tomllib
from pathlib import Path

import nox

from nox_sessions.environments import Environment
from nox_sessions.skew_environments import Side
from nox_sessions.skew_wheels import commit_wheels

FILE = Path("published.toml")


def published_side(session: nox.Session, builder: Environment, wanted: str) -> Side:
    """The published side.

    Args:
        session: Told when there is none.
        builder: Environment with the pinned hatchling.
        wanted: A commit, the address of an index, or empty for what published.toml says.
    """
    if "://" in wanted:
        return Side(name=wanted, index=wanted, version=wanted)
    commit = wanted or (tomllib.loads(FILE.read_text(encoding="utf-8"))["commit"] if FILE.is_file() else "HEAD")
    wheels = tuple(commit_wheels(session, builder, commit))
    return Side(name=f"commit {wheels[0].parent.name[:12]}", wheels=wheels)
