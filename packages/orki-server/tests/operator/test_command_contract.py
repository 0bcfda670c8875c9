"""`orki contract` against a real Valkey, orchestrators and agents."""

from __future__ import annotations

import asyncio
import json
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from google.protobuf import message_factory
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto, FileDescriptorSet

from orki.control.v1.session_pb2 import ServedService
from orki_contract import EventStream
from orki_contract.descriptors import Schema
from orki_contract.errors import ContractMismatch
from orki_contract.images import image_of
from orki_contract.read import read_image
from orki_events import connect
from orki_server._cli.root import root

pytestmark = pytest.mark.timeout(180)

SERVICE = "servertests.v1.WorkService"
Make = Callable[..., Any]
Edit = Callable[[FileDescriptorProto], None]


def keep(file: FileDescriptorProto) -> None:
    """The unchanged contract."""


def retype(file: FileDescriptorProto) -> None:
    file.message_type[0].field[0].type = FieldDescriptorProto.TYPE_INT64


def add_field(file: FileDescriptorProto) -> None:
    field = file.message_type[0].field.add(name="note", number=2)
    field.type, field.label = FieldDescriptorProto.TYPE_STRING, FieldDescriptorProto.LABEL_OPTIONAL


def retype_and_add(file: FileDescriptorProto) -> None:
    retype(file)
    add_field(file)


def stream_image(edit: Edit = keep, *, reader: bool = False) -> bytes:
    """An image of `acmenotes.v1` with the stream `notes`; or that of `acmereader.v1`, which declares groups on it."""
    schema = Schema(image_of("orki.events.v1"))
    needed = ("google/protobuf/descriptor.proto", "google/protobuf/duration.proto", "orki/options/v1/options.proto")
    classes = message_factory.GetMessageClassesForFiles([needed[0], needed[2]], schema.pool)
    make: Any = classes["google.protobuf.FileDescriptorProto"]
    owner = make(name="acmenotes/v1/note.proto", package="acmenotes.v1", syntax="proto3", dependency=[needed[2]])
    note = owner.message_type.add(name="Note")
    note.field.add(name="body", number=1, type=9, label=1)
    options = note.options.Extensions[schema.pool.FindExtensionByName("orki.options.v1.stream")]
    options.MergeFrom(
        type(options)(name="notes", retention={"max_entries": 1_000}, groups=[{"name": "readers", "start": 1}])
    )
    files = [owner]
    if reader:
        mine = make(name="acmereader/v1/reader.proto", package="acmereader.v1", syntax="proto3")
        mine.dependency.extend([owner.name, needed[2]])
        consume = mine.options.Extensions[schema.pool.FindExtensionByName("orki.options.v1.consume")]
        consume.add(stream="notes", group={"name": "late", "start": 2})
        consume.add(stream="notes", group={"name": "early", "start": 1})
        files.append(mine)
    plain = [FileDescriptorProto.FromString(each.SerializeToString()) for each in files]
    edit(plain[0])
    kept = [FileDescriptorProto.FromString(schema.files[name].SerializeToString()) for name in needed]
    return FileDescriptorSet(file=[*kept, *plain]).SerializeToString(deterministic=True)


def wheel(folder: Path, version: str, **images: bytes) -> str:
    """Build a wheel with images by package name; `_` in a name replaces a dot."""
    path = folder / f"acme_things-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for package, image in images.items():
            archive.writestr(f"{package.replace('_', '/')}/contract.binpb", image)
        archive.writestr("acme_things/__init__.py", "")
    return str(path)


@pytest.fixture
def quick() -> Iterator[Callable[..., Any]]:
    """Run `orki ARGS…` in a thread, ten times faster than as a process."""
    pool = ThreadPoolExecutor(1)
    # Click 8.1 mixes both outputs by default. Later versions never do and have no such option.
    apart: dict[str, Any] = {"mix_stderr": False} if "mix_stderr" in signature(CliRunner).parameters else {}
    runner = CliRunner(**apart)

    async def run(*arguments: str, **settings: str) -> Any:
        call = partial(runner.invoke, root, arguments, env=settings)
        result = await asyncio.get_running_loop().run_in_executor(pool, call)
        if not isinstance(result.exception, SystemExit | None):
            raise result.exception
        return SimpleNamespace(code=result.exit_code, out=result.stdout, err=result.stderr)

    yield run
    pool.shutdown()


async def rows(orki: Any, url: str) -> list[dict[str, Any]]:
    ended = await orki("contract", "list", "--json", "--redis", url)
    assert ended.code == 0, ended.err
    # What the orchestrator itself publishes is registered too.
    return [each for each in json.loads(ended.out) if each["name"] in (SERVICE, "notes")]


