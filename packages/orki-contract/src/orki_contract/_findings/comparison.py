"""Findings, the rules behind them, and the comparison of two contracts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any, Final

from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.message import Message

from orki_contract.descriptors import OPTIONS_PACKAGE, Location, MessageNode, MethodNode, Path
from orki_contract.model import ExternalGroup, Frame, Stream, TaskMethod, ToolMethod
from orki_contract.read import ReadContract


class Bump(StrEnum):
    """What a version must promise at the least."""

    MAJOR = "major"
    MINOR = "minor"
    PATCH = "patch"


class Category(StrEnum):
    """Groups of rules, by which buf's configuration names them."""

    STREAM = "ORKI_STREAM"
    FRAME = "ORKI_FRAME"
    TASK = "ORKI_TASK"
    TOOL = "ORKI_TOOL"
    SERVICE = "ORKI_SERVICE"
    MESSAGE = "ORKI_MESSAGE"
    OPTION = "ORKI_OPTION"
    NAME = "ORKI_NAME"


class Plane(StrEnum):
    """The part of a running fleet that a change touches. `MESSAGES`: several of them, or none."""

    EVENTS = "events"
    CONTROL = "control"
    HOTPATH = "hotpath"
    SERVICE = "service"
    MESSAGES = "messages"


@dataclass(frozen=True, order=True, slots=True, kw_only=True)
class Rule:
    """One way in which a contract may change.

    Attributes:
        id: Such as `ORKI_STREAM_REMOVED`.
        purpose: What the contract keeps, or what the change is, as a sentence.
        category: The group that it belongs to.
        bump: What the change asks for.
        wire: Whether processes built from the two sides would misunderstand or fail each other; False where only code
            written against the contract must change, or nothing must.
    """

    id: str
    purpose: str
    category: Category
    bump: Bump
    wire: bool


@dataclass(frozen=True, order=True, slots=True, kw_only=True)
class Finding:
    """One change of a contract.

    Attributes:
        location: Where the new contract says it, or the nearest thing around it there; where nothing of it is left,
            the place in the old contract.
        rule: Id of the rule.
        subject: What changed, such as `stream "findings"`.
        package: Proto package that declares the subject, and whose version must tell of the change.
        message: What changed, in words, the values of before and after included.
        plane: Where it is felt.
        bump: What it asks for.
        wire: Whether old and new processes would misunderstand or fail each other.
        affected: Who is concerned beside the subject itself: groups, streams, services, packages; sorted.
        gone: Whether `location` is a place in the old contract.
        before: The place in the old contract; an empty file name where there was nothing.
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


def breaking(category: Category, rule: str, purpose: str) -> Rule:
    """A rule whose break divides a running fleet."""
    return Rule(id=rule, purpose=purpose, category=category, bump=Bump.MAJOR, wire=True)


def source_breaking(category: Category, rule: str, purpose: str) -> Rule:
    """A rule whose break is felt by whoever compiles or imports, and not on the wire."""
    return Rule(id=rule, purpose=purpose, category=category, bump=Bump.MAJOR, wire=False)


def additive(category: Category, rule: str, purpose: str) -> Rule:
    """A rule that names something new, or looser, with which old processes live."""
    return Rule(id=rule, purpose=purpose, category=category, bump=Bump.MINOR, wire=False)


@dataclass(frozen=True, order=True, slots=True)
class Use:
    """One declaration that puts messages on a wire.

    Attributes:
        name: For people, such as `stream "findings"`.
        package: Who declares it.
        plane: Where it runs.
    """

    name: str
    package: str
    plane: Plane


class Reach:
    """Answers which declarations of a contract reach a message or an enum."""

    def __init__(self, read: ReadContract) -> None:
        self._read = read
        self._known: dict[str, tuple[frozenset[Use], frozenset[str]]] = {}

    def uses(self, name: str) -> frozenset[Use]:
        """The declarations whose entries, requests, responses, progress or directives hold it, at any depth."""
        return self._above(name)[0]

    def packages(self, name: str) -> frozenset[str]:
        """The packages of those declarations, and of every message that holds it, at any depth."""
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
        """The messages that have a field of each message or enum."""
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
                for name in (task.progress, task.directive):
                    yield name, kinds[task.full_name]
            for tool in file.contract.tools:
                kinds[tool.full_name] = Use(f"tool service {tool.service}", file.package, Plane.HOTPATH)
        for service in self._read.schema.services.values():
            plain = Use(f"service {service.full_name}", service.file.package, Plane.SERVICE)
            for method in service.methods:
                use = kinds.get(method.full_name, plain)
                for name in (method.proto.input_type, method.proto.output_type):
                    yield name.removeprefix("."), use


# Not a contract of anybody's: the options themselves, and what every compiler brings in its own version.
_NOT_JUDGED: Final = frozenset({OPTIONS_PACKAGE, "google.protobuf"})

Places = tuple[Location | None, Location | None]
"""Where something stands in the old and in the new contract."""


class Side:
    """The old contract, or the new one, with what its rules look up again and again."""

    def __init__(self, read: ReadContract) -> None:
        self.read = read
        self.schema = read.schema

    @cached_property
    def reach(self) -> Reach:
        """What reaches each message."""
        return Reach(self.read)

    @cached_property
    def streams(self) -> Mapping[str, Stream]:
        """By name; the first where a contract breaks the rule that names are unique."""
        return _first((each.name, each) for each in self.read.contract.streams)

    @cached_property
    def external_groups(self) -> Mapping[tuple[str, str, str], ExternalGroup]:
        """By package, stream and group."""
        found = self.read.contract.external_groups
        return _first(((each.package, each.stream, each.group.name), each) for each in found)

    @cached_property
    def consumed(self) -> Mapping[tuple[str, str], Sequence[tuple[FileDescriptorProto, int, Any]]]:
        """Where each package declares groups on each stream: file, index among its external groups, and the option."""
        found: dict[tuple[str, str], list[tuple[FileDescriptorProto, int, Any]]] = {}
        for file in self.schema.files.values():
            for index, option in enumerate(self.schema.option(file.options, "consume") or ()):
                found.setdefault((file.package, option.stream), []).append((file, index, option))
        return found

    @cached_property
    def tasks(self) -> Mapping[str, TaskMethod]:
        """By full name."""
        return _first((each.full_name, each) for each in self.read.contract.tasks)

    @cached_property
    def tools(self) -> Mapping[str, ToolMethod]:
        """By full name."""
        return _first((each.full_name, each) for each in self.read.contract.tools)

    @cached_property
    def frames(self) -> Mapping[str, Frame]:
        """By the message's full name."""
        return _first((each.message, each) for each in self.read.contract.frames)

    @cached_property
    def methods(self) -> Mapping[str, tuple[str, MethodNode]]:
        """Every judged rpc by its full name, with the path of its file."""
        return {
            method.full_name: (service.file.name, method)
            for service in self.schema.services.values()
            if service.file.package not in _NOT_JUDGED
            for method in service.methods
        }

    @cached_property
    def messages(self) -> Mapping[str, MessageNode]:
        """Every judged message by its full name, without the entries of maps."""
        return {
            name: node
            for name, node in self.schema.messages.items()
            if node.file.package not in _NOT_JUDGED and not node.proto.options.map_entry
        }

    @cached_property
    def enums(self) -> Mapping[str, str]:
        """The path of each judged enum's file, by the enum's full name."""
        return {name: file.name for name, (file, _) in self.schema.enums.items() if file.package not in _NOT_JUDGED}

    @cached_property
    def files(self) -> Mapping[str, str]:
        """The package of each judged file, by its path."""
        return {name: file.package for name, file in self.schema.files.items() if file.package not in _NOT_JUDGED}

    def place(self, file: str, path: Path, options: Message, option: str, *inside: str | int) -> Location:
        """Where an option's value, or a part of it, is written; see `Judge.place`."""
        return self.schema.locate(file, path, options, option, *inside)

    def message_place(self, message: str, option: str = "", *inside: str | int) -> Location:
        """Where a message stands, or a part of an option on it."""
        node = self.schema.messages[message]
        if not option or self.schema.option(node.proto.options, option) is None:
            return self.schema.location(node.file.name, node.path)
        return self.place(node.file.name, node.path, node.proto.options, option, *inside)

    def method_place(self, full_name: str, option: str = "", *inside: str | int) -> Location:
        """Where an rpc stands, or a part of an option on it."""
        file, method = self.methods[full_name]
        if not option or self.schema.option(method.proto.options, option) is None:
            return self.schema.location(file, method.path)
        return self.place(file, method.path, method.proto.options, option, *inside)


