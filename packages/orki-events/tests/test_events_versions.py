"""Versions of a stream's contract in the registry: compatible ones pass, incompatible ones are refused at the start."""

from __future__ import annotations

import asyncio
import importlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import message_factory
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet

from orki_contract import EventStream
from orki_contract.descriptors import Schema
from orki_contract.errors import ContractMismatch, InvalidContract
from orki_contract.images import image_of, package_version
from orki_contract.model import Group
from orki_contract.read import read_image
from orki_events import Events

PACKAGE = "acmeversions.v1"
Edit = Callable[[FileDescriptorProto], None]
Opened = Callable[..., Any]


def build(edit: Edit = lambda file: None, **stream: Any) -> bytes:
    """An image of `acmeversions.v1`: the stream `notes` of `Note`, with the group `readers`."""
    schema = Schema(image_of("orki.events.v1"))
    needed = ("google/protobuf/descriptor.proto", "google/protobuf/duration.proto", "orki/options/v1/options.proto")
    classes = message_factory.GetMessageClassesForFiles([needed[0], needed[2]], schema.pool)
    file: Any = classes["google.protobuf.FileDescriptorProto"](
        name="acmeversions/v1/note.proto", package=PACKAGE, syntax="proto3", dependency=[needed[2]]
    )
    note = file.message_type.add(name="Note")
    note.field.add(name="body", number=1, type=9, label=1)
    options = note.options.Extensions[schema.pool.FindExtensionByName("orki.options.v1.stream")]
    values = {"name": "notes", "retention": {"max_entries": 1_000}, "groups": [{"name": "readers", "start": 1}]}
    options.MergeFrom(type(options)(**(values | stream)))
    plain = FileDescriptorProto.FromString(file.SerializeToString())
    edit(plain)
    kept = [FileDescriptorProto.FromString(schema.files[name].SerializeToString()) for name in needed]
    return FileDescriptorSet(file=[*kept, plain]).SerializeToString(deterministic=True)


def add_field(file: FileDescriptorProto) -> None:
    file.message_type[0].field.add(name="author", number=2, type=9, label=1)


def retype(file: FileDescriptorProto) -> None:
    file.message_type[0].field[0].type = 3


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., EventStream[Any, Any]]:
    """Install a version of the contract like a wheel, and return the handle that its generated code would export."""
    site = tmp_path / "site"
    monkeypatch.syspath_prepend(str(site))

    def make(version: str, image: bytes) -> EventStream[Any, Any]:
        folder = site / "acmeversions" / "v1"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "contract.binpb").write_bytes(image)
        for old in site.glob("*.dist-info"):
            shutil.rmtree(old)
        listed = site / f"acmeversions-{version}.dist-info"
        listed.mkdir()
        (listed / "METADATA").write_text(f"Metadata-Version: 2.1\nName: acmeversions\nVersion: {version}\n")
        (listed / "RECORD").write_text("acmeversions/v1/contract.binpb,,\n")
        for name in ("acmeversions", PACKAGE):
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        package_version.cache_clear()
        read = read_image(image)
        classes = message_factory.GetMessageClassesForFiles(["acmeversions/v1/note.proto"], read.schema.pool)
        (stream,) = read.contract.streams
        return EventStream(classes[f"{PACKAGE}.Note"], stream)

    yield make
    package_version.cache_clear()


async def started(opened: Opened, stream: EventStream[Any, Any]) -> Events:
    """A publisher like one in a new process."""
    events: Events = await opened()
    await events.publish(stream, stream.message())
    return events


async def test_compatible_versions_pass_in_any_order_and_the_newer_one_stays(opened: Opened, install: Any) -> None:
    old, new = build(), build(add_field, retention={"max_entries": 5_000})
    await started(opened, install("1.0.0", old))
    await started(opened, install("1.1.0", new))
    await started(opened, install("1.0.0", old))
    late = install("1.0.0", old)
    events = await opened()
    async for delivery in events.deliveries(late, group="readers"):
        async with delivery:
            break
    (registered,) = await events.registered_streams()
    assert (registered.version, registered.image) == ("1.1.0", new)
    assert registered.contract.retention.max_entries == 5_000


async def test_a_release_that_keeps_less_replaces_the_earlier_one(opened: Opened, install: Any) -> None:
    """The findings alone make it look older; its version number decides."""
    await started(opened, install("1.9.0", build()))
    events = await started(opened, install("1.10.0", build(retention={"max_entries": 500})))
    (registered,) = await events.registered_streams()
    assert (registered.version, registered.contract.retention.max_entries) == ("1.10.0", 500)


