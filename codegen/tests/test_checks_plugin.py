"""The check plugin as a process, called as buf calls it, and as people may."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from typing import Any

import pytest
from google.protobuf import json_format
from google.protobuf.descriptor_pb2 import FileDescriptorSet

from orki_codegen.checks._messages import CHECK, RPC, Messages
from orki_codegen.checks._procedures import BREAKING, CATEGORIES, LINT, category_of
from orki_contract.descriptors import Schema
from orki_contract.images import image_of

SERVICE = f"/{CHECK}.CheckService"
EVENTS = image_of("orki.events.v1")
WIRE = Messages()


def call(*arguments: str, sent: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "orki_codegen.checks", *arguments]
    return subprocess.run(command, input=sent, capture_output=True, check=False)


def answered(procedure: str, kind: str, value: Any = None, *, sent: bytes | None = None) -> Any:
    """The value of a response, or its error."""
    request = WIRE.new(f"{RPC}.Request")
    if value is not None:
        request.value.CopyFrom(WIRE.packed(value))
    done = call(
        f"{SERVICE}/{procedure}", "--format", "binary", sent=request.SerializeToString() if sent is None else sent
    )
    assert done.returncode == 0, done.stderr
    response = WIRE.new(f"{RPC}.Response")
    response.ParseFromString(done.stdout)
    if response.HasField("error"):
        return response.error
    parsed = WIRE.new(f"{CHECK}.{kind}")
    parsed.ParseFromString(response.value.value)
    return parsed


def lowered() -> bytes:
    """The events' image with a stream that keeps fewer entries."""
    schema = Schema(EVENTS)
    stream = schema.pool.FindExtensionByName("orki.options.v1.stream")
    options = schema.messages["orki.events.v1.AuditEvent"].proto.options
    options.Extensions[stream].retention.max_entries = 10
    whole = FileDescriptorSet()
    for file in schema.files.values():
        whole.file.add().ParseFromString(file.SerializeToString())
    return whole.SerializeToString()


def check_request(new: bytes, old: bytes = b"", *rules: str, seed: int = 0) -> Any:
    request = WIRE.new(f"{CHECK}.CheckRequest", rule_ids=rules)
    for image, side in ((new, request.file_descriptors), (old, request.against_file_descriptors)):
        files = list(FileDescriptorSet.FromString(image).file)
        random.Random(seed).shuffle(files)
        for file in files:
            side.add().file_descriptor_proto.ParseFromString(file.SerializeToString())
    return request


def test_the_handshake() -> None:
    assert call("--protocol").stdout == b"1\n"
    spec = WIRE.new(f"{RPC}.Spec")
    spec.ParseFromString(call("--spec", "--format", "binary").stdout)
    paths = [each.path for each in spec.procedures]
    assert paths == [f"{SERVICE}/{name}" for name in ("Check", "ListRules", "ListCategories")]
    told = json.loads(call("--spec", "--format", "json").stdout)
    assert [each["path"] for each in told["procedures"]] == paths


def test_the_handshake_imports_nothing() -> None:
    """buf calls it six times a run."""
    code = "import sys; from orki_codegen.checks import main; main(['--protocol']); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "google.protobuf" not in done.stdout.splitlines()[-1]
    assert "'orki_contract'" not in done.stdout.splitlines()[-1]


def test_a_check_imports_neither_templates_nor_grpc() -> None:
    code = "import sys; import orki_codegen.checks._procedures; print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"jinja2", "grpc", "grpc_tools", "google.protobuf.json_format"} & set(done.stdout.split("'"))


def test_rules_and_categories_are_listed() -> None:
    rules = answered("ListRules", "ListRulesResponse", sent=b"").rules
    assert {rule.id: rule.type for rule in rules} == {**dict.fromkeys(LINT, 1), **dict.fromkeys(BREAKING, 2)}
    categories = {each.id for each in answered("ListCategories", "ListCategoriesResponse", sent=b"").categories}
    assert categories == set(CATEGORIES) == {rule.category_ids[0] for rule in rules}
    assert all(rule.default and rule.purpose.endswith(".") for rule in rules)
    assert {category_of(rule.id) for rule in rules} == categories


def test_lists_come_in_pages() -> None:
    token, found = "", []
    for _ in range(50):
        request = WIRE.new(f"{CHECK}.ListRulesRequest", page_size=7, page_token=token)
        answer = answered("ListRules", "ListRulesResponse", request)
        assert len(answer.rules) <= 7
        found += [rule.id for rule in answer.rules]
        token = answer.next_page_token
        if not token:
            break
    assert sorted(found) == sorted({*LINT, *BREAKING})


