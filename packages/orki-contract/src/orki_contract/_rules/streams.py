"""Rules for streams, their groups and external groups."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto

from orki_contract._rules.report import Report, Rule, quoted
from orki_contract.descriptors import Location, MessageNode, is_repeated
from orki_contract.read import seconds_of

RULES: Final[dict[Rule, str]] = {
    "ORKI_STREAM_NAME": "A stream's name has up to 64 lower-case letters, digits, -, _ and ., a letter first.",
    "ORKI_STREAM_NAME_UNIQUE": "A stream's name is unique.",
    "ORKI_MESSAGE_ONE_KIND": "A message is a stream entry or a frame, not both.",
    "ORKI_STREAM_RETENTION": "A stream declares its retention.",
    "ORKI_STREAM_MAX_ENTRIES": "A stream keeps 1 to 2^63-1 entries.",
    "ORKI_STREAM_BOUNDS": "A stream's retention bounds include its own retention.",
    "ORKI_STREAM_BOUNDS_AGE": "Only a stream with a maximum age has age bounds.",
    "ORKI_STREAM_OVERFLOW": "A stream's overflow policy is known to this version.",
    "ORKI_STREAM_CEILING": "Only a stream that keeps unread entries has a ceiling, which is not below its maximum.",
    "ORKI_STREAM_BYTES": "A stream keeps at most 2^63-1 bytes.",
    "ORKI_STREAM_DURABILITY": "A stream's durability is known to this version, and only replicas have a number.",
    "ORKI_STREAM_PARTITIONS": "A stream has 1 to 1024 partitions.",
    "ORKI_STREAM_KEY_REQUIRED": "A stream with several partitions has a partition key.",
    "ORKI_STREAM_KEY_UNUSED": "A stream with one partition has no partition key.",
    "ORKI_STREAM_KEY_FIELD": "A partition key is a field of the stream's message.",
    "ORKI_STREAM_KEY_TYPE": "A partition key is a string, bytes or integer field that is not repeated.",
    "ORKI_GROUP_NAME": "A group's name has up to 64 lower-case letters, digits, - and _, a letter first.",
    "ORKI_GROUP_UNIQUE": "A group's name is unique on its stream.",
    "ORKI_GROUP_AUDIT": "Only the stream's owner configures the group audit, and it starts at the earliest entry.",
    "ORKI_GROUP_START": "A group's start is known to this version.",
    "ORKI_GROUP_MAX_DELIVERIES": "A group allows 1 to 1000 deliveries of an entry.",
    "ORKI_GROUP_DEAD_LETTER": "A group's dead-letter stream has a valid name that no contract declares.",
    "ORKI_SUBSCRIPTION_STREAM": "A group is declared on a stream that exists.",
    "ORKI_SUBSCRIPTION_IMPORT": "A file that declares a group imports the stream's file.",
    "ORKI_SUBSCRIPTION_OWN": "A package declares groups of its own streams in the stream option.",
}

_NAME: Final = re.compile(r"[a-z][a-z0-9._-]{0,63}")
_GROUP: Final = re.compile(r"[a-z][a-z0-9_-]{0,63}")
# Numbers of orki.options.v1; newer options may have other values.
_OVERFLOWS: Final = frozenset({0, 1, 2, 3})
_DURABILITIES: Final = frozenset({0, 1, 2, 3})
_STARTS: Final = frozenset({0, 1, 2})
_KEY_TYPES: Final = frozenset(
    FieldDescriptorProto.Type.Value(f"TYPE_{name}")
    for name in (
        *("STRING", "BYTES", "INT32", "INT64", "UINT32", "UINT64"),
        *("SINT32", "SINT64", "FIXED32", "FIXED64", "SFIXED32", "SFIXED64"),
    )
)


def check(report: Report) -> None:
    """Check every stream and every external group."""
    names: dict[str, list[MessageNode]] = {}
    for node, option in report.messages("stream"):
        names.setdefault(option.name, []).append(node)
    for node, option in report.messages("stream"):
        _stream(report, node, option, [each for each in names[option.name] if each is not node])
    taken = {
        (stream.name, group.name): "its owner" for stream in report.read.contract.streams for group in stream.groups
    }
    for file in report.schema.files.values():
        for index, option in enumerate(report.schema.option(file.options, "consume") or ()):
            _external_group(report, file, index, option, taken)


def _stream(report: Report, node: MessageNode, option: Any, namesakes: list[MessageNode]) -> None:
    """Check one stream; `namesakes` are the messages of other streams with the same name."""
    place = partial(report.schema.locate, node.file.name, node.path, node.proto.options, "stream")
    subject = f'stream "{option.name}"'
    if report.schema.option(node.proto.options, "frame") is not None:
        report.add("ORKI_MESSAGE_ONE_KIND", place(), f"{node.full_name} is both a stream and a frame: remove one")
    if not _NAME.fullmatch(option.name):
        text = f'"{option.name}" is no valid stream name: use {_words("STREAM_NAME")}'
        report.add("ORKI_STREAM_NAME", place("name"), text)
    elif namesakes:
        others = (
            report.schema.locate(each.file.name, each.path, each.proto.options, "stream", "name") for each in namesakes
        )
        text = f"{subject} is also declared at {', '.join(map(str, map(report.shown, others)))}: rename one"
        report.add("ORKI_STREAM_NAME_UNIQUE", place("name"), text)
    if not option.HasField("retention"):
        report.add("ORKI_STREAM_RETENTION", place(), f"{subject} has no retention: add one")
    else:
        if not 1 <= option.retention.max_entries < 1 << 63:
            text = f"{subject} has max_entries = {option.retention.max_entries}: set it to 1 to 2^63-1"
            report.add("ORKI_STREAM_MAX_ENTRIES", place("retention", "max_entries"), text)
        for age in ("max_age", "least_age", "most_age"):
            report.duration(place("retention", age), option.retention, age, f"the retention of {subject}")
        _bounds(report, option.retention, partial(place, "retention"), subject)
        if option.retention.overflow not in _OVERFLOWS:
            text = f"{subject} has an overflow policy that this version does not know: {option.retention.overflow}"
            report.add("ORKI_STREAM_OVERFLOW", place("retention", "overflow"), text)
        _limits(report, option.retention, partial(place, "retention"), subject)
    _durability(report, option, place, subject)
    _partitions(report, node, option, subject)
    seen: set[str] = set()
    for index, group in enumerate(option.groups):
        where = partial(place, "groups", index)
        _group(report, group, where, option.name)
        if group.name in seen:
            text = f'{subject} declares the group "{group.name}" twice: remove one'
            report.add("ORKI_GROUP_UNIQUE", where("name"), text)
        seen.add(group.name)


def _bounds(report: Report, retention: Any, place: Callable[..., Location], subject: str) -> None:
    if "least_entries" not in retention.DESCRIPTOR.fields_by_name:
        # Options that are older than bounds.
        return
    for kind in ("entries", "age"):
        least, kept, most = (_amount(retention, f"{each}_{kind}") for each in ("least", "max", "most"))
        if kind == "age" and not retention.HasField("max_age"):
            for name in ("least_age", "most_age"):
                if retention.HasField(name):
                    text = f"{subject} has {name} but no max_age: add max_age or remove {name}"
                    report.add("ORKI_STREAM_BOUNDS_AGE", place(name), text)
            continue
        if least and least > kept:
            text = f"{subject} has a least_{kind} above its max_{kind}: lower it"
            report.add("ORKI_STREAM_BOUNDS", place(f"least_{kind}"), text)
        if most and (most < kept or (kind == "entries" and most >= 1 << 63)):
            text = f"{subject} has a most_{kind} below its max_{kind} or above 2^63-1: correct it"
            report.add("ORKI_STREAM_BOUNDS", place(f"most_{kind}"), text)


def _limits(report: Report, retention: Any, place: Callable[..., Location], subject: str) -> None:
    if "max_bytes" not in retention.DESCRIPTOR.fields_by_name:
        # Options that are older than these limits.
        return
    if retention.max_bytes >= 1 << 63:
        report.add("ORKI_STREAM_BYTES", place("max_bytes"), f"{subject} has max_bytes above 2^63-1: lower it")
    ceiling = retention.ceiling_entries
    if ceiling and retention.overflow not in (2, 3):
        text = f"{subject} has a ceiling_entries but trims unread entries: remove it or set another overflow"
        report.add("ORKI_STREAM_CEILING", place("ceiling_entries"), text)
    elif ceiling and not max(retention.max_entries, retention.most_entries) <= ceiling < 1 << 63:
        text = f"{subject} has a ceiling_entries below its max_entries or most_entries, or above 2^63-1: correct it"
        report.add("ORKI_STREAM_CEILING", place("ceiling_entries"), text)


def _durability(report: Report, option: Any, place: Callable[..., Location], subject: str) -> None:
    if "durability" not in option.DESCRIPTOR.fields_by_name:
        return
    if option.durability not in _DURABILITIES:
        text = f"{subject} has a durability that this version does not know: {option.durability}"
        report.add("ORKI_STREAM_DURABILITY", place("durability"), text)
    elif option.replicas > (9 if option.durability == 3 else 0):
        text = f"{subject} has {option.replicas} replicas: set 1 to 9, only with DURABILITY_REPLICAS"
        report.add("ORKI_STREAM_DURABILITY", place("replicas"), text)


def _amount(retention: Any, name: str) -> float:
    """Return entries, or seconds of an age; 0 if absent or negative."""
    value = getattr(retention, name)
    return value if isinstance(value, int) else seconds_of(value)


def _partitions(report: Report, node: MessageNode, option: Any, subject: str) -> None:
    place = partial(report.schema.locate, node.file.name, node.path, node.proto.options, "stream")
    if option.partitions > 1024:
        text = f"{subject} has {option.partitions} partitions: set 1 to 1024"
        report.add("ORKI_STREAM_PARTITIONS", place("partitions"), text)
    if not option.partition_key:
        if option.partitions > 1:
            text = f"{subject} has {option.partitions} partitions but no partition_key: add one"
            report.add("ORKI_STREAM_KEY_REQUIRED", place("partitions"), text)
        return
    if option.partitions <= 1:
        text = f"{subject} has a partition_key but only one partition: remove the key or add partitions"
        report.add("ORKI_STREAM_KEY_UNUSED", place("partition_key"), text)
    fields = {field.name: field for field in node.proto.field}
    key = fields.get(option.partition_key)
    if key is None:
        text = f'{node.full_name} has no field "{option.partition_key}" for the key (fields: {quoted([*fields])})'
        report.add("ORKI_STREAM_KEY_FIELD", place("partition_key"), text)
    elif key.type not in _KEY_TYPES or is_repeated(key):
        text = (
            f'field "{key.name}" cannot be a partition key: use a string, bytes or integer field that is not repeated'
        )
        report.add("ORKI_STREAM_KEY_TYPE", place("partition_key"), text)


def _group(report: Report, group: Any, place: Callable[..., Location], stream: str) -> None:
    subject = f'group "{group.name}" of stream "{stream}"'
    if not _GROUP.fullmatch(group.name):
        text = f'"{group.name}" is no valid group name: use {_words("GROUP_NAME")}'
        report.add("ORKI_GROUP_NAME", place("name"), text)
    if group.start not in _STARTS:
        text = (
            f"{subject} has a start that this version does not know ({group.start}): use START_EARLIEST or START_LATEST"
        )
        report.add("ORKI_GROUP_START", place("start"), text)
    if group.name == "audit" and group.start == 2:
        report.add("ORKI_GROUP_AUDIT", place("start"), f"{subject} must start at the earliest entry: remove its start")
    if group.max_deliveries > 1000:
        text = f"{subject} has max_deliveries = {group.max_deliveries}: set it to 1 to 1000"
        report.add("ORKI_GROUP_MAX_DELIVERIES", place("max_deliveries"), text)
    report.duration(place("ack_deadline"), group, "ack_deadline", subject)
    if "max_dead_letter_age" in group.DESCRIPTOR.fields_by_name:
        report.duration(place("max_dead_letter_age"), group, "max_dead_letter_age", subject)
    declared = report.schema.stream_messages
    if group.dead_letter and not _NAME.fullmatch(group.dead_letter):
        text = (
            f'{subject} sends dead letters to "{group.dead_letter}", which is no valid stream name: use '
            f"{_words('STREAM_NAME')}"
        )
        report.add("ORKI_GROUP_DEAD_LETTER", place("dead_letter"), text)
    target = group.dead_letter or f"{stream}.{group.name}.dead"
    if target in declared:
        text = (
            f'{subject} sends dead letters to the stream "{target}", which {declared[target]} declares: '
            "use another dead_letter"
        )
        report.add("ORKI_GROUP_DEAD_LETTER", place("dead_letter"), text)


def _external_group(
    report: Report, file: FileDescriptorProto, index: int, option: Any, taken: dict[tuple[str, str], str]
) -> None:
    place = partial(report.schema.locate, file.name, (), file.options, "consume", index)
    where = partial(place, "group")
    subject = f'stream "{option.stream}"'
    _group(report, option.group, where, option.stream)
    message = report.schema.stream_messages.get(option.stream)
    if message is None:
        known = quoted(sorted(report.schema.stream_messages))
        text = f"no given file declares {subject}: correct the name or import its file (declared: {known})"
        report.add("ORKI_SUBSCRIPTION_STREAM", place("stream"), text)
        return
    owner = report.schema.messages[message].file
    if owner.package == file.package:
        text = f"{subject} is declared in this package: add the group there, in {owner.name}"
        report.add("ORKI_SUBSCRIPTION_OWN", place("stream"), text)
    elif owner.name not in report.schema.imports(file.name):
        text = (
            f'{subject} is declared in {owner.name}, which this file must import: import "{owner.name}"; '
            "(put // buf:lint:ignore IMPORT_USED above it)"
        )
        report.add("ORKI_SUBSCRIPTION_IMPORT", place("stream"), text)
    if option.group.name == "audit":
        text = f'{subject} already has the group "audit", which only its owner configures: use another name'
        report.add("ORKI_GROUP_AUDIT", where("name"), text)
    elif (holder := taken.get((option.stream, option.group.name))) is not None:
        text = f'{subject} already has a group "{option.group.name}", declared by {holder}: use another name'
        report.add("ORKI_GROUP_UNIQUE", where("name"), text)
    taken.setdefault((option.stream, option.group.name), f"{file.package} in {file.name}")


def _words(rule: str) -> str:
    return RULES[f"ORKI_{rule}"].partition(" has ")[2].removesuffix(".")
