"""Environments of the skew matrix: nothing in them but wheels and what these ask for."""

from __future__ import annotations

__all__ = ["Side", "environment"]

import hashlib
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import nox

from nox_sessions.environments import Environment, uv
from nox_sessions.skew_wheels import CACHE


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """Where orki's own distributions come from.

    Attributes:
        name: For people, such as `published`.
        wheels: Of orki's distributions; none where they come from an index.
        index: Address of that index's pages.
        version: For an index: what a new environment is made for.
    """

    name: str
    wheels: tuple[Path, ...] = ()
    index: str = ""
    version: str = ""

    def requirements(self, *names: str) -> list[str]:
        """What to hand to an installer for these distributions, `orki-server` with its embedded server."""
        extras = {"orki-server": "[embedded]"}
        if self.index:
            return ["--index", self.index, *(f"{name}{extras.get(name, '')}" for name in names)]
        return [f"{name}{extras.get(name, '')} @ {self.wheel(name).as_uri()}" for name in names]

    def wheel(self, name: str) -> Path:
        """The wheel of a distribution."""
        return next(each for each in self.wheels if each.name.startswith(f"{name.replace('-', '_')}-")).absolute()

    def digest(self, *names: str) -> str:
        """What tells one set of wheels from another."""
        return self.version + "".join(_digest(self.wheel(name)) for name in names if not self.index)


RUNTIME = ("orki-agent", "orki-contract", "orki-control", "orki-events", "orki-server")
TOOLCHAIN = ("orki-codegen", "orki-contract")


def environment(
    session: nox.Session, side: Side, name: str, *, contract: Path | None = None, resolution: str | None = None
) -> Environment:
    """An environment, made now unless it stands and is made of the same.

    Args:
        session: Runs the installer.
        side: Whose wheels.
        name: Of its folder.
        contract: Wheel of the user's contract; None for an environment of the generator's.
        resolution: None: the versions of constraints.txt; `lowest-direct` or `highest`: as the wheels ask for.
    """
    folder = (CACHE / "environments" / name).absolute()
    names = RUNTIME if contract else TOOLCHAIN
    wanted = side.requirements(*names)
    if contract:
        wanted.append(f"skew-garden @ {contract.absolute().as_uri()}")
    if resolution is None:
        wanted += ["--constraints", str(Path("constraints.txt").absolute())]
    else:
        wanted += ["--resolution", resolution]
    interpreter = getattr(sys, "_base_executable", sys.executable)
    parts = [*wanted, side.digest(*names), _digest(contract) if contract else "", interpreter, sys.version]
    parts.append(Path("constraints.txt").read_text(encoding="utf-8"))
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    stamp = folder / "made-from"
    if not (stamp.is_file() and stamp.read_text(encoding="ascii") == digest):
        shutil.rmtree(folder, ignore_errors=True)
        create = ["venv", "--quiet", "--no-project", "--python", interpreter, str(folder)]
        session.run(uv(), *create, external=True, log=False)
        install = ["pip", "install", "--quiet", "--python", str(folder), *wanted]
        session.run(uv(), *install, external=True, log=False)
        stamp.write_text(digest, encoding="ascii")
    return Environment(folder)


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
