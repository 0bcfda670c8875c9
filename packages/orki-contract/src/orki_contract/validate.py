"""What is wrong with a contract: every rule, all at once, each violation with its place."""

from __future__ import annotations

__all__ = ["RULES", "Owners", "Violation", "check", "validate"]

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from orki_contract.descriptors import Location
from orki_contract.errors import InvalidContract
from orki_contract.read import ReadContract
from orki_contract.rules import frames, names, owners, services, streams
from orki_contract.rules.judge import Judge, Violation

RULES: Final[Mapping[str, str]] = {
    **streams.RULES,
    **services.RULES,
    **frames.RULES,
    **names.RULES,
    **owners.RULES,
    "ORKI_DURATION": "A duration is 1 ms to 3,650 days.",
}
"""The purpose of each rule, by its id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Owners:
    """The tree around a contract, for the rules that need it.

    Attributes:
        packages: The places that claim each proto package.
        files: Where each of the tree's own files lies, by the path under which it is imported.
    """

    packages: Mapping[str, Sequence[Location]]
    files: Mapping[str, str]


def validate(read: ReadContract, tree: Owners | None = None) -> tuple[Violation, ...]:
    """Every violation, sorted by place.

    Args:
        read: The contract; read it from an image with source information, so that places have lines.
        tree: Who owns what, and where the files lie; without it ownership is not judged and files are named as imports
            name them.
    """
    judge = Judge(read, RULES, tree.files if tree is not None else {})
    streams.judge(judge)
    services.judge(judge)
    frames.judge(judge)
    names.judge(judge)
    if tree is not None:
        owners.judge(judge, tree.packages, tree.files.keys())
    return tuple(sorted(set(judge.found)))


def check(read: ReadContract, tree: Owners | None = None) -> None:
    """Refuses a contract that breaks a rule.

    Raises:
        InvalidContract: The message holds one line for each violation.
    """
    found = validate(read, tree)
    if found:
        raise InvalidContract("\n".join(map(str, found)))
