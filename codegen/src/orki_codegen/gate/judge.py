"""From changes to a verdict: which version each asks for, and whether the tree promises it."""

from __future__ import annotations

__all__ = ["Terms", "Verdict", "judge"]

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date

from packaging.version import Version

from orki_codegen.buf import Buf
from orki_codegen.gate.accepted import Accepted
from orki_codegen.gate.bumps import heavier, is_promised, least
from orki_codegen.gate.console import console_remarks
from orki_codegen.gate.contents import content_remarks
from orki_codegen.gate.contracts import Present, contract_remarks
from orki_codegen.gate.imports import imported_modules
from orki_codegen.gate.members import Member
from orki_codegen.gate.metadata import metadata_remarks
from orki_codegen.gate.owners import owner_remarks
from orki_codegen.gate.past import Past, Release
from orki_codegen.gate.python_api import api_remarks
from orki_codegen.gate.ranges import range_remarks
from orki_codegen.gate.remarks import Remark
from orki_contract.descriptors import Location
from orki_contract.findings import Bump


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What the judge goes by, beside the two sides.

    Attributes:
        accepted: The accepted breaks.
        today: For what expires.
        settled: Keys of accepted breaks that may match nothing, as they speak of a time before the pasts.
        lenient: Whether generated code may lag behind the protos, as it may while somebody works.
    """

    accepted: Sequence[Accepted]
    today: date
    settled: frozenset[tuple[str, str, str]] = frozenset()
    lenient: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the gate says of a tree.

    Attributes:
        remarks: All of it, sorted by distribution and place.
        bumps: What each distribution that users have asks for, by name; None where nothing of it changed.
    """

    remarks: tuple[Remark, ...]
    bumps: Mapping[str, Bump | None]

    @property
    def red(self) -> bool:
        """Whether something may not pass."""
        return any(each.fails for each in self.remarks)


def judge(pasts: Sequence[Past], now: Present, terms: Terms, buf: Buf | None) -> Verdict:
    """Judges a tree.

    Args:
        pasts: What users have; the last release of each distribution before older ones.
        now: The tree.
        terms: What the judge goes by.
        buf: For buf's own rules; None leaves them out.

    Raises:
        InvalidContract: buf cannot compare.
        InvalidSetting: Something cannot be read.
    """
    valid = {each.key: each for each in terms.accepted if not each.expired(terms.today, now.members)}
    bench = _Bench(now, valid)
    for past in pasts:
        found = contract_remarks(past, now, buf)
        for name, release in sorted(past.releases.items()):
            own = [each for each in found if each.package == name]
            if past.streams_only:
                bench.judge_older(release, own)
            else:
                bench.judge(release, [*own, *owner_remarks(release, now)], unpublished=past.stands_in)
    remarks = [*bench.remarks, *_stale(terms, bench.used, now.members), *range_remarks(now.members, bench.broken)]
    if not terms.lenient:
        remarks += _lagging(now)
    return Verdict(remarks=tuple(_unique(remarks)), bumps=bench.bumps)


class _Bench:
    """Gathers what is found, distribution by distribution."""

    def __init__(self, now: Present, valid: Mapping[tuple[str, str, str], Accepted]) -> None:
        self.remarks: list[Remark] = []
        self.bumps: dict[str, Bump | None] = {}
        self.broken: dict[str, Version] = {}
        self.used: set[tuple[str, str, str]] = set()
        self._now = now
        self._valid = valid
        self._imported = imported_modules(now.root, now.members)

    def judge(self, release: Release, found: Sequence[Remark], *, unpublished: bool) -> None:
        """Holds a distribution against its last release."""
        member = self._now.members.get(release.name)
        if member is None:
            self.remarks += [replace(each, fails=each.bump is Bump.MAJOR) for each in self._accept(found)]
            return
        api = api_remarks(self._now.root, member, release, self._public(member, release))
        installed = [*console_remarks(member, release), *metadata_remarks(member, release)]
        judged = [_measured(each, member, release) for each in self._accept([*found, *installed, *api])]
        if not judged:
            # Under the version of a commit other files may lie: nobody got the earlier ones from an index.
            strict = release.wheel is not None and not unpublished
            contents = content_remarks(self._now.root, member, release)
            judged = [_measured(each, member, release, strict=strict) for each in contents]
        self.bumps[member.name] = heavier(each.bump for each in judged) if judged else None
        # Before the version tells of a break, no range can.
        if self.bumps[member.name] is Bump.MAJOR and not any(each.fails for each in judged):
            self.broken[member.name] = release.version
        self.remarks += judged

    def judge_older(self, release: Release, found: Sequence[Remark]) -> None:
        """Holds a distribution against a release whose entries may still lie in streams."""
        member = self._now.members[release.name]
        self.remarks += [_measured(each, member, release) for each in self._accept(found)]

    def _accept(self, found: Iterable[Remark]) -> Iterable[Remark]:
        """Makes accepted breaks milder."""
        for each in found:
            entry = self._valid.get((each.rule, each.package, each.subject))
            if entry is None or each.bump is not Bump.MAJOR:
                yield each
            else:
                self.used.add(entry.key)
                yield replace(each, bump=Bump.MINOR, message=f"{each.message} (accepted: {entry.reason})")

    def _public(self, member: Member, release: Release) -> frozenset[str] | None:
        """The modules whose names are promised: those that are listed, now or then, and those that siblings import."""
        return None if member.api is None else member.api | release.api | self._imported


def _measured(remark: Remark, member: Member, release: Release, strict: bool = True) -> Remark:
    """The remark, with the version that it asks for."""
    promised = is_promised(member.version, release.version, remark.bump)
    needs = least(release.version, remark.bump)
    return replace(remark, since=release.label, needs=needs, fails=strict and not promised)


def _stale(terms: Terms, used: set[tuple[str, str, str]], members: Mapping[str, Member]) -> Iterable[Remark]:
    for each in terms.accepted:
        if each.expired(terms.today, members):
            why = f"it was accepted until {each.until}"
        elif each.key not in used | terms.settled:
            why = "nothing breaks it"
        else:
            continue
        yield Remark(
            rule="ACCEPTED_BREAK_STALE",
            package=each.package,
            subject=each.subject,
            place=each.place,
            message=f"the accepted break {each.rule} of {each.subject} is stale, as {why}: take it out",
            bump=Bump.PATCH,
            fails=True,
        )


def _lagging(now: Present) -> Iterable[Remark]:
    for package, path in now.drifted.items():
        yield Remark(
            rule="GENERATED_CODE_STALE",
            package=now.owner(package) or "",
            subject=package,
            place=Location(path),
            message=f"the wheel would ship another contract of {package} than the protos say: run `nox -s generate`",
            bump=Bump.PATCH,
            fails=True,
        )


def _unique(remarks: Iterable[Remark]) -> list[Remark]:
    """Without what an older release says again: of equal changes, that against the newest release is kept."""
    kept: dict[tuple[object, ...], Remark] = {}
    for each in remarks:
        kept.setdefault((each.package, each.rule, each.subject, each.message, each.fails), each)
    return sorted(kept.values(), key=lambda each: (each.package, each.place, each.rule, each.subject, each.message))
