"""The procedures of a check plugin: rules, categories, and the check itself."""

from __future__ import annotations

__all__ = ["respond"]

from collections.abc import Callable, Mapping
from typing import Any, Final

from google.protobuf.message import DecodeError

from orki_codegen.checks.check import Refused, check
from orki_codegen.checks.rulebook import BREAKING, CATEGORIES, LINT, category_of
from orki_codegen.checks.wire import CHECK, RPC, Wire
from orki_contract.errors import InvalidContract

_LINT_TYPE, _BREAKING_TYPE = 1, 2
_INVALID_ARGUMENT: Final = 3


def respond(procedure: str, sent: bytes, *, as_json: bool) -> bytes:
    """The response to one request, or the error in its place.

    Args:
        procedure: Its path.
        sent: The request; nothing at all stands for an empty one.
        as_json: Whether request and response are JSON.

    Raises:
        KeyError: There is no such procedure.
    """
    wire = Wire()
    response = wire.new(f"{RPC}.Response")
    name, answer = _PROCEDURES[procedure]
    try:
        response.value.CopyFrom(wire.packed(answer(wire, _request(wire, name, sent, as_json=as_json))))
    except (Refused, InvalidContract) as error:
        response.error.code = _INVALID_ARGUMENT
        response.error.message = str(error)
    if not as_json:
        return bytes(response.SerializeToString())
    # Not before it is needed: buf speaks binary, and starts this process again and again.
    from orki_codegen.checks.json_form import to_json

    return to_json(wire, response)


def _request(wire: Wire, name: str, sent: bytes, *, as_json: bool) -> Any:
    """The request's value."""
    try:
        if as_json:
            from orki_codegen.checks.json_form import from_json

            url, value = from_json(wire, name, sent)
        else:
            request = wire.new(f"{RPC}.Request")
            request.ParseFromString(sent)
            url, value = request.value.type_url or name, request.value.value
        if url.rpartition("/")[2] != name:
            raise Refused(f"the request is a {url.rpartition('/')[2]}, and {name} is asked for")
        parsed = wire.new(name)
        parsed.ParseFromString(value)
    except (DecodeError, ValueError) as error:
        raise Refused(f"the request cannot be read: {error}") from error
    return parsed


def _check(wire: Wire, request: Any) -> Any:
    return wire.new(f"{CHECK}.CheckResponse", annotations=list(check(wire, request)))


def _rules(wire: Wire, request: Any) -> Any:
    rules = [
        wire.new(f"{CHECK}.Rule", id=rule, category_ids=[category_of(rule)], default=True, purpose=purpose, type=kind)
        for known, kind in ((LINT, _LINT_TYPE), (BREAKING, _BREAKING_TYPE))
        for rule, purpose in sorted(known.items())
    ]
    shown, behind = _page(rules, request)
    return wire.new(f"{CHECK}.ListRulesResponse", rules=shown, next_page_token=behind)


def _categories(wire: Wire, request: Any) -> Any:
    found = [wire.new(f"{CHECK}.Category", id=name, purpose=purpose) for name, purpose in sorted(CATEGORIES.items())]
    shown, behind = _page(found, request)
    return wire.new(f"{CHECK}.ListCategoriesResponse", categories=shown, next_page_token=behind)


def _page(entries: list[Any], request: Any) -> tuple[list[Any], str]:
    """One page of a list, and the token of the next one; a token is the number of entries before it."""
    token = request.page_token or "0"
    if not token.isdecimal() or int(token) > len(entries):
        raise Refused(f'"{token}" is no page of this list')
    start, size = int(token), request.page_size or 250
    behind = start + size
    return entries[start:behind], str(behind) if behind < len(entries) else ""


_PROCEDURES: Final[Mapping[str, tuple[str, Callable[[Wire, Any], Any]]]] = {
    f"/{CHECK}.CheckService/Check": (f"{CHECK}.CheckRequest", _check),
    f"/{CHECK}.CheckService/ListRules": (f"{CHECK}.ListRulesRequest", _rules),
    f"/{CHECK}.CheckService/ListCategories": (f"{CHECK}.ListCategoriesRequest", _categories),
}
