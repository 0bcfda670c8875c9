"""The wheels of the skew matrix: of a commit, of the tree as it stands, and of a user's contract in its versions."""

from __future__ import annotations

__all__ = ["CACHE", "CONTRACT", "Contract", "commit_wheels", "contract_wheel", "resolve", "tree_wheels"]

import hashlib
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import nox

from nox_sessions.environments import Environment
from nox_sessions.layout import Distribution, distributions

CACHE = Path(".nox/skew")
CONTRACT = Path("tests/skew/contract")
# Examples are nobody's runtime.
PLACES = ("packages/*", "codegen")


@dataclass(frozen=True, kw_only=True, slots=True)
class Contract:
    """A version of the user's contract.

    Attributes:
        name: For people, such as `v2`; a part of file names.
        version: Of the wheel.
        text: The proto file.
    """

    name: str
    version: str
    text: str


def tree_wheels(session: nox.Session, builder: Environment) -> list[Path]:
    """Wheels of the tree as it stands, committed or not; built only when a file of a distribution changed."""
    root = Path.cwd()
    members = distributions(root, PLACES)
    folder = CACHE / "wheels" / "tree"
    _build(session, builder, root, members, folder, _digest(_sources(root, members)))
    return sorted(folder.glob("*.whl"))


def commit_wheels(session: nox.Session, builder: Environment, commit: str) -> list[Path]:
    """Wheels of a commit, built by this tree's sessions; built once.

    Args:
        session: Told when the commit is not to be had.
        builder: Environment with the pinned hatchling.
        commit: Any name that git knows it by.
    """
    sha = _resolved(session, commit)
    folder = CACHE / "wheels" / sha
    tree = CACHE / "trees" / sha
    if not (folder / "made-from").is_file():
        shutil.rmtree(tree, ignore_errors=True)
        tree.mkdir(parents=True)
        archive = subprocess.run(["git", "archive", "--format=tar", sha], capture_output=True, check=True)
        subprocess.run(["tar", "-x", "-C", str(tree)], input=archive.stdout, check=True)
        _build(session, builder, tree, distributions(tree, PLACES), folder, sha)
        shutil.rmtree(tree)
    return sorted(folder.glob("*.whl"))


def contract_wheel(session: nox.Session, builder: Environment, generator: Environment, contract: Contract) -> Path:
    """The wheel of the user's contract, with the code that an installed generator writes; made once.

    Args:
        session: Runs the commands.
        builder: Environment with the pinned hatchling.
        generator: Environment that holds the wheel of orki-codegen.
        contract: Which version.
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
        member = Distribution("skew-garden", Path("garden"), ())
        _build(session, builder, folder, (member,), folder / "wheels", key)
    return next(folder.glob("wheels/*.whl"))


def _write_workspace(session: nox.Session, generator: Environment, folder: Path, contract: Contract) -> None:
    """A repository of a user's, as small as the generator takes it."""
    package = next((generator.folder / "lib").glob("python*/site-packages/orki_codegen"), None)
    vendored = {
        name: next(package.rglob(name), None) if package else None for name in ("buf.gen.yaml", "options.proto")
    }
    for name, place in {"buf.gen.yaml": "buf.gen.yaml", "options.proto": "proto/orki/options/v1/options.proto"}.items():
        source = vendored[name]
        if source is None:
            session.error(f"the wheel of orki-codegen in {generator.folder} brings no {name}")
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
    session: nox.Session,
    builder: Environment,
    root: Path,
    members: tuple[Distribution, ...],
    folder: Path,
    digest: str,
) -> None:
    """Builds wheels into a folder unless it holds those of the same digest."""
    stamp = folder / "made-from"
    if stamp.is_file() and stamp.read_text(encoding="ascii") == digest:
        return
    shutil.rmtree(folder, ignore_errors=True)
    again = folder / "again"
    again.mkdir(parents=True)
    folders = [str((root / each.folder).absolute()) for each in members]
    builder.run(session, "python", "-m", "nox_sessions.archives", str(folder), str(again), *folders)
    shutil.rmtree(again)
    stamp.write_text(digest, encoding="ascii")


def _resolved(session: nox.Session, commit: str) -> str:
    try:
        return resolve(Path.cwd(), commit)
    except LookupError as error:
        session.error(str(error))


def resolve(root: Path, commit: str) -> str:
    """The whole id of a commit.

    Raises:
        LookupError: The repository does not have it; the text says what to do.
    """
    git = ["git", "-C", str(root), "rev-parse"]
    asked = [*git, "--verify", "--quiet", f"{commit}^{{commit}}"]
    found = subprocess.run(asked, capture_output=True, text=True, check=False)
    if found.returncode:
        shallow = subprocess.run([*git, "--is-shallow-repository"], capture_output=True, text=True, check=False)
        why = "no such commit"
        if "true" in shallow.stdout:
            why = "this clone is shallow: `git fetch --unshallow` brings it"
        raise LookupError(f"The commit {commit} is to serve as the published one and is not here; {why}.")
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