@pytest.mark.parametrize("role", ["publisher", "consumer", "reader of another package"])
async def test_an_incompatible_version_is_refused_at_its_start(
    opened: Opened, install: Any, server: Any, role: str
) -> None:
    good = install("1.0.0", build())
    await started(opened, good)
    bad = install("2.0.0", build(retype, groups=[{"name": "readers", "start": 1}, {"name": "more", "start": 1}]))
    events = await opened()

    async def use() -> None:
        if role == "publisher":
            await events.publish(bad, bad.message(body=7))
        stream = bad if role == "consumer" else bad.with_groups(Group(name="more"))
        async for _ in events.deliveries(stream, group="more"):
            raise AssertionError("it was given an event")

    with pytest.raises(ContractMismatch) as refusal:
        await use()
    for part in (
        '"notes"',
        "ORKI_FIELD_RETYPED",
        f"{PACKAGE}.Note.body",
        "1.0.0 (sha256:",
        "2.0.0 (sha256:",
        f"this {'publisher' if role == 'publisher' else 'consumer'}",
        "orki contract withdraw notes",
    ):
        assert part in refusal.value.message
    with server.client as client:
        assert client.xlen("orki:ev:{notes}") == 1
        groups = {each["name"] for each in client.xinfo_groups("orki:ev:{notes}")}
    assert groups == {b"audit", b"readers"}, "what was refused left no group behind"
    (registered,) = await events.registered_streams()
    assert registered.version == "1.0.0"


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"partitions": 4, "partition_key": "body"}, "ORKI_STREAM_PARTITIONS_CHANGED"),
        ({"groups": [{"name": "readers", "start": 2}]}, "ORKI_GROUP_START_CHANGED"),
        ({"groups": [{"name": "readers", "start": 1, "dead_letter": "elsewhere"}]}, "ORKI_GROUP_DEAD_LETTER_CHANGED"),
    ],
)
async def test_a_differently_declared_stream_is_refused(
    opened: Opened, install: Any, change: dict[str, Any], rule: str
) -> None:
    await started(opened, install("1.0.0", build()))
    with pytest.raises(ContractMismatch, match=rule):
        await started(opened, install("2.0.0", build(**change)))


async def test_only_one_of_two_incompatible_versions_is_registered(opened: Opened, install: Any, server: Any) -> None:
    for turn in range(5):
        with server.client as client:
            client.flushall()
        pair = []
        for version, image in (("1.0.0", build()), ("2.0.0", build(retype))):
            stream = install(version, image)
            events = await opened()
            # The image is read at the first use; use it for another stream first, so that both are ready.
            events._registry._image(PACKAGE)
            pair.append((events, stream))
        waits = [events.prepare(stream) for events, stream in (pair if turn % 2 else pair[::-1])]
        settled = await asyncio.gather(*waits, return_exceptions=True)
        assert sorted(isinstance(each, ContractMismatch) for each in settled) == [False, True], settled


async def test_a_refused_stream_does_not_affect_others(opened: Opened, install: Any, usage: Any) -> None:
    """Events of both are in one batch; only the refused ones fail, until the registration is withdrawn."""
    first = await started(opened, install("1.0.0", build()))
    bad, good = install("2.0.0", build(retype)), usage()
    events = await opened()
    for _ in range(3):
        settled = await asyncio.gather(
            events.publish(bad, bad.message(body=1)), events.publish(good, good.message()), return_exceptions=True
        )
        assert isinstance(settled[0], ContractMismatch)
        assert isinstance(settled[1], bytes)
    assert (events.counts.published, events.counts.refused) == (3, 3)
    assert await first._registry.withdraw(first._command_connection(), "notes")
    assert isinstance(await events.publish(bad, bad.message(body=1)), bytes)


async def test_an_invalid_image_is_refused(opened: Opened, install: Any) -> None:
    await started(opened, install("1.0.0", build()))
    stream = install("1.0.1", build(add_field))
    (Path(sys.path[0]) / "acmeversions/v1/contract.binpb").write_bytes(b"\xff\xff")
    with pytest.raises(InvalidContract):
        await started(opened, stream)


async def test_a_withdrawn_stream_can_be_registered_again(opened: Opened, install: Any) -> None:
    events = await started(opened, install("1.0.0", build()))
    registry, link = events._registry, events._command_connection()
    assert await registry.withdraw(link, "notes")
    assert not await registry.withdraw(link, "notes")
    await started(opened, install("2.0.0", build(retype)))
