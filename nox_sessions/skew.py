"""The session `skew`: run published wheels against the tree's wheels in every plane.

    python -m nox_sessions.skew OUT NAME... [--index URL]

finds the published wheels or commit, in the environment that holds orki-codegen, and prints one JSON object. Without an
index it uses the commit that published.toml names; that file exists as long as no index has a release. Without that
file it uses the index of uv or pip. Distributions that the index lacks come from the commit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from email.parser import BytesParser
from pathlib import Path

import nox
from packaging.requirements import Requirement

from nox_sessions.environments import Environment, install
from nox_sessions.workspace import Distribution, distributions

DRIVER = Path("tests/skew/matrix.py")
CACHE = Path(".nox/skew")
CONTRACT = Path("tests/skew/contract")
# The examples are left out, because nothing here runs them.
FOLDERS = ("packages/*", "codegen")
RUNTIME = ("orki-agent", "orki-contract", "orki-control", "orki-events", "orki-server")
TOOLCHAIN = ("orki-codegen", "orki-contract")
_EXTRA = "embedded"


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """The options of the session.

    Attributes:
        quick: Whether to leave out the lowest and newest dependencies.
        json: The file for the results, or None.
        published: A commit or an index URL; empty for the commit that published.toml names.
    """

    quick: bool
    json: Path | None
    published: str

    @classmethod
    def parse(cls, arguments: Sequence[str]) -> Options:
        """Parse a command line; wrong usage exits with status 2."""
        parser = argparse.ArgumentParser(prog="nox -s skew --", description="Run published wheels against the tree's.")
        parser.add_argument("--quick", action="store_true", help="skip the lowest and newest dependencies")
        parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file")
        help_text = "the published side: a commit or an index URL (default: the commit that published.toml names)"
        parser.add_argument("--published", default="", metavar="COMMIT|INDEX", help=help_text)
        given = parser.parse_args(arguments)
        return cls(quick=given.quick, json=given.json, published=given.published)


def skew(session: nox.Session, builder: Environment) -> None:
    """Build and install the wheels and run the matrix; the session fails if a pair fails."""
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
    """Return the interpreter of each environment, by `SIDE-CONTRACT`."""
    made = {}
    for side, role, names in ((published, "published", ("v1",)), (head, "head", ("v1", "v2", "v3", "planted"))):
        generator = environment(session, side, f"{role}-generator")
        for name in names:
            wheel = contract_wheel(session, builder, generator, _contract(name))
            there = environment(session, side, f"{role}-{name}", contract=wheel)
            made[f"{role}-{name}"] = there.python
            if name == "planted":
                # Without the image the contract checks are off, so the break itself must be seen.
                for image in there.folder.glob("lib/python*/site-packages/garden/v1/contract.binpb"):
                    image.unlink()
            if name == "v2" and not options.quick:
                for label, resolution in (("lowest", "lowest-direct"), ("newest", "highest")):
                    extreme = environment(session, side, f"{label}-v2", contract=wheel, resolution=resolution)
                    made[f"{label}-v2"] = extreme.python
    return made


def _contract(name: str) -> Contract:
    """Return a version of the user's contract; `planted` is v2 with a break that the matrix must detect.

    Raises:
        ValueError: v2.proto lacks a line that planted.json replaces.
    """
    if name != "planted":
        text = (CONTRACT / f"{name}.proto").read_text(encoding="utf-8")
        return Contract(name=name, version=f"{name[1:]}.0", text=text)
    text = (CONTRACT / "v2.proto").read_text(encoding="utf-8")
    for line in json.loads((CONTRACT / "planted.json").read_text(encoding="utf-8")):
        if line["old"] not in text:
            raise ValueError(f"v2.proto has no line {line['old']!r} to replace")
        text = text.replace(line["old"], line["new"], 1)
    digest = int(hashlib.sha256(text.encode()).hexdigest()[:6], 16)
    return Contract(name=name, version=f"2.0.{digest}", text=text)


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """The wheels of orki's distributions from one source; `name` describes it, such as `commit 0123456789ab`."""

    name: str
    wheels: tuple[Path, ...]

    def wheel(self, name: str) -> Path:
        """Return the wheel of a distribution."""
        return next(each for each in self.wheels if each.name.startswith(f"{name.replace('-', '_')}-")).absolute()


def environment(
    session: nox.Session, side: Side, name: str, *, contract: Path | None = None, resolution: str | None = None
) -> Environment:
    """Return an environment of wheels and their dependencies; create it if its inputs changed.

    Args:
        session: The session; it runs the installer.
        side: The wheels.
        name: The name of its folder.
        contract: The wheel of the user's contract; None for the generator's environment.
        resolution: None for the versions of constraints.txt; `lowest-direct` or `highest` for the wheels' ranges.
    """
    folder = (CACHE / "environments" / name).absolute()
    wheels = [side.wheel(each) for each in (RUNTIME if contract else TOOLCHAIN)]
    wheels += [contract.absolute()] if contract else []
    wanted = [_requirement(wheel) for wheel in wheels]
    pins = Path("constraints.txt")
    if resolution is None:
        wanted += ["--constraints", str(pins.absolute())]
    else:
        # The installer takes only direct requirements at their lowest, so the wheels' requirements are listed here.
        wanted += ["--resolution", resolution, *_required_by(wheels)]
    interpreter = getattr(sys, "_base_executable", sys.executable)
    digests = [hashlib.sha256(wheel.read_bytes()).hexdigest() for wheel in wheels]
    parts = [*wanted, *digests, interpreter, sys.version, pins.read_text(encoding="utf-8")]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    stamp = folder / "made-from"
    if not (stamp.is_file() and stamp.read_text(encoding="ascii") == digest):
        install(session, folder, interpreter, *wanted)
        stamp.write_text(digest, encoding="ascii")
    return Environment(folder)


