"""The messages of PluginRPC and of buf check plugins, in a descriptor pool of their own.

The messages are defined here by field numbers, as in the packages `pluginrpc.v1` and
`buf.plugin.{check,descriptor,option}.v1`, without their validation options. Generated code would depend on the protobuf
runtime.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from google.protobuf import any_pb2, descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto

RPC: Final = "pluginrpc.v1"
CHECK: Final = "buf.plugin.check.v1"
_DESCRIPTOR: Final = "buf.plugin.descriptor.v1"
_OPTION: Final = "buf.plugin.option.v1"

_ENUMS: Final[Mapping[str, tuple[str, ...]]] = {
    f"{RPC}.Code": (
        "UNSPECIFIED",
        "CANCELED",
        "UNKNOWN",
        "INVALID_ARGUMENT",
        "DEADLINE_EXCEEDED",
        "NOT_FOUND",
        "ALREADY_EXISTS",
        "PERMISSION_DENIED",
        "RESOURCE_EXHAUSTED",
        "FAILED_PRECONDITION",
        "ABORTED",
        "OUT_OF_RANGE",
        "UNIMPLEMENTED",
        "INTERNAL",
        "UNAVAILABLE",
        "DATA_LOSS",
        "UNAUTHENTICATED",
    ),
    f"{CHECK}.RuleType": ("UNSPECIFIED", "LINT", "BREAKING"),
}

# The fields of each message: name, number and type; `*` marks a repeated field.
_MESSAGES: Final[Mapping[str, tuple[tuple[str, int, str], ...]]] = {
    f"{RPC}.Procedure": (("path", 1, "string"), ("args", 2, "string*")),
    f"{RPC}.Spec": (("procedures", 1, f"{RPC}.Procedure*"),),
    f"{RPC}.Request": (("value", 1, "google.protobuf.Any"),),
    f"{RPC}.Response": (("value", 1, "google.protobuf.Any"), ("error", 2, f"{RPC}.Error")),
    f"{RPC}.Error": (("code", 1, f"{RPC}.Code"), ("message", 2, "string")),
    f"{_DESCRIPTOR}.FileDescriptor": (
        ("file_descriptor_proto", 1, "google.protobuf.FileDescriptorProto"),
        ("is_import", 2, "bool"),
        ("is_syntax_unspecified", 3, "bool"),
        ("unused_dependency", 4, "int32*"),
    ),
    f"{_DESCRIPTOR}.FileLocation": (("file_name", 1, "string"), ("source_path", 2, "int32*")),
    f"{_OPTION}.Option": (("key", 1, "string"),),
    f"{CHECK}.CheckRequest": (
        ("file_descriptors", 1, f"{_DESCRIPTOR}.FileDescriptor*"),
        ("against_file_descriptors", 2, f"{_DESCRIPTOR}.FileDescriptor*"),
        ("options", 3, f"{_OPTION}.Option*"),
        ("rule_ids", 4, "string*"),
    ),
    f"{CHECK}.CheckResponse": (("annotations", 1, f"{CHECK}.Annotation*"),),
    f"{CHECK}.Annotation": (
        ("rule_id", 1, "string"),
        ("message", 2, "string"),
        ("file_location", 3, f"{_DESCRIPTOR}.FileLocation"),
        ("against_file_location", 4, f"{_DESCRIPTOR}.FileLocation"),
    ),
    f"{CHECK}.ListRulesRequest": (("page_size", 1, "uint32"), ("page_token", 2, "string")),
    f"{CHECK}.ListRulesResponse": (("next_page_token", 1, "string"), ("rules", 2, f"{CHECK}.Rule*")),
    f"{CHECK}.ListCategoriesRequest": (("page_size", 1, "uint32"), ("page_token", 2, "string")),
    f"{CHECK}.ListCategoriesResponse": (("next_page_token", 1, "string"), ("categories", 2, f"{CHECK}.Category*")),
    f"{CHECK}.Rule": (
        ("id", 1, "string"),
        ("category_ids", 2, "string*"),
        ("default", 3, "bool"),
        ("purpose", 4, "string"),
        ("type", 5, f"{CHECK}.RuleType"),
        ("deprecated", 6, "bool"),
        ("replacement_ids", 7, "string*"),
    ),
    f"{CHECK}.Category": (
        ("id", 1, "string"),
        ("purpose", 2, "string"),
        ("deprecated", 3, "bool"),
        ("replacement_ids", 4, "string*"),
    ),
}

_SCALARS: Final = {
    "bool": FieldDescriptorProto.TYPE_BOOL,
    "int32": FieldDescriptorProto.TYPE_INT32,
    "string": FieldDescriptorProto.TYPE_STRING,
    "uint32": FieldDescriptorProto.TYPE_UINT32,
}


class Messages:
    """Creates messages by name, from a descriptor pool of its own."""

    def __init__(self, known: Iterable[FileDescriptorProto] = ()) -> None:
        """Build the pool; `known` are files whose extensions JSON may contain."""
        self.pool = descriptor_pool.DescriptorPool()
        for module in (descriptor_pb2, any_pb2):
            self.pool.AddSerializedFile(module.DESCRIPTOR.serialized_pb)
        for file in (*known, *_files()):
            self.pool.AddSerializedFile(file.SerializeToString())

    def new(self, name: str, **fields: Any) -> Any:
        """Return a new message of a type."""
        return message_factory.GetMessageClass(self.pool.FindMessageTypeByName(name))(**fields)

    def packed(self, message: Any) -> Any:
        """Return an Any that contains the message."""
        url = f"type.googleapis.com/{message.DESCRIPTOR.full_name}"
        return self.new("google.protobuf.Any", type_url=url, value=message.SerializeToString())


def _files() -> list[FileDescriptorProto]:
    # Imported files first.
    return [
        _file(RPC, "google/protobuf/any.proto"),
        _file(_DESCRIPTOR, "google/protobuf/descriptor.proto"),
        _file(_OPTION),
        _file(CHECK, _path(_DESCRIPTOR), _path(_OPTION)),
    ]


def _path(package: str) -> str:
    return f"{package.replace('.', '/')}/all.proto"


def _file(package: str, *imports: str) -> FileDescriptorProto:
    file = FileDescriptorProto(name=_path(package), package=package, syntax="proto3", dependency=imports)
    for name, values in _ENUMS.items():
        if name.rpartition(".")[0] == package:
            enum = file.enum_type.add(name=name.rpartition(".")[2])
            prefix = {"Code": "CODE", "RuleType": "RULE_TYPE"}[enum.name]
            for number, value in enumerate(values):
                enum.value.add(name=f"{prefix}_{value}", number=number)
    for name, fields in _MESSAGES.items():
        if name.rpartition(".")[0] == package:
            message = file.message_type.add(name=name.rpartition(".")[2])
            for field, number, kind in fields:
                message.field.append(_field(field, number, kind))
    return file


def _field(name: str, number: int, kind: str) -> FieldDescriptorProto:
    label = FieldDescriptorProto.LABEL_REPEATED if kind.endswith("*") else FieldDescriptorProto.LABEL_OPTIONAL
    kind = kind.removesuffix("*")
    field = FieldDescriptorProto(name=name, number=number, label=label)
    if kind in _SCALARS:
        field.type = _SCALARS[kind]
    else:
        field.type_name = f".{kind}"
        field.type = FieldDescriptorProto.TYPE_ENUM if kind in _ENUMS else FieldDescriptorProto.TYPE_MESSAGE
    return field
