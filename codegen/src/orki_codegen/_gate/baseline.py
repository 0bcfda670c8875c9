"""Find the baseline of a tree: the releases of an index, or the files of a git commit."""

from __future__ import annotations

import re
import subprocess
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

from packaging.version import Version

from orki_codegen._gate.distributions import Baseline, Member, Release, find_members
from orki_codegen._gate.index import Index, Published
from orki_codegen._gate.wheels import release_of
from orki_contract.errors import InvalidContract, InvalidSetting
from orki_contract.read import read_image
from orki_contract.versions import ContractVersion, checked_out, commit_of, version_at

PUBLISHED_FILE: Final = "published.toml"
_KEYS: Final = {"commit", "reason"}
_SHORT: Final = 10
# These folders hold neither contracts nor public modules, so they are not checked out.
_LEFT_OUT: Final = frozenset({"benchmarks", "docs", "tests"})
_SOURCES: Final = frozenset({"gen", "src"})
_ALWAYS: Final = (".proto", ".binpb", ".toml", ".yaml", ".lock")


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedCommit:
    """The commit of published.toml, by its full id: the baseline before the first release."""

    commit: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Baselines:
    """All baselines of a tree.

    Attributes:
        baselines: The last releases first, then older ones whose entries may remain in streams.
        compared: A text for each distribution that names its baseline.
    """

    baselines: tuple[Baseline, ...] = ()
    compared: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, baseline: Baseline, members: Mapping[str, Member]) -> Baselines:
        """Return one baseline for all members."""
        return cls(baselines=(baseline,), compared={name: _compared(name, baseline) for name in members})


def _compared(name: str, baseline: Baseline) -> str:
    release = baseline.releases.get(name)
    if release is None:
        origin = next((each.origin for each in baseline.releases.values()), "that commit")
        return f"new: does not exist at {origin}"
    return f"against {release.version} of {release.origin}"


def read_published(root: Path) -> PublishedCommit | None:
    """Read published.toml; return None if it does not exist.

    Raises:
        InvalidSetting: The file is invalid.
    """
    path = root / PUBLISHED_FILE
    if not path.is_file():
        return None
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidSetting(f"{PUBLISHED_FILE}: {error}") from error
    if unknown := sorted(set(table) - _KEYS):
        raise InvalidSetting(f'{PUBLISHED_FILE}: unknown key "{unknown[0]}", the keys are "commit" and "reason"')
    for key in sorted(_KEYS):
        if not isinstance(table.get(key), str) or not table[key].strip():
            raise InvalidSetting(f'{PUBLISHED_FILE}: "{key}" is missing or not a text')
    if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", table["commit"]):
        raise InvalidSetting(f'{PUBLISHED_FILE}: "commit" must be the full id of a commit (`git rev-parse HEAD`)')
    return PublishedCommit(commit=table["commit"], reason=table["reason"])


def resolved(ref: str) -> str:
    """Return the id of the commit that a ref names.

    Raises:
        InvalidSetting: There is no such commit.
    """
    commit = commit_of(ref)
    if commit is not None:
        return commit
    shallow = _git("rev-parse", "--is-shallow-repository")
    if shallow == "true":
        raise InvalidSetting(
            f'this clone is shallow and has no commit "{ref}": fetch its history (`git fetch --unshallow`; '
            "`fetch-depth: 0` for a workflow's checkout) and try again"
        )
    if shallow is None:
        raise InvalidSetting(f'"{ref}" cannot be read: this folder is in no git repository, or git is not installed')
    raise InvalidSetting(f'this repository has no commit "{ref}": check the name, or fetch it (`git fetch`)')


def text_at(commit: str, path: str) -> str | None:
    """Return the text of a file of the workspace at a commit; None if it does not exist there."""
    return _git("show", f"{commit}:./{path}")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def from_commit(ref: str, members: Mapping[str, Member], folder: Path) -> Baselines:
    """Return the baseline of a git ref.

    Raises:
        InvalidContract: The commit's contract cannot be read.
        InvalidSetting: There is no such commit.
    """
    commit = resolved(ref)
    return Baselines.of(_baseline_at(commit, folder, f"{ref} ({commit[:_SHORT]})"), members)


def from_published(published: PublishedCommit | None, names: Iterable[str], folder: Path) -> Baseline | None:
    """Return the baseline of some distributions at the commit that published.toml names; None without such a file."""
    if published is None:
        return None
    commit = resolved(published.commit)
    baseline = _baseline_at(commit, folder, f"{PUBLISHED_FILE} ({commit[:_SHORT]})")
    releases = {name: each for name, each in baseline.releases.items() if name in names}
    return replace(baseline, releases=releases, unpublished=True)


