"""`protoc-gen-orki`: the generator as a plugin of protoc and buf; it reads one request and writes one response."""

from __future__ import annotations

__all__ = ["main", "respond"]

import sys
from collections.abc import Sequence

from google.protobuf.compiler.plugin_pb2 import CodeGeneratorRequest, CodeGeneratorResponse
from google.protobuf.descriptor_pb2 import Edition

from orki_codegen.module import build
from orki_codegen.render import render
from orki_contract.descriptors import Schema
from orki_contract.errors import OrkiError
from orki_contract.read import ReadContract, read_schema
from orki_contract.validate import check


def main() -> None:
    """Answers one request on standard input."""
    request = CodeGeneratorRequest.FromString(sys.stdin.buffer.read())
    sys.stdout.buffer.write(respond(request).SerializeToString())


def respond(request: CodeGeneratorRequest) -> CodeGeneratorResponse:
    """The modules of the files to generate, sorted by name; or all that is wrong with them, and no file."""
    response = CodeGeneratorResponse(
        supported_features=CodeGeneratorResponse.FEATURE_PROTO3_OPTIONAL
        | CodeGeneratorResponse.FEATURE_SUPPORTS_EDITIONS,
        minimum_edition=Edition.EDITION_PROTO2,
        maximum_edition=Edition.EDITION_2023,
    )
    if request.parameter:
        response.error = f'protoc-gen-orki knows no option "{request.parameter}": it has none'
        return response
    try:
        read = read_schema(Schema.of_files(request.proto_file))
        check(read)
    except OrkiError as error:
        response.error = error.message
        return response
    for name, content in modules(read, request.file_to_generate):
        response.file.add(name=name, content=content)
    return response


def modules(read: ReadContract, paths: Sequence[str]) -> list[tuple[str, str]]:
    """Path and text of each module that the files of these paths become, sorted."""
    wanted = frozenset(paths)
    built = [build(read, file) for file in read.files if file.path in wanted and not file.empty]
    return sorted((module.path, render(module)) for module in built)


if __name__ == "__main__":
    main()
