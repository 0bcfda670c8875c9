"""Which past a tree is judged by: an index, a git ref, or the commit that stands for published."""

from __future__ import annotations

__all__ = ["Gathered", "from_commit", "from_index", "stand_in"]

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

from packaging.version import Version

from orki_codegen.gate.commits import past_at, resolved
from orki_codegen.gate.indexes import Index, Published
from orki_codegen.gate.members import Member
from orki_codegen.gate.past import Past, Release
from orki_codegen.gate.published import FILE, StandIn
from orki_codegen.gate.wheels import release_of
from orki_contract.errors import InvalidContract
from orki_contract.read import read_image
from orki_contract.versions import ContractVersion, version_at

_SHORT: Final = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathered:
    """The pasts, and what is to be said of them.

    Attributes:
        pasts: The last releases first, then older ones whose entries may still lie in streams.
        states: For each distribution, with what it is compared, in words.
    """

    pasts: tuple[Past, ...] = ()
    states: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, past: Past, members: Mapping[str, Member]) -> Gathered:
        """One past for all."""
        return cls(pasts=(past,), states={name: _compared(name, past) for name in members})


def from_commit(ref: str, members: Mapping[str, Member], folder: Path) -> Gathered:
    """Everything as a git ref has it.

    Raises:
        InvalidContract: Its contract cannot be read.
        InvalidSetting: There is no such commit here.
    """
    commit = resolved(ref)
    return Gathered.of(past_at(commit, folder, f"{ref} ({commit[:_SHORT]})"), members)


def _compared(name: str, past: Past) -> str:
    release = past.releases.get(name)
    if release is None:
        origin = next((each.origin for each in past.releases.values()), "that commit")
        return f"new: not there yet at {origin}"
    return f"against {release.version} of {release.origin}"


def stand_in(given: StandIn | None, names: Iterable[str], folder: Path) -> Past | None:
    """Some distributions as the commit of published.toml has them; None without such a file."""
    if given is None:
        return None
    commit = resolved(given.commit)
    past = past_at(commit, folder, f"{FILE} ({commit[:_SHORT]})", stands_in=True)
    return replace(past, releases={name: each for name, each in past.releases.items() if name in names})


def from_index(
    index: Index, members: Mapping[str, Member], given: StandIn | None, folder: Path, now: datetime
) -> Gathered:
    """The last release of each distribution on an index, and older ones that streams may still hold entries of.

    Where nothing of a distribution is published, the commit of published.toml stands in, if there is that file.

    Raises:
        InvalidContract: A wheel's contract cannot be read.
        InvalidSetting: The index or the commit cannot be read.
    """
    public = [name for name, member in sorted(members.items()) if not member.private]
    listed = {name: index.wheels(name) or [] for name in public}
    if not any(listed.values()):
        index.check()
    states: dict[str, str] = {}
    last: dict[str, Release] = {}
    older: list[Past] = []
    for name, wheels in listed.items():
        if not wheels:
            continue
        wheel = _last(wheels, members[name].version)
        last[name] = _release(index, name, wheel, folder / "last")
        states[name] = f"against {wheel.version} of {index.label}"
        older += _still_in_streams(index, name, wheels, wheel, folder, now)
    pasts = [Past(releases=last, contract=_together(last.values()))] if last else []
    first = {name for name in public if name not in last}
    standing = stand_in(given, first, folder / "stand-in") if first else None
    for name in first:
        there = standing.releases.get(name) if standing is not None else None
        rest = f"{there.version} of {there.origin} stands in for published" if there else "nothing to compare with"
        states[name] = f"first release: nothing on {index.label} yet; {rest}"
    states |= {name: "private: held against git refs alone" for name in members if name not in public}
    if standing is not None and standing.releases:
        pasts.append(standing)
    return Gathered(pasts=(*pasts, *older), states=states)


def _last(wheels: Sequence[Published], promised: Version) -> Published:
    """The release to which the tree is the next one: the newest final one that is not newer than the promise."""
    finals = [each for each in wheels if not each.version.is_prerelease] or list(wheels)
    return next((each for each in reversed(finals) if each.version <= promised), finals[-1])


def _release(index: Index, name: str, wheel: Published, folder: Path) -> Release:
    downloads = folder.with_name(f"{folder.name}-wheels")
    downloads.mkdir(parents=True, exist_ok=True)
    path = index.fetch(wheel, downloads)
    return release_of(path, folder / name, name, wheel.version, index.label)


def _together(releases: Iterable[Release]) -> ContractVersion:
    """One contract of the images of some wheels."""
    found = [each for each in releases if each.packages]
    if not found:
        return ContractVersion(label="no contract", read=read_image(b""), packages=frozenset())
    # They were unpacked side by side.
    return version_at(str(found[0].imports[0].parent))


def _still_in_streams(
    index: Index, name: str, wheels: Sequence[Published], last: Published, folder: Path, now: datetime
) -> Iterable[Past]:
    """Releases before the last one whose entries may still lie in streams.

    A release writes until the next one is taken into use, at the earliest when that one was uploaded; from then on its
    entries stay for as long as its streams keep them. Where times are not known, or no age limits a stream, for ever.
    """
    earlier = sorted({each.version for each in wheels if each.version < last.version})
    by_version = {each.version: each for each in wheels}
    for version in earlier:
        wheel = by_version[version]
        successor = min((each for each in wheels if each.version > version), key=lambda each: each.version)
        release = _release(index, name, wheel, folder / f"older-{name}-{version}")
        try:
            contract = _together([release])
        except InvalidContract as error:
            raise InvalidContract(f"{release.label}: {error.message}") from error
        streams = contract.read.contract.streams
        own = [each for each in streams if each.message.rpartition(".")[0] in release.packages]
        # A deployment may keep them for longer than the contract does.
        ages = [each.retention.age_bounds[1] for each in own]
        if not ages:
            continue
        if successor.uploaded is not None and all(ages):
            longest = timedelta(seconds=max(each for each in ages if each))
            if successor.uploaded + longest < now:
                continue
        yield Past(releases={name: release}, contract=contract, streams_only=True)
