"""The command `orki-contract`."""

from __future__ import annotations

__all__ = ["main"]

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields

from orki_contract import difference
from orki_contract.errors import InvalidContract, OrkiError
from orki_contract.images import service_digest, stream_digest
from orki_contract.model import (
    Backoff,
    Contract,
    Frame,
    Group,
    Retention,
    Stream,
    TaskMethod,
    ToolMethod,
    dump,
    duration_text,
)
from orki_contract.printing import say
from orki_contract.read import ReadContract, merged, read_image
from orki_contract.sources import images_in
from orki_contract.validate import validate

_DUMP = """\
Shows what a contract declares: streams with their groups, tasks, tools, frames, sensitive fields.

SOURCE is one of:
  contract.binpb       an image: a serialized FileDescriptorSet with its imports (`buf build -o` writes one)
  acme-1.0-….whl       a wheel; every contract.binpb in it is read
  packages/acme        a folder; likewise, hidden folders left out; this one unless another is given
  orki-events          an installed distribution
  orki.events.v1       an installed proto package

Exit status: 0; 1, the source breaks a rule of contracts (it is shown all the same); 2, the source cannot be read.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(prog="orki-contract", description="Looks at orki contracts.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    dumping = commands.add_parser(
        "dump",
        help="show what a contract declares",
        description=_DUMP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    dumping.add_argument(
        "source", metavar="SOURCE", nargs="?", default=".", help="an image, a wheel, a folder, or what is installed (.)"
    )
    dumping.add_argument("--json", action="store_true", help="as JSON: an object for each proto package")
    difference.register(commands)
    given = parser.parse_args(arguments)
    try:
        if given.command == "diff":
            return difference.run(given)
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
        for name, contract in _packages(read, shipped=image.shipped):
            digests = dict(_digests(image.content, contract))
            packages[name] = {**dump(contract), "digests": digests}
            texts.append("\n".join([name, *_table(contract, digests)]))
    say(json.dumps(packages, indent=2) if as_json else "\n\n".join(texts))
    return status


def _packages(read: ReadContract, *, shipped: bool) -> Iterator[tuple[str, Contract]]:
    """The proto packages to show, by name: all that declare something, or in a shipped image those it was made for."""
    files = read.schema.files
    imported = {
        files[path].package
        for file in files.values()
        for path in file.dependency
        if files[path].package != file.package
    }
    declaring = {file.package for file in read.files if not file.empty}
    for name in sorted({file.package for file in read.files} - imported if shipped else declaring):
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
    # A few long names do not push everything else to the right.
    column = max((len(label) for label, _ in rows if len(label) <= 48), default=0)
    for label, text in rows:
        yield f"  {label:<{column}}  {text}".rstrip()


def _stream(stream: Stream) -> Iterator[_Row]:
    age = f", {duration_text(stream.retention.max_age)}" if stream.retention.max_age else ""
    split = f"; {stream.partitions} partitions by {stream.partition_key}" if stream.partitions > 1 else ""
    yield f"stream {stream.name}", stream.message
    yield "  keeps", f"{stream.retention.max_entries} entries{age}{split}"
    if stream.retention.tunable:
        yield "  may keep", _bounds(stream.retention)
    for group in stream.groups:
        yield f"  group {group.name}", _words(group)


def _bounds(retention: Retention) -> str:
    """What a deployment may set, for people: `500 to 5000 entries, 1 min to 1 h`."""
    least, most = retention.entries_bounds
    shortest, longest = retention.age_bounds
    return f"{least} to {most} entries" + (
        f", {duration_text(shortest)} to {duration_text(longest)}" if longest else ""
    )


def _method(method: TaskMethod | ToolMethod) -> Iterator[_Row]:
    kind = "task" if isinstance(method, TaskMethod) else "tool"
    yield f"{kind} {method.full_name}", "" if isinstance(method, TaskMethod) else f"0x{method.opcode:04x}"
    for name in ("request", "response", "progress", "directive"):
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


_NAMES = frozenset({"name", "service", "opcode", "request", "response", "progress", "directive"})


def _words(value: Group | TaskMethod | ToolMethod | Backoff) -> str:
    """The settings that differ from their defaults, in words."""
    told = []
    for field in fields(value):
        given = getattr(value, field.name)
        if field.name not in _NAMES and given != field.default:
            told.append(f"{field.name} ({_words(given)})" if isinstance(given, Backoff) else f"{field.name} {given}")
    return ", ".join(told)


if __name__ == "__main__":
    sys.exit(main())
