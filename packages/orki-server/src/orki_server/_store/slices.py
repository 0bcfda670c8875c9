"""Slices of the script: those of its statements that some operations need.

The server runs all of a script at each call, also the definitions of functions that the call does not use. These take
longer than a transition, so batches of the most frequent operations are sent to a slice.

A slice consists of the top-level statements that its operations need, directly or through others, in their order. Lua
searches the variables that a function captures among all that are captured in the enclosing one; so later statements
are in functions of their own, which reach earlier variables without a search.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from functools import lru_cache
from typing import Final

from orki_events.connection import Script

_GROUPS: Final = (
    frozenset({"succeed"}),
    frozenset({"submit", "offer"}),
    frozenset({"accept", "succeed", "fail", "renew", "progress"}),
    frozenset({"sweep"}),
    frozenset({"submit", "offer", "accept", "succeed", "renew"}),
)
"""Operations of each slice, in the order in which a slice is chosen."""
_MAIN: Final = "local ready, trouble = "
"""Beginning of the statements that apply the batch. All slices have them."""
_LEVEL: Final = 40
"""Minimum number of statements in one function."""
_CAPTURED: Final = 55
"""Maximum number of variables that a function captures. Lua allows 60."""
_OPENING: Final = re.compile(r"local [\w, ]+ = \(function\(\)|do")
_CLOSING: Final = re.compile(r"end\)\(\)|end|return [\w, ]+\nend\)\(\)")


def script_for(whole: Script, operations: Collection[str]) -> Script:
    """Return a slice for a batch of these operations, or the whole script."""
    for group in _GROUPS:
        if group.issuperset(operations):
            return sliced(whole, group)
    return whole


@lru_cache(maxsize=64)
def sliced(whole: Script, operations: frozenset[str]) -> Script:
    """Return the slice of a script for some operations."""
    found = statements(whole.text)
    main = next(at for at, each in enumerate(found) if each.startswith(_MAIN))
    defining: dict[str, list[int]] = {}
    for at, statement in enumerate(found[:main]):
        for name in defined(statement):
            defining.setdefault(name, []).append(at)
    needed: set[int] = set()
    waiting = [*range(main, len(found)), *(at for each in operations for at in defining[f"OPS.{each}"])]
    while waiting:
        at = waiting.pop()
        if at not in needed:
            needed.add(at)
            waiting += [other for word in _words(found[at]) for other in defining.get(word, ())]
    chosen = sorted(needed)
    return Script(_nested([found[at] for at in chosen], len([at for at in chosen if at < main])))


def statements(text: str) -> list[str]:
    """Return the top-level statements of a script in their order, without comments.

    Blocks without an indentation only bound the number of variables of the whole script; they are dissolved.
    """
    found: list[str] = []
    lines = re.sub(r"^--[^\n]*\n", "", text, flags=re.MULTILINE).split("\n")
    at = 0
    while at < len(lines):
        first, start = lines[at], at
        at += 1
        inside = _following(lines, at).startswith(" ")
        is_block = _OPENING.fullmatch(first) and not inside
        if not first or is_block or _CLOSING.fullmatch("\n".join(lines[start : at + 1])) or _CLOSING.fullmatch(first):
            continue
        if inside:
            while not lines[at] or lines[at].startswith(" "):
                at += 1
            at += 1  # The line that closes the statement.
        found.append("\n".join(lines[start:at]))
    return found


def defined(statement: str) -> list[str]:
    """Return the names that a top-level statement defines; `OPS.name` for an operation."""
    if matched := re.match(r"(?:local )?function (\w+)\(|(OPS\.\w+) = ", statement):
        return [matched[1] or matched[2]]
    if matched := re.match(r"local ([\w, ]+)", statement):
        return [name.strip() for name in matched[1].split(",")]
    # A block with functions in a table.
    return sorted(set(re.findall(r"^  function (\w+)\.\w+\(", statement, re.MULTILINE)))


def _following(lines: Sequence[str], at: int) -> str:
    return next((line for line in lines[at:] if line), "")


def _words(statement: str) -> set[str]:
    return set(re.findall(r"\w+", re.sub(r"--[^\n]*", "", statement)))


def _nested(found: Sequence[str], main: int) -> str:
    """Join statements; those from a bound on are in a function within the one of the statements before."""
    parts: list[str] = []
    last = depth = 0
    words = [_words(each) for each in found]
    names = [{name for name in defined(each) if "." not in name} for each in found]
    for at, statement in enumerate(found):
        if at - last >= _LEVEL and at < main and _captured(names[:at], words[at:]) <= _CAPTURED:
            parts.append("return (function()")
            last, depth = at, depth + 1
        parts.append(statement)
    return "\n".join([*parts, *["end)()"] * depth])


def _captured(names: Iterable[set[str]], words: Iterable[set[str]]) -> int:
    return len(set().union(*names) & set().union(*words))
