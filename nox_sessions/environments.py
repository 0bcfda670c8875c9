"""The environments that sessions share; each is made again only when its inputs change.

`run` holds the distributions and the test runner, without buf and protoc. `dev` adds the generator's toolchain and the
checkers. Both hold editable installs, so editing a handler needs no install.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import nox
from nox.command import CommandFailed

from nox_sessions.workspace import Distribution, distributions

TOOLCHAIN = "orki-codegen"
FOREIGN = {"newest": "requirements.txt", "earlier": "earlier.txt"}
"""Folders of packages with protos of other projects, and their pins in tests/foreign."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """The contents of an environment.

    Attributes:
        name: The first part of its folder's name.
        groups: Dependency groups of the workspace's pyproject.toml.
        toolchain: Whether it holds the generator, buf and protoc.
        resolution: None installs the versions of constraints.txt. `lowest-direct` and `highest` resolve our
            dependencies within the ranges of each pyproject.toml, and pin only the tools of `groups`.
    """

    name: str
    groups: tuple[str, ...]
    toolchain: bool = False
    resolution: str | None = None


RUN = Recipe(name="run", groups=("test",))
DEV = Recipe(name="dev", groups=("build", "check", "launcher", "release", "test"), toolchain=True)
OLDEST = Recipe(name="oldest", groups=("test",), resolution="lowest-direct")
NEWEST = Recipe(name="newest", groups=("test",), resolution="highest")


@dataclass(frozen=True, slots=True)
class Environment:
    """An environment that is ready to run commands."""

    folder: Path

    @property
    def python(self) -> str:
        """The path of its interpreter."""
        return str(self.folder / "bin" / "python")

    def run(self, session: nox.Session, *command: str, env: Mapping[str, str] | None = None) -> None:
        """Run a command with this environment first on the PATH, so that `python` and scripts are its own."""
        path = os.pathsep.join([str(self.folder / "bin"), os.environ.get("PATH", os.defpath)])
        program = shutil.which(command[0], path=path)
        if program is None:
            session.error(f"{command[0]} is not in {self.folder}: remove that folder, and it is made again")
        variables = {"PATH": path, "VIRTUAL_ENV": str(self.folder), **(env or {})}
        session.run(program, *command[1:], env=variables, external=True)

    def run_each(self, session: nox.Session, *commands: tuple[str, ...]) -> None:
        """Run every command, also after a failure; the session fails if one of them failed."""
        failed = []
        for command in commands:
            try:
                self.run(session, *command)
            except CommandFailed:
                failed.append(" ".join(command))
        if failed:
            session.error(f"Failed: {'; '.join(failed)}")


def uv() -> str:
    """Return the path of uv: the one beside this nox, else one on the PATH."""
    beside = Path(sys.executable).parent / "uv"
    found = str(beside) if beside.is_file() else shutil.which("uv")
    if found is None:
        sys.exit("uv is neither beside nox nor on the PATH: start the sessions with ./noxw, which installs it")
    return found


def ensure(session: nox.Session, recipe: Recipe, python: Path | None = None) -> Environment:
    """Return the environment of a recipe; create it if it is missing or its inputs changed.

    Without `python`, it has nox's own interpreter.
    """
    root = Path.cwd()
    interpreter = str(python) if python else getattr(sys, "_base_executable", sys.executable)
    version = _version(interpreter)
    folder = root / Path(session.cache_dir).parent / f"{recipe.name}-{'.'.join(version.split('.')[:2])}"
    stamp = folder / "made-from"
    members = [each for each in distributions(root) if recipe.toolchain or each.name != TOOLCHAIN]
    digest = _digest(root, recipe, members, version)
    with (folder.parent / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (stamp.is_file() and stamp.read_text(encoding="ascii") == digest and (folder / "bin/python").exists()):
            session.log(f"Making {folder.name}: it is missing, or its inputs changed")
            install(session, folder, interpreter, *_requirements(root, recipe, members))
            stamp.write_text(digest, encoding="ascii")
    return Environment(folder)


def install(session: nox.Session, folder: Path, interpreter: str, *requirements: str) -> None:
    """Make an environment, or replace it, and install requirements with the options of `pip install`."""
    create = ["venv", "--quiet", "--clear", "--no-project", "--python", interpreter, str(folder)]
    session.run(uv(), *create, external=True, log=False)
    command = ["pip", "install", "--quiet", "--python", str(folder), *requirements]
    session.run(uv(), *command, external=True, log=False)


def _version(interpreter: str) -> str:
    """Return an interpreter's version, such as `3.11.7`."""
    command = [interpreter, "-Ic", "import platform; print(platform.python_version())"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _digest(root: Path, recipe: Recipe, members: list[Distribution], version: str) -> str:
    """Return a digest of everything that determines the contents of an environment, its path included."""
    groups = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["dependency-groups"]
    parts = [str(root), version, repr(recipe), repr(groups), (root / "constraints.txt").read_text(encoding="utf-8")]
    for each in members:
        parts += [str(each.folder), (root / each.folder / "pyproject.toml").read_text(encoding="utf-8")]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _requirements(root: Path, recipe: Recipe, members: list[Distribution]) -> list[str]:
    command = ["--build-constraints", "constraints.txt"]
    if recipe.resolution is None:
        command += ["--constraints", "constraints.txt"]
        for group in recipe.groups:
            command += ["--group", group]
    else:
        command += ["--resolution", recipe.resolution, *_pinned(root, recipe.groups)]
    for each in members:
        command += ["--editable", each.requirement]
    return command


def _pinned(root: Path, groups: tuple[str, ...]) -> list[str]:
    """Return the tools of some dependency groups as pinned requirements."""
    table = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["dependency-groups"]
    pins = re.findall(r"^([\w.-]+)==([^\s;]+)", (root / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    versions = dict(pins)
    return [f"{name}=={versions[name]}" for group in groups for name in table[group]]


def foreign_packages(session: nox.Session, environment: Environment) -> Path:
    """Install the pinned packages of tests/foreign by hash, without their dependencies; return the parent folder."""
    top = Path(session.cache_dir).parent.absolute() / "foreign"
    for name, file in FOREIGN.items():
        folder, pins = top / name, Path("tests/foreign") / file
        text = pins.read_text(encoding="ascii")
        stamp = folder.with_suffix(".made-from")
        if not stamp.is_file() or stamp.read_text(encoding="ascii") != text:
            command = ["pip", "install", "--quiet", "--python", environment.python, "--target", str(folder)]
            command += ["--no-deps", "--upgrade", "--only-binary", ":all:", "--require-hashes", "--requirement"]
            session.run(uv(), *command, str(pins), external=True)
            stamp.write_text(text, encoding="ascii")
    return top
