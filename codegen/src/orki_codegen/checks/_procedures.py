"""The procedures of the check plugin: the check, the rules and the categories."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

from google.protobuf.message import DecodeError

from orki_codegen.checks._messages import CHECK, RPC, Messages
from orki_contract.descriptors import Location, Schema
from orki_contract.errors import InvalidContract
from orki_contract.findings import CATEGORIES as FINDING_CATEGORIES
from orki_contract.findings import RULES as FINDING_RULES
from orki_contract.findings import Bump, Category, findings
from orki_contract.read import ReadContract, read_schema
from orki_contract.validate import OWNER_RULES, RULES, validate

LINT: Final[Mapping[str, str]] = {rule: purpose for rule, purpose in RULES.items() if rule not in OWNER_RULES}
"""Purposes of the rules of `buf lint`, by id. Only the generator knows owners, so it alone checks their rules."""

BREAKING: Final[Mapping[str, str]] = {
    rule.id: rule.purpose for rule in FINDING_RULES.values() if rule.bump is Bump.MAJOR
}
"""Purposes of the rules of `buf breaking`, by id. Additions break nothing; `orki-contract diff` reports them."""

CATEGORIES: Final[Mapping[str, str]] = {category.value: purpose for category, purpose in FINDING_CATEGORIES.items()}
"""Purposes of the categories, by id; each contains lint and breaking rules."""

# Categories by the second part of a lint rule's id.
_LINT_CATEGORIES: Final = {
    "DURATION": Category.OPTION,
    "FRAME": Category.FRAME,
    "GROUP": Category.STREAM,
    "MESSAGE": Category.MESSAGE,
    "METHOD": Category.SERVICE,
    "NAME": Category.NAME,
    "PACKAGE": Category.NAME,
    "SERVICE": Category.SERVICE,
    "STREAM": Category.STREAM,
    "SUBSCRIPTION": Category.STREAM,
    "TASK": Category.TASK,
    "TOOL": Category.TOOL,
}


def category_of(rule: str) -> str:
    """Return the category of a rule.

    Raises:
        KeyError: The rule is unknown or has no category.
    """
    known = FINDING_RULES.get(rule)
    return str(known.category if known is not None else _LINT_CATEGORIES[rule.split("_")[1]])


class Refused(Exception):
    """The request is invalid."""


class _Side:
    """The files of one side of a check, in any order."""

    def __init__(self, messages: Messages, descriptors: Iterable[Any]) -> None:
        self._wire = messages
        self._files = {each.file_descriptor_proto.name: each for each in descriptors}
        files = [each.file_descriptor_proto for each in self._files.values()]
        image = messages.new("google.protobuf.FileDescriptorSet", file=files)
        self.read: ReadContract = read_schema(Schema(image.SerializeToString()))

    def is_checked(self, location: Location) -> bool:
        """Return whether the location's file is to be checked, not only imported."""
        file = self._files.get(location.file)
        return file is not None and not file.is_import

    def holds(self, path: str) -> bool:
        """Return whether the side contains the file."""
        return path in self._files

    def file_location(self, location: Location) -> Any:
        """Return the FileLocation, with the source path of the element at the location."""
        found = self._wire.new("buf.plugin.descriptor.v1.FileLocation", file_name=location.file)
        known = self._files.get(location.file)
        for each in known.file_descriptor_proto.source_code_info.location if known is not None else ():
            if each.path and list(each.span[:2]) == [location.line - 1, location.column - 1]:
                found.source_path.extend(each.path)
                break
        return found


def check(messages: Messages, request: Any) -> Iterator[Any]:
    """Yield the annotations of a CheckRequest.

    Raises:
        Refused: The request has an unknown rule or an option.
        orki_contract.errors.InvalidContract: The files of a side are incomplete.
    """
    for option in request.options:
        raise Refused(f'orki-checks has no options, but got "{option.key}"')
    wanted = frozenset(request.rule_ids)
    for rule in sorted(wanted - LINT.keys() - BREAKING.keys()):
        raise Refused(f'orki-checks has no rule "{rule}"')
    new = _Side(messages, request.file_descriptors)
    if not wanted or wanted & LINT.keys():
        yield from _lint(messages, new, wanted)
    if request.against_file_descriptors and (not wanted or wanted & BREAKING.keys()):
        yield from _breaking(messages, _Side(messages, request.against_file_descriptors), new, wanted)


def _lint(messages: Messages, side: _Side, wanted: frozenset[str]) -> Iterator[Any]:
    for violation in validate(side.read):
        if (not wanted or violation.rule in wanted) and side.is_checked(violation.location):
            yield messages.new(
                f"{CHECK}.Annotation",
                rule_id=violation.rule,
                message=f"{violation.message} [{violation.rule}]",
                file_location=side.file_location(violation.location),
            )


