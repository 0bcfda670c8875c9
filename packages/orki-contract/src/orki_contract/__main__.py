"""The command `orki-contract`."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from itertools import zip_longest
from typing import Any, Final

from orki_contract.descriptors import Location
from orki_contract.errors import InvalidContract, OrkiError
from orki_contract.findings import Bump, Finding, findings, required_bump
from orki_contract.images import Image, images_in, owned_packages, service_digest, stream_digest
from orki_contract.model import (
    TASK_MESSAGES,
    Backoff,
    Budget,
    Contract,
    Durability,
    Frame,
    Group,
    Retention,
    Stream,
    TaskMethod,
    ToolMethod,
    dump,
    duration_text,
)
from orki_contract.printing import print_line
from orki_contract.read import ReadContract, merged, read_image
from orki_contract.validate import validate
from orki_contract.versions import ContractVersion, version_at

_DUMP = """\
Show what a contract declares: streams with their groups, tasks, tools, frames, sensitive fields.

SOURCE is one of:
  contract.binpb       an image: a serialized FileDescriptorSet with its imports (`buf build -o` writes one)
  acme-1.0-….whl       a wheel; every contract.binpb in it is read
  packages/acme        a folder; every contract.binpb in it is read, except in hidden folders (default: .)
  orki-events          an installed distribution
  orki.events.v1       an installed proto package