async def test_an_applied_contract_refuses_breaking_agents_and_accepts_compatible_ones(
    orchestrator: Any, redis_url: str, stand_in: Make, work: Make, orki: Any, tmp_path: Path
) -> None:
    ahead: ServedService = work(edit=add_field)
    ended = await orki("contract", "apply", wheel(tmp_path, "1.1.0", servertests_v1=ahead.image), "--redis", redis_url)
    assert (ended.code, ended.err) == (0, "")
    assert f"service  {SERVICE}" in ended.out
    (row,) = await rows(orki, redis_url)
    assert (row["name"], row["version"], row["digest"]) == (SERVICE, "1.1.0", ahead.digest)
    assert (row["state"], row["agents"], row["leading"]) == ("applied", [], True)
    bad = stand_in(orchestrator.address, [work(edit=retype, version="2.0.0")], agent_id="bad")
    await bad.until(lambda: bool(bad.opened or bad.closed))
    assert isinstance(bad.closed, ContractMismatch)
    for part in ("ORKI_FIELD_RETYPED", "1.1.0 (sha256:", "2.0.0 (sha256:", "applied ahead", "orki contract withdraw"):
        assert part in bad.closed.message
    old = stand_in(orchestrator.address, [work(version="1.0.0")], agent_id="old")
    await old.ready()
    new = stand_in(orchestrator.address, [ahead], agent_id="new")
    await new.ready()
    states = {each["version"]: (each["state"], each["agents"]) for each in await rows(orki, redis_url)}
    assert states == {"1.0.0": ("live", ["old"]), "1.1.0": ("live", ["new"])}
    table = await orki("contract", "list", "--redis", redis_url, COLUMNS="120")
    assert [line.split()[0] for line in table.out.splitlines()[:3]] == ["KIND", "service", "service"]
    assert f"{SERVICE} *" in table.out


async def test_a_breaking_contract_prevents_the_whole_apply(
    orchestrator: Any, redis_url: str, stand_in: Make, work: Make, quick: Any, tmp_path: Path
) -> None:
    await stand_in(orchestrator.address, [work(version="1.0.0")], agent_id="one").ready()
    source = wheel(tmp_path, "2.0.0", servertests_v1=work(edit=retype).image, acmenotes_v1=stream_image())
    for more in ([], ["--check"]):
        ended = await quick("contract", "apply", source, "--redis", redis_url, *more)
        assert (ended.code, ended.out) == (1, "")
        assert len(ended.err.splitlines()) == 1
        for part in ("ORKI_FIELD_RETYPED", "DoRequest.body", "1.0.0 (sha256:", "2.0.0 (sha256:", "agent one serves it"):
            assert part in ended.err
    (row,) = await rows(quick, redis_url)
    assert (row["version"], row["state"]) == ("1.0.0", "live")
    # The two fit: the same command passes, writes nothing with --check, and names what is in use already.
    fits = wheel(tmp_path, "1.1.0", servertests_v1=work(edit=add_field).image, acmenotes_v1=stream_image())
    checked = await quick("contract", "apply", fits, "--check", "--redis", redis_url)
    assert checked.code == 0
    assert "nothing was written" in checked.out
    assert len(await rows(quick, redis_url)) == 1
    done = await quick("contract", "apply", fits, "--json", "--redis", redis_url)
    assert [(each["name"], each["outcome"]) for each in json.loads(done.out)["applied"]] == [
        (SERVICE, "applied"),
        ("notes", "applied"),
    ]
    assert {each["state"] for each in await rows(quick, redis_url)} == {"live", "applied"}


async def test_an_applied_group_reads_events_published_before_its_first_consumer(
    valkey_url: str, quick: Any, tmp_path: Path
) -> None:
    """Includes a group that starts at the latest entry and that the publisher does not know."""
    source = wheel(tmp_path, "1.0.0", acmenotes_v1=stream_image(), acmereader_v1=stream_image(reader=True))
    ended = await quick("contract", "apply", source, "--redis", valkey_url)
    assert ended.code == 0, ended.err
    assert [line.split()[1] for line in ended.out.splitlines()[1:]] == ["notes", "notes/early", "notes/late"]
    (row,) = await rows(quick, valkey_url)
    assert (row["state"], row["version"]) == ("applied", "1.0.0")
    assert {each["name"]: each["missing"] for each in row["groups"]} == dict.fromkeys(
        ("audit", "early", "late", "readers"), False
    )
    read = read_image(stream_image(reader=True))
    classes = message_factory.GetMessageClassesForFiles(["acmenotes/v1/note.proto"], read.schema.pool)
    (contract,) = read.contract.streams
    note: Any = classes["acmenotes.v1.Note"]
    handle: EventStream[Any, Any] = EventStream(note, contract)
    reader = handle.with_groups(*(each.group for each in read.contract.external_groups))
    async with connect(valkey_url) as events:
        await events.publish_many(handle, [note(body=str(number)) for number in range(3)])
        for stream, group in ((reader, "late"), (reader, "early"), (handle, "readers")):
            found = []
            async with asyncio.timeout(30):
                async for delivery in events.deliveries(stream, group=group):
                    async with delivery as event:
                        found.append(event.body)
                    if len(found) == 3:
                        break
            assert found == ["0", "1", "2"], group


