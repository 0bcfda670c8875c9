"""Changes that no other rule covers: unknown options, moved declarations, and other differences of files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from google.protobuf.descriptor_pb2 import FileDescriptorProto

from orki_contract._findings.comparison import Comparison, Plane, Side
from orki_contract.descriptors import OPTIONS_PACKAGE, Location, Path, field_path, is_repeated, without_source
from orki_contract.model import TASK_MESSAGES

# Options that the other rules cover. Unknown options are always reported.
_KNOWN: Final[Mapping[str, frozenset[str]]] = {
    "": frozenset({"consume", "stream", "frame", "sensitive", "offset", "scalar", "size", "since", "task", "tool"}),
    "TaskOptions": frozenset(
        {
            *TASK_MESSAGES,
            *("progress_policy", "max_attempts", "retry_backoff", "budget", "durability"),
            *("heartbeat_timeout", "attempt_timeout", "stall_timeout", "total_timeout", "cancel_grace"),
        }
    ),
    "Budget": frozenset({"tokens", "cost_micros", "calls"}),
    "RetryBackoff": frozenset({"initial", "maximum", "multiplier"}),
    "StreamOptions": frozenset(
        {"name", "partitions", "partition_key", "retention", "groups", "durability", "replicas"}
    ),
    "Retention": frozenset(
        {
            *("max_entries", "max_age", "overflow", "least_entries", "most_entries", "least_age", "most_age"),
            *("max_bytes", "ceiling_entries"),
        }
    ),
    "Group": frozenset(
        {
            *("name", "start", "max_deliveries", "ack_deadline", "dead_letter"),
            *("max_dead_letters", "max_dead_letter_age"),
        }
    ),
    "GroupSubscription": frozenset({"stream", "group"}),
    "FrameOptions": frozenset({"version", "block_length", "fixed"}),
    "ToolOptions": frozenset({"opcode", "timeout", "idempotent"}),
}
_PREFIX: Final = f"{OPTIONS_PACKAGE}."


def compare(comparison: Comparison) -> None:
    """Report the changes that no other rule has reported; call this after all other rules."""
    before, after = dict(_unknown_options(comparison.old)), dict(_unknown_options(comparison.new))
    subjects = {*_subjects(comparison.old)} & {*_subjects(comparison.new)}
    for key in sorted({*before, *after}):
        old, new = before.get(key), after.get(key)
        if key[0] in subjects and (old or ("", None))[0] != (new or ("", None))[0]:
            file = comparison.new.files.get(key[1], "") or comparison.old.files.get(key[1], "")
            name = f"option ({_PREFIX}{key[2]}) of {key[0]}"
            text = "changed, but this version does not know it and cannot tell whether that is compatible"
            places = (old[1] if old else None, new[1] if new else None)
            comparison.report("ORKI_OPTION_UNKNOWN", name, file, text, places, Plane.MESSAGES)
    _moves(comparison)
    _files(comparison)


_Key = tuple[str, str, str]


def _subjects(side: Side) -> Iterator[str]:
    for subject, _, _, _ in _elements(side):
        yield subject


def _unknown_options(side: Side) -> Iterator[tuple[_Key, tuple[str, Location]]]:
    """Yield each unknown part of an orki option: the key (subject, file and name), then the value and its location."""
    for subject, file, path, options in _elements(side):
        for field, value in options.ListFields():
            if not field.is_extension or not field.full_name.startswith(_PREFIX):
                continue
            place = side.schema.location(file, (*path, field.number))
            if field.name not in _KNOWN[""]:
                yield (subject, file, field.name), (str(value), place)
            elif field.message_type is not None:
                values = [*enumerate(value)] if is_repeated(field) else [(None, value)]
                for index, each in values:
                    inner = (*path, field.number, *(() if index is None else (index,)))
                    for name, text in _unknown(each, field.name):
                        yield (subject, file, name), (text, side.schema.location(file, inner))


def _unknown(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """Find unknown fields of an option's value at any depth."""
    known = _KNOWN.get(value.DESCRIPTOR.name)
    if not value.DESCRIPTOR.full_name.startswith(_PREFIX):
        return
    for field, inner in value.ListFields():
        if known is None or field.name not in known:
            yield f"{name}.{field.name}", str(inner)
        elif field.message_type is not None:
            parts: list[Any] = [*inner] if is_repeated(field) else [inner]
            for index, each in enumerate(parts):
                label = getattr(each, "name", "") or (str(index) if is_repeated(field) else "")
                yield from _unknown(each, f"{name}.{field.name}{f'[{label}]' if label else ''}")


