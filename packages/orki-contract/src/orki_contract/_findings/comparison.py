"""Findings and the comparison of two contracts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any, Final

from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.message import Message

from orki_contract._findings.rules import RULES, Bump
from orki_contract.descriptors import OPTIONS_PACKAGE, Location, MessageNode, MethodNode, Path, field_path
from orki_contract.model import ExternalGroup, Frame, Stream, TaskMethod, ToolMethod
from orki_contract.read import ReadContract


class Plane(StrEnum):
    """The part of a fleet that a change affects. `MESSAGES` stands for several parts or none."""

    EVENTS = "events"
    CONTROL = "control"
    HOTPATH = "hotpath"
    SERVICE = "service"
    MESSAGES = "messages"


@dataclass(frozen=True, order=True, slots=True, kw_only=True)
class Finding:
    """One change of a contract.

    Attributes:
        location: The subject's location in the new contract, or that of the nearest enclosing element if it was
            removed; the location in the old contract if that element was removed too.
        rule: Id of the rule.
        subject: What changed, such as `stream "findings"`.
        package: Proto package that declares the subject and whose version must change.
        message: A description of the change, with the old and the new value.
        plane: The affected plane.
        bump: The required version bump.
        wire: Whether old and new processes are incompatible.
        affected: Other groups, streams, services and packages that the change affects; sorted.
        gone: Whether `location` is a location in the old contract.
        before: The location in the old contract; its file is empty if there is none.
    """

    location: Location
    rule: str
    subject: str
    package: str
    message: str
    plane: Plane
    bump: Bump
    wire: bool
    affected: tuple[str, ...] = ()
    gone: bool = False
    before: Location = Location("")

    def __str__(self) -> str:
        return f"{self.location}: {self.message} [{self.rule}]"


@dataclass(frozen=True, order=True, slots=True)
class Use:
    """A declaration that uses messages; `name` describes it, such as `stream "findings"`."""

    name: str
    package: str
    plane: Plane


class Reach:
    """Finds the declarations of a contract that use a message or an enum."""

    def __init__(self, read: ReadContract) -> None:
        self._read = read
        self._known: dict[str, tuple[frozenset[Use], frozenset[str]]] = {}

    def uses(self, name: str) -> frozenset[Use]:
        """Return the declarations whose messages are `name`, or contain it at any depth."""
        return self._above(name)[0]

    def packages(self, name: str) -> frozenset[str]:
        """Return the packages of `uses(name)` and of every message that contains `name` at any depth."""
        return self._above(name)[1]

    def _above(self, name: str) -> tuple[frozenset[Use], frozenset[str]]:
        known = self._known.get(name)
        if known is None:
            seen = {name}
            waiting = [name]
            found: set[Use] = set()
            while waiting:
                each = waiting.pop()
                found |= self._direct.get(each, set())
                for holder in self._holders.get(each, ()):
                    if holder not in seen:
                        seen.add(holder)
                        waiting.append(holder)
            messages = self._read.schema.messages
            packages = {messages[each].file.package for each in seen if each in messages}
            packages |= {use.package for use in found}
            known = self._known[name] = (frozenset(found), frozenset(packages))
        return known

    @cached_property
    def _holders(self) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for name, node in self._read.schema.messages.items():
            for field in node.proto.field:
                if field.type_name:
                    found.setdefault(field.type_name.removeprefix("."), set()).add(name)
        return found

    @cached_property
    def _direct(self) -> dict[str, set[Use]]:
        found: dict[str, set[Use]] = {}
        for message, use in self._roots():
            found.setdefault(message, set()).add(use)
        return found

    def _roots(self) -> Iterator[tuple[str, Use]]:
        kinds = {}
        for file in self._read.files:
            for stream in file.contract.streams:
                yield stream.message, Use(f'stream "{stream.name}"', file.package, Plane.EVENTS)
            for task in file.contract.tasks:
                kinds[task.full_name] = Use(f"task service {task.service}", file.package, Plane.CONTROL)
                for name in task.messages:
                    yield name, kinds[task.full_name]
            for tool in file.contract.tools:
                kinds[tool.full_name] = Use(f"tool service {tool.service}", file.package, Plane.HOTPATH)
        for service in self._read.schema.services.values():
            plain = Use(f"service {service.full_name}", service.file.package, Plane.SERVICE)
            for method in service.methods:
                use = kinds.get(method.full_name, plain)
                for name in (method.proto.input_type, method.proto.output_type):
                    yield name.removeprefix("."), use


# Packages that are not compared: orki's options, and the protos that ship with compilers.
_IGNORED: Final = frozenset({OPTIONS_PACKAGE, "google.protobuf"})

Places = tuple[Location | None, Location | None]
"""Locations in the old and in the new contract."""


class Side:
    """The old or the new contract, with cached lookups."""

    def __init__(self, read: ReadContract) -> None:
        self.read = read
        self.schema = read.schema
        self.reach = Reach(read)
        contract = read.contract
        # Of a duplicate name, only the first declaration is compared.
        self.streams: Mapping[str, Stream] = _first((each.name, each) for each in contract.streams)
        self.external_groups: Mapping[tuple[str, str, str], ExternalGroup] = _first(
            ((each.package, each.stream, each.group.name), each) for each in contract.external_groups
        )
        self.tasks: Mapping[str, TaskMethod] = _first((each.full_name, each) for each in contract.tasks)
        self.tools: Mapping[str, ToolMethod] = _first((each.full_name, each) for each in contract.tools)
        self.frames: Mapping[str, Frame] = _first((each.message, each) for each in contract.frames)

    @cached_property
    def consumed(self) -> Mapping[tuple[str, str], Sequence[tuple[FileDescriptorProto, int, Any]]]:
        """Declarations of external groups by package and stream: file, index and option."""
        found: dict[tuple[str, str], list[tuple[FileDescriptorProto, int, Any]]] = {}
        for file in self.schema.files.values():
            for index, option in enumerate(self.schema.option(file.options, "consume") or ()):
                found.setdefault((file.package, option.stream), []).append((file, index, option))
        return found

    @cached_property
    def methods(self) -> Mapping[str, tuple[str, MethodNode]]:
        """Compared rpcs by full name, with the path of their file."""
        return {
            method.full_name: (service.file.name, method)
            for service in self.schema.services.values()
            if service.file.package not in _IGNORED
            for method in service.methods
        }

    @cached_property
    def messages(self) -> Mapping[str, MessageNode]:
        """Compared messages by full name, without map entries."""
        return {
            name: node
            for name, node in self.schema.messages.items()
            if node.file.package not in _IGNORED and not node.proto.options.map_entry
        }

    @cached_property
    def enums(self) -> Mapping[str, str]:
        """Paths of the files of compared enums, by full name."""
        return {name: file.name for name, (file, _) in self.schema.enums.items() if file.package not in _IGNORED}

    @cached_property
    def files(self) -> Mapping[str, str]:
        """Packages of the compared files, by path."""
        return {name: file.package for name, file in self.schema.files.items() if file.package not in _IGNORED}

    def message_place(self, message: str, option: str = "", *inside: str | int) -> Location:
        """Return the location of a message or of a part of its option."""
        node = self.schema.messages[message]
        return self._place(node.file.name, node.path, node.proto.options, option, *inside)

    def field_place(self, message: MessageNode, index: int, option: str = "") -> Location:
        """Return the location of a field or of one of its options."""
        options = message.proto.field[index].options
        return self._place(message.file.name, field_path(message, index), options, option)

    def method_place(self, full_name: str, option: str = "", *inside: str | int) -> Location:
        """Return the location of an rpc or of a part of its option."""
        file, method = self.methods[full_name]
        return self._place(file, method.path, method.proto.options, option, *inside)

    def _place(self, file: str, path: Path, options: Message, option: str, *inside: str | int) -> Location:
        if not option or self.schema.option(options, option) is None:
            return self.schema.location(file, path)
        return self.schema.locate(file, path, options, option, *inside)


class Comparison:
    """Two contracts and the findings of all rules."""

    def __init__(self, old: ReadContract, new: ReadContract) -> None:
        self.old = Side(old)
        self.new = Side(new)
        self.found: list[Finding] = []

    def report(
        self,
        rule: str,
        subject: str,
        package: str,
        text: str,
        places: Places,
        plane: Plane,
        affected: Iterable[str] = (),
    ) -> None:
        """Add a finding. Its message is the subject followed by `text`, which describes the change."""
        before, after = places
        finding = Finding(
            location=after or before or Location(""),
            rule=rule,
            subject=subject,
            package=package,
            message=f"{subject} {text}",
            plane=plane,
            bump=RULES[rule].bump,
            wire=RULES[rule].wire,
            affected=tuple(sorted(set(affected))),
            gone=after is None,
            before=before or Location(""),
        )
        self.found.append(finding)

    def report_users(self, rule: str, subject: str, package: str, text: str, places: Places, name: str) -> None:
        """Add a finding about the message or enum `name`; it affects every declaration that uses it."""
        self.report(rule, subject, package, text, places, self.plane(name), self.users(name, package))

    def users(self, name: str, package: str) -> set[str]:
        """Return the declarations and the other packages that use a message in either contract."""
        sides = (self.old.reach, self.new.reach)
        packages = {each for side in sides for each in side.packages(name)} - {package}
        return {use.name for side in sides for use in side.uses(name)} | {f"package {each}" for each in packages}

    def plane(self, name: str) -> Plane:
        """Return the plane that uses a message; `MESSAGES` if several planes or none use it."""
        planes = {use.plane for side in (self.old.reach, self.new.reach) for use in side.uses(name)}
        return planes.pop() if len(planes) == 1 else Plane.MESSAGES


def was(value: Any, other: Any, shown: Callable[[Any], str] = str) -> str:
    """Return both values as text, such as `5 → 3`."""
    return f"{shown(value)} → {shown(other)}"


def left_at(place: Location) -> str:
    """Return a suffix with the old location of a removed declaration."""
    return f" (formerly at {place})" if place.line else ""


def _first(entries: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for key, value in entries:
        found.setdefault(key, value)
    return found