def _breaking(messages: Messages, old: _Side, new: _Side, wanted: frozenset[str]) -> Iterator[Any]:
    for finding in findings(old.read, new.read):
        if finding.rule not in (wanted or BREAKING.keys()):
            continue
        if not (old if finding.gone else new).is_checked(finding.location):
            continue
        annotation = messages.new(f"{CHECK}.Annotation", rule_id=finding.rule)
        annotation.message = f"{finding.message} [{finding.rule}]"
        if finding.gone and finding.location.line:
            annotation.message = f"{finding.message}, formerly at {finding.location} [{finding.rule}]"
        if not finding.gone:
            annotation.file_location.CopyFrom(new.file_location(finding.location))
        elif new.holds(finding.location.file):
            annotation.file_location.CopyFrom(new.file_location(Location(finding.location.file)))
        if finding.before.file:
            annotation.against_file_location.CopyFrom(old.file_location(finding.before))
        yield annotation


_LINT_TYPE, _BREAKING_TYPE = 1, 2
_INVALID_ARGUMENT: Final = 3


def respond(procedure: str, sent: bytes, *, as_json: bool) -> bytes:
    """Return the response of a procedure, given by its path, to a request, or the error.

    Empty bytes are an empty request.

    Raises:
        KeyError: The procedure is unknown.
    """
    messages = Messages()
    response = messages.new(f"{RPC}.Response")
    name, answer = _PROCEDURES[procedure]
    try:
        response.value.CopyFrom(messages.packed(answer(messages, _request(messages, name, sent, as_json=as_json))))
    except (Refused, InvalidContract) as error:
        response.error.code = _INVALID_ARGUMENT
        response.error.message = str(error)
    if not as_json:
        return bytes(response.SerializeToString())
    from orki_codegen.checks._json import to_json

    return to_json(messages, response)


def _request(messages: Messages, name: str, sent: bytes, *, as_json: bool) -> Any:
    try:
        if as_json:
            from orki_codegen.checks._json import from_json

            url, value = from_json(messages, name, sent)
        else:
            request = messages.new(f"{RPC}.Request")
            request.ParseFromString(sent)
            url, value = request.value.type_url or name, request.value.value
        if url.rpartition("/")[2] != name:
            raise Refused(f"the request is a {url.rpartition('/')[2]} instead of a {name}")
        parsed = messages.new(name)
        parsed.ParseFromString(value)
    except (DecodeError, ValueError) as error:
        raise Refused(f"the request cannot be read: {error}") from error
    return parsed


def _check(messages: Messages, request: Any) -> Any:
    return messages.new(f"{CHECK}.CheckResponse", annotations=list(check(messages, request)))


def _rules(messages: Messages, request: Any) -> Any:
    rules = [
        messages.new(
            f"{CHECK}.Rule", id=rule, category_ids=[category_of(rule)], default=True, purpose=purpose, type=kind
        )
        for known, kind in ((LINT, _LINT_TYPE), (BREAKING, _BREAKING_TYPE))
        for rule, purpose in sorted(known.items())
    ]
    shown, behind = _page(rules, request)
    return messages.new(f"{CHECK}.ListRulesResponse", rules=shown, next_page_token=behind)


def _categories(messages: Messages, request: Any) -> Any:
    found = [
        messages.new(f"{CHECK}.Category", id=name, purpose=purpose) for name, purpose in sorted(CATEGORIES.items())
    ]
    shown, behind = _page(found, request)
    return messages.new(f"{CHECK}.ListCategoriesResponse", categories=shown, next_page_token=behind)


def _page(entries: list[Any], request: Any) -> tuple[list[Any], str]:
    """Return a page of a list and the token of the next page; a token is the number of entries before it."""
    token = request.page_token or "0"
    if not token.isdecimal() or int(token) > len(entries):
        raise Refused(f'"{token}" is not a page token of this list')
    start, size = int(token), request.page_size or 250
    behind = start + size
    return entries[start:behind], str(behind) if behind < len(entries) else ""


_PROCEDURES: Final[Mapping[str, tuple[str, Callable[[Messages, Any], Any]]]] = {
    f"/{CHECK}.CheckService/Check": (f"{CHECK}.CheckRequest", _check),
    f"/{CHECK}.CheckService/ListRules": (f"{CHECK}.ListRulesRequest", _rules),
    f"/{CHECK}.CheckService/ListCategories": (f"{CHECK}.ListCategoriesRequest", _categories),
}
