"""The commands that a distribution installs, against those that users have."""

from __future__ import annotations

__all__ = ["console_remarks", "installed_commands"]

import configparser
from collections.abc import Iterator
from pathlib import Path

from orki_codegen.gate.members import Member
from orki_codegen.gate.past import Release
from orki_codegen.gate.remarks import Remark
from orki_contract.errors import InvalidContract
from orki_contract.findings import Bump


def installed_commands(unpacked: Path) -> frozenset[str]:
    """The commands of an unpacked wheel.

    Raises:
        InvalidContract: The wheel's entry points cannot be read.
    """
    found: set[str] = set()
    for file in unpacked.glob("*.dist-info/entry_points.txt"):
        parser = configparser.RawConfigParser(delimiters=("=",))
        parser.optionxform = str  # type: ignore[assignment,method-assign]
        try:
            parser.read_string(file.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, configparser.Error) as error:
            raise InvalidContract(f"the entry points in {file.name} cannot be read: {error}") from error
        if parser.has_section("console_scripts"):
            found.update(parser.options("console_scripts"))
    return frozenset(found)


def console_remarks(member: Member, release: Release) -> Iterator[Remark]:
    """One for each command that is gone, and for each that is new."""
    for name in sorted(release.commands - member.commands):
        yield _remark(member, "API_COMMAND_REMOVED", name, f"the command {name} is gone", Bump.MAJOR)
    for name in sorted(member.commands - release.commands):
        yield _remark(member, "API_COMMAND_ADDED", name, f"the command {name} is new", Bump.MINOR)


def _remark(member: Member, rule: str, name: str, message: str, bump: Bump) -> Remark:
    return Remark(rule=rule, package=member.name, subject=name, place=member.place, message=message, bump=bump)
