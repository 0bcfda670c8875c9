"""Read the built files and plan the upload from the contents of the index; no network access."""

from __future__ import annotations

import enum
import hashlib
import io
import tarfile
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from email.message import Message
from email.parser import BytesParser
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import (
    InvalidSdistFilename,
    InvalidWheelFilename,
    canonicalize_name,
    parse_sdist_filename,
    parse_wheel_filename,
)
from packaging.version import Version

PRIVATE = "Private :: Do Not Upload"


class BuiltError(Exception):
    """The built files cannot be released."""


@dataclass(frozen=True, slots=True)
class Built:
    """One built file and the SHA-256 of its bytes in hex."""

    path: Path
    sha256: str

    @property
    def name(self) -> str:
        """The file's name."""
        return self.path.name


@dataclass(frozen=True, slots=True)
class Release:
    """One distribution at one version, ready for upload.

    Attributes:
        name: The normalized name, such as `orki-agent`.
        files: The wheel first, so that an install during the upload needs no build.
        requires: Its requirements, extras included.
        private: Whether its classifiers forbid an upload.
    """

    name: str
    version: Version
    files: tuple[Built, ...]
    requires: tuple[Requirement, ...]
    private: bool


def read_releases(folder: Path) -> tuple[Release, ...]:
    """Read a folder of wheels and sdists; return the releases by name, dependencies first.

    Raises:
        BuiltError: A wheel or sdist is missing, a distribution has two versions, or dependencies form a circle.
    """
    wheels = {parse_wheel_filename(path.name)[:2]: path for path in sorted(folder.glob("*.whl"))}
    sdists = {parse_sdist_filename(path.name): path for path in sorted(folder.glob("*.tar.gz"))}
    if not wheels:
        raise BuiltError(f"{folder} has no wheel: build first (./noxw -s build)")
    if odd := sorted(set(wheels) ^ set(sdists), key=str):
        name, version = odd[0]
        raise BuiltError(f"{folder}: {name} {version} lacks its wheel or its sdist: build again")
    found: dict[str, Release] = {}
    for (name, version), wheel in wheels.items():
        if name in found:
            raise BuiltError(f"{folder}: {name} has the versions {found[name].version} and {version}: build again")
        found[name] = _release(name, version, (wheel, sdists[name, version]))
    return _in_order(found.values())


def _release(name: str, version: Version, paths: Iterable[Path]) -> Release:
    files = tuple(Built(path, hashlib.sha256(path.read_bytes()).hexdigest()) for path in paths)
    metadata = _metadata(files[0].path)
    return Release(
        name=name,
        version=version,
        files=files,
        requires=tuple(Requirement(text) for text in metadata.get_all("Requires-Dist", [])),
        private=PRIVATE in metadata.get_all("Classifier", []),
    )


def _metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return BytesParser().parsebytes(archive.read(name), headersonly=True)


def _in_order(found: Iterable[Release]) -> tuple[Release, ...]:
    by_name = {each.name: each for each in found}
    graph = {
        each.name: {name for need in each.requires if (name := canonicalize_name(need.name)) in by_name} - {each.name}
        for each in by_name.values()
    }
    sorter = TopologicalSorter(graph)
    try:
        sorter.prepare()
    except CycleError as error:
        raise BuiltError(f"circular dependency: {', '.join(error.args[1])}") from None
    ordered: list[Release] = []
    while sorter.is_active():
        for ready in sorted(sorter.get_ready()):
            ordered.append(by_name[ready])
            sorter.done(ready)
    return tuple(ordered)


class State(enum.Enum):
    """The state of a built file on the index."""

    MISSING = "to upload"
    SAME = "already there"
    COPIES = "already there; only its copies of other owners' contracts differ"
    OTHER = "there with different bytes"


@dataclass(frozen=True, slots=True)
class Step:
    """One built file, in upload order; `there` is the SHA-256 on the index in hex, None if the index lacks it."""

    release: Release
    file: Built
    state: State
    there: str | None


