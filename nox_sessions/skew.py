"""The session `skew`: old wheels meet new ones in every plane, in environments of their own."""

from __future__ import annotations

__all__ = ["skew"]

import argparse
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nox

from nox_sessions.environments import Environment
from nox_sessions.skew_environments import Side, environment
from nox_sessions.skew_published import published_side
from nox_sessions.skew_wheels import CACHE, CONTRACT, Contract, contract_wheel, tree_wheels

DRIVER = Path("tests/skew/matrix.py")


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What the session is told.

    Attributes:
        quick: Whether to leave out the dependency extremes and what the short form says nothing new about.
        json: Where to write the verdicts for a program, or None.
        published: A commit or the address of an index; empty for what published.toml names.
    """

    quick: bool
    json: Path | None
    published: str

    @classmethod
    def parse(cls, arguments: Sequence[str]) -> Options:
        """Read a command line; what is wrong with it is said on stderr, and ends the process with status 2."""
        parser = argparse.ArgumentParser(prog="nox -s skew --", description=__doc__)
        parser.add_argument("--quick", action="store_true", help="without the lowest and newest dependencies")
        parser.add_argument("--json", type=Path, metavar="FILE", help="write the verdicts there, too")
        help_text = "what serves as published: a commit, or the address of an index (default: published.toml says)"
        parser.add_argument("--published", default="", metavar="COMMIT|INDEX", help=help_text)
        given = parser.parse_args(arguments)
        return cls(quick=given.quick, json=given.json, published=given.published)


def skew(session: nox.Session, builder: Environment) -> None:
    """Build, install, let them meet, and end with status 1 where a pair does not do what it must."""
    options = Options.parse(session.posargs)
    CACHE.mkdir(parents=True, exist_ok=True)
    wheels = tuple(tree_wheels(session, builder))
    head = Side(name="head", wheels=wheels)
    published = published_side(session, builder, options.published)
    session.log(f"published: {published.name}")
    environments = _environments(session, builder, head, published, options)
    config = CACHE / "matrix.json"
    config.write_text(json.dumps({"environments": environments, "published": published.name}), encoding="utf-8")
    command = ["-E", "-s", str(DRIVER), str(config)]
    command += ["--json", str(options.json)] if options.json else []
    builder.run(session, "python", *command)


def _environments(
    session: nox.Session, builder: Environment, head: Side, published: Side, options: Options
) -> dict[str, str]:
    """The interpreter of every environment, by `SIDE-CONTRACT`."""
    made = {}
    for side, role, names in (
        (published, "published", ("v1",)),
        (head, "head", ("v1", "v2", "v3", "planted")),
    ):
        generator = environment(session, side, f"{role}-generator")
        for name in names:
            wheel = contract_wheel(session, builder, generator, _contract(name))
            there = environment(session, side, f"{role}-{name}", contract=wheel)
            made[f"{role}-{name}"] = there.python
            if name == "planted":
                # Without its image code has nothing to compare: the checks are off, and the break itself is seen.
                for image in there.folder.glob("lib/python*/site-packages/garden/v1/contract.binpb"):
                    image.unlink()
            if name == "v2" and not options.quick:
                for label, resolution in (("lowest", "lowest-direct"), ("newest", "highest")):
                    extreme = environment(session, side, f"{label}-v2", contract=wheel, resolution=resolution)
                    made[f"{label}-v2"] = extreme.python
    return made


def _contract(name: str) -> Contract:
    """A version of the user's contract; `planted` is v2 with what must not happen, to see the matrix turn red.

    Raises:
        ValueError: v2.proto does not hold what is to be broken.
    """
    if name != "planted":
        text = (CONTRACT / f"{name}.proto").read_text(encoding="utf-8")
        return Contract(name=name, version=f"{name[1:]}.0", text=text)
    text = (CONTRACT / "v2.proto").read_text(encoding="utf-8")
    for line in json.loads((CONTRACT / "planted.json").read_text(encoding="utf-8")):
        if line["old"] not in text:
            raise ValueError(f"v2.proto has no {line['old']!r} in which to plant a break")
        text = text.replace(line["old"], line["new"], 1)
    digest = int(hashlib.sha256(text.encode()).hexdigest()[:6], 16)
    return Contract(name=name, version=f"2.0.{digest}", text=text)
