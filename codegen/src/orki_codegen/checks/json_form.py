"""Requests and responses as JSON: for people who call the plugin by hand, and for callers other than buf."""

from __future__ import annotations

__all__ = ["from_json", "to_json"]

import json
from collections.abc import Mapping
from typing import Any

from google.protobuf import json_format
from google.protobuf.descriptor_pb2 import FileDescriptorProto

from orki_codegen.checks.wire import Wire
from orki_contract.descriptors import OPTIONS_PACKAGE

# What the options import, and so what their own file needs in a pool.
_IMPORTED = "google/protobuf/duration.proto"
_SIDES = ("fileDescriptors", "againstFileDescriptors", "file_descriptors", "against_file_descriptors")


def to_json(wire: Wire, message: Any) -> bytes:
    """A message as JSON, with a newline at the end."""
    return (json_format.MessageToJson(message, descriptor_pool=wire.pool) + "\n").encode()


def from_json(wire: Wire, name: str, sent: bytes) -> tuple[str, bytes]:
    """The type and the binary form of what a `pluginrpc.v1.Request` in JSON holds; nothing at all holds nothing.

    Each side of a check brings its own options, by whose names its files speak of them.

    Raises:
        ValueError: It cannot be read.
    """
    if not sent.strip():
        return name, b""
    try:
        value: dict[str, Any] = dict(json.loads(sent).get("value") or {})
        url = str(value.pop("@type", name))
        parts = [_binary(wire, name, {key: each for key, each in value.items() if key not in _SIDES})]
        for side in _SIDES:
            if side in value:
                parts.append(_binary(Wire(_options(value[side])), name, {side: value[side]}))
    except (json_format.Error, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    # Repeated fields of concatenated messages are read as one list.
    return url, b"".join(parts)


def _options(side: list[Mapping[str, Any]]) -> list[FileDescriptorProto]:
    files = [each.get("fileDescriptorProto") or each["file_descriptor_proto"] for each in side]
    known = [file for file in files if file["name"] == _IMPORTED or file.get("package") == OPTIONS_PACKAGE]
    known.sort(key=lambda file: bool(file["name"] != _IMPORTED))
    return [json_format.ParseDict(file, FileDescriptorProto(), ignore_unknown_fields=True) for file in known]


def _binary(wire: Wire, name: str, value: Mapping[str, Any]) -> bytes:
    message = wire.new(name)
    json_format.ParseDict(dict(value), message, ignore_unknown_fields=True, descriptor_pool=wire.pool)
    return bytes(message.SerializeToString())
