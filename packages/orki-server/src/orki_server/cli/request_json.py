"""JSON from the command line to a request message, and results back to JSON."""

from __future__ import annotations

__all__ = ["message_json", "request_from_json"]

import json
from typing import Any

from google.protobuf import json_format
from google.protobuf.message import Message

from orki_contract.errors import InvalidArgument


def request_from_json(text: str, kind: type[Message]) -> Message:
    """The message that the JSON says (proto3 JSON mapping; field names as in the proto or in lowerCamelCase).

    Raises:
        InvalidArgument: It is no JSON object, or does not fit the message; the message names place or field.
    """
    name = kind.DESCRIPTOR.full_name
    try:
        value = json.loads(text, object_pairs_hook=_no_repetition)
    except json.JSONDecodeError as error:
        raise InvalidArgument(
            f"the request is no JSON: {error.msg} at line {error.lineno}, column {error.colno}; "
            f"give an object such as {_example(kind)}"
        ) from error
    except RecursionError as error:
        raise InvalidArgument("the request is nested too deeply") from error
    if not isinstance(value, dict):
        raise InvalidArgument(f"the request must be a JSON object such as {_example(kind)}")
    message = kind()
    try:
        json_format.ParseDict(value, message, descriptor_pool=_pool(message))
    except (json_format.ParseError, TypeError, ValueError) as error:
        words = " ".join(str(error).split())
        known = ", ".join(field.name for field in kind.DESCRIPTOR.fields) or "none"
        raise InvalidArgument(f"the request does not fit {name}: {words} (fields: {known})") from error
    return message


def message_json(message: Message) -> dict[str, Any]:
    """The message as JSON, every field of it, names as in the proto."""
    shown: dict[str, Any] = json_format.MessageToDict(
        message,
        preserving_proto_field_name=True,
        always_print_fields_with_no_presence=True,
        descriptor_pool=_pool(message),
    )
    return shown


def _pool(message: Message) -> Any:
    # Where the types inside an Any are looked for; the stubs know two names of the one class.
    return message.DESCRIPTOR.file.pool


def _example(kind: type[Message]) -> str:
    fields = kind.DESCRIPTOR.fields
    return json.dumps({fields[0].name: "…"}, ensure_ascii=False) if fields else "{}"


def _no_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidArgument(f'the request names "{twice}" twice')
    return found
