"""Evaluate a tree against its baselines: the bump that each change needs, and whether the versions fit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from typing import Final

from packaging.version import Version

from orki_codegen._buf import Buf
from orki_codegen._gate.accepted import Accepted
from orki_codegen._gate.contracts import Tree, contract_findings
from orki_codegen._gate.distributions import Baseline, Dependency, Member, Release
from orki_codegen._gate.findings import Evaluation, Finding
from orki_codegen._gate.python_api import api_findings, imported_modules
from orki_codegen._gate.wheels import content_findings, metadata_findings
from orki_contract.descriptors import Location
from orki_contract.findings import Bump

_WEIGHT: Final = {Bump.PATCH: 0, Bump.MINOR: 1, Bump.MAJOR: 2}
_fault: Final = partial(Finding, bump=Bump.PATCH, fails=True)


def least(base: Version, bump: Bump) -> Version:
    """Return the lowest version that may contain a change since another version.

    From 1.0 on it follows Semantic Versioning 2.0.0. Before 1.0 a major change raises the second number and a minor one
    the third, as installers and ranges such as `>=0.3.1,<0.4` interpret them.
    """
    major, minor, patch = base.major, base.minor, base.micro
    if bump is Bump.MAJOR:
        return Version(f"{major + 1}.0.0" if major else f"0.{minor + 1}.0")
    if bump is Bump.MINOR and major:
        return Version(f"{major}.{minor + 1}.0")
    # A pre-release becomes the final release of the same number.
    return Version(f"{major}.{minor}.{patch}") if base.is_prerelease else Version(f"{major}.{minor}.{patch + 1}")


def is_sufficient(version: Version, base: Version, bump: Bump) -> bool:
    """Return whether a version may contain a change since another one; a pre-release counts as its final release."""
    return version > base and Version(version.base_version) >= least(base, bump)


def heaviest(bumps: Iterable[Bump]) -> Bump:
    """Return the heaviest bump; `PATCH` if there are none."""
    return max(bumps, key=_WEIGHT.__getitem__, default=Bump.PATCH)


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The settings of an evaluation.

    Attributes:
        today: The date for the expiry of accepted breaks.
        settled: Keys of accepted breaks that may match nothing, because they were accepted before the baseline.
        lenient: Whether generated code may be stale, as it may during development.
    """

    accepted: Sequence[Accepted]
    today: date
    settled: frozenset[tuple[str, str, str]] = frozenset()
    lenient: bool = False


def evaluate(baselines: Sequence[Baseline], tree: Tree, policy: Policy, buf: Buf | None) -> Evaluation:
    """Evaluate a tree; buf's own rules are left out if `buf` is None.

    The baselines begin with the last release of each distribution.

    Raises:
        InvalidContract: buf cannot compare the contracts.
        InvalidSetting: A file cannot be read.
    """
    valid = {each.key: each for each in policy.accepted if not each.expired(policy.today, tree.members)}
    evaluator = _Evaluator(tree, valid)
    for baseline in baselines:
        found = contract_findings(baseline, tree, buf)
        for name, release in sorted(baseline.releases.items()):
            own = [each for each in found if each.package == name]
            if baseline.streams_only:
                evaluator.compare_older(release, own)
            else:
                own += _owner_findings(release, tree)
                evaluator.compare(release, own, unpublished=baseline.unpublished)
    findings = [*evaluator.findings, *_stale_breaks(policy, evaluator.used, tree.members)]
    findings += _range_findings(tree.members, evaluator.broken)
    if not policy.lenient:
        findings += _stale_code(tree)
    return Evaluation(findings=tuple(_unique(findings)), bumps=evaluator.bumps)


class _Evaluator:
    """Collects the findings, distribution by distribution."""

    def __init__(self, tree: Tree, valid: Mapping[tuple[str, str, str], Accepted]) -> None:
        self.findings: list[Finding] = []
        self.bumps: dict[str, Bump | None] = {}
        self.broken: dict[str, Version] = {}
        self.used: set[tuple[str, str, str]] = set()
        self._tree = tree
        self._valid = valid
        self._imported = imported_modules(tree.root, tree.members)

    def compare(self, release: Release, found: Sequence[Finding], *, unpublished: bool) -> None:
        """Compare a distribution with its last release."""
        member = self._tree.members.get(release.name)
        if member is None:
            self.findings += [replace(each, fails=each.bump is Bump.MAJOR) for each in self._accept(found)]
            return
        # The modules whose names are public: those that the tree or the release lists, and those that siblings import.
        public = None if member.api is None else member.api | release.api | self._imported
        api = api_findings(self._tree.root, member, release, public)
        changes = self._accept([*found, *metadata_findings(member, release), *api])
        measured = [_measured(each, member, release) for each in changes]
        if not measured:
            # Nobody installed the files of a commit, so one version may have different contents.
            strict = release.wheel is not None and not unpublished
            contents = content_findings(self._tree.root, member, release)
            measured = [_measured(each, member, release, strict=strict) for each in contents]
        self.bumps[member.name] = heaviest(each.bump for each in measured) if measured else None
        # Ranges of siblings can exclude a break only when the version reflects it.
        if self.bumps[member.name] is Bump.MAJOR and not any(each.fails for each in measured):
            self.broken[member.name] = release.version
        self.findings += measured

    def compare_older(self, release: Release, found: Sequence[Finding]) -> None:
        """Compare a distribution with a release whose entries may remain in streams."""
        member = self._tree.members[release.name]
        self.findings += [_measured(each, member, release) for each in self._accept(found)]

    def _accept(self, found: Iterable[Finding]) -> Iterator[Finding]:
        """Reduce accepted breaks to minor changes."""
        for each in found:
            entry = self._valid.get((each.rule, each.package, each.subject))
            if entry is None or each.bump is not Bump.MAJOR:
                yield each
            else:
                self.used.add(entry.key)
                yield replace(each, bump=Bump.MINOR, message=f"{each.message} (accepted: {entry.reason})")


