"""Masking the values of sensitive fields in texts."""

from __future__ import annotations

import base64
import json
from typing import Any
from urllib.parse import quote

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from hypothesis import given
from hypothesis import strategies as st

from orki.events.v1.audit_pb2 import AuditEvent
from orki_contract.masking import MASK, mask, masked_trace

SECRET = 'xyzzy \u00e9 "quoted"\n7731'
_SENSITIVE = bytes((0xA8, 0xE8, 0x18, 1))  # (orki.options.v1.sensitive), field 50821


def _add(message: Any, name: str, number: int, kind: int, type_name: str = "", *, label: int = 1, secret: bool) -> None:
    field = message.field.add(name=name, number=number, type=kind, label=label)
    if type_name:
        field.type_name = type_name
    if secret:
        field.options.MergeFromString(_SENSITIVE)


def _classes() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(name="masking/v1/m.proto", package="masking.v1", syntax="proto3")
    inner = file.message_type.add(name="Inner")
    _add(inner, "password", 1, 9, secret=True)
    _add(inner, "note", 2, 9, secret=False)
    outer = file.message_type.add(name="Outer")
    _add(outer, "token", 1, 9, secret=True)
    _add(outer, "key", 2, 12, secret=True)
    _add(outer, "pin", 3, 5, secret=True)
    _add(outer, "inner", 4, 11, ".masking.v1.Inner", secret=False)
    _add(outer, "inners", 5, 11, ".masking.v1.Inner", label=3, secret=False)
    _add(outer, "hidden", 6, 11, ".masking.v1.Inner", secret=True)
    _add(outer, "by_name", 7, 11, ".masking.v1.Outer.ByNameEntry", label=3, secret=False)
    _add(outer, "names", 8, 9, label=3, secret=True)
    _add(outer, "title", 9, 9, secret=False)
    entry = outer.nested_type.add(name="ByNameEntry")
    entry.options.map_entry = True
    _add(entry, "key", 1, 9, secret=False)
    _add(entry, "value", 2, 11, ".masking.v1.Inner", secret=False)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    names = ("Inner", "Outer")
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"masking.v1.{name}")) for name in names}


CLASSES = _classes()
Inner, Outer = CLASSES["Inner"], CLASSES["Outer"]


@pytest.mark.parametrize(
    "message",
    [
        Outer(token=SECRET),
        Outer(key=SECRET.encode()),
        Outer(names=["other", SECRET]),
        Outer(inner=Inner(password=SECRET)),
        Outer(inners=[Inner(note="n"), Inner(password=SECRET)]),
        Outer(hidden=Inner(note=SECRET)),
        Outer(by_name={"k": Inner(password=SECRET)}),
    ],
    ids=lambda message: message.ListFields()[0][0].name,
)
def test_every_form_of_a_value_is_masked_at_every_depth(message: Any) -> None:
    forms = {
        SECRET,
        repr(SECRET),
        ascii(SECRET),
        json.dumps(SECRET),
        quote(SECRET),
        quote(SECRET, safe=""),
        repr(SECRET.encode()),
        repr(message),
        str(message),
        text_format.MessageToString(message, as_utf8=True),
        f"one line: {SECRET.splitlines()[0]}",
    }
    if message.key:
        forms |= {base64.b64encode(message.key).decode(), message.key.hex()}
    for form in forms:
        masked = mask(f"before {form} after", [message])
        assert "xyzzy" not in masked, form
        assert base64.b64encode(SECRET.encode()).decode() not in masked
        assert SECRET.encode().hex() not in masked
        assert masked.startswith("before ")
        assert masked.endswith(" after")


def test_what_is_not_sensitive_stays() -> None:
    message = Outer(title="a title", inner=Inner(note="a note"), token="t0k3n", pin=7)
    text = "a title, a note, 17 of 70 or 7.5, but not t0k3n and 7"
    assert mask(text, [message, object(), b"bytes"]) == f"a title, a note, 17 of 70 or 7.5, but not {MASK} and {MASK}"
    assert mask(text, []) == text
    assert mask(text, [Outer()]) == text


def test_generated_messages_are_masked_by_their_contract() -> None:
    assert mask("audit says t0k3n", [AuditEvent(detail="t0k3n", actor="audit")]) == f"audit says {MASK}"


def test_short_values_are_masked_as_words() -> None:
    assert mask("ab, cab, (ab)", [Outer(token="ab")]) == f"{MASK}, cab, ({MASK})"


def test_a_value_inside_another_one_is_masked_with_it() -> None:
    assert mask("secret-and-more", [Outer(names=["secret", "secret-and-more"])]) == MASK


def test_a_traceback_is_masked_with_its_causes_notes_and_groups() -> None:
    def failing() -> None:
        try:
            raise KeyError(SECRET)
        except KeyError as error:
            error.add_note(f"note {SECRET}")
            raise ExceptionGroup("several", [ValueError(f"bad {SECRET}"), OSError(SECRET)]) from error

    message = Outer(token=SECRET)
    with pytest.raises(ExceptionGroup) as raised:
        failing()
    trace = masked_trace(raised.value, [message])
    assert trace is not None
    assert "xyzzy" not in trace
    assert "7731" not in trace
    assert MASK in trace
    assert "def failing" not in trace
    assert "in failing" in trace
    assert masked_trace(ValueError("harmless"), [message]) is None


@given(st.text(min_size=4).filter(lambda text: len(text.strip()) > 3), st.text(), st.text())
def test_any_text_is_masked_in_its_usual_forms(secret: str, before: str, after: str) -> None:
    message = Outer(token=secret)
    for form in (secret, repr(secret), json.dumps(secret)):
        assert secret not in mask(f"{before}{form}{after}", [message]) or secret in MASK
