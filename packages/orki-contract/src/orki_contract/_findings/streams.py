"""Changes of streams and of their groups."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from orki_contract._findings.comparison import Comparison, Places, Plane, Side, left_at, was
from orki_contract.descriptors import Location
from orki_contract.model import Group, Retention, Stream, duration_text


def compare(comparison: Comparison) -> None:
    """Compare every stream and all groups."""
    old, new = comparison.old, comparison.new
    for name, before in old.streams.items():
        after = new.streams.get(name)
        if after is None:
            _removed(comparison, before)
        else:
            _stream(comparison, before, after)
    for name, after in new.streams.items():
        if name not in old.streams:
            _report(comparison, "ORKI_STREAM_ADDED", after, "is new", (None, _place(new, after)("name")))
    _compare_groups(comparison)


def _removed(comparison: Comparison, before: Stream) -> None:
    """Report a removed stream, or a renamed one if its message now declares a stream of another name."""
    new = comparison.new
    place = _place(comparison.old, before)("name")
    heir = next((each for each in new.streams.values() if each.message == before.message), None)
    if heir is not None:
        text = f'was renamed to "{heir.name}": unread entries under the old name are lost'
        _report(comparison, "ORKI_STREAM_REMOVED", before, text, (place, _place(new, heir)("name")))
    else:
        rest = new.message_place(before.message) if before.message in new.messages else None
        text = f"was removed: its unread entries are lost{left_at(place) if rest else ''}"
        _report(comparison, "ORKI_STREAM_REMOVED", before, text, (place, rest))


def _stream(comparison: Comparison, before: Stream, after: Stream) -> None:
    was_at, is_at = _place(comparison.old, before), _place(comparison.new, after)

    def report(rule: str, text: str, *inside: str | int) -> None:
        _report(comparison, rule, after, text, (was_at(*inside), is_at(*inside)))

    if before.message != after.message:
        report("ORKI_STREAM_MOVED", f"changed its message: {was(before.message, after.message)}")
    _retention(before.retention, after.retention, report)
    overflows = _overflow(comparison.old, before), _overflow(comparison.new, after)
    if overflows[0] != overflows[1]:
        text = f"changed its overflow policy: {was(overflows[0], overflows[1])}"
        report("ORKI_STREAM_OVERFLOW_CHANGED", text, "retention", "overflow")
    durabilities = _durability(comparison.old, before), _durability(comparison.new, after)
    if durabilities[0] != durabilities[1]:
        text = f"changed its durability: {was(durabilities[0], durabilities[1])}"
        report("ORKI_STREAM_DURABILITY_CHANGED", text, "durability")
    if before.partitions != after.partitions:
        text = f"changed its number of partitions: {was(before.partitions, after.partitions)}"
        report("ORKI_STREAM_PARTITIONS_CHANGED", text, "partitions")
    elif _key(comparison.old, before) != _key(comparison.new, after):
        text = f"changed its partition key: {was(before.partition_key or 'none', after.partition_key or 'none')}"
        report("ORKI_STREAM_KEY_CHANGED", text, "partition_key")


def _retention(before: Retention, after: Retention, report: Callable[..., None]) -> None:
    entries = was(before.max_entries, after.max_entries)
    if after.max_entries < before.max_entries:
        report("ORKI_STREAM_ENTRIES_LOWERED", f"keeps fewer entries: {entries}", "retention", "max_entries")
    elif after.max_entries > before.max_entries:
        report("ORKI_STREAM_RELAXED", f"keeps more entries: {entries}", "retention", "max_entries")
    ages = was(before.max_age, after.max_age, duration_text)
    if bool(before.max_age) != bool(after.max_age):
        report("ORKI_STREAM_LIMITS", f"changed its age limit: {ages}", "retention", "max_age")
    elif after.max_age < before.max_age:
        report("ORKI_STREAM_AGE_LOWERED", f"has a shorter maximum age: {ages}", "retention", "max_age")
    elif after.max_age > before.max_age:
        report("ORKI_STREAM_RELAXED", f"has a longer maximum age: {ages}", "retention", "max_age")
    _bounds(before, after, report)
    _bytes(before, after, report)


def _bounds(before: Retention, after: Retention, report: Callable[..., None]) -> None:
    """Compare the bounds of a deployment's settings. Another rule covers added and removed age limits."""
    kinds: list[tuple[str, tuple[float, float], tuple[float, float], float, float]] = [
        ("entries", before.entries_bounds, after.entries_bounds, before.max_entries, after.max_entries)
    ]
    if before.max_age and after.max_age:
        kinds.append(("age", before.age_bounds, after.age_bounds, before.max_age, after.max_age))
    for kind, old, new, was_kept, is_kept in kinds:
        shown = f"{_range(old, kind)} → {_range(new, kind)}"
        # The contract's own lower value is reported separately, unless a deployment may go even lower.
        if new[0] < old[0] and (new[0] < is_kept or is_kept >= was_kept):
            text = f"has a lower minimum setting: {shown}"
            report("ORKI_STREAM_LEAST_LOWERED", text, "retention", f"least_{kind}")
        if old[0] != old[1] and (old[0] < new[0] or new[1] < old[1]):
            edge = "least" if old[0] < new[0] else "most"
            text = f"has a narrower range of settings: {shown}"
            report("ORKI_STREAM_BOUNDS_NARROWED", text, "retention", f"{edge}_{kind}")
        if new[1] > old[1] and new[1] > is_kept:
            report("ORKI_STREAM_RELAXED", f"has a higher maximum setting: {shown}", "retention", f"most_{kind}")


