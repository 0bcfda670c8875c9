"""Redaction of generated protos: every kind of field that can contain a secret."""

from __future__ import annotations

import json
from typing import Any

import pytest
from google.protobuf import any_pb2, descriptor_pb2, descriptor_pool, message_factory, struct_pb2
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from orki_contract.model import SensitiveField
from orki_server._observers.redaction import REDACTED, UNKNOWN_FIELDS, Redaction, safe_json, safe_text

SECRET = "xyzzy-canary-7731"
F = descriptor_pb2.FieldDescriptorProto


def _field(name: str, number: int, kind: int, label: int = 1, type_name: str = "", oneof: int | None = None) -> F:
    field = F(name=name, number=number, type=kind, label=label)  # type: ignore[arg-type]
    if type_name:
        field.type_name = type_name
    if oneof is not None:
        field.oneof_index = oneof
    return field


def _file() -> descriptor_pb2.FileDescriptorProto:
    leaf = descriptor_pb2.DescriptorProto(
        name="Leaf",
        field=[_field("token", 1, F.TYPE_STRING), _field("note", 2, F.TYPE_STRING), _field("raw", 3, F.TYPE_BYTES)],
    )
    entry = descriptor_pb2.DescriptorProto(
        name="ByNameEntry",
        field=[_field("key", 1, F.TYPE_STRING), _field("value", 2, F.TYPE_MESSAGE, type_name=".t.Leaf")],
        options=descriptor_pb2.MessageOptions(map_entry=True),
    )
    secrets = descriptor_pb2.DescriptorProto(
        name="SecretsEntry",
        field=[_field("key", 1, F.TYPE_STRING), _field("value", 2, F.TYPE_STRING)],
        options=descriptor_pb2.MessageOptions(map_entry=True),
    )
    tree = descriptor_pb2.DescriptorProto(
        name="Tree",
        field=[
            _field("leaf", 1, F.TYPE_MESSAGE, type_name=".t.Leaf"),
            _field("leaves", 2, F.TYPE_MESSAGE, 3, ".t.Leaf"),
            _field("by_name", 3, F.TYPE_MESSAGE, 3, ".t.Tree.ByNameEntry"),
            _field("secrets", 4, F.TYPE_MESSAGE, 3, ".t.Tree.SecretsEntry"),
            _field("picked", 5, F.TYPE_MESSAGE, type_name=".t.Leaf", oneof=0),
            _field("picked_text", 6, F.TYPE_STRING, oneof=0),
            _field("hidden", 7, F.TYPE_MESSAGE, type_name=".t.Leaf"),
            _field("numbers", 8, F.TYPE_UINT64, 3),
            _field("packed", 9, F.TYPE_MESSAGE, type_name=".google.protobuf.Any"),
            _field("deeper", 10, F.TYPE_MESSAGE, type_name=".t.Tree"),
            _field("free", 11, F.TYPE_MESSAGE, type_name=".google.protobuf.Struct"),
            _field("share", 12, F.TYPE_DOUBLE),
            _field("codes", 13, F.TYPE_INT32, 3),
        ],
        nested_type=[entry, secrets],
        oneof_decl=[descriptor_pb2.OneofDescriptorProto(name="choice")],
    )
    newer = descriptor_pb2.DescriptorProto(name="Newer", field=[_field("added", 200, F.TYPE_STRING)])
    return descriptor_pb2.FileDescriptorProto(
        name="t.proto",
        package="t",
        syntax="proto3",
        dependency=["google/protobuf/any.proto", "google/protobuf/struct.proto"],
        message_type=[leaf, tree, newer],
    )


def _classes() -> dict[str, type[Message]]:
    pool = descriptor_pool.DescriptorPool()
    for module in (any_pb2, struct_pb2):
        pool.AddSerializedFile(module.DESCRIPTOR.serialized_pb)
    pool.AddSerializedFile(_file().SerializeToString())
    return message_factory.GetMessageClassesForFiles(["t.proto"], pool)


CLASSES = _classes()
REDACTION = Redaction(
    [
        SensitiveField(message="t.Leaf", field="token"),
        SensitiveField(message="t.Leaf", field="raw"),
        SensitiveField(message="t.Tree", field="secrets"),
        SensitiveField(message="t.Tree", field="picked_text"),
        SensitiveField(message="t.Tree", field="hidden"),
        SensitiveField(message="t.Tree", field="codes"),
    ],
    CLASSES.get,
)


def _leaf() -> Any:
    return CLASSES["t.Leaf"](token=SECRET, note="seen", raw=SECRET.encode())


def test_a_secret_is_redacted_at_any_depth() -> None:
    tree: Any = CLASSES["t.Tree"](
        leaf=_leaf(), leaves=[_leaf(), _leaf()], hidden=_leaf(), picked=_leaf(), codes=[7, 731]
    )
    tree.by_name["a"].CopyFrom(_leaf())
    tree.secrets["b"] = SECRET
    tree.deeper.deeper.leaf.CopyFrom(_leaf())
    tree.packed.type_url = "type.example/t.Leaf"
    tree.packed.value = _leaf().SerializeToString()
    shown = REDACTION.redacted(tree)
    leaf = {"token": REDACTED, "note": "seen", "raw": REDACTED}
    assert shown == {
        "leaf": leaf,
        "leaves": [leaf, leaf],
        "by_name": {"a": leaf},
        "secrets": REDACTED,
        "picked": leaf,
        "hidden": REDACTED,
        "deeper": {"deeper": {"leaf": leaf}},
        "packed": {"@type": "type.example/t.Leaf", **leaf},
        "codes": REDACTED,
    }
    assert SECRET not in safe_json(shown)


def test_a_oneof_member_is_redacted() -> None:
    assert REDACTION.redacted(CLASSES["t.Tree"](picked_text=SECRET)) == {"picked_text": REDACTED}


def test_unknown_fields_are_shown_by_number_only() -> None:
    newer: Any = CLASSES["t.Newer"](added=SECRET)
    old = CLASSES["t.Leaf"].FromString(newer.SerializeToString() + _leaf().SerializeToString())
    shown = REDACTION.redacted(old)
    assert shown == {"token": REDACTED, "note": "seen", "raw": REDACTED, UNKNOWN_FIELDS: [200]}


@pytest.mark.parametrize("url", ["type.example/t.Nobody", "", "t.Leaf"])
def test_an_undecodable_any_shows_its_size(url: str) -> None:
    value = SECRET.encode()  # no message of any type: 'x' is field 15 with a wire type that does not exist
    tree: Any = CLASSES["t.Tree"]()
    tree.packed.type_url, tree.packed.value = url, value
    shown = REDACTION.redacted(tree)["packed"]
    assert shown == {"@type": url, "value": f"[{len(value)} bytes of an unknown type]"}


def test_values_have_their_json_form() -> None:
    tree: Any = CLASSES["t.Tree"](numbers=[2**64 - 1], share=float("inf"))
    tree.free["k"] = [1, None, {"z": "ü"}]
    assert REDACTION.redacted(tree) == {
        "numbers": ["18446744073709551615"],
        "share": "Infinity",
        "free": {"k": [1.0, None, {"z": "ü"}]},
    }


@given(st.text())
def test_a_line_is_printable_ascii_and_round_trips(text: str) -> None:
    line = safe_json({"text": text})
    assert line.isascii()
    assert line.isprintable()
    assert json.loads(line) == {"text": text}


@given(st.text())
def test_text_for_a_terminal_is_printable(text: str) -> None:
    shown = safe_text(text)
    assert shown.isprintable() or not shown
    assert "\x1b" not in shown
