"""What installers ask of a distribution: its extras, and the Pythons that it runs on."""

from __future__ import annotations

__all__ = ["installed_extras", "installed_python", "metadata_remarks"]

from collections.abc import Iterator
from email.message import Message
from email.parser import HeaderParser
from pathlib import Path
from typing import Final

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.utils import canonicalize_name

from orki_codegen.gate.members import Member
from orki_codegen.gate.past import Release
from orki_codegen.gate.remarks import Remark
from orki_contract.descriptors import Location
from orki_contract.errors import InvalidContract
from orki_contract.findings import Bump

# A range is judged by whom it admits: Pythons that were, are and may come, of the one major version that counts.
_PYTHONS: Final = tuple(f"3.{minor}.{micro}" for minor in range(7, 31) for micro in range(31))


def installed_extras(unpacked: Path) -> frozenset[str]:
    """The extras of an unpacked wheel, in the one form that indexes compare."""
    return frozenset(
        canonicalize_name(each) for head in _heads(unpacked) for each in head.get_all("Provides-Extra", [])
    )


def installed_python(unpacked: Path) -> SpecifierSet:
    """The Pythons that an unpacked wheel admits.

    Raises:
        InvalidContract: Its metadata cannot be read.
    """
    try:
        found = [SpecifierSet(str(each)) for head in _heads(unpacked) for each in head.get_all("Requires-Python", [])]
    except InvalidSpecifier as error:
        raise InvalidContract(f"the metadata of the wheel in {unpacked.name} cannot be read: {error}") from error
    return found[0] if found else SpecifierSet()


def metadata_remarks(member: Member, release: Release) -> Iterator[Remark]:
    """One for each extra that is gone or new, and one where Pythons are admitted no more.

    A refused Python is a break like any other: whoever has it gets no later release, and what he is told to take
    (`>=1.4,<2`) no longer gives him what is mended.
    """
    for name in sorted(release.extras - set(member.extras)):
        message = f"the extra {name} is gone: {member.name}[{name}] would install without it"
        yield _remark(member, "API_EXTRA_REMOVED", name, member.extras_place, message, Bump.MAJOR)
    for name in sorted(set(member.extras) - release.extras):
        yield _remark(member, "API_EXTRA_ADDED", name, member.extras[name], f"the extra {name} is new", Bump.MINOR)
    if member.python == release.python:
        return
    refused = [each for each in _PYTHONS if each in release.python and each not in member.python]
    if refused:
        message = f'Python {refused[0]} is admitted no more: requires-python "{release.python}" → "{member.python}"'
        yield _remark(member, "API_PYTHON_REFUSED", "requires-python", member.python_place, message, Bump.MAJOR)


def _heads(unpacked: Path) -> Iterator[Message]:
    for file in sorted(unpacked.glob("*.dist-info/METADATA")):
        yield HeaderParser().parsestr(file.read_text(encoding="utf-8", errors="replace"))


def _remark(member: Member, rule: str, subject: str, place: Location, message: str, bump: Bump) -> Remark:
    return Remark(rule=rule, package=member.name, subject=subject, place=place, message=message, bump=bump)
