"""`accepted-breaks.toml`: breaks that somebody answers for, each with a reason and an end."""

from __future__ import annotations

__all__ = ["FILE", "Accepted", "parse_accepted", "read_accepted"]

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from typing import Any, Final

from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from orki_codegen.gate.members import Member
from orki_contract.descriptors import Location
from orki_contract.errors import InvalidSetting

FILE: Final = "accepted-breaks.toml"
_KEYS: Final = ("rule", "subject", "package", "reason", "until")


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """One break that is accepted.

    Attributes:
        rule: Id of the rule that it breaks.
        subject: What breaks it, as the gate names it.
        package: The distribution.
        reason: Why nobody is hurt.
        until: The date after which, or the version with which, it is accepted no longer.
        place: Where it is written.
    """

    rule: str
    subject: str
    package: str
    reason: str
    until: date | Version
    place: Location

    @property
    def key(self) -> tuple[str, str, str]:
        """What it is matched by."""
        return (self.rule, self.package, self.subject)

    def expired(self, today: date, members: Mapping[str, Member]) -> bool:
        """Whether its end has come."""
        if isinstance(self.until, date):
            return today > self.until
        member = members.get(self.package)
        return member is None or member.version >= self.until


def read_accepted(root: Path) -> tuple[Accepted, ...]:
    """Reads the file of a workspace; nothing where there is none.

    Raises:
        InvalidSetting: It is wrong.
    """
    path = root / FILE
    return parse_accepted(path.read_text(encoding="utf-8")) if path.is_file() else ()


def parse_accepted(text: str) -> tuple[Accepted, ...]:
    """Reads the text of such a file; errors as those of `read_accepted`."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidSetting(f"{FILE}: {error}") from error
    entries = table.pop("break", [])
    if table or not isinstance(entries, list):
        raise InvalidSetting(f"{FILE}: it holds [[break]] tables, and nothing else")
    lines = [number for number, line in enumerate(text.splitlines(), 1) if line.strip() == "[[break]]"]
    places = [Location(FILE, line, 1) for line in lines]
    if len(places) != len(entries):
        places = [Location(FILE, 1, 1)] * len(entries)
    found = tuple(_entry(entry, place) for entry, place in zip(entries, places, strict=True))
    keys = [each.key for each in found]
    for each in found:
        if keys.count(each.key) > 1:
            raise InvalidSetting(f"{each.place}: {each.rule} of {each.subject} is accepted twice")
    return found


def _entry(entry: Any, place: Location) -> Accepted:
    if not isinstance(entry, dict):
        raise InvalidSetting(f"{place}: it holds [[break]] tables, and nothing else")
    if unknown := sorted(set(entry) - set(_KEYS)):
        raise InvalidSetting(f'{place}: there is no key "{unknown[0]}", only {", ".join(_KEYS)}')
    for key in _KEYS[:-1]:
        if not isinstance(entry.get(key), str) or not entry[key].strip():
            raise InvalidSetting(f'{place}: "{key}" is missing, or is no text')
    return Accepted(
        rule=entry["rule"],
        subject=entry["subject"],
        package=canonicalize_name(entry["package"]),
        reason=entry["reason"],
        until=_until(entry.get("until"), place),
        place=place,
    )


def _until(value: Any, place: Location) -> date | Version:
    if isinstance(value, date) and not isinstance(value, datetime):
        return value
    if isinstance(value, str):
        try:
            return date.fromisoformat(value)
        except ValueError:
            pass
        try:
            return Version(value)
        except InvalidVersion:
            pass
    raise InvalidSetting(f'{place}: "until" must be a date (2027-01-31) or a version ("2.0.0")')