def plan(releases: Iterable[Release], index: Mapping[str, Mapping[str, str]]) -> tuple[Step, ...]:
    """Compare each built file with the index, which maps projects to file names to SHA-256 digests."""
    steps = []
    for release in releases:
        for file in release.files:
            there = index[release.name].get(file.name)
            state = State.MISSING if there is None else State.SAME if there == file.sha256 else State.OTHER
            steps.append(Step(release, file, state, there))
    return tuple(steps)


def but_for_copies(steps: Sequence[Step], same: Callable[[Step], bool]) -> tuple[Step, ...]:
    """Set the state COPIES for files of completely published releases that differ only in copies of others' contracts.

    `same` returns whether a file with different bytes differs only in those copies.
    """
    found = list(steps)
    for name in sorted({step.release.name for step in steps if step.state is State.OTHER}):
        indexes = [index for index, step in enumerate(steps) if step.release.name == name]
        others = [index for index in indexes if steps[index].state is State.OTHER]
        # An incomplete release can only be completed with its own bytes.
        complete = all(steps[index].state is not State.MISSING for index in indexes)
        if complete and all(same(steps[index]) for index in others):
            for index in others:
                found[index] = replace(steps[index], state=State.COPIES)
    return tuple(found)


def conflicts(steps: Iterable[Step]) -> list[str]:
    """Return a sentence for each file that the index has with different bytes."""
    return [
        f"{step.file.name}: the index has it with different bytes (sha256 {step.there}, here {step.file.sha256})."
        f" Published files never change: raise the version of {step.release.name} or revert the change"
        for step in steps
        if step.state is State.OTHER
    ]


def unmet(releases: Collection[Release], index: Mapping[str, Mapping[str, str]], own: Collection[str]) -> list[str]:
    """Return a sentence for each release that needs a version of a sibling that the index will not have.

    `own` are the names of all distributions of the workspace; other requirements are ignored.
    """
    found = []
    for release in releases:
        for need in release.requires:
            name = canonicalize_name(need.name)
            if name not in own:
                continue
            versions = _versions(index[name]) | {each.version for each in releases if each.name == name}
            if not any(need.specifier.contains(version, prereleases=True) for version in versions):
                has = ", ".join(map(str, sorted(versions))) or "nothing"
                found.append(
                    f"{release.name} {release.version} needs {name}{need.specifier}, and the index has {has}:"
                    f" publish {name} too, or change the range"
                )
    return found


def _versions(files: Iterable[str]) -> set[Version]:
    """Return the versions of some wheels and sdists; other names are ignored."""
    found = set()
    for name in files:
        try:
            found.add(parse_wheel_filename(name)[1] if name.endswith(".whl") else parse_sdist_filename(name)[1])
        except (InvalidWheelFilename, InvalidSdistFilename):
            continue
    return found


def same_but_for_copies(name: str, here: bytes, there: bytes) -> bool:
    """Compare two wheels or two sdists file by file, except copies of other owners' contracts.

    A `contract.binpb` contains copies of imported contracts. A change by their owner needs no release here. The file's
    name shows whether it is a wheel.
    """
    members = _wheel_files if name.endswith(".whl") else _sdist_files
    # The environment that runs nox has no orki-codegen.
    from orki_codegen._gate.wheels import digest

    try:
        first, second = ({path: digest(path, content) for path, content in members(side)} for side in (here, there))
    except (zipfile.BadZipFile, tarfile.TarError, EOFError):
        return False
    return first == second


def _wheel_files(content: bytes) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for name in archive.namelist():
            # The record repeats the digests of all other files.
            if not name.endswith((".dist-info/RECORD", "/")):
                yield name, archive.read(name)


def _sdist_files(content: bytes) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        for member in archive:
            if (file := archive.extractfile(member)) is not None:
                yield member.name, file.read()
