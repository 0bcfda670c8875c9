"""Build the wheels of the skew matrix: of a commit, of the working tree, and of a user's contract."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import nox

from nox_sessions.environments import Environment
from nox_sessions.workspace import Distribution, distributions

CACHE = Path(".nox/skew")
CONTRACT = Path("tests/skew/contract")
# Without the examples, which nothing here runs.
FOLDERS = ("packages/*", "codegen")


@dataclass(frozen=True, kw_only=True, slots=True)
class Contract:
    """A version of the user's contract.

    Attributes:
        name: Its name, such as `v2`; part of file names.
        version: The version of its wheel.
        text: The text of its proto file.
    """

    name: str
    version: str
    text: str


def tree_wheels(session: nox.Session, builder: Environment) -> list[Path]:
    """Return the wheels of the working tree; build them if a file of a distribution changed."""
    root = Path.cwd()
    members = distributions(root, FOLDERS)
    folder = CACHE / "wheels" / "tree"
    _build(session, builder, root, members, folder, _digest(_sources(root, members)))
    return sorted(folder.glob("*.whl"))


def commit_wheels(session: nox.Session, builder: Environment, commit: str) -> list[Path]:
    """Return the wheels of a commit; this tree's sessions build them once.

    Args:
        session: The session; it fails if git does not know the commit.
        builder: The environment with the pinned hatchling.
        commit: Any name of the commit.
    """
    sha = _resolved(session, commit)
    folder = CACHE / "wheels" / sha
    tree = CACHE / "trees" / sha
    if not (folder / "made-from").is_file():
        shutil.rmtree(tree, ignore_errors=True)
        tree.mkdir(parents=True)
        archive = subprocess.run(["git", "archive", "--format=tar", sha], capture_output=True, check=True)
        subprocess.run(["tar", "-x", "-C", str(tree)], input=archive.stdout, check=True)
        _build(session, builder, tree, distributions(tree, FOLDERS), folder, sha)
        shutil.rmtree(tree)
    return sorted(folder.glob("*.whl"))


def contract_wheel(session: nox.Session, builder: Environment, generator: Environment, contract: Contract) -> Path:
    """Return the wheel of the user's contract with the code of an installed generator; build it once.

    Args:
        session: The session; it runs the commands.
        builder: The environment with the pinned hatchling.
        generator: The environment that holds the wheel of orki-codegen.
        contract: The version of the contract.
    """
    made_from = (generator.folder / "made-from").read_text(encoding="ascii")
    key = hashlib.sha256(f"{made_from}\0{contract}".encode()).hexdigest()
    folder = CACHE / "contracts" / f"{contract.name}-{key[:12]}"
    if not list(folder.glob("wheels/*.whl")):
        shutil.rmtree(folder, ignore_errors=True)
        _write_workspace(session, generator, folder, contract)
        with session.chdir(folder):
            path = os.pathsep.join([str(generator.folder / "bin"), os.environ.get("PATH", os.defpath)])
            command = str(generator.folder / "bin/orki-codegen")
            session.run(command, "generate", env={"PATH": path}, external=True, silent=True)
        member = Distribution("skew-garden", Path("garden"))
        _build(session, builder, folder, (member,), folder / "wheels", key)
    return next(folder.glob("wheels/*.whl"))


def _write_workspace(session: nox.Session, generator: Environment, folder: Path, contract: Contract) -> None:
    """Write the smallest user repository that the generator accepts."""
    package = next((generator.folder / "lib").glob("python*/site-packages/orki_codegen"), None)
    vendored = {
        name: next(package.rglob(name), None) if package else None for name in ("buf.gen.yaml", "options.proto")
    }
    for name, place in {"buf.gen.yaml": "buf.gen.yaml", "options.proto": "proto/orki/options/v1/options.proto"}.items():
        source = vendored[name]
        if source is None:
            session.error(f"the wheel of orki-codegen in {generator.folder} has no {name}")
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, folder / place)
    (folder / "buf.yaml").write_text("version: v2\nmodules:\n  - path: proto\n", encoding="utf-8")
    proto = folder / "proto/garden/v1/garden.proto"
    proto.parent.mkdir(parents=True)
    proto.write_text(contract.text, encoding="utf-8")
    project = (CONTRACT / "pyproject.toml").read_text(encoding="utf-8")
    (folder / "garden").mkdir()
    written = project.replace('version = "0"', f'version = "{contract.version}"')
    (folder / "garden/pyproject.toml").write_text(written, encoding="utf-8")


def _build(
    session: nox.Session, builder: Environment, root: Path, members: tuple[Distribution, ...], folder: Path, digest: str
) -> None:
    """Build wheels into a folder unless it holds those of the same digest."""
    stamp = folder / "made-from"
    if stamp.is_file() and stamp.read_text(encoding="ascii") == digest:
        return
    shutil.rmtree(folder, ignore_errors=True)
    again = folder / "again"
    again.mkdir(parents=True)
    folders = [str((root / each.folder).absolute()) for each in members]
    builder.run(session, "python", "-m", "nox_sessions.wheels", str(folder), str(again), *folders)
    shutil.rmtree(again)
    stamp.write_text(digest, encoding="ascii")


def _resolved(session: nox.Session, commit: str) -> str:
    try:
        return resolve(Path.cwd(), commit)
    except LookupError as error:
        session.error(str(error))


def resolve(root: Path, commit: str) -> str:
    """Return the full id of a commit.

    Raises:
        LookupError: The repository does not have it.
    """
    git = ["git", "-C", str(root), "rev-parse"]
    asked = [*git, "--verify", "--quiet", f"{commit}^{{commit}}"]
    found = subprocess.run(asked, capture_output=True, text=True, check=False)
    if found.returncode:
        shallow = subprocess.run([*git, "--is-shallow-repository"], capture_output=True, text=True, check=False)
        why = "no such commit"
        if "true" in shallow.stdout:
            why = "this clone is shallow: `git fetch --unshallow` fetches it"
        raise LookupError(f"The published commit {commit} is not in this repository; {why}.")
    return found.stdout.strip()


def _sources(root: Path, members: tuple[Distribution, ...]) -> list[Path]:
    found = []
    for each in members:
        folder = root / each.folder
        found += [folder / name for name in ("pyproject.toml", "README.md", "LICENSE")]
        found += sorted(path for top in ("src", "gen") for path in (folder / top).rglob("*") if path.is_file())
    return [path for path in found if path.is_file() and "__pycache__" not in path.parts]


def _digest(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file}\0".encode())
        digest.update(file.read_bytes())
        digest.update(b"\0")
    return digest.hexdigest()
