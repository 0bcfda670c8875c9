"""protoc's own Python generators as one plugin of the protoc protocol, for buf: `python -m orki_codegen.protoc_shim`.

gRPC has no such plugin. The shim also removes the options of orki, which are not used at run time, and task and tool
services, which need no gRPC stubs. The plugin's parameter lists the generators to run: `python`, `grpc_python`,
`mypy_grpc`.
"""

from __future__ import annotations

__all__ = ["main", "respond"]

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

from google.protobuf.compiler.plugin_pb2 import CodeGeneratorRequest, CodeGeneratorResponse
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet, SourceCodeInfo
from google.protobuf.message import Message
from grpc_tools import protoc

from orki_codegen.plugin import empty_response, serve
from orki_contract.descriptors import OPTIONS_PACKAGE, Schema
from orki_contract.errors import OrkiError
from orki_contract.read import read_schema

_SERVICE: Final = 6  # field number of FileDescriptorProto.service, with which source paths begin


def main() -> None:
    """Read a request from standard input and write the response."""
    serve(respond)


def respond(request: CodeGeneratorRequest) -> CodeGeneratorResponse:
    """Return the generated files sorted by name, or the error."""
    response = empty_response()
    generators = request.parameter.split(",")
    unknown = [name for name in generators if name not in _GENERATORS]
    if unknown:
        response.error = f'unknown generator "{unknown[0]}" in the parameter: give some of {", ".join(_GENERATORS)}'
        return response
    schema = Schema.of_files(request.proto_file)
    found: dict[str, str] = {}
    try:
        for name in generators:
            found.update(_GENERATORS[name](request, schema))
    except OrkiError as error:
        response.error = error.message
        return response
    for name in sorted(found):
        response.file.add(name=name, content=found[name])
    return response


def _python(request: CodeGeneratorRequest, schema: Schema) -> dict[str, str]:
    wanted = [name for name in request.file_to_generate if not _is_options(schema, name)]
    return _protoc("python", _without_options(request, schema), wanted)


def _grpc_python(request: CodeGeneratorRequest, schema: Schema) -> dict[str, str]:
    return _protoc("grpc_python", *_plain_grpc(request, schema))


def _mypy_grpc(request: CodeGeneratorRequest, schema: Schema) -> dict[str, str]:
    files, wanted = _plain_grpc(request, schema)
    if not wanted:
        return {}
    inner = CodeGeneratorRequest(parameter="only_async,readable_stubs,quiet", file_to_generate=wanted)
    inner.proto_file.extend(files)
    program = shutil.which("protoc-gen-mypy_grpc", path=str(Path(sys.executable).parent)) or "protoc-gen-mypy_grpc"
    ran = subprocess.run([program], input=inner.SerializeToString(), capture_output=True, check=False)
    if ran.returncode != 0:
        raise OrkiError(f"protoc-gen-mypy_grpc failed: {ran.stderr.decode(errors='replace').strip()}")
    answer = CodeGeneratorResponse.FromString(ran.stdout)
    if answer.error:
        raise OrkiError(f"protoc-gen-mypy_grpc: {answer.error}")
    return {file.name: file.content for file in answer.file}


_GENERATORS: Final[dict[str, Callable[[CodeGeneratorRequest, Schema], dict[str, str]]]] = {
    "python": _python,
    "grpc_python": _grpc_python,
    "mypy_grpc": _mypy_grpc,
}


def _plain_grpc(request: CodeGeneratorRequest, schema: Schema) -> tuple[list[FileDescriptorProto], list[str]]:
    """Return the files with their plain services only, and the names of the files to generate."""
    plain = frozenset(name for file in read_schema(schema).files for name in file.plain_services)
    files = [_only_services(file, plain) for file in _without_options(request, schema)]
    return files, sorted({file.name for file in files if file.service}.intersection(request.file_to_generate))


def _protoc(generator: str, files: list[FileDescriptorProto], wanted: Iterable[str]) -> dict[str, str]:
    """Run one generator of protoc."""
    names = sorted(wanted)
    if not names:
        return {}
    with tempfile.TemporaryDirectory(prefix="orki-protoc-") as folder:
        image = Path(folder, "image.binpb")
        image.write_bytes(FileDescriptorSet(file=files).SerializeToString())
        out = Path(folder, "out")
        out.mkdir()
        arguments = ["protoc", f"--descriptor_set_in={image}", f"--{generator}_out={out}", *names]
        if (code := protoc.main(arguments)) != 0:
            raise OrkiError(f"protoc's generator {generator} failed with exit code {code}; see its output above")
        written = (path for path in out.rglob("*") if path.is_file())
        return {path.relative_to(out).as_posix(): path.read_text("utf-8") for path in written}


def _without_options(request: CodeGeneratorRequest, schema: Schema) -> list[FileDescriptorProto]:
    """Return the files without orki options and imports of them, in the order of the request: imports first."""
    return [_stripped(schema, file.name) for file in request.proto_file if not _is_options(schema, file.name)]


def _stripped(schema: Schema, name: str) -> FileDescriptorProto:
    # A copy of the class of the schema, which knows the options.
    known = type(schema.files[name])()
    known.CopyFrom(schema.files[name])
    _clear_options(known)
    plain = FileDescriptorProto.FromString(known.SerializeToString())
    removed = [index for index, each in enumerate(known.dependency) if _is_options(schema, each)]
    plain.dependency[:] = [each for index, each in enumerate(known.dependency) if index not in removed]
    for indexes in (plain.public_dependency, plain.weak_dependency):
        indexes[:] = [each - sum(index < each for index in removed) for each in indexes if each not in removed]
    return plain


def _is_options(schema: Schema, name: str) -> bool:
    return schema.files[name].package == OPTIONS_PACKAGE


def _clear_options(message: Message) -> None:
    """Remove the orki options from a descriptor and its children, and empty options messages."""
    found: list[tuple[Any, Any]] = list(message.ListFields())
    for field, value in found:
        if field.is_extension:
            if field.file.package == OPTIONS_PACKAGE:
                message.ClearExtension(field)
        elif field.message_type is not None and field.name != "source_code_info":
            for each in [value] if isinstance(value, Message) else value:
                _clear_options(each)
            if field.name == "options" and isinstance(value, Message) and not value.ByteSize():
                message.ClearField(field.name)


def _only_services(file: FileDescriptorProto, kept: frozenset[str]) -> FileDescriptorProto:
    """Return the file with only some services and their comments."""
    prefix = f"{file.package}." if file.package else ""
    indexes = [index for index, service in enumerate(file.service) if prefix + service.name in kept]
    if len(indexes) == len(file.service):
        return file
    cut = FileDescriptorProto()
    cut.CopyFrom(file)
    cut.ClearField("service")
    cut.service.extend(file.service[index] for index in indexes)
    cut.source_code_info.ClearField("location")
    for location in file.source_code_info.location:
        moved = SourceCodeInfo.Location()
        moved.CopyFrom(location)
        if len(moved.path) > 1 and moved.path[0] == _SERVICE:
            if moved.path[1] not in indexes:
                continue
            moved.path[1] = indexes.index(moved.path[1])
        cut.source_code_info.location.append(moved)
    return cut


if __name__ == "__main__":
    main()
