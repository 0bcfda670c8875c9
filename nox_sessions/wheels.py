"""Build the distributions and check the wheels in an empty environment.

    python -m nox_sessions.wheels OUT AGAIN FOLDER...

builds with hatchling in one process, in the environment that holds the pinned hatchling. The wheel in OUT is built from
the sdist beside it, so the sdist is complete. The wheel in AGAIN is built from the tree; both must have the same bytes.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from contextlib import chdir
from email import message_from_bytes
from pathlib import Path, PurePosixPath

import nox

from nox_sessions.environments import Environment, install
from nox_sessions.workspace import Distribution

# Archive members carry one fixed time (2020-01-01), so the same sources give the same bytes everywhere.
EPOCH = "1577836800"


def build(session: nox.Session, environment: Environment, members: Iterable[Distribution]) -> None:
    """Build each sdist and wheel into dist/, check them, and import every module in an empty environment."""
    out, again = Path("dist"), Path(session.create_tmp()) / "again"
    for folder in (out, again):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    folders = [str(each.folder) for each in members]
    environment.run(session, "python", "-m", "nox_sessions.wheels", str(out), str(again), *folders)
    wheels = sorted(out.glob("*.whl"))
    owners: dict[str, str] = {}
    problems = [fault for wheel in wheels for fault in _faults(wheel, owners)]
    for wheel in wheels:
        if _digest(wheel) != _digest(again / wheel.name):
            problems.append(f"{wheel.name}: the build from the sdist and the build from the tree differ")
    if problems:
        session.error("\n".join(problems))
    environment.run(session, "twine", "check", "--strict", *sorted(str(path) for path in out.iterdir()))
    _import_all(session, environment, wheels, Path(session.create_tmp()) / "clean")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _faults(wheel: Path, owners: dict[str, str]) -> list[str]:
    """Return the faults of a wheel: files that it lacks, and files that another wheel also contains.

    `owners` maps each file seen so far to its wheel; this wheel's files are added.
    """
    faults = []
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
    if not any(".dist-info/licenses/" in name for name in names):
        faults.append(f"{wheel.name}: contains no licence")
    modules = [PurePosixPath(name) for name in names if name.endswith(".py")]
    typed = {str(PurePosixPath(name).parent) for name in names if name.endswith("/py.typed")}
    for folder in sorted({str(_package(module)) for module in modules}):
        if folder not in typed:
            faults.append(f"{wheel.name}: {folder} has modules and no py.typed")
    if "orki" in typed or "orki/__init__.py" in names:
        faults.append(f"{wheel.name}: orki is a namespace package and must not contain files of its own")
    for name in names:
        if ".dist-info/" not in name and owners.setdefault(name, wheel.name) != wheel.name:
            faults.append(f"{wheel.name}: {name} is also in {owners[name]}")
    return faults


def _package(module: PurePosixPath) -> PurePosixPath:
    """Return the folder whose py.typed covers a module: its proto package, or the top of its hand-written package."""
    generated = module.stem.endswith(("_pb2", "_pb2_grpc", "_orki"))
    return module.parent if generated else PurePosixPath(module.parts[0])


def _import_all(session: nox.Session, environment: Environment, wheels: list[Path], folder: Path) -> None:
    """Install the wheels with their extras and the pinned dependencies into an empty environment, and import all."""
    wanted = [_with_extras(wheel) for wheel in wheels]
    install(session, folder, environment.python, "--constraints", "constraints.txt", *wanted)
    script = str(Path(__file__).with_name("import_everything.py"))
    empty = folder / "empty"
    empty.mkdir(exist_ok=True)
    arguments = [str(wheel.resolve()) for wheel in wheels]
    python = str((folder / "bin" / "python").absolute())
    with session.chdir(empty):
        session.run(python, "-I", "-W", "error", script, *arguments, external=True)


def _with_extras(wheel: Path) -> str:
    """Return what pip installs a wheel by: its path and the names of its extras."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [each for each in archive.namelist() if each.endswith(".dist-info/METADATA")]
        extras = message_from_bytes(archive.read(name)).get_all("Provides-Extra", [])
    return f"{wheel}[{','.join(extras)}]" if extras else str(wheel)


def build_archives(out: Path, again: Path, folders: list[Path]) -> None:
    """Build sdists and wheels, one distribution after another; hatchling builds the working directory."""
    from hatchling.build import build_sdist, build_wheel

    os.environ["SOURCE_DATE_EPOCH"] = EPOCH
    for folder in folders:
        with chdir(folder):
            build_wheel(str(again))
            sdist = build_sdist(str(out))
        with tarfile.open(out / sdist) as archive:
            archive.extractall(again, filter="data")
        with chdir(again / sdist.removesuffix(".tar.gz")):
            wheel = build_wheel(str(out))
        print(f"{folder}: {sdist}, {wheel}", flush=True)


if __name__ == "__main__":
    build_archives(Path(sys.argv[1]).absolute(), Path(sys.argv[2]).absolute(), [Path(each) for each in sys.argv[3:]])