Exit status: 0, valid; 1, the contract violates a rule (it is still shown); 2, the source cannot be read.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(prog="orki-contract", description="Show and compare orki contracts.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    dumping = commands.add_parser(
        "dump",
        help="show what a contract declares",
        description=_DUMP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    help_text = "image, wheel, folder or package (default: .)"
    dumping.add_argument("source", metavar="SOURCE", nargs="?", default=".", help=help_text)
    dumping.add_argument("--json", action="store_true", help="print JSON: an object for each proto package")
    _add_diff(commands)
    given = parser.parse_args(arguments)
    try:
        if given.command == "diff":
            return _diff(given)
        return _dump(given.source, as_json=given.json)
    except OrkiError as error:
        print(f"orki-contract: {error.message}", file=sys.stderr)
        return 2


def _dump(source: str, *, as_json: bool) -> int:
    status = 0
    packages: dict[str, object] = {}
    texts = []
    for image in images_in(source):
        try:
            read = read_image(image.content)
        except InvalidContract as error:
            raise InvalidContract(f"{image.place}: {error.message}") from error
        for violation in validate(read):
            print(f"orki-contract: {image.place}: {violation}", file=sys.stderr)
            status = 1
        for name, contract in _packages(read, image):
            digests = dict(_digests(image.content, contract))
            packages[name] = {**dump(contract), "digests": digests}
            texts.append("\n".join([name, *_table(contract, digests)]))
    print_line(json.dumps(packages, indent=2) if as_json else "\n\n".join(texts))
    return status


def _packages(read: ReadContract, image: Image) -> Iterator[tuple[str, Contract]]:
    """Return the proto packages to show: those that declare something, or those that a shipped image owns."""
    declaring = {file.package for file in read.files if not file.empty}
    for name in sorted(owned_packages(image, read.schema.files.values()) if image.shipped else declaring):
        parts = [file.contract for file in read.files if file.package == name]
        yield name, merged(parts)


def _digests(image: bytes, contract: Contract) -> Iterator[tuple[str, str]]:
    for service in sorted({each.service for each in contract.tasks + contract.tools}):
        yield service, service_digest(image, service)
    for stream in contract.streams:
        yield stream.name, stream_digest(image, stream.name)


_Row = tuple[str, str]


def _table(contract: Contract, digests: Mapping[str, str]) -> Iterator[str]:
    rows = [
        *(row for stream in contract.streams for row in _stream(stream)),
        *(
            (f"group {each.group.name} on stream {each.stream}", _words(each.group))
            for each in contract.external_groups
        ),
        *(row for method in contract.tasks + contract.tools for row in _method(method)),
        *(row for frame in contract.frames for row in _frame(frame)),
        *((f"sensitive {each.message}.{each.field}", "") for each in contract.sensitive),
        *((f"digest of {name}", digest) for name, digest in digests.items()),
    ]
    if not rows:
        yield "  declares no stream, task, tool or frame"
    # Ignore a few long names when aligning the columns.
    column = max((len(label) for label, _ in rows if len(label) <= 48), default=0)
    for label, text in rows:
        yield f"  {label:<{column}}  {text}".rstrip()


def _stream(stream: Stream) -> Iterator[_Row]:
    age = f", {duration_text(stream.retention.max_age)}" if stream.retention.max_age else ""
    split = f"; {stream.partitions} partitions by {stream.partition_key}" if stream.partitions > 1 else ""
    yield f"stream {stream.name}", stream.message
    size = f", {stream.retention.max_bytes} bytes" if stream.retention.max_bytes else ""
    yield "  keeps", f"{stream.retention.max_entries} entries{age}{size}{split}"
    if stream.retention.ceiling:
        yield "  unread", f"{stream.retention.ceiling} entries, then {stream.retention.overflow}"
    if stream.durability is not Durability.MEMORY:
        number = f" {stream.replicas}" if stream.replicas else ""
        yield "  durability", f"{stream.durability}{number}"
    if stream.retention.tunable:
        yield "  may keep", _bounds(stream.retention)
    for group in stream.groups:
        yield f"  group {group.name}", _words(group)


def _bounds(retention: Retention) -> str:
    """Describe the settings of a deployment, such as `500 to 5000 entries, 1 min to 1 h`."""
    least, most = retention.entries_bounds
    shortest, longest = retention.age_bounds
    return f"{least} to {most} entries" + (
        f", {duration_text(shortest)} to {duration_text(longest)}" if longest else ""
    )


def _method(method: TaskMethod | ToolMethod) -> Iterator[_Row]:
    kind = "task" if isinstance(method, TaskMethod) else "tool"
    yield f"{kind} {method.full_name}", "" if isinstance(method, TaskMethod) else f"0x{method.opcode:04x}"
    for name in ("request", "response", *TASK_MESSAGES):
        if message := getattr(method, name, ""):
            yield f"  {name}", message
    if words := _words(method):
        yield "  settings", words


def _frame(frame: Frame) -> Iterator[_Row]:
    tail = f", tail {frame.tail}" if frame.tail else ""
    yield f"frame {frame.message}", f"version {frame.version}, {frame.block_length} bytes{tail}"
    for field in frame.fields:
        since = f", since version {field.since}" if field.since > 1 else ""
        yield f"  {field.name}", f"{field.offset}..{field.offset + field.size - 1} {field.scalar}{since}"


_NAMES = frozenset({"name", "service", "opcode", "request", "response", *TASK_MESSAGES})


def _words(value: Group | TaskMethod | ToolMethod | Backoff | Budget) -> str:
    """Describe the settings that differ from their defaults."""
    words = []
    for field in fields(value):
        given = getattr(value, field.name)
        if field.name not in _NAMES and given != field.default:
            shown = f"({_words(given)})" if isinstance(given, Backoff | Budget) else given
            words.append(f"{field.name} {shown}")
    return ", ".join(words)


_DIFF = """\
Show the changes between two contracts: the plane, the affected parts, and the required version bump.

OLD and NEW are each one of:
  contract.binpb       an image: a serialized FileDescriptorSet with its imports (`buf build -o` writes one)
  acme-1.0-….whl       a wheel; every contract.binpb in it is read
  packages/acme        a folder; buf compiles it where it has a buf.yaml, else every contract.binpb in it is read
  main, v1.2.0, HEAD~3 a git ref of the repository around the working directory, read as a folder
  orki-events          an installed distribution
  orki.events.v1       an installed proto package

For a wheel or a folder of images, only the packages that it owns are compared.
"""


def _add_diff(commands: Any) -> None:
    parser = commands.add_parser(
        "diff",
        help="show the changes between two contracts",
        description=_DIFF,
        epilog="Exit status: 0, compatible; 1, a change requires a major bump; 2, OLD or NEW cannot be read.\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("old", metavar="OLD", help="the released version")
    parser.add_argument("new", metavar="NEW", help="the version to check")
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--json", action="store_true", help="print JSON: an object with bump, packages and findings")
    shape.add_argument("--github", action="store_true", help="print GitHub workflow annotations")


def _diff(given: argparse.Namespace) -> int:
    old, new = version_at(given.old), version_at(given.new)
    found = _of_packages(findings(old.read, new.read), old, new)
    show = _as_json if given.json else _as_github if given.github else _as_table
    print_line(show(found, old, new))
    return 1 if any(finding.bump is Bump.MAJOR for finding in found) else 0


def _of_packages(found: tuple[Finding, ...], old: ContractVersion, new: ContractVersion) -> list[Finding]:
    sides = [side.packages for side in (old, new) if side.packages is not None]
    if not sides:
        return list(found)
    wanted = frozenset[str]().union(*sides)
    return [finding for finding in found if finding.package in wanted]


_NARROWEST: Final = 72
_ORDER: Final = {Bump.MAJOR: 0, Bump.MINOR: 1, Bump.PATCH: 2}


def _as_json(found: Sequence[Finding], old: ContractVersion, new: ContractVersion) -> str:
    shown = [_placed(finding, old, new) for finding in found]
    whole = {
        "old": old.label,
        "new": new.label,
        "bump": required_bump(found).value,
        "packages": {package: bump.value for package, bump in _bumps(found).items()},
        "findings": [dump(finding) for finding in shown],
    }
    return json.dumps(whole, indent=2, ensure_ascii=False)


def _as_github(found: Sequence[Finding], old: ContractVersion, new: ContractVersion) -> str:
    lines = []
    for finding in _sorted(_placed(each, old, new) for each in found):
        kind = "error" if finding.bump is Bump.MAJOR else "notice"
        text = f"{finding.message} ({finding.bump})"
        if finding.gone:
            text += f"\nformerly at {finding.location}"
        if finding.affected:
            text += f"\naffects {', '.join(finding.affected)}"
        # GitHub cannot annotate removed files and old versions.
        position = [] if finding.gone else [f"file={_property(finding.location.file)}"]
        if position and finding.location.line:
            position += [f"line={finding.location.line}", f"col={finding.location.column}"]
        properties = ",".join([*position, f"title={_property(finding.rule)}"])
        lines.append(f"::{kind} {properties}::{_escaped(text)}")
    lines += _summary(found, old, new)
    return "\n".join(lines)


def _as_table(found: Sequence[Finding], old: ContractVersion, new: ContractVersion) -> str:
    width = max(shutil.get_terminal_size((120, 24)).columns, _NARROWEST)
    # Two narrow columns and the spaces between all four take their width first.
    rest = width - 5 - 8 - 3 * 2
    widths = (5, 8, rest * 2 // 3, rest - rest * 2 // 3)
    lines: list[str] = []
    if found:
        lines += _row(("bump", "plane", "what changed", "affects"), widths)
    for finding in _sorted(_placed(each, old, new) for each in found):
        where = f"{'formerly at ' if finding.gone else ''}{finding.location} [{finding.rule}]"
        what = f"{finding.message}\n{where}"
        lines += _row((finding.bump.value, finding.plane.value, what, "\n".join(finding.affected)), widths)
    return "\n".join([*lines, *_summary(found, old, new)])


def _row(cells: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    columns = [
        [part for line in cell.split("\n") for part in textwrap.wrap(line, width) or [""]]
        for cell, width in zip(cells, widths, strict=True)
    ]
    for parts in zip_longest(*columns, fillvalue=""):
        yield "  ".join(part.ljust(width) for part, width in zip(parts, widths, strict=True)).rstrip()


def _summary(found: Sequence[Finding], old: ContractVersion, new: ContractVersion) -> Iterator[str]:
    if not found:
        yield f"{old.label} → {new.label}: the contracts are the same"
        return
    for package, bump in _bumps(found).items():
        own = [finding for finding in found if finding.package == package]
        breaks = sum(finding.bump is Bump.MAJOR for finding in own)
        yield f"{package or 'no package'}: {bump} ({breaks} breaking, {len(own) - breaks} compatible)"
    yield f"{old.label} → {new.label}: at least a {required_bump(found)} bump"


def _bumps(found: Sequence[Finding]) -> Mapping[str, Bump]:
    names = sorted({finding.package for finding in found})
    return {name: required_bump(each for each in found if each.package == name) for name in names}


def _sorted(found: Iterator[Finding]) -> list[Finding]:
    return sorted(found, key=lambda each: (_ORDER[each.bump], each.package, each))


def _placed(finding: Finding, old: ContractVersion, new: ContractVersion) -> Finding:
    location = _reached(finding.location, (old if finding.gone else new).paths)
    return replace(finding, location=location, before=_reached(finding.before, old.paths))


def _reached(location: Location, paths: Mapping[str, str]) -> Location:
    return replace(location, file=paths.get(location.file, location.file))


def _escaped(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _escaped(text).replace(":", "%3A").replace(",", "%2C")


if __name__ == "__main__":
    sys.exit(main())