class Comparison:
    """Hears all rules on two contracts, and gathers what they find."""

    def __init__(self, old: ReadContract, new: ReadContract, known: Mapping[str, Rule]) -> None:
        self.old = Side(old)
        self.new = Side(new)
        self.found: list[Finding] = []
        self._known = known

    def report(
        self,
        rule: str,
        subject: str,
        package: str,
        message: str,
        *,
        plane: Plane,
        places: Places,
        affected: Iterable[str] = (),
    ) -> None:
        """Puts down one finding.

        Args:
            rule: Id of the rule.
            subject: What changed.
            package: Which package declares it.
            message: What changed, as a sentence without a full stop.
            plane: Where it is felt.
            places: In the old and in the new contract; None where nothing of it is left there.
            affected: Who is concerned.
        """
        known = self._known[rule]
        before, after = places
        location = after or before or Location("")
        self.found.append(
            Finding(
                location=location,
                rule=rule,
                subject=subject,
                package=package,
                message=message,
                plane=plane,
                bump=known.bump,
                wire=known.wire,
                affected=tuple(sorted(set(affected))),
                gone=after is None,
                before=before or Location(""),
            )
        )

    def users(self, name: str, package: str) -> set[str]:
        """Who uses a message, on either side: declarations, and packages other than its own."""
        sides = (self.old.reach, self.new.reach)
        packages = {each for side in sides for each in side.packages(name)} - {package}
        return {use.name for side in sides for use in side.uses(name)} | {f"package {each}" for each in packages}

    def plane(self, name: str) -> Plane:
        """Where a message travels: one plane, or `MESSAGES` for several or none."""
        planes = {use.plane for side in (self.old.reach, self.new.reach) for use in side.uses(name)}
        return planes.pop() if len(planes) == 1 else Plane.MESSAGES


def was(value: Any, other: Any, shown: Callable[[Any], str] = str) -> str:
    """`5 → 3`."""
    return f"{shown(value)} → {shown(other)}"


def left_at(place: Location) -> str:
    """Where something was that is gone, for a message whose own place is the nearest thing that is left."""
    return f" (formerly at {place})" if place.line else ""


def _first(entries: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for key, value in entries:
        found.setdefault(key, value)
    return found
