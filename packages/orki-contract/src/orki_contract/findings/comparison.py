"""What all rules of change share: the two contracts, places in both, and how a finding is put down."""

from __future__ import annotations

__all__ = ["Comparison", "Places", "Side", "left_at", "was"]

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, Final

from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.message import Message

from orki_contract.descriptors import OPTIONS_PACKAGE, Location, MessageNode, MethodNode, Path
from orki_contract.findings.finding import Finding, Plane, Rule
from orki_contract.findings.reach import Reach
from orki_contract.model import ExternalGroup, Frame, Stream, TaskMethod, ToolMethod
from orki_contract.read import ReadContract
from orki_contract.rules.judge import Judge

# Not a contract of anybody's: the options themselves, and what every compiler brings in its own version.
_NOT_JUDGED: Final = frozenset({OPTIONS_PACKAGE, "google.protobuf"})

Places = tuple[Location | None, Location | None]
"""Where something stands in the old and in the new contract."""


class Side:
    """The old contract, or the new one, with what its rules look up again and again."""

    def __init__(self, read: ReadContract) -> None:
        self.read = read
        self.schema = read.schema
        self._judge = Judge(read, {}, {})

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
        return self._judge.place(file, path, options, option, *inside)

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

    def say(
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
    return f" (it was at {place})" if place.line else ""


def _first(entries: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for key, value in entries:
        found.setdefault(key, value)
    return found
