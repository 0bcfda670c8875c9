"""The generated AsyncAPI documents pass the official parser, and their schemas describe the JSON form of messages."""

from __future__ import annotations

import json
import os
import random
import runpy
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from orki_codegen._asyncapi import document
from orki_codegen._buf import Buf
from orki_contract.read import ReadContract, read_image

ROOT = Path(__file__).resolve().parents[2]
TOOLS = Path(os.environ["ORKI_ASYNCAPI_TOOLS"])
COMMITTED = sorted(ROOT.glob("*/*/gen/**/asyncapi.json"))
EXAMPLES = 20
Json = dict[str, Any]


def errors_of(path: Path, content: Json) -> str:
    path.write_text(json.dumps(content), encoding="utf-8")
    node = shutil.which("node")
    assert node is not None
    command = [node, str(Path(__file__).with_name("parse.mjs")), str(TOOLS), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.stderr == ""
    assert bool(done.returncode) == bool(done.stdout)
    return done.stdout


@pytest.fixture(scope="module")
def kitchen(tmp_path_factory: pytest.TempPathFactory) -> ReadContract:
    """The contract of the protos that hold all that a contract can hold."""
    root = tmp_path_factory.mktemp("kitchen")
    runpy.run_path(str(ROOT / "codegen/tests/conftest.py"))["lay_out"](root)
    return read_image(Buf(root).image())


def filled(descriptor: Descriptor, chance: random.Random, depth: int = 0) -> Message:
    """Return a message with random values in most of its fields."""
    message = message_factory.GetMessageClass(descriptor)()
    if descriptor.file.package == "google.protobuf":
        return message  # Not all values of its fields have a JSON form.
    for field in descriptor.fields:
        if chance.random() < 0.2 or (depth > 2 and field.type == FieldDescriptor.TYPE_MESSAGE):
            continue
        if field.is_repeated and field.type == FieldDescriptor.TYPE_MESSAGE:
            if field.message_type.GetOptions().map_entry:
                key, value = field.message_type.fields
                if value.type == FieldDescriptor.TYPE_MESSAGE:
                    getattr(message, field.name)[scalar(key, chance)].CopyFrom(
                        filled(value.message_type, chance, depth + 1)
                    )
                else:
                    getattr(message, field.name)[scalar(key, chance)] = scalar(value, chance)
            else:
                getattr(message, field.name).append(filled(field.message_type, chance, depth + 1))
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            getattr(message, field.name).CopyFrom(filled(field.message_type, chance, depth + 1))
        elif field.is_repeated:
            getattr(message, field.name).extend(scalar(field, chance) for _ in range(3))
        else:
            setattr(message, field.name, scalar(field, chance))
    return message


def scalar(field: FieldDescriptor, chance: random.Random) -> Any:
    if field.type == FieldDescriptor.TYPE_ENUM:
        return chance.choice(field.enum_type.values).number
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_STRING:
            return b"\xff\x00" if field.type == FieldDescriptor.TYPE_BYTES else chance.choice(["", "ä"])
        case FieldDescriptor.CPPTYPE_BOOL:
            return chance.random() < 0.5
        case FieldDescriptor.CPPTYPE_DOUBLE | FieldDescriptor.CPPTYPE_FLOAT:
            return chance.choice([0.5, float("inf"), float("nan")])
        case FieldDescriptor.CPPTYPE_INT32 | FieldDescriptor.CPPTYPE_INT64:
            return chance.choice([-3, 0, 5])
        case _:
            return chance.choice([0, 7])


def with_examples(content: Json, read: ReadContract) -> Json:
    """Add the JSON form of random messages. The parser checks them against the schema of the payload."""
    for name, message in content["components"]["messages"].items():
        descriptor = read.schema.pool.FindMessageTypeByName(name)
        made = (filled(descriptor, random.Random(seed)) for seed in range(EXAMPLES))
        message["examples"] = [{"payload": MessageToDict(each)} for each in made]
    return content


def documents(read: ReadContract) -> dict[str, Json]:
    packages = sorted({each.package for each in read.files})
    made = {package: document(read, package) for package in packages}
    return {package: json.loads(each) for package, each in made.items() if each is not None}


def test_committed_documents_are_valid(tmp_path: Path) -> None:
    assert [path.parent.name for path in COMMITTED] == ["v1", "v1"]
    for path in COMMITTED:
        assert errors_of(tmp_path / "document.json", json.loads(path.read_text(encoding="utf-8"))) == ""


def test_schemas_accept_the_json_form_of_random_messages(tmp_path: Path, kitchen: ReadContract) -> None:
    read = read_image(Buf(ROOT).image())
    for contract in (kitchen, read):
        made = documents(contract)
        assert made
        for content in made.values():
            assert errors_of(tmp_path / "document.json", with_examples(content, contract)) == ""


def misspell_an_action(content: Json) -> None:
    next(iter(content["operations"].values()))["action"] = "publish"


def lose_a_schema(content: Json) -> None:
    content["components"]["schemas"].popitem()


def break_a_payload(content: Json) -> None:
    name, message = next(iter(content["components"]["messages"].items()))
    message["examples"] = [{"payload": {next(iter(content["components"]["schemas"][name]["properties"])): [[]]}}]


@pytest.mark.parametrize("plant", [misspell_an_action, lose_a_schema, break_a_payload])
def test_a_planted_mistake_is_found(tmp_path: Path, plant: Callable[[Json], None]) -> None:
    content = json.loads(COMMITTED[0].read_text(encoding="utf-8"))
    plant(content)
    assert errors_of(tmp_path / "document.json", content) != ""


def test_each_stream_and_group_is_described(kitchen: ReadContract) -> None:
    for package, content in documents(kitchen).items():
        own = [each.contract for each in kitchen.files if each.package == package]
        streams = {each.name for one in own for each in one.streams}
        groups = {(each.name, group.name) for one in own for each in one.streams for group in each.groups}
        groups |= {(each.stream, each.group.name) for one in own for each in one.external_groups}
        assert content["channels"].keys() == streams | {stream for stream, _ in groups}
        expected = {f"publish_{each}" for each in streams} | {f"consume_{stream}_{group}" for stream, group in groups}
        assert content["operations"].keys() == expected


def test_a_package_without_streams_has_no_document(kitchen: ReadContract) -> None:
    assert document(kitchen, "orki.options.v1") is None
