"""Violations of rules, and the report that collects them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from orki_contract.descriptors import Location, MessageNode, Schema
from orki_contract.read import ReadContract

Rule = str
"""An id such as `ORKI_STREAM_NAME_UNIQUE`."""

LONGEST_MS: Final = 3650 * 24 * 3600 * 1000
"""The longest duration that a contract may set: 3,650 days."""


@dataclass(frozen=True, order=True, slots=True)
class Violation:
    """A violation of a rule; the message describes the problem and how to fix it."""

    location: Location
    rule: Rule
    message: str

    def __str__(self) -> str:
        return f"{self.location}: {self.message} [{self.rule}]"


class Report:
    """A contract and the violations found so far."""

    def __init__(self, read: ReadContract, known: Mapping[Rule, str], places: Mapping[str, str]) -> None:
        self.read = read
        self.schema: Schema = read.schema
        self.found: list[Violation] = []
        self._known = known
        self._places = places

    def add(self, rule: Rule, location: Location, message: str) -> None:
        """Add a violation."""
        if rule not in self._known:
            raise KeyError(rule)
        self.found.append(Violation(self.shown(location), rule, message))

    def shown(self, location: Location) -> Location:
        """Return the location with the file's path in the source tree instead of its import path."""
        return replace(location, file=self._places.get(location.file, location.file))

    def messages(self, option: str) -> Iterator[tuple[MessageNode, Any]]:
        """Return every message with the option, and the option's value."""
        for node in self.schema.messages.values():
            value = self.schema.option(node.proto.options, option)
            if value is not None:
                yield node, value

    def duration(self, place: Location, holder: Any, name: str, subject: str) -> None:
        """Check that a duration, if set, is from 1 ms to 3,650 days."""
        if name not in holder.DESCRIPTOR.fields_by_name or not holder.HasField(name):
            return
        value = getattr(holder, name)
        length = value.seconds * 1_000_000_000 + value.nanos
        if not 1_000_000 <= length <= LONGEST_MS * 1_000_000:
            given = f"{length / 1_000_000_000:.9f}".rstrip("0").rstrip(".")
            self.add("ORKI_DURATION", place, f"{name} of {subject} is {given} s: use 1 ms to 3650 days, or remove it")


def quoted(names: list[str]) -> str:
    """Return the names in quotation marks."""
    return ", ".join(f'"{name}"' for name in names) or "none"
