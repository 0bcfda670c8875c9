"""Groups: what consumers of two versions, and those who replay dead letters, must agree on."""

from __future__ import annotations

__all__ = ["RULES", "compare"]

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from google.protobuf.descriptor_pb2 import FileDescriptorProto

from orki_contract.descriptors import Location
from orki_contract.findings.comparison import Comparison, Places, Side, left_at, was
from orki_contract.findings.finding import Category, Plane, Rule, additive, breaking
from orki_contract.model import Group, Stream, duration_text

_STREAM: Final = Category.STREAM

RULES: Final[tuple[Rule, ...]] = (
    breaking(_STREAM, "ORKI_GROUP_REMOVED", "A group stays, under its name and with who declares it."),
    breaking(_STREAM, "ORKI_GROUP_START_CHANGED", "A group begins where it began before."),
    breaking(_STREAM, "ORKI_GROUP_DELIVERIES_LOWERED", "A group tries an entry no fewer times than before."),
    breaking(_STREAM, "ORKI_GROUP_DEADLINE_LOWERED", "A group leaves an entry to a consumer no shorter than before."),
    breaking(_STREAM, "ORKI_GROUP_DEAD_LETTER_CHANGED", "A group's dead letters go to the same stream."),
    additive(_STREAM, "ORKI_GROUP_ADDED", "A group is new."),
    additive(_STREAM, "ORKI_GROUP_RELAXED", "A group gives an entry more deliveries or more time than before."),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Declared:
    """A group as one side declares it.

    Attributes:
        group: The group.
        option: As it is written; None for `audit`, which nobody need write.
        package: Who declares it.
        place: Finds the place of a part of it, or of the whole.
    """

    group: Group
    option: Any
    package: str
    place: Callable[..., Location]


def compare(comparison: Comparison) -> None:
    """Judges the groups of every stream that is there on both sides, and every subscription."""
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
    """Judges the groups that one package declares on one stream; `rest` is what is left where one is gone."""
    for name, group in before.items():
        heir = after.get(name)
        if heir is None:
            place = group.place()
            text = f"is gone from {group.package}{left_at(place) if rest else ''}"
            _say(comparison, "ORKI_GROUP_REMOVED", stream, group, text, (place, rest))
        else:
            _pair(comparison, stream, group, heir)
    for name, group in after.items():
        if name not in before:
            text = f"is new in {group.package}"
            _say(comparison, "ORKI_GROUP_ADDED", stream, group, text, (None, group.place()))


def _pair(comparison: Comparison, stream: str, old: _Declared, new: _Declared) -> None:
    def say(rule: str, text: str, name: str) -> None:
        _say(comparison, rule, stream, new, text, (old.place(name), new.place(name)))

    before, after = old.group, new.group
    if _start(old) != _start(new):
        text = was(before.start, after.start) if before.start != after.start else was(_start(old), _start(new))
        say("ORKI_GROUP_START_CHANGED", f"begins elsewhere: {text}", "start")
    deliveries = was(before.max_deliveries, after.max_deliveries)
    if after.max_deliveries < before.max_deliveries:
        say("ORKI_GROUP_DELIVERIES_LOWERED", f"gives up sooner: {deliveries} deliveries", "max_deliveries")
    elif after.max_deliveries > before.max_deliveries:
        say("ORKI_GROUP_RELAXED", f"gives up later: {deliveries} deliveries", "max_deliveries")
    deadlines = was(before.ack_deadline, after.ack_deadline, duration_text)
    if after.ack_deadline < before.ack_deadline:
        say("ORKI_GROUP_DEADLINE_LOWERED", f"takes entries away sooner: {deadlines}", "ack_deadline")
    elif after.ack_deadline > before.ack_deadline:
        say("ORKI_GROUP_RELAXED", f"takes entries away later: {deadlines}", "ack_deadline")
    letters = [each.dead_letter or f"{stream}.{each.name}.dead" for each in (before, after)]
    if letters[0] != letters[1]:
        text = f"sends dead letters elsewhere: {was(letters[0], letters[1])}"
        say("ORKI_GROUP_DEAD_LETTER_CHANGED", text, "dead_letter")


def _say(comparison: Comparison, rule: str, stream: str, group: _Declared, text: str, places: Places) -> None:
    subject = f'group "{group.group.name}" of stream "{stream}"'
    affected = {f'stream "{stream}"'}
    for side in (comparison.old, comparison.new):
        known = side.streams.get(stream)
        if known is not None:
            affected.add(f"package {side.schema.messages[known.message].file.package}")
    affected.discard(f"package {group.package}")
    comparison.say(
        rule,
        subject,
        group.package,
        f"{subject} {text}",
        plane=Plane.EVENTS,
        places=places,
        affected=affected,
    )


def _owned(side: Side, stream: Stream) -> Iterator[tuple[str, _Declared]]:
    """The groups that a stream's owner declares, `audit` among them."""
    node = side.schema.messages[stream.message]
    written = side.schema.option(node.proto.options, "stream").groups
    names = [each.name for each in written]
    for group in stream.groups:
        index = names.index(group.name) if group.name in names else -1

        def place(*inside: str | int, _index: int = index) -> Location:
            steps = ("groups", _index, *inside) if _index >= 0 else ("name",)
            return side.message_place(stream.message, "stream", *steps)

        option = written[index] if index >= 0 else None
        yield group.name, _Declared(group=group, option=option, package=node.file.package, place=place)


def _read(side: Side, package: str, stream: str) -> Iterator[tuple[str, _Declared]]:
    """The groups that a package declares on somebody else's stream."""
    for file, index, option in side.consumed.get((package, stream), ()):

        def place(*inside: str | int, _file: FileDescriptorProto = file, _index: int = index) -> Location:
            return side.place(_file.name, (), _file.options, "consume", _index, "group", *inside)

        group = side.external_groups[package, stream, option.group.name].group
        yield group.name, _Declared(group=group, option=option.group, package=package, place=place)


def _start(declared: _Declared) -> int:
    """The start as a number, the default's own where it is left out; one that nobody knows here stays itself."""
    return int(declared.option.start) or 1 if declared.option is not None else 1
