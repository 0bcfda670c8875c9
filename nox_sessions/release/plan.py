"""What is to be uploaded, given what was built and what the index has; nothing here touches either."""

from __future__ import annotations

__all__ = ["State", "Step", "but_for_copies", "conflicts", "plan", "unmet"]

import enum
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from packaging.utils import (
    InvalidSdistFilename,
    InvalidWheelFilename,
    canonicalize_name,
    parse_sdist_filename,
    parse_wheel_filename,
)
from packaging.version import Version

from nox_sessions.release.files import Built, Release


class State(enum.Enum):
    """How a built file stands to the index."""

    MISSING = "to upload"
    SAME = "already there"
    COPIES = "already there; only its copies of contracts that others own have changed since"
    OTHER = "there with other bytes"


@dataclass(frozen=True, slots=True)
class Step:
    """One built file, in the order of upload.

    Attributes:
        release: what it belongs to.
        file: the file itself.
        state: how it stands to the index.
        there: the SHA-256 of the file of that name on the index, in hex; None where there is none.
    """

    release: Release
    file: Built
    state: State
    there: str | None


def plan(releases: Iterable[Release], index: Mapping[str, Mapping[str, str]]) -> tuple[Step, ...]:
    """Hold each built file against the index: its files and their SHA-256, by project."""
    steps = []
    for release in releases:
        for file in release.files:
            there = index[release.name].get(file.name)
            state = State.MISSING if there is None else State.SAME if there == file.sha256 else State.OTHER
            steps.append(Step(release, file, state, there))
    return tuple(steps)


def but_for_copies(steps: Sequence[Step], same: Callable[[Step], bool]) -> tuple[Step, ...]:
    """Leave alone what is published whole and brings the same, but for copies of contracts that others own.

    Args:
        steps: the plan.
        same: tells of a step whose file is there with other bytes whether that is so.
    """
    found = list(steps)
    for name in sorted({step.release.name for step in steps if step.state is State.OTHER}):
        places = [place for place, step in enumerate(steps) if step.release.name == name]
        others = [place for place in places if steps[place].state is State.OTHER]
        # A half release is completed with its own bytes, or not at all.
        whole = all(steps[place].state is not State.MISSING for place in places)
        if whole and all(same(steps[place]) for place in others):
            for place in others:
                found[place] = replace(steps[place], state=State.COPIES)
    return tuple(found)


def conflicts(steps: Iterable[Step]) -> list[str]:
    """Say of each file that the index has with other bytes which it is, and both digests."""
    return [
        f"{step.file.name}: the index has it with other bytes (sha256 {step.there}, and built here {step.file.sha256})."
        f" What is published never changes: raise the version of {step.release.name}, or undo the change"
        for step in steps
        if step.state is State.OTHER
    ]


def unmet(releases: Collection[Release], index: Mapping[str, Mapping[str, str]], own: Collection[str]) -> list[str]:
    """Say which release needs a sibling in a version that the index will not have after this upload.

    Args:
        releases: what is uploaded now.
        index: what is there already.
        own: the names of all distributions of the workspace; other requirements are not judged.
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
                    f"{release.name} {release.version} needs {name}{need.specifier}, and the index has {has} of it:"
                    f" publish {name} with it, or set another range"
                )
    return found


def _versions(files: Iterable[str]) -> set[Version]:
    """Return the versions of which there is a file; names that are neither wheel nor sdist are passed over."""
    found = set()
    for name in files:
        try:
            found.add(parse_wheel_filename(name)[1] if name.endswith(".whl") else parse_sdist_filename(name)[1])
        except (InvalidWheelFilename, InvalidSdistFilename):
            continue
    return found
