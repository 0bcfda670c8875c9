"""Who uses a message: the streams, tasks, tools and services whose wire it is part of, and their packages."""

from __future__ import annotations

__all__ = ["Reach", "Use"]

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from orki_contract.findings.finding import Plane
from orki_contract.read import ReadContract


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
