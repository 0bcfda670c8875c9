"""Findings for people, for programs, and for GitHub."""

from __future__ import annotations

__all__ = ["as_github", "as_json", "as_table"]

import json
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Final

from orki_contract.descriptors import Location
from orki_contract.difference.versions import Version
from orki_contract.findings import Bump, Finding, required_bump
from orki_contract.model import dump

_NARROWEST: Final = 72
_ORDER: Final = {Bump.MAJOR: 0, Bump.MINOR: 1, Bump.PATCH: 2}


def as_json(found: Sequence[Finding], old: Version, new: Version) -> str:
    """An object: both labels, the bump of all, the bump of each package, and the findings."""
    shown = [_placed(finding, old, new) for finding in found]
    whole = {
        "old": old.label,
        "new": new.label,
        "bump": required_bump(found).value,
        "packages": {package: bump.value for package, bump in _packages(found).items()},
        "findings": [dump(finding) for finding in shown],
    }
    return json.dumps(whole, indent=2, ensure_ascii=False)


def as_github(found: Sequence[Finding], old: Version, new: Version) -> str:
    """Workflow commands: an error for each break, a notice for what is new, and the bump at the end."""
    lines = []
    for finding in _sorted(_placed(each, old, new) for each in found):
        kind = "error" if finding.bump is Bump.MAJOR else "notice"
        place = finding.location
        # A file that is gone, or a place in the old version, can carry no annotation.
        spots = [] if finding.gone else [f"file={_property(place.file)}"]
        if spots and place.line:
            spots += [f"line={place.line}", f"col={place.column}"]
        text = f"{finding.message} ({finding.bump})"
        if finding.gone:
            text += f"\nwas at {place}"
        if finding.affected:
            text += f"\naffects {', '.join(finding.affected)}"
        properties = ",".join([*spots, f"title={_property(finding.rule)}"])
        lines.append(f"::{kind} {properties}::{_text(text)}")
    lines += _summary(found, old, new)
    return "\n".join(lines)


def as_table(found: Sequence[Finding], old: Version, new: Version) -> str:
    """A table with a row for each finding, breaks first, and the bumps below it."""
    width = max(shutil.get_terminal_size((120, 24)).columns, _NARROWEST)
    # What is left after two narrow columns and the spaces between all four.
    rest = width - 5 - 8 - 3 * 2
    widths = (5, 8, rest * 2 // 3, rest - rest * 2 // 3)
    lines: list[str] = []
    if found:
        lines += _row(("bump", "plane", "what changed", "affects"), widths)
    for finding in _sorted(_placed(each, old, new) for each in found):
        where = f"{'was at ' if finding.gone else ''}{finding.location} [{finding.rule}]"
        what = f"{finding.message}\n{where}"
        lines += _row((finding.bump.value, finding.plane.value, what, "\n".join(finding.affected)), widths)
    return "\n".join([*lines, *_summary(found, old, new)])


def _row(cells: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    columns = []
    for cell, width in zip(cells, widths, strict=True):
        columns.append([part for line in cell.split("\n") for part in textwrap.wrap(line, width) or [""]])
    for index in range(max(map(len, columns))):
        parts = [
            (column[index] if index < len(column) else "").ljust(width)
            for column, width in zip(columns, widths, strict=True)
        ]
        yield "  ".join(parts).rstrip()


def _summary(found: Sequence[Finding], old: Version, new: Version) -> Iterator[str]:
    if not found:
        yield f"{old.label} → {new.label}: the contracts are the same"
        return
    for package, bump in _packages(found).items():
        own = [finding for finding in found if finding.package == package]
        breaks = sum(finding.bump is Bump.MAJOR for finding in own)
        yield f"{package or 'no package'}: {bump} ({breaks} breaking, {len(own) - breaks} compatible)"
    yield f"{old.label} → {new.label}: at least a {required_bump(found)} bump"


def _packages(found: Sequence[Finding]) -> Mapping[str, Bump]:
    """What the findings ask of each package."""
    names = sorted({finding.package for finding in found})
    return {name: required_bump(each for each in found if each.package == name) for name in names}


def _sorted(found: Iterator[Finding]) -> list[Finding]:
    return sorted(found, key=lambda each: (_ORDER[each.bump], each.package, each))


def _placed(finding: Finding, old: Version, new: Version) -> Finding:
    """The finding with places as people reach them."""
    location = _reached(finding.location, (old if finding.gone else new).paths)
    return replace(finding, location=location, before=_reached(finding.before, old.paths))


def _reached(location: Location, paths: Mapping[str, str]) -> Location:
    return replace(location, file=paths.get(location.file, location.file))


def _text(text: str) -> str:
    """As GitHub asks the text of a workflow command to be written."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    """As GitHub asks a property of a workflow command to be written."""
    return _text(text).replace(":", "%3A").replace(",", "%2C")