def _measured(finding: Finding, member: Member, release: Release, strict: bool = True) -> Finding:
    """Return the finding with the version that it needs."""
    sufficient = is_sufficient(member.version, release.version, finding.bump)
    needs = least(release.version, finding.bump)
    return replace(finding, since=release.label, needs=needs, fails=strict and not sufficient)


def _owner_findings(release: Release, tree: Tree) -> Iterator[Finding]:
    """Yield a finding for each proto package that moved to another distribution, and for a removed distribution."""
    member = tree.members.get(release.name)
    for package in sorted(release.packages):
        owner = tree.owner(package)
        if owner not in (None, release.name):
            yield Finding(
                rule="CONTRACT_OWNER_CHANGED",
                package=release.name,
                subject=package,
                location=(member or tree.members[str(owner)]).location,
                message=f"{package} moved to {owner}: during an upgrade two wheels contain the same files",
                bump=Bump.MAJOR,
            )
    if member is None and release.packages:
        yield Finding(
            rule="DISTRIBUTION_GONE",
            package=release.name,
            subject=release.name,
            location=Location(""),
            message=f"{release.name} was removed, and with it {', '.join(sorted(release.packages))}",
            bump=Bump.MAJOR,
        )


def _range_findings(members: Mapping[str, Member], broken: Mapping[str, Version]) -> Iterator[Finding]:
    """Yield a finding for each wrong range on a sibling; `broken` maps names to the last version before a break."""
    for member in members.values():
        for each in member.dependencies:
            sibling = members.get(each.name)
            if sibling is None:
                continue
            written = f'"{each.requirement}"'
            if not each.requirement.specifier.contains(sibling.version, prereleases=True):
                message = f"{written} excludes {sibling.name} {sibling.version}, the version in the tree"
            elif each.name in broken and _contains_both(each, broken[each.name], sibling.version):
                message = (
                    f"{written} still contains {sibling.name} {broken[each.name]}, although {sibling.version} is a "
                    "break: raise its lower bound"
                )
            else:
                continue
            yield _fault(
                rule="SIBLING_RANGE", package=member.name, subject=each.name, location=each.location, message=message
            )


def _contains_both(dependency: Dependency, before: Version, after: Version) -> bool:
    specifier = dependency.requirement.specifier
    return before != after and specifier.contains(before, prereleases=True) and specifier.contains(after, True)


def _stale_breaks(policy: Policy, used: set[tuple[str, str, str]], members: Mapping[str, Member]) -> Iterator[Finding]:
    for each in policy.accepted:
        if each.expired(policy.today, members):
            why = f"it was accepted until {each.until}"
        elif each.key not in used | policy.settled:
            why = "no change matches it"
        else:
            continue
        yield _fault(
            rule="ACCEPTED_BREAK_STALE",
            package=each.package,
            subject=each.subject,
            location=each.location,
            message=f"the accepted break {each.rule} of {each.subject} is stale, because {why}: remove it",
        )


def _stale_code(tree: Tree) -> Iterator[Finding]:
    for package, path in tree.stale.items():
        yield _fault(
            rule="GENERATED_CODE_STALE",
            package=tree.owner(package) or "",
            subject=package,
            location=Location(path),
            message=f"the wheel's contract of {package} differs from the protos: run `nox -s generate`",
        )


def _unique(findings: Iterable[Finding]) -> list[Finding]:
    """Remove repeated changes: of equal findings, the one since the newest release is kept."""
    kept: dict[tuple[object, ...], Finding] = {}
    for each in findings:
        kept.setdefault((each.package, each.rule, each.subject, each.message, each.fails), each)
    return sorted(kept.values(), key=lambda each: (each.package, each.location, each.rule, each.subject, each.message))