@pytest.mark.parametrize("seed", range(4))
def test_the_order_of_files_means_nothing(seed: int) -> None:
    answer = answered("Check", "CheckResponse", check_request(lowered(), EVENTS, seed=seed))
    (annotation,) = answer.annotations
    assert annotation.rule_id == "ORKI_STREAM_ENTRIES_LOWERED"
    assert annotation.message == ('stream "audit" keeps fewer entries: 1000000 → 10 [ORKI_STREAM_ENTRIES_LOWERED]')
    assert annotation.file_location.file_name == "orki/events/v1/audit.proto"
    assert annotation.against_file_location.file_name == "orki/events/v1/audit.proto"


def test_only_the_rules_that_are_asked_for_are_checked() -> None:
    asked = check_request(lowered(), EVENTS, "ORKI_STREAM_AGE_LOWERED", "ORKI_STREAM_NAME")
    assert list(answered("Check", "CheckResponse", asked).annotations) == []
    asked = check_request(lowered(), EVENTS, "ORKI_STREAM_ENTRIES_LOWERED")
    assert len(answered("Check", "CheckResponse", asked).annotations) == 1


def test_imported_files_are_not_checked() -> None:
    request = check_request(lowered(), EVENTS)
    for each in request.file_descriptors:
        each.is_import = True
    assert list(answered("Check", "CheckResponse", request).annotations) == []


def test_nothing_to_compare_with_is_no_break() -> None:
    assert list(answered("Check", "CheckResponse", check_request(EVENTS)).annotations) == []


def test_what_makes_no_sense_is_refused_as_an_answer() -> None:
    assert 'no rule "NO_SUCH_RULE"' in answered("Check", "", check_request(EVENTS, b"", "NO_SUCH_RULE")).message
    request = check_request(EVENTS)
    request.options.add(key="depth")
    assert 'no options, but got "depth"' in answered("Check", "", request).message
    request = check_request(EVENTS)
    names = [each.file_descriptor_proto.name for each in request.file_descriptors]
    del request.file_descriptors[names.index("orki/options/v1/options.proto")]
    assert "lacks" in answered("Check", "", request).message
    assert "cannot be read" in answered("Check", "", sent=b"\xff\xff").message
    assert "instead of a" in answered("Check", "", WIRE.new(f"{CHECK}.ListRulesRequest", page_size=1)).message
    request = WIRE.new(f"{CHECK}.ListRulesRequest", page_token="seven")
    assert "is not a page token" in answered("ListRules", "", request).message


@pytest.mark.parametrize("arguments", [(), ("--what",), ("/no.Service/Method",), ("--spec", "--format", "xml")])
def test_a_call_that_is_none_fails(arguments: tuple[str, ...]) -> None:
    done = call(*arguments)
    assert done.returncode == 2
    assert b"usage: orki-checks" in done.stderr
    assert done.stdout == b""


def test_json_as_people_and_other_callers_send_it() -> None:
    sides = {}
    for name, image in (("fileDescriptors", lowered()), ("againstFileDescriptors", EVENTS)):
        schema = Schema(image)
        sides[name] = [
            {"fileDescriptorProto": json_format.MessageToDict(file, descriptor_pool=schema.pool)}
            for file in schema.files.values()
        ]
    value = {"@type": f"type.googleapis.com/{CHECK}.CheckRequest", **sides}
    done = call(f"{SERVICE}/Check", "--format", "json", sent=json.dumps({"value": value}).encode())
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)["value"]
    assert answer["@type"].endswith("CheckResponse")
    assert [each["ruleId"] for each in answer["annotations"]] == ["ORKI_STREAM_ENTRIES_LOWERED"]
    done = call(f"{SERVICE}/ListCategories", "--format", "json")
    assert len(json.loads(done.stdout)["value"]["categories"]) == len(CATEGORIES)
    done = call(f"{SERVICE}/Check", "--format", "json", sent=b"{")
    assert json.loads(done.stdout)["error"]["code"] == "CODE_INVALID_ARGUMENT"


def test_the_wire_has_the_published_numbers() -> None:
    """A request written down byte by byte, by the field numbers that buf publishes."""
    file = b"\x0a\x07a.proto" + b"\x62\x06proto3"
    descriptor = b"\x0a" + bytes((len(file),)) + file + b"\x10\x01"
    raw = b"\x0a" + bytes((len(descriptor),)) + descriptor + b"\x22\x10ORKI_STREAM_NAME"
    request = WIRE.new(f"{CHECK}.CheckRequest")
    request.ParseFromString(raw)
    assert request.file_descriptors[0].file_descriptor_proto.name == "a.proto"
    assert request.file_descriptors[0].is_import
    assert list(request.rule_ids) == ["ORKI_STREAM_NAME"]
