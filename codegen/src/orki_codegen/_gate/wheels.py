"""Read and build wheels, and compare their contents, commands and metadata."""

from __future__ import annotations

import configparser
import hashlib
import importlib.util
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from email.parser import HeaderParser
from pathlib import Path
from typing import Final

from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.message import DecodeError
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from orki_codegen._gate.distributions import Member, Release
from orki_codegen._gate.findings import Finding
from orki_codegen._workspace import read_project
from orki_contract.descriptors import Location
from orki_contract.errors import InvalidContract, InvalidSetting
from orki_contract.findings import Bump
from orki_contract.images import IMAGE_NAME
from orki_contract.read import read_image

_SHOWN: Final = 3
# Two ranges are compared by the versions that they contain; only Python 3 counts.
_PYTHONS: Final = tuple(f"3.{minor}.{micro}" for minor in range(7, 31) for micro in range(31))


def release_of(wheel: Path, folder: Path, name: str, version: Version, origin: str) -> Release:
    """Unpack a wheel into an empty folder.

    Raises:
        InvalidContract: The file is not a wheel, or an image or its metadata cannot be read.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
            images = [each for each in archive.namelist() if each.rpartition("/")[2] == IMAGE_NAME]
            for each in images:
                read_image(archive.read(each))
    except (zipfile.BadZipFile, OSError) as error:
        raise InvalidContract(f"the wheel {wheel.name} of {origin} cannot be read: {error}") from error
    except InvalidContract as error:
        raise InvalidContract(f"the wheel {wheel.name} of {origin} cannot be read: {error.message}") from error
    files = sorted(folder.glob("*.dist-info/METADATA"))
    heads = [HeaderParser().parsestr(file.read_text(encoding="utf-8", errors="replace")) for file in files]
    try:
        python = [SpecifierSet(str(each)) for head in heads for each in head.get_all("Requires-Python", [])]
    except InvalidSpecifier as error:
        raise InvalidContract(f"the metadata of the wheel {wheel.name} cannot be read: {error}") from error
    return Release(
        name=name,
        version=version,
        origin=origin,
        packages=frozenset(each.rpartition("/")[0].replace("/", ".") for each in images),
        imports=(folder,),
        commands=_commands(folder),
        wheel=wheel,
        extras=frozenset(canonicalize_name(each) for head in heads for each in head.get_all("Provides-Extra", [])),
        python=python[0] if python else SpecifierSet(),
    )


def _commands(unpacked: Path) -> frozenset[str]:
    found: set[str] = set()
    for file in unpacked.glob("*.dist-info/entry_points.txt"):
        parser = configparser.RawConfigParser(delimiters=("=",))
        parser.optionxform = str  # type: ignore[assignment,method-assign]
        try:
            parser.read_string(file.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, configparser.Error) as error:
            raise InvalidContract(f"the entry points in {file.name} cannot be read: {error}") from error
        if parser.has_section("console_scripts"):
            found.update(parser.options("console_scripts"))
    return frozenset(found)


def metadata_findings(member: Member, release: Release) -> Iterator[Finding]:
    """Yield a finding for each removed or added command or extra, and for a dropped Python version.

    A dropped Python version is a break: its users get no later release, not even within the ranges that they require.
    """

    def finding(rule: str, subject: str, location: Location, message: str, bump: Bump) -> Finding:
        return Finding(rule=rule, package=member.name, subject=subject, location=location, message=message, bump=bump)

    for name in sorted(release.commands - member.commands):
        yield finding("API_COMMAND_REMOVED", name, member.location, f"the command {name} was removed", Bump.MAJOR)
    for name in sorted(member.commands - release.commands):
        yield finding("API_COMMAND_ADDED", name, member.location, f"the command {name} is new", Bump.MINOR)
    for name in sorted(release.extras - set(member.extras)):
        message = f"the extra {name} was removed: {member.name}[{name}] would install without it"
        yield finding("API_EXTRA_REMOVED", name, member.extras_location, message, Bump.MAJOR)
    for name in sorted(set(member.extras) - release.extras):
        yield finding("API_EXTRA_ADDED", name, member.extras[name], f"the extra {name} is new", Bump.MINOR)
    dropped = next((each for each in _PYTHONS if each in release.python and each not in member.python), None)
    if member.python != release.python and dropped:
        message = f'Python {dropped} is no longer supported: requires-python "{release.python}" → "{member.python}"'
        yield finding("API_PYTHON_REFUSED", "requires-python", member.python_location, message, Bump.MAJOR)


def content_findings(root: Path, member: Member, release: Release) -> Iterator[Finding]:
    """Yield one finding if a distribution's contents differ from those of a release.

    A wheel is compared with the wheel built from the tree; the sources of a commit with the tree's sources.

    Raises:
        InvalidSetting: The tree's wheel cannot be built.
    """
    if release.wheel is not None:
        before = _wheel_digests(release.wheel)
        with tempfile.TemporaryDirectory(prefix="orki-gate-") as folder:
            after = _wheel_digests(build_wheel(root, member.folder, Path(folder)))
        if release.version != member.version:
            # The metadata contains the version.
            before, after = ({**side, "dist-info/METADATA": ""} for side in (before, after))
    elif release.folder is not None:
        before, after = _source_digests(release.folder), _source_digests(root / member.folder)
    else:
        return
    names = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
    if not names:
        return
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    paths = (root / member.folder / folder / names[0] for folder in ("gen", "src", ""))
    path = next((each for each in paths if each.is_file()), root / member.folder / "pyproject.toml")
    yield Finding(
        rule="CONTENT_CHANGED",
        package=member.name,
        subject=member.name,
        location=Location(path.relative_to(root).as_posix(), 1, 1),
        message=f"no API and no contract changed, but other files did: {', '.join(names[:_SHOWN])}{more}",
        bump=Bump.PATCH,
    )


def digest(name: str, content: bytes) -> str:
    """Return the digest of a file; for an image, that of its own package's files, because others own the rest."""
    folder, _, base = name.rpartition("/")
    if base == IMAGE_NAME:
        content = _own_files(f"{folder}/", content)
    return hashlib.sha256(content).hexdigest()