def _bytes(before: Retention, after: Retention, report: Callable[..., None]) -> None:
    sizes = was(before.max_bytes or "no limit", after.max_bytes or "no limit")
    if bool(before.max_bytes) != bool(after.max_bytes):
        report("ORKI_STREAM_LIMITS", f"changed its size limit: {sizes}", "retention", "max_bytes")
    elif after.max_bytes < before.max_bytes:
        report("ORKI_STREAM_BYTES_LOWERED", f"keeps fewer bytes: {sizes}", "retention", "max_bytes")
    elif after.max_bytes > before.max_bytes:
        report("ORKI_STREAM_RELAXED", f"keeps more bytes: {sizes}", "retention", "max_bytes")
    if before.overflow == after.overflow and before.ceiling != after.ceiling:
        rule = "ORKI_STREAM_CEILING_LOWERED" if after.ceiling < before.ceiling else "ORKI_STREAM_RELAXED"
        ceilings = was(before.ceiling, after.ceiling)
        report(rule, f"changed its ceiling: {ceilings}", "retention", "ceiling_entries")


def _range(bounds: tuple[float, float], kind: str) -> str:
    least, most = (duration_text(each) if kind == "age" else str(each) for each in bounds)
    return least if least == most else f"{least} to {most}"


def _report(comparison: Comparison, rule: str, stream: Stream, text: str, places: Places) -> None:
    side = comparison.new if stream.message in comparison.new.messages else comparison.old
    subject = f'stream "{stream.name}"'
    package = side.schema.messages[stream.message].file.package
    readers = _readers(comparison, stream)
    comparison.report(rule, subject, package, text, places, Plane.EVENTS, readers)


def _readers(comparison: Comparison, stream: Stream) -> Iterator[str]:
    """Return the stream's groups on either side, and the packages that declare external groups."""
    for side in (comparison.old, comparison.new):
        known = side.streams.get(stream.name)
        for group in known.groups if known is not None else ():
            yield f'group "{group.name}"'
        for subscription in side.external_groups.values():
            if subscription.stream == stream.name:
                yield f'group "{subscription.group.name}"'
                yield f"package {subscription.package}"


def _place(side: Side, stream: Stream) -> Callable[..., Location]:
    return partial(side.message_place, stream.message, "stream")


def _overflow(side: Side, stream: Stream) -> str:
    """Return the policy's name; the default if absent, the number if unknown."""
    number = side.schema.option(side.schema.messages[stream.message].proto.options, "stream").retention.overflow
    return str(stream.retention.overflow) if number in (0, 1, 2, 3) else str(number)


def _durability(side: Side, stream: Stream) -> str:
    """Return the durability's name with the number of replicas; the number if unknown."""
    option = side.schema.option(side.schema.messages[stream.message].proto.options, "stream")
    number = getattr(option, "durability", 0)
    if number not in (0, 1, 2, 3):
        return str(number)
    return f"{stream.durability}:{stream.replicas}" if stream.replicas else str(stream.durability)


