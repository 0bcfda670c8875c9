"""Bounds of a deployment's retention settings: reading, validation, comparison, and images of older options."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf import message_factory
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet

from orki_contract.descriptors import Schema
from orki_contract.findings import Bump, findings
from orki_contract.images import image_of
from orki_contract.model import Retention
from orki_contract.read import ReadContract, read_image
from orki_contract.validate import validate

OPTIONS = "orki/options/v1/options.proto"
BOUNDS = ("least_entries", "most_entries", "least_age", "most_age")


def build(*, older: bool = False, **retention: Any) -> ReadContract:
    """A stream of this retention; `older`: with options that know no bounds."""
    schema = Schema(image_of("orki.events.v1"))
    needed = ("google/protobuf/descriptor.proto", "google/protobuf/duration.proto", OPTIONS)
    classes = message_factory.GetMessageClassesForFiles([needed[0], OPTIONS], schema.pool)
    file: Any = classes["google.protobuf.FileDescriptorProto"](
        name="kept/v1/note.proto", package="kept.v1", syntax="proto3", dependency=[OPTIONS]
    )
    note = file.message_type.add(name="Note")
    note.field.add(name="body", number=1, type=9, label=1, json_name="body")
    stream = note.options.Extensions[schema.pool.FindExtensionByName("orki.options.v1.stream")]
    stream.MergeFrom(type(stream)(name="notes", retention=retention))
    kept = [FileDescriptorProto.FromString(schema.files[name].SerializeToString()) for name in needed]
    if older:
        (declared,) = [each for each in kept[2].message_type if each.name == "Retention"]
        known = [each for each in declared.field if each.name not in BOUNDS]
        del declared.field[:]
        declared.field.extend(known)
    own = FileDescriptorProto.FromString(file.SerializeToString())
    return read_image(FileDescriptorSet(file=[*kept, own]).SerializeToString())


def rules(old: ReadContract, new: ReadContract) -> dict[str, Bump]:
    return {each.rule: each.bump for each in findings(old, new)}


def seconds(count: int) -> dict[str, int]:
    return {"seconds": count}


def test_bounds_that_are_left_out_are_the_contracts_own_values() -> None:
    plain = Retention(max_entries=10, max_age=0.02)
    assert (plain.entries_bounds, plain.age_bounds, plain.tunable) == ((10, 10), (0.02, 0.02), False)
    lower = Retention(max_entries=10, least_entries=5)
    assert (lower.entries_bounds, lower.age_bounds, lower.tunable) == ((5, 10), (0, 0), True)
    longer = Retention(max_entries=10, max_age=0.02, most_age=0.03)
    assert (longer.entries_bounds, longer.age_bounds, longer.tunable) == ((10, 10), (0.02, 0.03), True)


def test_bounds_are_read() -> None:
    read = build(max_entries=10, max_age=seconds(9), least_entries=5, most_entries=20, least_age=seconds(8))
    (stream,) = read.contract.streams
    assert validate(read) == ()
    assert stream.retention == Retention(max_entries=10, max_age=9.0, least_entries=5, most_entries=20, least_age=8.0)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ({}, {"most_entries": 200}, {"ORKI_STREAM_RELAXED": Bump.MINOR}),
        ({}, {"least_entries": 50}, {"ORKI_STREAM_LEAST_LOWERED": Bump.MAJOR}),
        ({"least_entries": 50}, {}, {"ORKI_STREAM_BOUNDS_NARROWED": Bump.MAJOR}),
        ({"least_entries": 50}, {"least_entries": 60}, {"ORKI_STREAM_BOUNDS_NARROWED": Bump.MAJOR}),
        ({"most_age": seconds(99)}, {"most_age": seconds(98)}, {"ORKI_STREAM_BOUNDS_NARROWED": Bump.MAJOR}),
        ({"most_age": seconds(99)}, {"most_age": seconds(100)}, {"ORKI_STREAM_RELAXED": Bump.MINOR}),
        ({}, {"least_age": seconds(9)}, {"ORKI_STREAM_LEAST_LOWERED": Bump.MAJOR}),
        # The contract's own lower value is reported once, by its own rule.
        ({}, {"max_entries": 90}, {"ORKI_STREAM_ENTRIES_LOWERED": Bump.MAJOR}),
        (
            {},
            {"max_entries": 90, "least_entries": 80},
            {"ORKI_STREAM_ENTRIES_LOWERED": Bump.MAJOR, "ORKI_STREAM_LEAST_LOWERED": Bump.MAJOR},
        ),
        # Saying what stood without saying is no change that anybody feels.
        ({}, {"least_entries": 100}, {"ORKI_FILE_CHANGED": Bump.MINOR}),
    ],
)
def test_a_change_of_bounds_gives_these_findings(
    before: dict[str, Any], after: dict[str, Any], expected: dict[str, Bump]
) -> None:
    common: dict[str, Any] = {"max_entries": 100, "max_age": seconds(10)}
    assert rules(build(**common | before), build(**common | after)) == expected


def test_an_image_of_older_options_has_no_bounds() -> None:
    old = build(older=True, max_entries=100, max_age=seconds(10))
    (stream,) = old.contract.streams
    assert (validate(old), stream.retention.tunable) == ((), False)
    new = build(max_entries=100, max_age=seconds(10), least_entries=50, most_age=seconds(20))
    assert rules(old, new) == {"ORKI_STREAM_LEAST_LOWERED": Bump.MAJOR, "ORKI_STREAM_RELAXED": Bump.MINOR}
    assert rules(new, old) == {"ORKI_STREAM_BOUNDS_NARROWED": Bump.MAJOR}
    assert "50 to 100 → 100" in " ".join(each.message for each in findings(new, old))
