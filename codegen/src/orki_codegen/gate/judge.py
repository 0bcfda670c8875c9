"""From changes to a verdict: which version each asks for, and whether the tree promises it."""

from __future__ import annotations

__all__ = ["Verdict", "judge"]

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date

from packaging.version import Version

from orki_codegen.buf import Buf
from orki_codegen.gate.accepted import Accepted
from orki_codegen.gate.bumps import heavier, is_promised, least
from orki_codegen.gate.contents import content_remarks
from orki_codegen.gate.contracts import Present, contract_remarks
from orki_codegen.gate.imports import imported_modules
from orki_codegen.gate.members import Member
from orki_codegen.gate.past import Past, Release
from orki_codegen.gate.python_api import api_remarks
from orki_codegen.gate.ranges import range_remarks
from orki_codegen.gate.remarks import Remark
from orki_contract.descriptors import Location
from orki_contract.findings import Bump


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the gate says of a tree.

    Attributes:
        remarks: All of it, sorted by distribution and place.
        bumps: What each distribution that users have asks for, by name; None where nothing of it changed.
        accepted: The remarks that are milder than their rule, with the reason.
    """

    remarks: tuple[Remark, ...]
    bumps: Mapping[str, Bump | None]
    accepted: Mapping[Remark, str]

    @property
    def red(self) -> bool:
        """Whether something may not pass."""
        return any(each.fails for each in self.remarks)


def judge(
    pasts: Sequence[Past],
    now: Present,
    accepted: Sequence[Accepted],
    *,
    buf: Buf | None,
    today: date,
    old: frozenset[tuple[str, str, str]] = frozenset(),
    lenient: bool = False,
    tell: Callable[[str], None] = lambda line: None,
) -> Verdict:
    """Judges a tree.

    Args:
        pasts: What users have; the last release of each distribution before older ones.
        now: The tree.
        accepted: The accepted breaks.
        buf: For buf's own rules; None leaves them out.
        today: For what expires.
        old: Accepted breaks that may match nothing, as they speak of a time before the pasts.
        lenient: Whether generated code may lag behind the protos, as it may while somebody works.
        tell: Takes a line on every step.

    Raises:
        InvalidContract: buf cannot compare.
        InvalidSetting: Something cannot be read.
    """
    valid = {each.key: each for each in accepted if not each.expired(today, now.members)}
    used: set[tuple[str, str, str]] = set()
    remarks: list[Remark] = []
    reasons: dict[Remark, str] = {}
    bumps: dict[str, Bump | None] = {}
    broken: dict[str, Version] = {}
    imported = imported_modules(now.root, now.members)
    for past in pasts:
        found = contract_remarks(past, now, buf)
        for name in sorted(set(past.releases) & set(now.members)):
            member, release = now.members[name], past.releases[name]
            own = [each for each in found if each.package == name]
            if not past.streams_only:
                tell(f"{name}: {release.version} of {release.origin} → {member.version}")
                own += api_remarks(now.root, member, release, _public(member, release, imported))
            judged = []
            for each in own:
                entry = valid.get((each.rule, name, each.subject))
                if entry is not None and each.bump is Bump.MAJOR:
                    used.add(entry.key)
                    each = replace(each, bump=Bump.MINOR, message=f"{each.message} (accepted: {entry.reason})")
                judged.append(_measured(each, member, release))
                if entry is not None:
                    reasons[judged[-1]] = entry.reason
            if not past.streams_only:
                if not judged:
                    judged = [
                        _measured(each, member, release, fails=not past.stands_in and release.wheel is not None)
                        for each in content_remarks(now.root, member, release)
                    ]
                bumps[name] = heavier(each.bump for each in judged) if judged else None
                # Before the version tells of the break, no range can.
                if bumps[name] is Bump.MAJOR and not any(each.fails for each in judged):
                    broken[name] = release.version
            remarks += judged
    remarks += _stale(accepted, used | old, today, now.members)
    remarks += range_remarks(now.members, broken)
    remarks += [] if lenient else _lagging(now)
    return Verdict(remarks=tuple(_unique(remarks)), bumps=bumps, accepted=reasons)


def _public(member: Member, release: Release, imported: frozenset[str]) -> frozenset[str] | None:
    """The modules whose names are promised: those that are listed, now or then, and those that siblings import."""
    return None if member.api is None else member.api | release.api | imported


def _measured(remark: Remark, member: Member, release: Release, fails: bool = True) -> Remark:
    """The remark, with the version that it asks for."""
    promised = is_promised(member.version, release.version, remark.bump)
    needs = least(release.version, remark.bump)
    return replace(remark, since=release.label, needs=needs, fails=fails and not promised)


def _stale(
    accepted: Iterable[Accepted], used: set[tuple[str, str, str]], today: date, members: Mapping[str, Member]
) -> Iterable[Remark]:
    for each in accepted:
        if each.expired(today, members):
            why = f"it was accepted until {each.until}"
        elif each.key not in used:
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
        key = (each.package, each.rule, each.subject, each.message, each.fails)
        kept.setdefault(key, each)
    return sorted(kept.values(), key=lambda each: (each.package, each.place, each.rule, each.subject, each.message))
