"""The findings of the gate, and their text, JSON and GitHub forms."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from packaging.version import Version

from orki_codegen._gate.distributions import Member
from orki_contract.descriptors import Location
from orki_contract.findings import Bump


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One change or fault of a distribution.

    Attributes:
        rule: The id of a rule: one of orki's (`ORKI_…`), of buf's, of the Python API's (`API_…`) or of the gate's own.
        package: The distribution whose version must reflect it.
        subject: The changed thing.
        location: Location of the changed thing.
        message: A sentence without a full stop.
        bump: The bump that it needs.
        since: The label of the release before the change; empty for faults of the tree itself.
        needs: The lowest version that may contain the change; None if no version can.
        fails: Whether it makes the gate fail.
        wire: Whether running processes would misunderstand or refuse each other.
        affected: The affected agents, groups or services.
    """

    rule: str
    package: str
    subject: str
    location: Location
    message: str
    bump: Bump
    since: str = ""
    needs: Version | None = None
    fails: bool = False
    wire: bool = False
    affected: tuple[str, ...] = ()

    @property
    def sentence(self) -> str:
        """The message with the affected parties and the earlier release."""
        affects = f"; affects {', '.join(self.affected)}" if self.affected else ""
        since = f" (since {self.since})" if self.since else ""
        return f"{self.message}{affects}{since}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The result of the gate.

    Attributes:
        findings: All findings, sorted by distribution and location.
        bumps: The bump that each released distribution needs, by name; None for an unchanged one.
    """

    findings: tuple[Finding, ...]
    bumps: Mapping[str, Bump | None]

    @property
    def red(self) -> bool:
        """Whether any finding makes the gate fail."""
        return any(each.fails for each in self.findings)


def as_json(findings: Iterable[Finding]) -> str:
    """Return an array with one object for each finding."""
    shown = [
        {
            "rule": each.rule,
            "package": each.package,
            "subject": each.subject,
            "file": each.location.file,
            "line": each.location.line,
            "message": each.sentence,
            "bump": each.bump.value,
        }
        for each in findings
    ]
    return json.dumps(shown, indent=2, ensure_ascii=False) + "\n"


def as_text(evaluation: Evaluation, members: Mapping[str, Member], compared: Mapping[str, str]) -> Iterator[str]:
    """Yield a line for each finding and each distribution, and the result."""
    width = max((len(each.rule) for each in evaluation.findings), default=0)
    for name, member in sorted(members.items()):
        bump = evaluation.bumps.get(name)
        if name not in evaluation.bumps:
            outcome = ""
        elif bump is None:
            outcome = ": unchanged, no release needed"
        else:
            outcome = f": {bump}"
        yield f"{name} {member.version}, {compared.get(name, 'not compared')}{outcome}"
        yield from (f"  {_line(each, width)}" for each in evaluation.findings if each.package == name)
    yield from (_line(each, width) for each in evaluation.findings if each.package not in members)
    if not evaluation.red:
        yield "the gate is green: every version fits its changes"
        return
    yield "the gate is red:"
    for name, member in sorted(members.items()):
        own = [each for each in evaluation.findings if each.package == name]
        if low := [each.needs for each in own if each.fails and each.needs is not None]:
            yield (
                f"  {member.location}: {name} has version {member.version} and needs at least {max(low)}: "
                "raise the version or revert the change"
            )
    faults = sum(each.fails and each.needs is None for each in evaluation.findings)
    if faults:
        yield f"  {faults} {'fault' if faults == 1 else 'faults'} that no version fixes, see the lines with ✗"


def as_github(evaluation: Evaluation) -> Iterator[str]:
    """Yield GitHub workflow commands: an error for each failing finding, a warning or notice for the others."""
    for each in evaluation.findings:
        needs = f" → {each.package} {each.needs}" if each.needs is not None else ""
        position = [f"file={_property(each.location.file)}"] if each.location.file else []
        if position and each.location.line:
            position += [f"line={each.location.line}", f"col={each.location.column}"]
        properties = ",".join([*position, f"title={_property(each.rule)}"])
        kind = "error" if each.fails else "warning" if each.bump is Bump.MAJOR else "notice"
        yield f"::{kind} {properties}::{_escaped(f'{each.sentence}{needs}')}"


def _line(finding: Finding, width: int) -> str:
    needs = f"  → {finding.package} {finding.needs}" if finding.needs is not None else ""
    mark = "✗" if finding.fails else " "
    return f"{mark} {finding.location}  {finding.rule:{width}}  {finding.sentence}{needs}"


def _escaped(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _escaped(text).replace(":", "%3A").replace(",", "%2C")