def _key(side: Side, stream: Stream) -> int:
    """Return the number of the field that selects the partition; 0 for none."""
    fields = side.schema.messages[stream.message].proto.field
    return next((field.number for field in fields if field.name == stream.partition_key), 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Declared:
    """A group as declared on one side; an implicit `audit` has no option.

    `place` returns the location of the group or of a part of it.
    """

    group: Group
    option: Any
    package: str
    place: Callable[..., Location]


def _compare_groups(comparison: Comparison) -> None:
    """Compare the groups of every stream that exists on both sides, and all external groups."""
    old, new = comparison.old, comparison.new
    for name, before in old.streams.items():
        after = new.streams.get(name)
        if after is not None:
            written = new.schema.option(new.schema.messages[after.message].proto.options, "stream").groups
            rest = new.message_place(after.message, "stream", *(("groups", 0) if written else ()))
            _each(comparison, name, dict(_owned(old, before)), dict(_owned(new, after)), rest)
    streams = {(each.package, each.stream) for side in (old, new) for each in side.external_groups.values()}
    for package, stream in sorted(streams):
        _each(comparison, stream, dict(_read(old, package, stream)), dict(_read(new, package, stream)), None)


def _each(
    comparison: Comparison,
    stream: str,
    before: Mapping[str, _Declared],
    after: Mapping[str, _Declared],
    rest: Location | None,
) -> None:
    """Compare the groups that one package declares on one stream; `rest` is the location of removed groups."""
    for name, group in before.items():
        heir = after.get(name)
        if heir is None:
            place = group.place()
            text = f"was removed from {group.package}{left_at(place) if rest else ''}"
            _report_group(comparison, "ORKI_GROUP_REMOVED", stream, group, text, (place, rest))
        else:
            _pair(comparison, stream, group, heir)
    for name, group in after.items():
        if name not in before:
            text = f"is new in {group.package}"
            _report_group(comparison, "ORKI_GROUP_ADDED", stream, group, text, (None, group.place()))


def _pair(comparison: Comparison, stream: str, old: _Declared, new: _Declared) -> None:
    def report(rule: str, text: str, name: str) -> None:
        _report_group(comparison, rule, stream, new, text, (old.place(name), new.place(name)))

    before, after = old.group, new.group
    if _start(old) != _start(new):
        text = was(before.start, after.start) if before.start != after.start else was(_start(old), _start(new))
        report("ORKI_GROUP_START_CHANGED", f"changed its start: {text}", "start")
    deliveries = was(before.max_deliveries, after.max_deliveries)
    if after.max_deliveries < before.max_deliveries:
        report("ORKI_GROUP_DELIVERIES_LOWERED", f"allows fewer deliveries: {deliveries}", "max_deliveries")
    elif after.max_deliveries > before.max_deliveries:
        report("ORKI_GROUP_RELAXED", f"allows more deliveries: {deliveries}", "max_deliveries")
    deadlines = was(before.ack_deadline, after.ack_deadline, duration_text)
    if after.ack_deadline < before.ack_deadline:
        report("ORKI_GROUP_DEADLINE_LOWERED", f"has a shorter acknowledgement deadline: {deadlines}", "ack_deadline")
    elif after.ack_deadline > before.ack_deadline:
        report("ORKI_GROUP_RELAXED", f"has a longer acknowledgement deadline: {deadlines}", "ack_deadline")
    limits = [(each.max_dead_letters, each.max_dead_letter_age or math.inf) for each in (before, after)]
    if limits[0] != limits[1]:
        ages = (duration_text(before.max_dead_letter_age), duration_text(after.max_dead_letter_age))
        kept = was(f"{before.max_dead_letters}, {ages[0]}", f"{after.max_dead_letters}, {ages[1]}")
        name = "max_dead_letters" if limits[0][0] != limits[1][0] else "max_dead_letter_age"
        lower = limits[1][0] < limits[0][0] or limits[1][1] < limits[0][1]
        words = "fewer or younger" if lower else "more or older"
        rule = "ORKI_GROUP_LETTERS_LOWERED" if lower else "ORKI_GROUP_RELAXED"
        report(rule, f"keeps {words} dead letters: {kept}", name)
    letters = [each.dead_letter or f"{stream}.{each.name}.dead" for each in (before, after)]
    if letters[0] != letters[1]:
        text = f"changed its dead-letter stream: {was(letters[0], letters[1])}"
        report("ORKI_GROUP_DEAD_LETTER_CHANGED", text, "dead_letter")


def _report_group(comparison: Comparison, rule: str, stream: str, group: _Declared, text: str, places: Places) -> None:
    subject = f'group "{group.group.name}" of stream "{stream}"'
    affected = {f'stream "{stream}"'}
    for side in (comparison.old, comparison.new):
        known = side.streams.get(stream)
        if known is not None:
            affected.add(f"package {side.schema.messages[known.message].file.package}")
    affected.discard(f"package {group.package}")
    comparison.report(rule, subject, group.package, text, places, Plane.EVENTS, affected)


def _owned(side: Side, stream: Stream) -> Iterator[tuple[str, _Declared]]:
    """Return the groups that a stream's owner declares, including `audit`."""
    node = side.schema.messages[stream.message]
    written = side.schema.option(node.proto.options, "stream").groups
    names = [each.name for each in written]
    for group in stream.groups:
        index = names.index(group.name) if group.name in names else -1

        def place(*inside: str | int, _index: int = index) -> Location:
            return _place(side, stream)(*(("groups", _index, *inside) if _index >= 0 else ("name",)))

        option = written[index] if index >= 0 else None
        yield group.name, _Declared(group=group, option=option, package=node.file.package, place=place)


def _read(side: Side, package: str, stream: str) -> Iterator[tuple[str, _Declared]]:
    """Return the groups that a package declares on another package's stream."""
    for file, index, option in side.consumed.get((package, stream), ()):
        place = partial(side.schema.locate, file.name, (), file.options, "consume", index, "group")
        group = side.external_groups[package, stream, option.group.name].group
        yield group.name, _Declared(group=group, option=option.group, package=package, place=place)


def _start(declared: _Declared) -> int:
    """Return the start as a number; the default if absent. Unknown values are unchanged."""
    return int(declared.option.start) or 1 if declared.option is not None else 1
