"""Read accepted-breaks.toml: accepted breaks, each with a reason and an end."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from typing import Any, Final

from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from orki_codegen._gate.distributions import Member
from orki_contract.descriptors import Location
from orki_contract.errors import InvalidSetting

FILE: Final = "accepted-breaks.toml"
_KEYS: Final = ("rule", "subject", "package", "reason", "until")


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """One accepted break; `until` is the last date of the acceptance, or the version that ends it."""

    rule: str
    subject: str
    package: str
    reason: str
    until: date | Version
    location: Location

    @property
    def key(self) -> tuple[str, str, str]:
        """The values that a finding must match."""
        return (self.rule, self.package, self.subject)

    def expired(self, today: date, members: Mapping[str, Member]) -> bool:
        """Return whether the acceptance has ended."""
        if isinstance(self.until, date):
            return today > self.until
        member = members.get(self.package)
        return member is None or member.version >= self.until


def read_accepted(root: Path) -> tuple[Accepted, ...]:
    """Read the file of a workspace; return nothing if it does not exist.

    Raises:
        InvalidSetting: The file is invalid.
    """
    path = root / FILE
    return parse_accepted(path.read_text(encoding="utf-8")) if path.is_file() else ()


def parse_accepted(text: str) -> tuple[Accepted, ...]:
    """Parse the text of the file; raises the same errors as `read_accepted`."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidSetting(f"{FILE}: {error}") from error
    entries = table.pop("break", [])
    if table or not isinstance(entries, list):
        raise InvalidSetting(f"{FILE}: only [[break]] tables are allowed")
    lines = [number for number, line in enumerate(text.splitlines(), 1) if line.strip() == "[[break]]"]
    locations = [Location(FILE, line, 1) for line in lines]
    if len(locations) != len(entries):
        locations = [Location(FILE, 1, 1)] * len(entries)
    found = tuple(_entry(entry, location) for entry, location in zip(entries, locations, strict=True))
    keys = [each.key for each in found]
    for each in found:
        if keys.count(each.key) > 1:
            raise InvalidSetting(f"{each.location}: {each.rule} of {each.subject} is accepted twice")
    return found


def _entry(entry: Any, location: Location) -> Accepted:
    if not isinstance(entry, dict):
        raise InvalidSetting(f"{location}: only [[break]] tables are allowed")
    if unknown := sorted(set(entry) - set(_KEYS)):
        raise InvalidSetting(f'{location}: unknown key "{unknown[0]}", the keys are {", ".join(_KEYS)}')
    for key in _KEYS[:-1]:
        if not isinstance(entry.get(key), str) or not entry[key].strip():
            raise InvalidSetting(f'{location}: "{key}" is missing or not a text')
    return Accepted(
        rule=entry["rule"],
        subject=entry["subject"],
        package=canonicalize_name(entry["package"]),
        reason=entry["reason"],
        until=_until(entry.get("until"), location),
        location=location,
    )


def _until(value: Any, location: Location) -> date | Version:
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
    raise InvalidSetting(f'{location}: "until" must be a date (2027-01-31) or a version ("2.0.0")')
