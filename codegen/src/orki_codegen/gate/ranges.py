"""Whether distributions of the workspace admit each other's promised versions, and tell of each other's breaks."""

from __future__ import annotations

__all__ = ["range_remarks"]

from collections.abc import Iterator, Mapping

from packaging.version import Version

from orki_codegen.gate.members import Dependency, Member
from orki_codegen.gate.remarks import Remark
from orki_contract.findings import Bump


def range_remarks(members: Mapping[str, Member], broken: Mapping[str, Version]) -> Iterator[Remark]:
    """Every range on a sibling that does not hold.

    Args:
        members: The distributions, by name.
        broken: For each distribution that breaks: the version that users have, and from which it breaks away.
    """
    for member in members.values():
        for each in member.dependencies:
            sibling = members.get(each.name)
            if sibling is None:
                continue
            written = f'"{each.requirement}"'
            if not each.requirement.specifier.contains(sibling.version, prereleases=True):
                message = f"{written} does not admit {sibling.name} {sibling.version}, which the tree promises"
                yield _remark("SIBLING_RANGE", member, each, message)
            elif each.name in broken and _admits_both(each, broken[each.name], sibling.version):
                message = (
                    f"{written} still admits {sibling.name} {broken[each.name]}, from which {sibling.version} breaks "
                    "away: raise its lower bound"
                )
                yield _remark("SIBLING_RANGE", member, each, message)


def _admits_both(dependency: Dependency, before: Version, after: Version) -> bool:
    specifier = dependency.requirement.specifier
    return before != after and specifier.contains(before, prereleases=True) and specifier.contains(after, True)


def _remark(rule: str, member: Member, dependency: Dependency, message: str) -> Remark:
    return Remark(
        rule=rule,
        package=member.name,
        subject=dependency.name,
        place=dependency.place,
        message=message,
        bump=Bump.PATCH,
        fails=True,
    )
