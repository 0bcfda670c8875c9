"""Images in wheels, digests, classes out of images; all on the images that the workspace's own packages ship."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto, FileDescriptorSet

from orki_contract.descriptors import Schema
from orki_contract.errors import InvalidContract
from orki_contract.images import image_of, message_class, package_images, service_digest, stream_digest
from orki_contract.read import read_image

EVENTS = "orki.events.v1"
IMAGE = image_of(EVENTS)


def changed(edit: Callable[[dict[str, FileDescriptorProto]], None]) -> bytes:
    """The image after an edit of its files, which are given by name."""
    files = FileDescriptorSet.FromString(IMAGE)
    by_name = {file.name: file for file in files.file}
    edit(by_name)
    return files.SerializeToString()


def test_an_image_contains_its_package_and_imports_without_source_information() -> None:
    schema = Schema(IMAGE)
    own = {name for name, file in schema.files.items() if file.package == EVENTS}
    assert {"orki/events/v1/task.proto", "orki/events/v1/envelope.proto"} <= own
    assert set(schema.files) == set().union(*(schema.imports(name) for name in own))
    assert not any(file.HasField("source_code_info") for file in schema.files.values())
    names = [file.name for file in FileDescriptorSet.FromString(IMAGE).file]
    assert names == sorted(names)


def test_extracting_an_image_from_itself_gives_the_same_bytes_for_any_order() -> None:
    files = FileDescriptorSet.FromString(IMAGE)
    shuffled = list(files.file)
    random.Random(5).shuffle(shuffled)
    assert package_images(FileDescriptorSet(file=shuffled).SerializeToString(), [EVENTS]) == {EVENTS: IMAGE}


def test_a_smaller_package_is_cut_out_with_its_imports_only() -> None:
    errors = package_images(IMAGE, ["orki.errors.v1"])["orki.errors.v1"]
    assert set(Schema(errors).files) == {"orki/errors/v1/errors.proto"}
    assert errors == image_of("orki.errors.v1")


@pytest.mark.parametrize(
    ("package", "message"),
    [
        ("orki.nowhere.v1", 'no proto package "orki.nowhere.v1" is installed'),
        ("", 'no proto package "" is installed'),
        ("json", 'the installed package "json" has no contract.binpb'),
        ("this-is no name", "is installed"),
    ],
)
def test_a_package_without_an_image_is_refused_in_words(package: str, message: str) -> None:
    with pytest.raises(InvalidContract) as caught:
        image_of(package)
    assert message in caught.value.message


@pytest.mark.parametrize("image", [b"\xff\xff", b"\n\x05hello", b"garbage that is no protobuf"])
def test_bytes_that_are_no_image_are_refused(image: bytes) -> None:
    for use in (
        lambda: read_image(image),
        lambda: package_images(image, [EVENTS]),
        lambda: service_digest(image, "a.B"),
        lambda: stream_digest(image, "a"),
        lambda: message_class(image, "a.B"),
    ):
        with pytest.raises(InvalidContract):
            use()


def test_the_error_names_a_missing_import() -> None:
    files = FileDescriptorSet.FromString(IMAGE)
    kept = [file for file in files.file if file.name != "orki/errors/v1/errors.proto"]
    with pytest.raises(InvalidContract, match=r"lacks orki/errors/v1/errors.proto, which orki/events/v1"):
        read_image(FileDescriptorSet(file=kept).SerializeToString())


def test_files_are_read_whichever_way_their_imports_cross() -> None:
    """`a` imports `b` before `c`, and `c` imports `b` as well: no circle, though `b` is met twice on the way."""
    imports = {"a.proto": ["b.proto", "c.proto"], "b.proto": ["d.proto"], "c.proto": ["b.proto"], "d.proto": []}
    files = [FileDescriptorProto(name=name, dependency=each) for name, each in imports.items()]
    for order in (files, files[::-1]):
        read = read_image(FileDescriptorSet(file=order).SerializeToString())
        assert [file.path for file in read.files] == sorted(imports)


def test_files_that_import_each_other_are_refused() -> None:
    files = [
        FileDescriptorProto(name="a.proto", dependency=["b.proto"]),
        FileDescriptorProto(name="b.proto", dependency=["a.proto"]),
    ]
    with pytest.raises(InvalidContract, match="import cycle"):
        read_image(FileDescriptorSet(file=files).SerializeToString())


def test_a_stream_digest_has_its_shape_and_minds_neither_order_nor_comments_nor_other_messages() -> None:
    digest = stream_digest(IMAGE, "usage")
    assert len(digest) == 71
    assert digest.startswith("sha256:")

    def reorder(files: dict[str, FileDescriptorProto]) -> None:
        fields = files["orki/events/v1/usage.proto"].message_type[0].field
        moved = list(fields)
        del fields[:]
        fields.extend(reversed(moved))
        location = files["orki/events/v1/usage.proto"].source_code_info.location.add(path=[4, 0], span=[1, 1, 1])
        location.leading_comments = "a comment"
        files["orki/events/v1/agent.proto"].message_type[0].field[0].name = "renamed"

    assert stream_digest(changed(reorder), "usage") == digest
    assert stream_digest(changed(reorder), "agents") != stream_digest(IMAGE, "agents")


def test_where_a_message_lies_does_not_change_a_digest() -> None:
    def rename(files: dict[str, FileDescriptorProto]) -> None:
        files["orki/events/v1/usage.proto"].name = "orki/events/v1/consumption.proto"

    assert stream_digest(changed(rename), "usage") == stream_digest(IMAGE, "usage")


def _add_field(files: dict[str, FileDescriptorProto]) -> None:
    message = files["orki/events/v1/usage.proto"].message_type[0]
    message.field.add(name="region", number=100, type=FieldDescriptorProto.TYPE_STRING, label=1)


def _rename_field(files: dict[str, FileDescriptorProto]) -> None:
    files["orki/events/v1/usage.proto"].message_type[0].field[0].name = "agent"


def _retype_field(files: dict[str, FileDescriptorProto]) -> None:
    files["orki/events/v1/usage.proto"].message_type[0].field[0].type = FieldDescriptorProto.TYPE_BYTES


def _add_enum_value(files: dict[str, FileDescriptorProto]) -> None:
    files["orki/errors/v1/errors.proto"].enum_type[0].value.add(name="REASON_NEW", number=9999)


@pytest.mark.parametrize("edit", [_add_field, _rename_field, _retype_field])
def test_the_shape_of_a_message_changes_the_digest_of_its_stream_alone(
    edit: Callable[[dict[str, FileDescriptorProto]], None],
) -> None:
    assert stream_digest(changed(edit), "usage") != stream_digest(IMAGE, "usage")
    assert stream_digest(changed(edit), "audit") == stream_digest(IMAGE, "audit")


def test_an_enum_out_of_another_package_counts() -> None:
    assert stream_digest(changed(_add_enum_value), "tools") != stream_digest(IMAGE, "tools")
    assert stream_digest(changed(_add_enum_value), "usage") == stream_digest(IMAGE, "usage")


def test_a_sensitive_flag_counts() -> None:
    def publish(files: dict[str, FileDescriptorProto]) -> None:
        for field in files["orki/events/v1/audit.proto"].message_type[0].field:
            field.ClearField("options")

    assert stream_digest(changed(publish), "audit") != stream_digest(IMAGE, "audit")


@pytest.mark.parametrize(
    "use", [lambda: stream_digest(IMAGE, "nope"), lambda: service_digest(IMAGE, "orki.events.v1.Nope")]
)
def test_a_digest_of_an_unknown_declaration_is_an_error(use: Callable[[], str]) -> None:
    with pytest.raises(InvalidContract, match=r"nope|Nope"):
        use()


def test_a_class_from_an_image_parses_messages_of_generated_code() -> None:
    from orki.events.v1.usage_pb2 import UsageEvent

    made = message_class(IMAGE, "orki.events.v1.UsageEvent")
    assert made is not UsageEvent
    event = made.FromString(UsageEvent(model="m", input_tokens=7).SerializeToString())
    assert {field.name: value for field, value in event.ListFields()} == {"model": "m", "input_tokens": 7}


def test_a_class_of_an_unknown_message_is_an_error() -> None:
    with pytest.raises(InvalidContract, match=r'no message "orki.events.v1.Nope"'):
        message_class(IMAGE, "orki.events.v1.Nope")
