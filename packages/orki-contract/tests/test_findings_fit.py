"""Two versions side by side: what counts, what does not, and in which direction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf import message_factory
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet

from orki_contract.descriptors import Schema
from orki_contract.findings import Fit, service_fit, stream_fit
from orki_contract.images import image_of, package_version
from orki_contract.read import ReadContract, read_image

SERVICE = "fits.v1.WorkService"
Edit = Callable[[Any], None]


def build(*edits: Edit) -> ReadContract:
    """A service with one task, a stream, and an enum; with edits of its file."""
    schema = Schema(image_of("orki.events.v1"))
    needed = ("google/protobuf/descriptor.proto", "google/protobuf/duration.proto", "orki/options/v1/options.proto")
    classes = message_factory.GetMessageClassesForFiles([needed[0], needed[2]], schema.pool)
    file: Any = classes["google.protobuf.FileDescriptorProto"](
        name="fits/v1/work.proto", package="fits.v1", syntax="proto3", dependency=[needed[2]]
    )
    for name in ("Ask", "Answer", "Note"):
        file.message_type.add(name=name).field.add(name="body", number=1, type=9, label=1)
    kind = file.enum_type.add(name="Kind")
    for number, name in enumerate(("KIND_UNSPECIFIED", "KIND_ONE")):
        kind.value.add(name=name, number=number)
    file.message_type[0].field.add(name="kind", number=2, type=14, label=1, type_name=".fits.v1.Kind")
    stream = file.message_type[2].options.Extensions[schema.pool.FindExtensionByName("orki.options.v1.stream")]
    stream.MergeFrom(type(stream)(name="notes", retention={"max_entries": 1_000}))
    method = file.service.add(name="WorkService").method.add(
        name="Do", input_type=".fits.v1.Ask", output_type=".fits.v1.Answer"
    )
    task = method.options.Extensions[schema.pool.FindExtensionByName("orki.options.v1.task")]
    task.max_attempts = 3
    for edit in edits:
        edit(file)
    kept = [FileDescriptorProto.FromString(schema.files[name].SerializeToString()) for name in needed]
    if unknown_option in edits:
        (task_options,) = [each for each in kept[2].message_type if each.name == "TaskOptions"]
        task_options.field.add(name="urgency", number=99, type=13, label=1)
    own = FileDescriptorProto.FromString(file.SerializeToString())
    return read_image(FileDescriptorSet(file=[*kept, own]).SerializeToString())


def field(message: int, number: int, kind: int = 9) -> Edit:
    return lambda file: file.message_type[message].field.add(name=f"f{number}", number=number, type=kind, label=1)


def set_type(message: int, kind: int) -> Edit:
    return lambda file: setattr(file.message_type[message].field[0], "type", kind)


def attempts(count: int) -> Edit:
    def edit(file: Any) -> None:
        options = file.service[0].method[0].options
        (extension,) = [each for each, _ in options.ListFields()]
        options.Extensions[extension].max_attempts = count

    return edit


def unknown_option(file: Any) -> None:
    """Field 99 of the task's options, which these rules do not know; `build` makes the options newer."""
    options = file.service[0].method[0].options
    (extension,) = [each for each, _ in options.ListFields()]
    options.Extensions[extension].MergeFromString(b"\x98\x06\x01")


def test_equal_versions_fit_both_ways() -> None:
    fit = service_fit(SERVICE, build(), build())
    assert (fit.forward, fit.backward, fit.breaks, str(fit)) == ((), (), (), "compatible")


@pytest.mark.parametrize("edit", [field(0, 5), attempts(7)], ids=["a field more", "attempts more"])
def test_an_evolution_fits_from_both_sides(edit: Edit) -> None:
    old, new = build(), build(edit)
    fit = service_fit(SERVICE, old, new)
    assert fit.compatible
    assert not fit.forward, "the second is the evolution"
    assert fit.backward, "the first is not one"
    turned = service_fit(SERVICE, new, old)
    assert turned == Fit(fit.backward, fit.forward)
    assert turned.compatible


@pytest.mark.parametrize(
    ("edits", "rule"),
    [
        ([set_type(0, 12)], "ORKI_FIELD_RETYPED"),
        ([set_type(1, 3)], "ORKI_FIELD_RETYPED"),
        ([lambda file: setattr(file.enum_type[0].value[1], "name", "KIND_TWO")], "ORKI_ENUM_VALUE_REN"),
        ([lambda file: setattr(file.service[0].method[0], "input_type", ".fits.v1.Note")], "ORKI_TASK_REQUEST_CHANGED"),
        ([attempts(1)], "ORKI_TASK_REPEATED"),
    ],
)
def test_a_change_that_breaks_both_ways_is_reported_with_rule_and_subject(edits: list[Edit], rule: str) -> None:
    for pair in ((build(), build(*edits)), (build(*edits), build())):
        fit = service_fit(SERVICE, *pair)
        assert not fit.compatible
        assert rule in str(fit) or rule in " ".join(each.rule for each in (*fit.forward, *fit.backward))
        assert all(each.wire for each in fit.breaks)


def test_a_change_that_is_half_a_step_forward_and_half_a_step_back_fits_not() -> None:
    fit = service_fit(SERVICE, build(field(0, 5)), build(field(0, 6)))
    assert not fit.compatible
    assert "ORKI_FIELD_REMOVED" in str(fit)


@pytest.mark.parametrize(
    "edit",
    [
        set_type(2, 12),
        lambda file: setattr(file.options, "java_package", "x"),
        lambda file: file.message_type.add(name="Elsewhere"),
    ],
    ids=["another message", "an option of the file", "a new message"],
)
def test_changes_outside_the_service_are_ignored(edit: Edit) -> None:
    assert service_fit(SERVICE, build(), build(edit)).compatible


def test_changes_that_affect_only_source_code_are_ignored() -> None:
    def retire(file: Any) -> None:
        del file.message_type[0].field[0]
        file.message_type[0].reserved_range.add(start=1, end=2)

    fit = service_fit(SERVICE, build(), build(retire))
    assert fit.compatible
    assert not fit.forward


def test_an_option_that_nobody_knows_counts() -> None:
    fit = service_fit(SERVICE, build(), build(unknown_option))
    assert not fit.compatible
    assert "ORKI_OPTION_UNKNOWN" in str(fit)
    assert stream_fit("notes", build(), build(unknown_option)).compatible


def test_streams_are_judged_by_themselves_and_their_messages() -> None:
    assert not stream_fit("notes", build(), build(set_type(2, 3))).compatible
    assert stream_fit("notes", build(), build(field(2, 4))).compatible
    assert stream_fit("notes", build(), build(set_type(0, 3))).compatible, "that is the service's alone"


def test_many_breaks_are_cut_short() -> None:
    def many(kind: int) -> ReadContract:
        return build(*(field(0, number, kind) for number in range(3, 9)))

    text = str(service_fit(SERVICE, many(9), many(3)))
    assert text.count("[ORKI_") == 3
    assert text.endswith("and 3 more")


@pytest.mark.parametrize("package", ["nobody.has.this", "", "json"])
def test_a_package_of_no_distribution_has_no_version(package: str) -> None:
    assert package_version(package) == ""
