"""The rules that the plugin offers: how a contract is written down, and how it may change."""

from __future__ import annotations

__all__ = ["BREAKING", "CATEGORIES", "LINT", "category_of"]

from collections.abc import Mapping
from typing import Final

from orki_contract import findings
from orki_contract.findings import Bump, Category
from orki_contract.validate import OWNER_RULES, RULES

LINT: Final[Mapping[str, str]] = {rule: purpose for rule, purpose in RULES.items() if rule not in OWNER_RULES}
"""Purposes of the rules of `buf lint`, by id. Who owns what is not in the protos, so the generator alone judges it."""

BREAKING: Final[Mapping[str, str]] = {
    rule.id: rule.purpose for rule in findings.RULES.values() if rule.bump is Bump.MAJOR
}
"""Purposes of the rules of `buf breaking`, by id. What is new breaks nothing; `orki-contract diff` tells of it."""

CATEGORIES: Final[Mapping[str, str]] = {category.value: purpose for category, purpose in findings.CATEGORIES.items()}
"""Purposes of the categories, by id; each holds rules of both kinds."""

# By the word behind ORKI_ in the id of a rule of lint.
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
    """The category of a rule.

    Raises:
        KeyError: There is no such rule, or nobody said where it belongs.
    """
    known = findings.RULES.get(rule)
    return str(known.category if known is not None else _LINT_CATEGORIES[rule.split("_")[1]])
