"""The plugins as protoc and buf call them: bytes in, bytes out, the same whatever the order."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf.compiler.plugin_pb2 import CodeGeneratorRequest, CodeGeneratorResponse
from google.protobuf.descriptor_pb2 import Edition, FileDescriptorProto, FileDescriptorSet

from orki_codegen import plugin, protoc_shim
from orki_codegen._buf import Buf


@pytest.fixture(scope="module")
def request_all(kitchen: Path) -> CodeGeneratorRequest:
    """A request to generate every file of the kitchen."""
    files = FileDescriptorSet.FromString(Buf(kitchen).image()).file
    wanted = [file.name for file in files if file.package.startswith("kitchen.")]
    return CodeGeneratorRequest(proto_file=files, file_to_generate=wanted)


def answer(module: str, request: CodeGeneratorRequest, seed: str) -> bytes:
    """What a plugin's process writes for a request."""
    return subprocess.run(
        [sys.executable, "-m", module],
        input=request.SerializeToString(),
        env={**os.environ, "PYTHONHASHSEED": seed},
        capture_output=True,
        check=True,
    ).stdout


@pytest.mark.parametrize(
    ("module", "parameter"),
    [("orki_codegen.plugin", ""), ("orki_codegen.protoc_shim", "python,grpc_python,mypy_grpc")],
)
def test_order_and_hash_seed_change_nothing(request_all: CodeGeneratorRequest, module: str, parameter: str) -> None:
    request_all = CodeGeneratorRequest.FromString(request_all.SerializeToString())
    request_all.parameter = parameter
    first = answer(module, request_all, "1")
    wanted = list(request_all.file_to_generate)
    random.Random(7).shuffle(wanted)
    request_all.file_to_generate[:] = wanted
    assert answer(module, request_all, "4711") == first
    assert CodeGeneratorResponse.FromString(first).file


def test_the_order_of_files_does_not_matter_to_the_plugin(request_all: CodeGeneratorRequest) -> None:
    files = list(request_all.proto_file)
    random.Random(3).shuffle(files)
    shuffled = CodeGeneratorRequest(proto_file=files, file_to_generate=request_all.file_to_generate)
    assert plugin.respond(shuffled) == plugin.respond(request_all)


def test_only_the_files_asked_for_are_written(request_all: CodeGeneratorRequest) -> None:
    one = CodeGeneratorRequest(proto_file=request_all.proto_file, file_to_generate=["kitchen/v1/my-dashed.proto"])
    assert [file.name for file in plugin.respond(one).file] == ["kitchen/v1/my_dashed_orki.py"]
    one.parameter = "python"
    assert [file.name for file in protoc_shim.respond(one).file] == ["kitchen/v1/my_dashed_pb2.py"]


def test_a_file_without_options_of_ours_becomes_no_module(request_all: CodeGeneratorRequest) -> None:
    one = CodeGeneratorRequest(proto_file=request_all.proto_file, file_to_generate=["kitchen/v1/plain.proto"])
    response = plugin.respond(one)
    assert not response.file
    assert not response.error


@pytest.mark.parametrize("respond", [plugin.respond, protoc_shim.respond])
def test_unknown_parameters_are_refused(request_all: CodeGeneratorRequest, respond: object) -> None:
    request = CodeGeneratorRequest(proto_file=request_all.proto_file, parameter="colour=red")
    assert callable(respond)
    response = respond(request)
    assert 'colour=red"' in response.error
    assert not response.file


@pytest.mark.parametrize("respond", [plugin.respond, protoc_shim.respond])
def test_optional_fields_and_editions_are_announced(request_all: CodeGeneratorRequest, respond: object) -> None:
    assert callable(respond)
    response = respond(CodeGeneratorRequest(proto_file=request_all.proto_file, parameter=""))
    both = CodeGeneratorResponse.FEATURE_PROTO3_OPTIONAL | CodeGeneratorResponse.FEATURE_SUPPORTS_EDITIONS
    assert response.supported_features == both
    assert (response.minimum_edition, response.maximum_edition) == (Edition.EDITION_PROTO2, Edition.EDITION_2023)


def test_violations_come_back_as_an_error_and_no_file(request_all: CodeGeneratorRequest) -> None:
    broken = CodeGeneratorRequest.FromString(request_all.SerializeToString())
    for file in broken.proto_file:
        if file.name == "kitchen/v1/my-dashed.proto":
            file.message_type[0].field[0].name = "lambda"
    response = plugin.respond(broken)
    assert response.error == (
        'kitchen/v1/my-dashed.proto:15:10: field "lambda" of frame kitchen.v1.DashedFrame is a Python keyword: '
        "rename it [ORKI_NAME_KEYWORD]"
    )
    assert not response.file


def test_a_request_that_lacks_an_import_is_an_error(request_all: CodeGeneratorRequest) -> None:
    files = [file for file in request_all.proto_file if file.name != "kitchen/v1/my-dashed.proto"]
    response = plugin.respond(CodeGeneratorRequest(proto_file=files))
    assert response.error.startswith("the image lacks kitchen/v1/my-dashed.proto, which kitchen/v1/sink.proto imports")


def test_the_options_themselves_are_never_generated(request_all: CodeGeneratorRequest) -> None:
    options = CodeGeneratorRequest(proto_file=request_all.proto_file, parameter="python,grpc_python,mypy_grpc")
    options.file_to_generate.append("orki/options/v1/options.proto")
    response = protoc_shim.respond(options)
    assert not response.error
    assert not response.file


def test_public_imports_keep_their_places_when_the_options_go(request_all: CodeGeneratorRequest) -> None:
    """The options stand second of three imports, and the third is public."""
    base = FileDescriptorProto(name="a/v1/a.proto", package="a.v1", syntax="proto3")
    top = FileDescriptorProto(name="a/v1/b.proto", package="a.v1", syntax="proto3")
    top.dependency.extend(["kitchen/v1/plain.proto", "orki/options/v1/options.proto", "a/v1/a.proto"])
    top.public_dependency.append(2)
    request = CodeGeneratorRequest(proto_file=[*request_all.proto_file, base, top], parameter="python")
    request.file_to_generate.append("a/v1/b.proto")
    (file,) = protoc_shim.respond(request).file
    assert "from a.v1.a_pb2 import *" in file.content
    assert "options" not in file.content.replace("_loaded_options", "")