def _baseline_at(commit: str, folder: Path, origin: str) -> Baseline:
    """Check out a commit into an empty folder and read it."""
    checked_out(commit, folder, _is_wanted)
    # The workspace may be a subfolder of the repository.
    root = folder / (_git("rev-parse", "--show-prefix") or "")
    releases = {
        member.name: Release(
            name=member.name,
            version=member.version,
            origin=origin,
            packages=member.contracts,
            imports=tuple(each for each in (root / member.folder / "src", root / member.folder) if each.is_dir()),
            commands=member.commands,
            api=member.api or frozenset(),
            folder=root / member.folder,
            extras=frozenset(member.extras),
            python=member.python,
        )
        for member in find_members(root).values()
    }
    return Baseline(releases=releases, contract=version_at(str(root)))


def _is_wanted(path: str) -> bool:
    folders = set(path.split("/")[:-1])
    return path.endswith(_ALWAYS) or bool(folders & _SOURCES) or not folders & _LEFT_OUT


def from_index(
    index: Index, members: Mapping[str, Member], published: PublishedCommit | None, folder: Path, now: datetime
) -> Baselines:
    """Return the last release of each distribution, and older ones whose entries may remain in streams.

    The commit of published.toml is the baseline of distributions without a release.

    Raises:
        InvalidContract: A wheel's contract cannot be read.
        InvalidSetting: The index or the commit cannot be read.
    """
    public = [name for name, member in sorted(members.items()) if not member.private]
    listed = {name: index.wheels(name) or [] for name in public}
    if not any(listed.values()):
        index.check()
    compared: dict[str, str] = {}
    last: dict[str, Release] = {}
    older: list[Baseline] = []
    for name, wheels in listed.items():
        if not wheels:
            continue
        wheel = last_release(wheels, members[name].version)
        last[name] = _release(index, name, wheel, folder / "last")
        compared[name] = f"against {wheel.version} of {index.label}"
        older += _still_in_streams(index, name, wheels, wheel, folder, now)
    baselines = [Baseline(releases=last, contract=_combined(last.values()))] if last else []
    first = {name for name in public if name not in last}
    baseline = from_published(published, first, folder / "published") if first else None
    for name in first:
        release = baseline.releases.get(name) if baseline is not None else None
        rest = f"compared with {release.version} of {release.origin}" if release else "nothing to compare with"
        compared[name] = f"first release: nothing on {index.label} yet; {rest}"
    compared |= {name: "private: compared with git refs only" for name in members if name not in public}
    if baseline is not None and baseline.releases:
        baselines.append(baseline)
    return Baselines(baselines=(*baselines, *older), compared=compared)


def last_release(wheels: Sequence[Published], version: Version | None = None) -> Published:
    """Return the newest final release that is not newer than a version, else the newest release."""
    finals = [each for each in wheels if not each.version.is_prerelease] or list(wheels)
    return next((each for each in reversed(finals) if version is None or each.version <= version), finals[-1])


def _release(index: Index, name: str, wheel: Published, folder: Path) -> Release:
    downloads = folder.with_name(f"{folder.name}-wheels")
    downloads.mkdir(parents=True, exist_ok=True)
    path = index.fetch(wheel, downloads)
    return release_of(path, folder / name, name, wheel.version, index.label)


def _combined(releases: Iterable[Release]) -> ContractVersion:
    found = [each for each in releases if each.packages]
    if not found:
        return ContractVersion(label="no contract", read=read_image(b""), packages=frozenset())
    # The wheels were unpacked side by side.
    return version_at(str(found[0].imports[0].parent))


def _still_in_streams(
    index: Index, name: str, wheels: Sequence[Published], last: Published, folder: Path, now: datetime
) -> Iterable[Baseline]:
    """Yield the releases before the last one whose entries may remain in streams.

    A release may write entries until its successor is uploaded, and streams keep an entry for their maximum age. A
    release without a known upload time, or with a stream without a maximum age, is always included.
    """
    by_version = {each.version: each for each in wheels}
    for version in sorted(each for each in by_version if each < last.version):
        successor = min((each for each in wheels if each.version > version), key=lambda each: each.version)
        release = _release(index, name, by_version[version], folder / f"older-{name}-{version}")
        try:
            contract = _combined([release])
        except InvalidContract as error:
            raise InvalidContract(f"{release.label}: {error.message}") from error
        streams = contract.read.contract.streams
        own = [each for each in streams if each.message.rpartition(".")[0] in release.packages]
        # A deployment may keep entries for longer than the default, up to the upper bound.
        ages = [each.retention.age_bounds[1] for each in own]
        if not ages:
            continue
        expiry = timedelta(seconds=max(ages))
        if all(ages) and successor.uploaded is not None and successor.uploaded + expiry < now:
            continue
        yield Baseline(releases={name: release}, contract=contract, streams_only=True)