async def test_a_stream_incompatible_with_the_registered_version_is_not_applied(
    valkey_url: str, quick: Any, tmp_path: Path
) -> None:
    image = tmp_path / "contract.binpb"
    image.write_bytes(stream_image())
    first = await quick("contract", "apply", str(image), "--package-version", "1.0.0", "--redis", valkey_url)
    assert first.code == 0, first.err
    image.write_bytes(stream_image(retype))
    second = await quick("contract", "apply", str(image), "--package-version", "2.0.0", "--redis", valkey_url)
    assert (second.code, second.out) == (1, "")
    for part in ('"notes"', "ORKI_FIELD_RETYPED", "1.0.0 (sha256:", "2.0.0 (sha256:", "orki contract withdraw notes"):
        assert part in second.err
    gone = await quick("contract", "withdraw", "notes", "--redis", valkey_url)
    assert (gone.code, gone.err) == (0, "")
    assert "entries and groups stay" in gone.out
    third = await quick("contract", "apply", str(image), "--package-version", "2.0.0", "--redis", valkey_url)
    assert third.code == 0, third.err
    image.write_bytes(stream_image(retype_and_add))
    again = await quick("contract", "apply", str(image), "--package-version", "2.1.0", "--redis", valkey_url)
    assert again.code == 0, again.err
    (row,) = await rows(quick, valkey_url)
    assert row["version"] == "2.1.0"


async def test_apply_is_idempotent_and_registrations_survive_a_restart(
    redis_url: str, options: Make, launch: Make, stand_in: Make, work: Make, quick: Any, tmp_path: Path
) -> None:
    source = wheel(tmp_path, "1.0.0", servertests_v1=work().image)
    for _ in range(2):
        assert (await quick("contract", "apply", source, "--redis", redis_url)).code == 0
    first = await launch(options(redis_url))
    await first.stop()
    again = await launch(options(redis_url))
    (row,) = await rows(quick, redis_url)
    assert (row["state"], row["version"]) == ("applied", "1.0.0")
    ended = await quick("submit", "Do", "{}", "--no-wait", ORKI_ORCHESTRATOR=again.address)
    assert ended.code == 0, ended.err
    (row,) = await rows(quick, redis_url)
    assert (row["state"], row["unfinished_tasks"]) == ("live", 1)
    await stand_in(again.address, [work()], agent_id="late").ready()


async def test_only_unused_contracts_are_withdrawn(
    orchestrator: Any, redis_url: str, stand_in: Make, work: Make, quick: Any, tmp_path: Path
) -> None:
    agent = stand_in(orchestrator.address, [work()], agent_id="one")
    await agent.ready()
    source = wheel(tmp_path, "1.1.0", servertests_v1=work(edit=add_field).image)
    assert (await quick("contract", "apply", source, "--redis", redis_url)).code == 0
    which = await quick("contract", "withdraw", SERVICE, "--redis", redis_url)
    assert which.code == 2
    assert "2 contracts" in which.err
    used = await quick("contract", "withdraw", SERVICE, work().digest, "--redis", redis_url)
    assert used.code == 1
    assert "stop its agents" in used.err
    ahead = await quick("contract", "withdraw", SERVICE, work(edit=add_field).digest[:20], "--redis", redis_url)
    assert ahead.code == 0, ahead.err
    (row,) = await rows(quick, redis_url)
    assert (row["digest"], row["leading"]) == (work().digest, True)
    for name in (SERVICE, "nobody.knows.It"):
        unknown = await quick("contract", "withdraw", name, "sha256:ffff", "--redis", redis_url)
        assert unknown.code == 1
        assert "orki contract list" in unknown.err


async def test_bad_sources_are_wrong_usage(redis_only: dict[str, str], work: Make, quick: Any, tmp_path: Path) -> None:
    def unruly(file: FileDescriptorProto) -> None:
        file.service[0].method[0].client_streaming = True

    bad = {
        "nothing.whl": None,
        "empty.binpb": b"",
        "garbage.binpb": b"\xff\xff\xff\xff",
        "text.whl": b"no zip at all",
        "unruly.binpb": work(edit=unruly).image,
        "library.binpb": FileDescriptorSet(
            file=[each for each in FileDescriptorSet.FromString(work().image).file if "servertests" not in each.name]
        ).SerializeToString(),
    }
    for name, content in bad.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        ended = await quick("contract", "apply", name, **redis_only)
        assert (ended.code, ended.out) == (2, ""), (name, ended.err)
        assert ended.err.splitlines()[-1].startswith("Error: "), name
    bare = wheel(tmp_path, "1.0")
    ended = await quick("contract", "apply", bare, **redis_only)
    assert ended.code == 2
    assert "holds no contract.binpb" in ended.err


async def test_a_store_that_does_not_answer(quick: Any, dead_port: int, work: Make, tmp_path: Path) -> None:
    source = wheel(tmp_path, "1.0.0", servertests_v1=work().image)
    for arguments in (["apply", source], ["list"], ["withdraw", SERVICE]):
        ended = await quick("contract", *arguments, "--redis", f"redis://127.0.0.1:{dead_port}/0")
        assert ended.code == 1
        assert len(ended.err.splitlines()) == 1
        assert "check --redis" in ended.err
