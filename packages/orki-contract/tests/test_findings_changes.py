"""Findings on contracts that orki ships, each edited in one place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorSet

from orki_contract.descriptors import Schema
from orki_contract.findings import RULES, Bump, Finding, Plane, findings, required_bump
from orki_contract.images import image_of
from orki_contract.read import read_image

EVENTS = image_of("orki.events.v1")
HOTPATH = image_of("orki.hotpath.v1")
CONTROL = image_of("orki.control.v1")

Edit = Callable[[dict[str, Any], Callable[[str], Any]], None]


def edited(image: bytes, edit: Edit) -> bytes:
    """The image after an edit of its messages, by full name; the second argument finds an option's extension."""
    schema = Schema(image)
    files = list(schema.files.values())
    edit(
        {name: node.proto for name, node in schema.messages.items()},
        lambda name: schema.pool.FindExtensionByName(f"orki.options.v1.{name}"),
    )
    whole = FileDescriptorSet()
    for file in files:
        whole.file.add().ParseFromString(file.SerializeToString())
    return whole.SerializeToString()


def changes(image: bytes, edit: Edit) -> tuple[Finding, ...]:
    return findings(read_image(image), read_image(edited(image, edit)))


def rename_usage(messages: dict[str, Any], option: Callable[[str], Any]) -> None:
    messages["orki.events.v1.UsageEvent"].options.Extensions[option("stream")].name = "costs"


@pytest.mark.parametrize("image", [EVENTS, HOTPATH, CONTROL], ids=["events", "hotpath", "control"])
def test_a_contract_compared_with_itself_requires_a_patch_bump(image: bytes) -> None:
    found = findings(read_image(image), read_image(image))
    assert found == ()
    assert required_bump(found) is Bump.PATCH


def test_the_order_of_files_is_ignored() -> None:
    turned = FileDescriptorSet(file=reversed(FileDescriptorSet.FromString(EVENTS).file)).SerializeToString()
    assert findings(read_image(EVENTS), read_image(turned)) == ()


def test_a_renamed_stream_names_its_readers() -> None:
    found = {finding.rule: finding for finding in changes(EVENTS, rename_usage)}
    assert set(found) == {"ORKI_STREAM_REMOVED", "ORKI_STREAM_ADDED"}
    removed = found["ORKI_STREAM_REMOVED"]
    assert removed.bump is Bump.MAJOR
    assert removed.plane is Plane.EVENTS
    assert removed.package == "orki.events.v1"
    assert removed.subject == 'stream "usage"'
    assert '"costs"' in removed.message
    assert removed.affected == ('group "audit"', 'group "metrics"')
    assert removed.wire
    assert not removed.gone
    assert removed.location.file == removed.before.file == "orki/events/v1/usage.proto"


def test_findings_are_sorted_and_the_same_every_time() -> None:
    def edit(messages: dict[str, Any], option: Callable[[str], Any]) -> None:
        rename_usage(messages, option)
        for name in ("TaskEvent", "ToolEvent", "AgentEvent"):
            messages[f"orki.events.v1.{name}"].options.Extensions[option("stream")].retention.max_entries //= 2

    first, second = changes(EVENTS, edit), changes(EVENTS, edit)
    assert first == second == tuple(sorted(first))
    assert [finding.rule for finding in first].count("ORKI_STREAM_ENTRIES_LOWERED") == 3


def test_a_field_of_a_message_in_a_stream_is_felt_in_its_plane() -> None:
    def edit(messages: dict[str, Any], option: Callable[[str], Any]) -> None:
        messages["orki.events.v1.AgentSpawned"].field.add(name="more", number=90, type=9, label=1, json_name="more")

    (finding,) = changes(EVENTS, edit)
    assert (finding.rule, finding.bump, finding.plane) == ("ORKI_FIELD_ADDED", Bump.MINOR, Plane.EVENTS)
    assert finding.affected == ('stream "agents"',)
    assert not finding.wire


def test_the_header_of_the_hot_path_is_fixed() -> None:
    def edit(messages: dict[str, Any], option: Callable[[str], Any]) -> None:
        header = messages["orki.hotpath.v1.FrameHeader"]
        added = header.field.add(name="more", number=90, type=13, label=1, json_name="more")
        added.options.Extensions[option("offset")] = 12 + 2
        added.options.Extensions[option("scalar")] = 2
        added.options.Extensions[option("since")] = 2
        header.options.Extensions[option("frame")].version = 2

    found = {finding.rule: finding for finding in changes(HOTPATH, edit)}
    assert found["ORKI_FRAME_FIXED_CHANGED"].bump is Bump.MAJOR
    assert {finding.bump for rule, finding in found.items() if rule != "ORKI_FRAME_FIXED_CHANGED"} == {Bump.MINOR}


def test_another_frame_takes_a_field_in_bytes_that_nothing_used() -> None:
    def edit(messages: dict[str, Any], option: Callable[[str], Any]) -> None:
        welcome = messages["orki.hotpath.v1.WelcomeFrame"]
        added = welcome.field.add(name="more", number=4, type=13, label=1, json_name="more")
        added.options.Extensions[option("offset")] = 12
        added.options.Extensions[option("since")] = 2
        welcome.options.Extensions[option("frame")].version = 2

    found = changes(HOTPATH, edit)
    assert {finding.rule for finding in found} == {"ORKI_FRAME_GROWN"}
    assert required_bump(found) is Bump.MINOR


def test_the_packages_of_the_options_are_nobodys_contract() -> None:
    def edit(messages: dict[str, Any], option: Callable[[str], Any]) -> None:
        added = messages["orki.options.v1.Retention"].field.add(name="more", number=90, type=13, label=1)
        added.json_name = "more"

    assert changes(EVENTS, edit) == ()


def test_a_change_without_a_rule_requires_a_minor_bump() -> None:
    def edit(messages: dict[str, Any], option: Callable[[str], Any]) -> None:
        messages["orki.events.v1.AgentStopped"].options.deprecated = True

    (finding,) = changes(EVENTS, edit)
    assert (finding.rule, finding.bump) == ("ORKI_FILE_CHANGED", Bump.MINOR)


def test_a_whole_package_that_is_new_breaks_nothing() -> None:
    found = findings(read_image(image_of("orki.errors.v1")), read_image(EVENTS))
    assert {finding.bump for finding in found} == {Bump.MINOR}
    gone = findings(read_image(EVENTS), read_image(image_of("orki.errors.v1")))
    assert {finding.gone for finding in gone} == {True}
    assert required_bump(gone) is Bump.MAJOR


def test_every_rule_has_its_id_and_a_consistent_bump() -> None:
    for name, rule in RULES.items():
        assert name == rule.id
        assert rule.bump in (Bump.MAJOR, Bump.MINOR)
        assert not (rule.wire and rule.bump is Bump.MINOR), name
