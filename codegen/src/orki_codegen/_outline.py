"""A contract as flat subjects, to describe the differences between two contracts.

Every declaration is a subject such as `stream "findings"` or `field acme.v1.Finding.path`, with the attributes that a
reader cares about. A comparison of two outlines needs only subjects and attributes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf.descriptor_pb2 import FieldDescriptorProto

from orki_contract.descriptors import is_repeated
from orki_contract.model import Group, dump
from orki_contract.read import ReadContract


@dataclass(frozen=True, slots=True)
class Subject:
    """One declaration; `parent` is empty at the top. If the parent was added or removed, only that is reported."""

    parent: str
    attributes: Mapping[str, str]


Outline = Mapping[str, Subject]


def outline(read: ReadContract, packages: Collection[str]) -> Outline:
    """Return the subjects that the proto packages declare."""
    found: dict[str, Subject] = {}
    for file in read.files:
        if file.package in packages:
            contract = file.contract
            for stream in contract.streams:
                name = f'stream "{stream.name}"'
                found[name] = _subject("", stream, "name", "groups")
                for group in stream.groups:
                    found[f'group "{group.name}" of {name}'] = _subject(name, group, "name")
            for subscription in contract.external_groups:
                name = f'group "{subscription.group.name}" on stream "{subscription.stream}"'
                found[name] = _subject("", subscription.group, "name")
            for method in contract.tasks:
                found[f"task {method.full_name}"] = _subject("", method, "service", "name")
            for tool in contract.tools:
                found[f"tool {tool.full_name}"] = _subject("", tool, "service", "name")
            for frame in contract.frames:
                found[f"frame {frame.message}"] = _subject("", frame, "message", "fields")
                for field in frame.fields:
                    name = f"frame field {frame.message}.{field.name}"
                    found[name] = _subject(f"frame {frame.message}", field, "name")
            found.update(_protobuf(read, file.path, frozenset(file.plain_services)))
    return found


def changes(old: Outline, new: Outline) -> list[str]:
    """Describe additions (`+`), removals (`-`) and changes (`~`), sorted by subject."""
    lines = []
    for name in sorted({*old, *new}):
        before, after = old.get(name), new.get(name)
        if before is None and after is not None:
            if after.parent not in new or after.parent in old:
                text = ", ".join(f"{key} {value}" for key, value in after.attributes.items())
                lines.append(f"+ {name}: {text}" if text else f"+ {name}")
        elif before is not None and after is None:
            if before.parent not in old or before.parent in new:
                lines.append(f"- {name}")
        elif before is not None and after is not None:
            for key in sorted({*before.attributes, *after.attributes}):
                was, now = before.attributes.get(key, "none"), after.attributes.get(key, "none")
                if was != now:
                    lines.append(f"~ {name}: {key} {was} → {now}")
    return lines


def _subject(parent: str, value: Any, *skipped: str) -> Subject:
    """Return a subject with the attributes of a model value, including nested ones, without empty ones."""
    return Subject(parent, dict(_attributes("", dump(value), frozenset(skipped))))


def _attributes(prefix: str, value: Mapping[str, Any], skipped: frozenset[str]) -> Iterator[tuple[str, str]]:
    for key, each in value.items():
        if key in skipped:
            continue
        if isinstance(each, dict):
            yield from _attributes(f"{prefix}{key}.", each, frozenset())
        elif each not in ("", 0, False, None) and each != getattr(Group(name=""), key, None):
            yield f"{prefix}{key}", str(each)


def _protobuf(read: ReadContract, path: str, services: frozenset[str]) -> Iterator[tuple[str, Subject]]:
    """Yield the messages, enums and plain services of one file."""
    schema = read.schema
    for node in schema.messages_of.get(path, ()):
        if node.proto.options.map_entry:
            continue
        name = f"message {node.full_name}"
        yield name, Subject("", {})
        for field in node.proto.field:
            yield f"field {node.full_name}.{field.name}", Subject(name, dict(_field(read, field)))
    for full_name, (file, enum) in schema.enums.items():
        if file.name == path:
            yield f"enum {full_name}", Subject("", {})
            for value in enum.value:
                yield f"value {full_name}.{value.name}", Subject(f"enum {full_name}", {"number": str(value.number)})
    for service in schema.services_of.get(path, ()):
        if service.full_name in services:
            yield f"service {service.full_name}", Subject("", {})
            for method in service.methods:
                request = "stream " * method.proto.client_streaming + method.proto.input_type.removeprefix(".")
                response = "stream " * method.proto.server_streaming + method.proto.output_type.removeprefix(".")
                attributes = {"request": request, "response": response}
                yield f"rpc {method.full_name}", Subject(f"service {service.full_name}", attributes)


def _field(read: ReadContract, field: FieldDescriptorProto) -> Iterator[tuple[str, str]]:
    yield "number", str(field.number)
    kind = FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()
    kind = field.type_name.removeprefix(".") or kind
    yield "type", f"repeated {kind}" if is_repeated(field) else kind
    if read.schema.option(field.options, "sensitive"):
        yield "sensitive", "true"
