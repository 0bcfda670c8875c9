"""Edits of orki's options: any field of any of them, at any depth."""

from __future__ import annotations

__all__ = ["MUTATIONS", "OPTION_FIELDS", "option_fields"]

import random
from collections.abc import Callable, Iterator
from typing import Any

from drafts import Draft
from google.protobuf.descriptor import FieldDescriptor

from orki_contract.descriptors import Schema, is_repeated

_TEXTS = (
    "findings",
    "kinds",
    "digests",
    "notify",
    "index",
    "counter",
    "unheard",
    "other",
    "agent",
    "serial",
    "severity",
    "ReviewProgress",
    "ReviewDirective",
    "acme.fleet.v1.ReviewProgress",
    "AskRequest",
)
_WEIGHTS = {"task": 5, "stream": 5, "frame": 3, "tool": 3}
_SITES = ("consume", "stream", "frame", "task", "tool", "sensitive", "offset", "scalar", "size", "since")


def tweak(draft: Draft, rng: random.Random) -> bool:
    """Changes one field of an option that is there."""
    sites = [site for site in _sites(draft) if site[0].HasExtension(site[1])] if rng.random() < 0.9 else []
    sites = sites or [site for site in _sites(draft) if not is_repeated(site[1]) and site[0].HasExtension(site[1])]
    # As often for rare options as for common ones, and oftener for those that have many fields.
    names = sorted({site[1].name for site in sites})
    name = rng.choices(names, [_WEIGHTS.get(each, 1) for each in names])[0]
    options, extension, where = rng.choice([site for site in sites if site[1].name == name])
    return _tweak(draft, rng, options, extension, where)


def tweak_group(draft: Draft, rng: random.Random) -> bool:
    """Changes one field of a group, declared by its stream's owner or by a reader."""
    groups = []
    for spot in draft.messages():
        stream = draft.option(spot.proto.options, "stream")
        groups += [(f"{spot.full_name} groups", each) for each in (stream.groups if stream is not None else ())]
    for file in draft.own:
        for each in file.options.Extensions[draft.extension("consume")]:
            groups.append((f"{file.name} consume", each.group))
    if not groups:
        return False
    where, group = rng.choice(groups)
    return _perturb(draft, rng, group, where)


def rebound(draft: Draft, rng: random.Random) -> bool:
    """Moves what a stream keeps, or what a deployment may set for it, where it has bounds."""
    kept = [
        option.retention
        for spot in draft.messages()
        if (option := draft.option(spot.proto.options, "stream")) is not None and option.retention.most_entries
    ]
    if not kept:
        return False
    retention = rng.choice(kept)
    name = rng.choice(["max", "least", "least", "most", "most"]) + rng.choice(["_entries", "_age"])
    draft.touched.add(f"Retention.{name}")
    if not name.startswith("max") and rng.random() < 0.2:
        retention.ClearField(name)
        draft.told.append(f"{name} removed")
        return True
    factor = rng.choice([0.5, 0.9, 1.1, 2])
    if name.endswith("_age"):
        age = getattr(retention, name)
        age.seconds = max(1, int(age.seconds * factor))
    else:
        setattr(retention, name, max(1, int(getattr(retention, name) * factor)))
    draft.told.append(f"{name} times {factor}")
    return True


def regroup(draft: Draft, rng: random.Random) -> bool:
    """Adds a group to a stream, or takes one away."""
    streams = [
        option for spot in draft.messages() if (option := draft.option(spot.proto.options, "stream")) is not None
    ]
    if not streams:
        return False
    stream = rng.choice(streams)
    draft.touched.add("StreamOptions.groups")
    if stream.groups and rng.random() < 0.5:
        index = rng.randrange(len(stream.groups))
        draft.told.append(f'group "{stream.groups[index].name}" of {stream.name} removed')
        del stream.groups[index]
    else:
        stream.groups.add(name=f"g{rng.randrange(100)}")
        draft.told.append(f"group added to {stream.name}")
    return True


def resubscribe(draft: Draft, rng: random.Random) -> bool:
    """Adds a subscription, takes one away, or points one to another stream."""
    file = draft.files.get("acme/reader/v1/reader.proto")
    if file is None:
        return False
    consumed = file.options.Extensions[draft.extension("consume")]
    choice = rng.randrange(3)
    draft.touched.add("GroupSubscription.stream")
    if choice == 0 and len(consumed):
        draft.told.append("subscription removed")
        del consumed[rng.randrange(len(consumed))]
    elif choice == 1 and len(consumed):
        each = rng.choice(list(consumed))
        each.stream = rng.choice(["findings", "kinds"])
        draft.told.append(f"subscription moved to {each.stream}")
    else:
        added = consumed.add(stream=rng.choice(["findings", "kinds"]))
        added.group.name = f"r{rng.randrange(100)}"
        draft.told.append("subscription added")
    return True