def _own_files(folder: str, content: bytes) -> bytes:
    try:
        image = FileDescriptorSet.FromString(content)
    except DecodeError:
        return content
    own = [each for each in image.file if each.package and folder.endswith(f"{each.package.replace('.', '/')}/")]
    return FileDescriptorSet(file=own).SerializeToString(deterministic=True)


def _wheel_digests(wheel: Path) -> Mapping[str, str]:
    """Return the digest of each file of a wheel, without those that depend on the build alone."""
    found = {}
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            # The folder's name contains the version.
            shown = re.sub(r"^[^/]+\.dist-info/", "dist-info/", name)
            if not name.endswith("/") and shown not in ("dist-info/RECORD", "dist-info/WHEEL"):
                found[shown] = digest(name, archive.read(name))
    return found


def _source_digests(folder: Path) -> Mapping[str, str]:
    """Return the digests of a wheel's likely sources: `src`, `gen`, and pyproject.toml without its version."""
    found = {}
    for path in sorted(each for name in ("src", "gen") for each in (folder / name).rglob("*")):
        name = path.relative_to(folder).as_posix()
        hidden = any(part.startswith(".") or part == "__pycache__" for part in Path(name).parts)
        if path.is_file() and not hidden:
            found[name] = digest(name, path.read_bytes())
    settings = (folder / "pyproject.toml").read_text(encoding="utf-8")
    found["pyproject.toml"] = digest("", re.sub(r"(?m)^version\s*=.*$", "", settings).encode())
    return found


def build_wheel(root: Path, folder: str, out: Path) -> Path:
    """Build the wheel of a distribution of the tree.

    Raises:
        InvalidSetting: The wheel cannot be built.
    """
    table = read_project(root, folder).table
    backend = table.get("build-system", {}).get("build-backend", "setuptools.build_meta")
    # An installed backend need not be installed again into an isolated environment.
    installed = importlib.util.find_spec(backend.partition(".")[0].partition(":")[0]) is not None
    isolation = ["--no-isolation", "--skip-dependency-check"] if installed else []
    command = [sys.executable, "-m", "build", "--wheel", *isolation, "--outdir", str(out), str(root / folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(out.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        raise InvalidSetting(f"the wheel of {folder} cannot be built:\n{(done.stdout + done.stderr).strip()}")
    return wheels[0]