def _requirement(wheel: Path) -> str:
    """Return a wheel as a requirement, the server with its embedded extra."""
    name = wheel.name.partition("-")[0].replace("_", "-")
    extra = f"[{_EXTRA}]" if name == "orki-server" else ""
    return f"{name}{extra} @ {wheel.as_uri()}"


def _required_by(wheels: list[Path]) -> list[str]:
    """Return the third-party requirements of some wheels."""
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


def published_side(session: nox.Session, builder: Environment, wanted: str) -> Side:
    """Return the published side; the session fails if there is none.

    `wanted` is a commit, an index URL, or empty for the commit that published.toml names. The builder has the pinned
    hatchling and orki-codegen.
    """
    if wanted and "://" not in wanted:
        return _of_commit(session, builder, wanted)
    out = (CACHE / "wheels" / "index").absolute()
    shutil.rmtree(out, ignore_errors=True)
    command = [builder.python, "-m", "nox_sessions.skew", str(out), *sorted({*RUNTIME, *TOOLCHAIN})]
    command += ["--index", wanted] if wanted else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        session.error(done.stderr.strip())
    found = json.loads(done.stdout)
    baseline = _of_commit(session, builder, found["commit"]) if found["commit"] else None
    wheels = [Path(each) for each in found["wheels"].values()]
    if baseline is None:
        return Side(name=found["index"], wheels=tuple(wheels))
    if not wheels:
        return baseline
    missing = found["missing"]
    name = f"{found['index']}, and {', '.join(missing)} of {baseline.name}"
    return Side(name=name, wheels=(*wheels, *(baseline.wheel(each) for each in missing)))


def _of_commit(session: nox.Session, builder: Environment, commit: str) -> Side:
    wheels = tuple(commit_wheels(session, builder, commit))
    return Side(name=f"commit {wheels[0].parent.name[:12]}", wheels=wheels)


def find_published() -> int:
    """Download the published wheels and print where they are; return 1 if there is no published side."""
    # The environment that runs the sessions has no orki-codegen.
    from orki_codegen._gate.baseline import last_release, read_published
    from orki_codegen._gate.index import Index, index_settings
    from orki_contract.errors import InvalidSetting, OrkiError

    parser = argparse.ArgumentParser(prog="nox_sessions.skew")
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--index")
    given = parser.parse_args()
    found: dict[str, str] = {}
    label = ""
    try:
        published = read_published(Path.cwd())
        if given.index or published is None:
            with Index(index_settings(given.index)) as index:
                label = index.label
                index.check()
                listed = {name: wheels for name in given.names if (wheels := index.wheels(name))}
                given.out.mkdir(parents=True, exist_ok=True)
                found = {name: str(index.fetch(last_release(wheels), given.out)) for name, wheels in listed.items()}
        missing = [name for name in given.names if name not in found]
        if missing and published is None:
            raise InvalidSetting(
                f"{label} has no wheel of {', '.join(missing)}, and there is no published.toml: "
                "give a commit or another index with --published"
            )
    except OrkiError as error:
        print(error.message, file=sys.stderr)
        return 1
    commit = published.commit if missing and published else ""
    print(json.dumps({"wheels": found, "missing": missing, "commit": commit, "index": label}))
    return 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Contract:
    """A version of the user's contract: the text of its proto file, and the version of its wheel.

    The name, such as `v2`, is part of file names.
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
    """Return the wheels of a commit, which this tree's sessions build once.

    The session fails if git does not know the commit.
    """
    try:
        sha = resolve(Path.cwd(), commit)
    except LookupError as error:
        session.error(str(error))
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

    The builder has the pinned hatchling, and the generator has the wheel of orki-codegen.
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
    for path in ("buf.gen.yaml", "proto/orki/options/v1/options.proto"):
        name = path.rpartition("/")[2]
        source = next(generator.folder.glob(f"lib/python*/site-packages/orki_codegen/**/{name}"), None)
        if source is None:
            session.error(f"the wheel of orki-codegen in {generator.folder} has no {name}")
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, folder / path)
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
    """Build wheels into a folder, unless the folder already holds wheels of the same digest."""
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


def resolve(root: Path, commit: str) -> str:
    """Return the full id of a commit.

    Raises:
        LookupError: The repository does not have the commit.
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


if __name__ == "__main__":
    sys.exit(find_published())
