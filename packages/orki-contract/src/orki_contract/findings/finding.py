"""What a finding is, and the rule behind it."""

from __future__ import annotations

__all__ = ["Bump", "Category", "Finding", "Plane", "Rule", "additive", "breaking", "source_breaking"]

from dataclasses import dataclass
from enum import StrEnum

from orki_contract.descriptors import Location


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