def toggle(draft: Draft, rng: random.Random) -> bool:
    """Sets an option where it was not, or takes it away whole."""
    sites = list(_sites(draft))
    options, extension, where = rng.choice([site for site in sites if not is_repeated(site[1])])
    draft.touched.add(extension.name)
    if options.HasExtension(extension):
        options.ClearExtension(extension)
        draft.told.append(f"{where}: {extension.name} removed")
    elif extension.name == "stream":
        options.Extensions[extension].name = f"s{rng.randrange(100)}"
        options.Extensions[extension].retention.max_entries = 10
        draft.told.append(f"{where}: a stream now")
    elif extension.name == "frame":
        options.Extensions[extension].version = 1
        options.Extensions[extension].block_length = 8
        draft.told.append(f"{where}: a frame now")
    elif extension.name == "tool":
        options.Extensions[extension].opcode = rng.choice([256, 257, 258, 300])
        draft.told.append(f"{where}: a tool now")
    elif extension.name == "task":
        options.Extensions[extension].max_attempts = 2
        draft.told.append(f"{where}: a task now")
    elif extension.name == "sensitive":
        options.Extensions[extension] = True
        draft.told.append(f"{where}: sensitive now")
    else:
        options.Extensions[extension] = rng.choice([1, 2, 3, 4, 8])
        draft.told.append(f"{where}: {extension.name} set")
    return True


def _sites(draft: Draft) -> Iterator[tuple[Any, Any, str]]:
    """Every place where an option may stand."""
    keys = {name: draft.extension(name) for name in _SITES if name != "consume"}
    for spot in draft.messages():
        for name in ("stream", "frame"):
            yield spot.proto.options, keys[name], spot.full_name
        for field in spot.proto.field:
            for name in ("sensitive", "offset", "scalar", "size", "since"):
                yield field.options, keys[name], f"{spot.full_name}.{field.name}"
    for _, service, method in draft.methods():
        for name in ("task", "tool"):
            yield method.options, keys[name], f"{service.name}/{method.name}"


def _tweak(draft: Draft, rng: random.Random, options: Any, extension: Any, where: str) -> bool:
    if extension.message_type is not None:
        return _perturb(draft, rng, options.Extensions[extension], where)
    draft.touched.add(extension.name)
    before = options.Extensions[extension]
    after = _scalar(rng, extension, before)
    if after == before:
        return False
    options.Extensions[extension] = after
    draft.told.append(f"{where}: {extension.name} {before} → {after}")
    return True


def _perturb(draft: Draft, rng: random.Random, message: Any, where: str) -> bool:
    """Changes one field of a message, or of a message in it."""
    field = rng.choice(list(message.DESCRIPTOR.fields))
    holder = message.DESCRIPTOR.name
    if is_repeated(field):
        entries = getattr(message, field.name)
        return bool(entries) and _perturb(draft, rng, rng.choice(list(entries)), where)
    if field.message_type is not None and field.message_type.full_name == "google.protobuf.Duration":
        draft.touched.add(f"{holder}.{field.name}")
        before = str(getattr(message, field.name)).strip()
        if message.HasField(field.name) and rng.random() < 0.25:
            message.ClearField(field.name)
        else:
            value = getattr(message, field.name)
            value.seconds = rng.choice([1, 2, 3, 8, 10, 20, 60, 300, 600, 3600, max(1, value.seconds - 1)])
            value.nanos = rng.choice([0, 0, 0, 500_000_000])
        draft.told.append(f"{where}: {holder}.{field.name} {before} → {str(getattr(message, field.name)).strip()}")
        return True
    if field.message_type is not None:
        return _perturb(draft, rng, getattr(message, field.name), where)
    draft.touched.add(f"{holder}.{field.name}")
    before = getattr(message, field.name)
    after = _scalar(rng, field, before)
    if after == before:
        return False
    setattr(message, field.name, after)
    draft.told.append(f"{where}: {holder}.{field.name} {before!r} → {after!r}")
    return True


def _scalar(rng: random.Random, field: FieldDescriptor, value: Any) -> Any:
    """Another value of a field's type, near the one at hand more often than not."""
    if field.type == FieldDescriptor.TYPE_BOOL:
        return not value
    if field.enum_type is not None:
        return rng.choice([each.number for each in field.enum_type.values])
    if field.type == FieldDescriptor.TYPE_STRING:
        return rng.choice([*_TEXTS, "", f"{value}x"])
    if field.type == FieldDescriptor.TYPE_DOUBLE:
        return rng.choice([0.0, 1.0, 1.5, 2.0, 3.0])
    near = [0, 1, value + 1, value - 1, value * 2, value // 2, value + 8, 1000, 4, 16, 256, 257, 300]
    return max(0, rng.choice(near))


def option_fields(schema: Schema) -> frozenset[str]:
    """Every option and every field of one, as `touched` names them."""
    found = set()
    for file in schema.files.values():
        if file.package == "orki.options.v1":
            for extension in file.extension:
                kind = schema.pool.FindExtensionByName(f"orki.options.v1.{extension.name}")
                if kind.message_type is None:
                    found.add(extension.name)
            for message in file.message_type:
                descriptor = schema.pool.FindMessageTypeByName(f"orki.options.v1.{message.name}")
                for field in descriptor.fields:
                    inner = field.message_type
                    if inner is None or inner.full_name == "google.protobuf.Duration":
                        found.add(f"{message.name}.{field.name}")
    return frozenset(found)


OPTION_FIELDS = option_fields
Mutation = Callable[[Draft, random.Random], bool]
MUTATIONS: list[tuple[int, Mutation]] = [
    (14, tweak),
    (8, tweak_group),
    (3, rebound),
    (4, regroup),
    (3, resubscribe),
    (6, toggle),
]
