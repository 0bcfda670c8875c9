"""Environments of the skew matrix: nothing in them but wheels and what these ask for."""

from __future__ import annotations

__all__ = ["RUNTIME", "TOOLCHAIN", "Side", "environment"]

import hashlib
import re
import shutil
import sys
import zipfile
from dataclasses import dataclass
from email.parser import BytesParser
from pathlib import Path

import nox
from packaging.requirements import Requirement

from nox_sessions.environments import Environment, uv
from nox_sessions.skew_wheels import CACHE

RUNTIME = ("orki-agent", "orki-contract", "orki-control", "orki-events", "orki-server")
TOOLCHAIN = ("orki-codegen", "orki-contract")
_EXTRA = "embedded"


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """Where orki's own distributions come from.

    Attributes:
        name: For people, such as `commit 0123456789ab`.
        wheels: Of orki's distributions.
    """

    name: str
    wheels: tuple[Path, ...]

    def wheel(self, name: str) -> Path:
        """The wheel of a distribution."""
        return next(each for each in self.wheels if each.name.startswith(f"{name.replace('-', '_')}-")).absolute()


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
    wheels = [side.wheel(each) for each in (RUNTIME if contract else TOOLCHAIN)]
    wheels += [contract.absolute()] if contract else []
    wanted = [_requirement(wheel) for wheel in wheels]
    pins = Path("constraints.txt")
    if resolution is None:
        wanted += ["--constraints", str(pins.absolute())]
    else:
        # What a wheel asks for is no direct requirement to the installer, and would not be taken at its lowest.
        wanted += ["--resolution", resolution, *_asked_for(wheels)]
    interpreter = getattr(sys, "_base_executable", sys.executable)
    digests = [hashlib.sha256(wheel.read_bytes()).hexdigest() for wheel in wheels]
    parts = [*wanted, *digests, interpreter, sys.version, pins.read_text(encoding="utf-8")]
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


def _requirement(wheel: Path) -> str:
    """A wheel as what to install, the server with its embedded one."""
    name = wheel.name.partition("-")[0].replace("_", "-")
    extra = f"[{_EXTRA}]" if name == "orki-server" else ""
    return f"{name}{extra} @ {wheel.as_uri()}"


def _asked_for(wheels: list[Path]) -> list[str]:
    """The ranges of others' distributions that some wheels ask for."""
    own = {wheel.name.partition("-")[0].replace("_", "-") for wheel in wheels}
    found = set()
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            (metadata,) = (each for each in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", each))
            headers = BytesParser().parsebytes(archive.read(metadata), headersonly=True)
        for line in headers.get_all("Requires-Dist", []):
            requirement = Requirement(line)
            if requirement.name in own or not (
                requirement.marker is None or requirement.marker.evaluate({"extra": _EXTRA})
            ):
                continue
            requirement.marker = None
            found.add(str(requirement))
    return sorted(found)
