"""Masks the values of sensitive fields in texts about messages: errors, tracebacks and logs.

A handler's exception may quote what it handles. So before the text of an exception leaves the handler's process, each
value of a sensitive field of the handled messages is replaced by `MASK`, also where it is escaped as by `repr`, JSON,
the protobuf text format or a URL, and bytes also in base64 and hex. Numbers and texts of up to three characters are
replaced only as whole words. Booleans and enums are not replaced. A text that contains a transformed value, such as its
hash or its first half, cannot be recognised.
"""

from __future__ import annotations

__all__ = ["MASK", "is_sensitive", "mask", "masked_trace"]

import base64
import functools
import json
import re
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final
from urllib.parse import quote, quote_plus

from google.protobuf import descriptor_pool, message_factory, text_encoding
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

from orki_contract.errors import InvalidContract

_escape: Callable[..., str] = text_encoding.CEscape
MASK: Final = "[redacted]"
"""Replaces a sensitive value."""

_OPTION: Final = 50821
"""Number of the field option `(orki.options.v1.sensitive)`."""
_WORD: Final = 3
"""Texts of up to this many characters are replaced only as whole words."""


def mask(text: str, messages: Iterable[object]) -> str:
    """Return a text without the values of the sensitive fields of messages; objects of other types are ignored."""
    forms: set[str] = set()
    words: set[str] = set()
    for message in messages:
        if isinstance(message, Message):
            for value in _values(message):
                _add_forms(value, forms, words)
    # The longest first: a value may contain another one.
    for form in sorted(forms, key=len, reverse=True):
        text = text.replace(form, MASK)
    if words:
        pattern = "|".join(map(re.escape, sorted(words, key=len, reverse=True)))
        text = re.sub(rf"(?<![\w.])(?:{pattern})(?!\w|\.\d)", MASK, text)
    return text


def masked_trace(error: BaseException, messages: Iterable[object]) -> str | None:
    """Return the traceback of an exception with its causes, masked; None if there is nothing to mask in it."""
    trace = "".join(traceback.format_exception(error))
    masked = mask(trace, messages)
    return masked if masked != trace else None


@functools.cache
def is_sensitive(field: FieldDescriptor) -> bool:
    """Return whether the contract declares a field as sensitive."""
    owner = field.containing_type
    if owner is not None and (owner.full_name, field.name) in _declared(owner.file.package):
        return True
    # Generated code carries no options; classes made from an image do.
    if not field.has_options:
        return False
    options = field.GetOptions()
    for known, value in options.ListFields():
        if known.is_extension and known.number == _OPTION:
            return bool(value)
    unknown = UnknownFieldSet(options)
    return any(unknown[index].field_number == _OPTION and unknown[index].data for index in range(len(unknown)))


@functools.cache
def _declared(package: str) -> frozenset[tuple[str, str]]:
    """Return the sensitive fields of an installed proto package: message and field. None without an image."""
    # Not imported before a handler fails: reading images takes longer to import than this module.
    from orki_contract.images import image_of
    from orki_contract.read import read_image

    try:
        found = read_image(image_of(package)).contract.sensitive
    except InvalidContract:
        return frozenset()
    return frozenset((each.message, each.field) for each in found)


@functools.cache
def _has_sensitive(descriptor: Descriptor) -> bool:
    """Return whether a message may contain a sensitive value at any depth."""
    found, left = {descriptor}, [descriptor]
    while left:
        for field in left.pop().fields:
            inner = field.message_type
            if is_sensitive(field) or (inner is not None and inner.full_name == "google.protobuf.Any"):
                return True
            if inner is not None and inner not in found:
                found.add(inner)
                left.append(inner)
    return descriptor.full_name == "google.protobuf.Any"


def _values(message: Message, inside: bool = False) -> Iterator[object]:
    """Yield the values of the sensitive fields of a message; with `inside`, of all fields."""
    if not inside and not _has_sensitive(message.DESCRIPTOR):
        return
    if message.DESCRIPTOR.full_name == "google.protobuf.Any":
        yield from _packed_values(message, inside)
        return
    for field, value in message.ListFields():
        inner = inside or is_sensitive(field)
        entry = field.message_type
        if entry is not None and entry.GetOptions().map_entry:
            key, of_value = entry.fields_by_name["key"], entry.fields_by_name["value"]
            if inner:
                yield from (each for each in value if key.type != FieldDescriptor.TYPE_BOOL)
            yield from _field_values(of_value, value.values(), inner)
        else:
            one = isinstance(value, str | bytes | int | float | Message)
            yield from _field_values(field, (value,) if one else value, inner)


def _field_values(field: FieldDescriptor, values: Iterable[Any], inside: bool) -> Iterator[object]:
    if field.message_type is not None:
        for each in values:
            yield from _values(each, inside)
    elif inside and field.type not in (FieldDescriptor.TYPE_BOOL, FieldDescriptor.TYPE_ENUM):
        yield from values


def _packed_values(message: Any, inside: bool) -> Iterator[object]:
    """Yield the values in a `google.protobuf.Any`, if its type is known."""
    try:
        name = message.type_url.rpartition("/")[2]
        kind = message_factory.GetMessageClass(descriptor_pool.Default().FindMessageTypeByName(name))
        packed = kind.FromString(message.value)
    except (KeyError, DecodeError):
        if inside:
            yield message.value
        return
    yield from _values(packed, inside)


def _add_forms(value: object, forms: set[str], words: set[str]) -> None:
    found: set[str] = set()
    if isinstance(value, bytes):
        found |= {base64.b64encode(value).decode(), base64.urlsafe_b64encode(value).decode(), value.hex()}
        found |= _escaped(value)
        value = value.decode("utf-8", "backslashreplace")
    if isinstance(value, str):
        plain = {value, value.strip(), *(line.strip() for line in value.splitlines())}
        for each in plain:
            found |= {each, repr(each)[1:-1], ascii(each)[1:-1], json.dumps(each)[1:-1]}
            found |= {quote(_encoded(each)), quote(_encoded(each), safe=""), quote_plus(_encoded(each))}
            found |= {_escape(each, as_utf8=True), *_escaped(_encoded(each))}
    else:
        words |= {str(value), f"{value:,}"}
        return
    for form in found:
        if form:
            (words if len(form) <= _WORD else forms).add(form)


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _escaped(value: bytes) -> set[str]:
    return {repr(value)[2:-1], _escape(value, as_utf8=False)}
