"""Build the distributions, and try what came out as someone would who has only the wheels."""

from __future__ import annotations

__all__ = ["build"]

import hashlib
import shutil
import zipfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import nox

from nox_sessions.environments import Environment, uv
from nox_sessions.layout import Distribution


def build(session: nox.Session, environment: Environment, members: Iterable[Distribution]) -> None:
    """Build each distribution's sdist and wheel into dist/, check them, and import them in an empty environment."""
    out, again = Path("dist"), Path(session.create_tmp()) / "again"
    for folder in (out, again):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    folders = [str(each.folder) for each in members]
    environment.run(session, "python", "-m", "nox_sessions.archives", str(out), str(again), *folders)
    wheels = sorted(out.glob("*.whl"))
    owners: dict[str, str] = {}
    problems = [fault for wheel in wheels for fault in _faults(wheel, owners)]
    for wheel in wheels:
        if _digest(wheel) != _digest(again / wheel.name):
            problems.append(f"{wheel.name}: built from the sdist it has other bytes than built from the tree")
    if problems:
        session.error("\n".join(problems))
    environment.run(session, "twine", "check", "--strict", *sorted(str(path) for path in out.iterdir()))
    _try_wheels(session, environment, wheels, Path(session.create_tmp()) / "stranger")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _faults(wheel: Path, owners: dict[str, str]) -> list[str]:
    """Return what a wheel lacks, and which of its files another wheel brings as well.

    Args:
        wheel: its path.
        owners: each file seen so far, and the wheel that brought it; this wheel's files are added.
    """
    faults = []
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
    if not any(".dist-info/licenses/" in name for name in names):
        faults.append(f"{wheel.name}: carries no licence")
    modules = [PurePosixPath(name) for name in names if name.endswith(".py")]
    typed = {str(PurePosixPath(name).parent) for name in names if name.endswith("/py.typed")}
    for folder in sorted({str(_package(module)) for module in modules}):
        if folder not in typed:
            faults.append(f"{wheel.name}: {folder} has modules, and no py.typed")
    if "orki" in typed or "orki/__init__.py" in names:
        faults.append(f"{wheel.name}: orki is a namespace that many wheels share, and may hold no file of its own")
    for name in names:
        if ".dist-info/" not in name and owners.setdefault(name, wheel.name) != wheel.name:
            faults.append(f"{wheel.name}: {name} is in {owners[name]} too")
    return faults


def _package(module: PurePosixPath) -> PurePosixPath:
    """Return the folder that must hold a module's py.typed: its proto package's, or its hand-written package's top."""
    generated = module.stem.endswith(("_pb2", "_pb2_grpc", "_orki"))
    return module.parent if generated else PurePosixPath(module.parts[0])


def _try_wheels(session: nox.Session, environment: Environment, wheels: list[Path], stranger: Path) -> None:
    """Install the wheels into an empty environment, with the pinned dependencies, and import all that they bring."""
    create = ["venv", "--quiet", "--clear", "--no-project", "--python", environment.python, str(stranger)]
    session.run(uv(), *create, external=True)
    install = [uv(), "pip", "install", "--quiet", "--python", str(stranger), "--constraints", "constraints.txt"]
    session.run(*install, *map(str, wheels), external=True)
    script = str(Path(__file__).with_name("import_everything.py"))
    empty = stranger / "empty"
    empty.mkdir(exist_ok=True)
    arguments = [str(wheel.resolve()) for wheel in wheels]
    python = str((stranger / "bin" / "python").absolute())
    with session.chdir(empty):
        session.run(python, "-I", "-W", "error", script, *arguments, external=True)
