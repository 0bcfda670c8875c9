"""Streams: what producers and consumers of two versions must agree on."""

from __future__ import annotations

__all__ = ["RULES", "compare"]

from collections.abc import Callable, Iterator
from typing import Final

from orki_contract.descriptors import Location
from orki_contract.findings.comparison import Comparison, Places, Side, left_at, was
from orki_contract.findings.finding import Category, Plane, Rule, additive, breaking, source_breaking
from orki_contract.model import Retention, Stream, duration_text

_STREAM: Final = Category.STREAM

RULES: Final[tuple[Rule, ...]] = (
    breaking(_STREAM, "ORKI_STREAM_REMOVED", "A stream stays, under its name."),
    breaking(_STREAM, "ORKI_STREAM_MOVED", "A stream's entries stay of one message."),
    breaking(_STREAM, "ORKI_STREAM_ENTRIES_LOWERED", "A stream keeps no fewer entries than before."),
    breaking(_STREAM, "ORKI_STREAM_AGE_LOWERED", "A stream keeps entries no shorter than before."),
    breaking(_STREAM, "ORKI_STREAM_LIMITS", "A stream's retention gains no limit by age, and loses none."),
    breaking(_STREAM, "ORKI_STREAM_LEAST_LOWERED", "A deployment may not keep less of a stream than before."),
    source_breaking(_STREAM, "ORKI_STREAM_BOUNDS_NARROWED", "What a deployment could set for a stream, it still can."),
    breaking(_STREAM, "ORKI_STREAM_OVERFLOW_CHANGED", "A full stream does what it did before."),
    breaking(_STREAM, "ORKI_STREAM_PARTITIONS_CHANGED", "A stream keeps its number of partitions."),
    breaking(_STREAM, "ORKI_STREAM_KEY_CHANGED", "A stream is partitioned by the same field."),
    additive(_STREAM, "ORKI_STREAM_ADDED", "A stream is new."),
    additive(_STREAM, "ORKI_STREAM_RELAXED", "A stream keeps more than before, or may be set to."),
)

_Where = Callable[..., Location]


def compare(comparison: Comparison) -> None:
    """Judges every stream and every subscription."""
    old, new = comparison.old, comparison.new
    for name, before in old.streams.items():
        after = new.streams.get(name)
        if after is None:
            _removed(comparison, before)
        else:
            _stream(comparison, before, after)
    for name, after in new.streams.items():
        if name not in old.streams:
            _say(comparison, "ORKI_STREAM_ADDED", after, "is new", (None, _place(new, after)("name")))


def _removed(comparison: Comparison, before: Stream) -> None:
    """The stream's name is gone; its message may carry another one now."""
    new = comparison.new
    place = _place(comparison.old, before)("name")
    heir = next((each for each in new.streams.values() if each.message == before.message), None)
    if heir is not None:
        text = f'is called "{heir.name}" now: what waits under the old name is read by nobody'
        _say(comparison, "ORKI_STREAM_REMOVED", before, text, (place, _place(new, heir)("name")))
    else:
        rest = new.message_place(before.message) if before.message in new.messages else None
        text = f"is gone: what waits in it is read by nobody{left_at(place) if rest else ''}"
        _say(comparison, "ORKI_STREAM_REMOVED", before, text, (place, rest))


def _stream(comparison: Comparison, before: Stream, after: Stream) -> None:
    was_at, is_at = _place(comparison.old, before), _place(comparison.new, after)

    def say(rule: str, text: str, *inside: str | int) -> None:
        _say(comparison, rule, after, text, (was_at(*inside), is_at(*inside)))

    if before.message != after.message:
        say("ORKI_STREAM_MOVED", f"has other entries: {was(before.message, after.message)}")
    _retention(before.retention, after.retention, say)
    overflows = _overflow(comparison.old, before), _overflow(comparison.new, after)
    if overflows[0] != overflows[1]:
        text = f"overflows otherwise: {was(overflows[0], overflows[1])}"
        say("ORKI_STREAM_OVERFLOW_CHANGED", text, "retention", "overflow")
    if before.partitions != after.partitions:
        text = f"has other partitions: {was(before.partitions, after.partitions)}"
        say("ORKI_STREAM_PARTITIONS_CHANGED", text, "partitions")
    elif _key(comparison.old, before) != _key(comparison.new, after):
        text = f"is partitioned otherwise: {was(before.partition_key, after.partition_key, _shown_key)}"
        say("ORKI_STREAM_KEY_CHANGED", text, "partition_key")


