"""The verdict for people and for GitHub."""

from __future__ import annotations

__all__ = ["as_github", "as_text"]

from collections.abc import Iterator, Mapping

from orki_codegen.gate.contracts import Present
from orki_codegen.gate.judge import Verdict
from orki_codegen.gate.remarks import Remark
from orki_contract.findings import Bump


def as_text(verdict: Verdict, now: Present, states: Mapping[str, str]) -> Iterator[str]:
    """A line for each remark, and one for each distribution."""
    width = max((len(each.rule) for each in verdict.remarks), default=0)
    for name, member in sorted(now.members.items()):
        own = [each for each in verdict.remarks if each.package == name]
        bump = verdict.bumps.get(name)
        if name not in verdict.bumps:
            outcome = ""
        elif bump is None:
            outcome = ": unchanged, no release needed"
        else:
            outcome = f": {bump}"
        yield f"{name} {member.version}, {states.get(name, 'not compared')}{outcome}"
        yield from (f"  {_line(each, width)}" for each in own)
    known = set(now.members)
    yield from (_line(each, width) for each in verdict.remarks if each.package not in known)
    yield from _outcome(verdict, now)


def _line(remark: Remark, width: int) -> str:
    needs = f"  → {remark.package} {remark.needs}" if remark.needs is not None else ""
    mark = "✗" if remark.fails else " "
    return f"{mark} {remark.place}  {remark.rule:{width}}  {remark.sentence}{needs}"


def _outcome(verdict: Verdict, now: Present) -> Iterator[str]:
    if not verdict.red:
        yield "the gate is green: every version promises what changed"
        return
    yield "the gate is red:"
    for name, member in sorted(now.members.items()):
        low = [each.needs for each in verdict.remarks if each.package == name and each.fails and each.needs is not None]
        if low:
            yield (
                f"  {member.place}: {name} promises {member.version}, and must promise {max(low)} at the least: raise "
                "the version, or take the change back"
            )
    faults = sum(each.fails and each.needs is None for each in verdict.remarks)
    if faults:
        yield f"  {faults} {'fault' if faults == 1 else 'faults'} that no version mends, see the lines with ✗"


def as_github(verdict: Verdict) -> Iterator[str]:
    """Workflow commands: an error for each remark that makes the gate red, a notice for the others."""
    for each in verdict.remarks:
        needs = f" → {each.package} {each.needs}" if each.needs is not None else ""
        spots = [f"file={_property(each.place.file)}"] if each.place.file else []
        if spots and each.place.line:
            spots += [f"line={each.place.line}", f"col={each.place.column}"]
        properties = ",".join([*spots, f"title={_property(each.rule)}"])
        kind = "error" if each.fails else "warning" if each.bump is Bump.MAJOR else "notice"
        yield f"::{kind} {properties}::{_text(f'{each.sentence}{needs}')}"


def _text(text: str) -> str:
    """As GitHub asks the text of a workflow command to be written."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    """As GitHub asks a property of a workflow command to be written."""
    return _text(text).replace(":", "%3A").replace(",", "%2C")