def _elements(side: Side) -> Iterator[tuple[str, str, Path, Any]]:
    """Yield each element that may have options as (name, file, source path of the options, options)."""
    schema = side.schema
    for path in side.files:
        yield f"file {path}", path, (8,), schema.files[path].options
    for name, node in side.messages.items():
        yield f"message {name}", node.file.name, (*node.path, 7), node.proto.options
        for index, field in enumerate(node.proto.field):
            yield f"field {name}.{field.number}", node.file.name, (*field_path(node, index), 8), field.options
    for service in schema.services.values():
        yield f"service {service.full_name}", service.file.name, (*service.path, 3), service.proto.options
    for name, (file, method) in side.methods.items():
        yield f"method {name}", file, (*method.path, 4), method.proto.options
    for name, path in side.enums.items():
        yield f"enum {name}", path, (), schema.enums[name][1].options


def _moves(comparison: Comparison) -> None:
    """Report declarations that moved to another file, because its path determines the import."""
    old, new = _homes(comparison.old), _homes(comparison.new)
    for subject, (file, path) in old.items():
        if subject in new and new[subject][0] != file:
            now = new[subject][0]
            package = comparison.new.files[now]
            users = comparison.users(subject.partition(" ")[2], package)
            places = comparison.old.schema.location(file, path), comparison.new.schema.location(*new[subject])
            text = f"moved: {file} → {now}"
            comparison.report("ORKI_DECLARATION_MOVED", subject, package, text, places, Plane.MESSAGES, users)


def _homes(side: Side) -> dict[str, tuple[str, Path]]:
    """Return the file and the source path of every top-level declaration."""
    found: dict[str, tuple[str, Path]] = {}
    for path in side.files:
        file = side.schema.files[path]
        prefix = f"{file.package}." if file.package else ""
        kinds: tuple[tuple[str, int, Sequence[Any]], ...] = (
            ("message", 4, file.message_type),
            ("enum", 5, file.enum_type),
            ("service", 6, file.service),
        )
        for kind, number, declared in kinds:
            for index, each in enumerate(declared):
                found[f"{kind} {prefix}{each.name}"] = (path, (number, index))
    return found


def _files(comparison: Comparison) -> None:
    """Report changed files without any other finding in their package, so that equal versions mean equal code."""
    reported = {finding.package for finding in comparison.found}
    old, new = comparison.old, comparison.new
    for path in sorted({*old.files, *new.files}):
        package = new.files.get(path) or old.files.get(path, "")
        before, after = old.schema.files.get(path), new.schema.files.get(path)
        if package not in reported and _plain(before) != _plain(after):
            places = (
                old.schema.location(path) if before is not None else None,
                new.schema.location(path) if after is not None else None,
            )
            text = "differs in what no rule names"
            comparison.report("ORKI_FILE_CHANGED", f"file {path}", package, text, places, Plane.MESSAGES)


def _plain(file: FileDescriptorProto | None) -> bytes:
    """Serialize a file without comments, locations and default JSON names."""
    if file is None:
        return b""
    copy = without_source(file)
    waiting = [*copy.message_type]
    while waiting:
        message = waiting.pop()
        waiting.extend(message.nested_type)
        for field in (*message.field, *message.extension):
            if field.json_name == _camel(field.name):
                field.ClearField("json_name")
    return copy.SerializeToString(deterministic=True)


def _camel(name: str) -> str:
    """Return the JSON name that protoc gives a field."""
    head, *others = name.split("_")
    return head + "".join(part[:1].upper() + part[1:] for part in others)