def _retention(before: Retention, after: Retention, say: Callable[..., None]) -> None:
    if after.max_entries < before.max_entries:
        text = f"keeps fewer entries: {was(before.max_entries, after.max_entries)}"
        say("ORKI_STREAM_ENTRIES_LOWERED", text, "retention", "max_entries")
    if bool(before.max_age) != bool(after.max_age):
        ages = was(before.max_age, after.max_age, duration_text)
        say("ORKI_STREAM_LIMITS", f"is limited by age otherwise: {ages}", "retention", "max_age")
    elif after.max_age < before.max_age:
        text = f"keeps entries shorter: {was(before.max_age, after.max_age, duration_text)}"
        say("ORKI_STREAM_AGE_LOWERED", text, "retention", "max_age")
    if after.max_entries > before.max_entries:
        text = f"keeps more entries: {was(before.max_entries, after.max_entries)}"
        say("ORKI_STREAM_RELAXED", text, "retention", "max_entries")
    if before.max_age and after.max_age > before.max_age:
        text = f"keeps entries longer: {was(before.max_age, after.max_age, duration_text)}"
        say("ORKI_STREAM_RELAXED", text, "retention", "max_age")
    _bounds(before, after, say)


def _bounds(before: Retention, after: Retention, say: Callable[..., None]) -> None:
    """Judges what a deployment may set. A limit by age that came or went is told by another rule."""
    kinds: list[tuple[str, tuple[float, float], tuple[float, float], float, float]] = [
        ("entries", before.entries_bounds, after.entries_bounds, before.max_entries, after.max_entries)
    ]
    if before.max_age and after.max_age:
        kinds.append(("age", before.age_bounds, after.age_bounds, before.max_age, after.max_age))
    for kind, old, new, was_kept, is_kept in kinds:
        shown = f"{_range(old, kind)} → {_range(new, kind)}"
        # A lower value of the contract's own is told already, unless a deployment may go below even that.
        if new[0] < old[0] and (new[0] < is_kept or is_kept >= was_kept):
            text = f"may be set to keep less: {shown}"
            say("ORKI_STREAM_LEAST_LOWERED", text, "retention", f"least_{kind}")
        if old[0] != old[1] and (old[0] < new[0] or new[1] < old[1]):
            edge = "least" if old[0] < new[0] else "most"
            text = f"may not be set to what it could be: {shown}"
            say("ORKI_STREAM_BOUNDS_NARROWED", text, "retention", f"{edge}_{kind}")
        if new[1] > old[1] and new[1] > is_kept:
            say("ORKI_STREAM_RELAXED", f"may be set to keep more: {shown}", "retention", f"most_{kind}")


def _range(bounds: tuple[float, float], kind: str) -> str:
    least, most = (duration_text(each) if kind == "age" else str(each) for each in bounds)
    return least if least == most else f"{least} to {most}"


def _say(comparison: Comparison, rule: str, stream: Stream, text: str, places: Places) -> None:
    side = comparison.new if stream.message in comparison.new.messages else comparison.old
    subject = f'stream "{stream.name}"'
    comparison.say(
        rule,
        subject,
        side.schema.messages[stream.message].file.package,
        f"{subject} {text}",
        plane=Plane.EVENTS,
        places=places,
        affected=_readers(comparison, stream),
    )


def _readers(comparison: Comparison, stream: Stream) -> Iterator[str]:
    """Groups of the stream on either side, and the packages of those that readers declare."""
    for side in (comparison.old, comparison.new):
        known = side.streams.get(stream.name)
        for group in known.groups if known is not None else ():
            yield f'group "{group.name}"'
        for subscription in side.external_groups.values():
            if subscription.stream == stream.name:
                yield f'group "{subscription.group.name}"'
                yield f"package {subscription.package}"


def _place(side: Side, stream: Stream) -> _Where:
    def where(*inside: str | int) -> Location:
        return side.message_place(stream.message, "stream", *inside)

    return where


def _overflow(side: Side, stream: Stream) -> str:
    """The policy by its name, the default's own where it is left out; one that nobody knows here stays a number."""
    number = side.schema.option(side.schema.messages[stream.message].proto.options, "stream").retention.overflow
    return str(stream.retention.overflow) if number in (0, 1) else str(number)


def _key(side: Side, stream: Stream) -> int:
    """Number of the field that picks the partition; 0 for none."""
    fields = side.schema.messages[stream.message].proto.field
    return next((field.number for field in fields if field.name == stream.partition_key), 0)


def _shown_key(value: str) -> str:
    return value or "not at all"
