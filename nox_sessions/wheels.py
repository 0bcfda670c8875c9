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

# Archive members carry one fixed time (2020-01-01): the same sources give the same bytes, wherever they are built.
EPOCH = "1577836800"


def build(session: nox.Session, environment: Environment, members: Iterable[Distribution]) -> None:
    """Build each distribution's sdist and wheel into dist/, check them, and import them in an empty environment.

    The wheel is built from the sdist, so that one cannot lack what the other has, and once more from the tree: the
    bytes must agree.
    """
    out = Path("dist")
    shutil.rmtree(out, ignore_errors=True)
    scratch = Path(session.create_tmp()).resolve()
    problems: list[str] = []
    owners: dict[str, str] = {}
    for each in members:
        _build_one(session, environment, each, out)
        wheel = _only(out.glob(f"{each.name.replace('-', '_')}-*.whl"), each.name)
        shutil.rmtree(scratch / each.name, ignore_errors=True)
        again = ["python", "-m", "hatchling", "build", "--target", "wheel", "--directory"]
        with session.chdir(each.folder):
            environment.run(session, *again, str(scratch / each.name), env={"SOURCE_DATE_EPOCH": EPOCH})
        if _digest(wheel) != _digest(scratch / each.name / wheel.name):
            problems.append(f"{wheel.name}: built from the sdist it has other bytes than built from the tree")
        problems += _faults(wheel, owners)
    if problems:
        session.error("\n".join(problems))
    archives = sorted(str(path) for path in out.iterdir())
    environment.run(session, "twine", "check", "--strict", *archives)
    _try_wheels(session, environment, sorted(out.glob("*.whl")), scratch / "stranger")


def _build_one(session: nox.Session, environment: Environment, each: Distribution, out: Path) -> None:
    """Build one distribution, with the build backend that constraints.txt pins."""
    command = ["python", "-m", "build", "--no-isolation", "--outdir", str(out), str(each.folder)]
    environment.run(session, *command, env={"SOURCE_DATE_EPOCH": EPOCH})


def _only(found: Iterable[Path], name: str) -> Path:
    """Return the one path there is."""
    paths = list(found)
    if len(paths) != 1:
        raise RuntimeError(f"{name}: expected one wheel in dist/, found {[path.name for path in paths]}")
    return paths[0]


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
