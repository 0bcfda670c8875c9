"""`published.toml`: the commit that stands for what users have, before anything is on an index."""

from __future__ import annotations

__all__ = ["FILE", "StandIn", "read_stand_in"]

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from orki_contract.errors import InvalidSetting

FILE: Final = "published.toml"
_KEYS: Final = {"commit", "reason"}


@dataclass(frozen=True, slots=True, kw_only=True)
class StandIn:
    """A commit that is taken for published.

    Attributes:
        commit: Its id.
        reason: Why this one.
    """

    commit: str
    reason: str


def read_stand_in(root: Path) -> StandIn | None:
    """Reads the file of a workspace; None where there is none.

    Raises:
        InvalidSetting: It is wrong.
    """
    path = root / FILE
    if not path.is_file():
        return None
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidSetting(f"{FILE}: {error}") from error
    if unknown := sorted(set(table) - _KEYS):
        raise InvalidSetting(f'{FILE}: there is no key "{unknown[0]}", only "commit" and "reason"')
    for key in sorted(_KEYS):
        if not isinstance(table.get(key), str) or not table[key].strip():
            raise InvalidSetting(f'{FILE}: "{key}" is missing, or is no text')
    if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", table["commit"]):
        raise InvalidSetting(f'{FILE}: "commit" must be the whole id of a commit (`git rev-parse HEAD`)')
    return StandIn(commit=table["commit"], reason=table["reason"])
