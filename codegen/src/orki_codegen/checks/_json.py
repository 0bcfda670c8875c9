"""Requests and responses as JSON, for calls by hand and callers other than buf.

Imported only for `--format json`, since buf uses the binary form and starts the plugin often.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from google.protobuf import json_format
from google.protobuf.descriptor_pb2 import FileDescriptorProto

from orki_codegen.checks._messages import Messages
from orki_contract.descriptors import OPTIONS_PACKAGE

# The import of the options file.
_IMPORTED = "google/protobuf/duration.proto"
_SIDES = ("fileDescriptors", "againstFileDescriptors", "file_descriptors", "against_file_descriptors")


def to_json(messages: Messages, message: Any) -> bytes:
    """Return a message as JSON with a trailing newline."""
    return (json_format.MessageToJson(message, descriptor_pool=messages.pool) + "\n").encode()


def from_json(messages: Messages, name: str, sent: bytes) -> tuple[str, bytes]:
    """Return the type and the binary value of a `pluginrpc.v1.Request` in JSON; both are empty for empty input.

    Each side of a check is read with its own options.

    Raises:
        ValueError: The JSON is invalid.
    """
    if not sent.strip():
        return name, b""
    try:
        value: dict[str, Any] = dict(json.loads(sent).get("value") or {})
        url = str(value.pop("@type", name))
        parts = [_binary(messages, name, {key: each for key, each in value.items() if key not in _SIDES})]
        for side in _SIDES:
            if side in value:
                parts.append(_binary(Messages(_options(value[side])), name, {side: value[side]}))
    except (json_format.Error, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    # Repeated fields of concatenated messages are read as one list.
    return url, b"".join(parts)


def _options(side: list[Mapping[str, Any]]) -> list[FileDescriptorProto]:
    files = [each.get("fileDescriptorProto") or each["file_descriptor_proto"] for each in side]
    known = [file for file in files if file["name"] == _IMPORTED or file.get("package") == OPTIONS_PACKAGE]
    known.sort(key=lambda file: bool(file["name"] != _IMPORTED))
    return [json_format.ParseDict(file, FileDescriptorProto(), ignore_unknown_fields=True) for file in known]


def _binary(messages: Messages, name: str, value: Mapping[str, Any]) -> bytes:
    message = messages.new(name)
    json_format.ParseDict(dict(value), message, ignore_unknown_fields=True, descriptor_pool=messages.pool)
    return bytes(message.SerializeToString())
