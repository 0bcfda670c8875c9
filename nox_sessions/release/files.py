"""The files that were built, and what each says of itself."""

from __future__ import annotations

__all__ = ["PRIVATE", "Built", "BuiltError", "Release", "releases"]

import hashlib
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from email.message import Message
from email.parser import BytesParser
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import NormalizedName, canonicalize_name, parse_sdist_filename, parse_wheel_filename
from packaging.version import Version

PRIVATE = "Private :: Do Not Upload"


class BuiltError(Exception):
    """What was built cannot be released as it is; the text says which file and why."""


@dataclass(frozen=True, slots=True)
class Built:
    """One built file, and the SHA-256 of its bytes in hex."""

    path: Path
    sha256: str

    @property
    def name(self) -> str:
        """The file's name, which is what an index knows it by."""
        return self.path.name


@dataclass(frozen=True, slots=True)
class Release:
    """One distribution at one version, ready to be uploaded.

    Attributes:
        name: the normal name, as `orki-agent`.
        version: the version of all its files.
        files: the wheel first: whoever installs while an upload is under way needs no build.
        requires: its requirements, extras included.
        private: whether it says of itself that it is for no index.
    """

    name: str
    version: Version
    files: tuple[Built, ...]
    requires: tuple[Requirement, ...]
    private: bool


def releases(folder: Path) -> tuple[Release, ...]:
    """Read a folder of wheels and sdists; a release comes after all that it depends on, else by name.

    Raises:
        BuiltError: a wheel has no sdist or the reverse, there are two versions of one, or they depend in a circle.
    """
    wheels = {_wheel_key(path): path for path in sorted(folder.glob("*.whl"))}
    sdists = {parse_sdist_filename(path.name): path for path in sorted(folder.glob("*.tar.gz"))}
    if not wheels:
        raise BuiltError(f"{folder} holds no wheel: build first (./noxw -s build)")
    if odd := sorted(set(wheels) ^ set(sdists), key=str):
        name, version = odd[0]
        raise BuiltError(f"{folder}: of {name} {version} there is a wheel or an sdist, and not both: build anew")
    found: dict[str, Release] = {}
    for (name, version), wheel in wheels.items():
        if name in found:
            raise BuiltError(f"{folder}: {name} is there as {found[name].version} and as {version}: build anew")
        found[name] = _release(name, version, (wheel, sdists[name, version]))
    return _in_order(found.values())


def _wheel_key(path: Path) -> tuple[NormalizedName, Version]:
    name, version, _, _ = parse_wheel_filename(path.name)
    return name, version


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
        raise BuiltError(f"these distributions depend on each other in a circle: {', '.join(error.args[1])}") from None
    ordered: list[Release] = []
    while sorter.is_active():
        for ready in sorted(sorter.get_ready()):
            ordered.append(by_name[ready])
            sorter.done(ready)
    return tuple(ordered)
