"""Whether what users get from one distribution still comes from it."""

from __future__ import annotations

__all__ = ["owner_remarks"]

from collections.abc import Iterator

from orki_codegen.gate.contracts import Present
from orki_codegen.gate.past import Release
from orki_codegen.gate.remarks import Remark
from orki_contract.descriptors import Location
from orki_contract.findings import Bump


def owner_remarks(release: Release, now: Present) -> Iterator[Remark]:
    """One for each proto package that another distribution owns now, and one for a distribution that is gone."""
    member = now.members.get(release.name)
    for package in sorted(release.packages):
        owner = now.owner(package)
        if owner not in (None, release.name):
            place = member.place if member is not None else now.members[str(owner)].place
            yield Remark(
                rule="CONTRACT_OWNER_CHANGED",
                package=release.name,
                subject=package,
                place=place,
                message=f"{package} comes with {owner} now: while versions meet, two wheels bring the same files",
                bump=Bump.MAJOR,
            )
    if member is None and release.packages:
        yield Remark(
            rule="DISTRIBUTION_GONE",
            package=release.name,
            subject=release.name,
            place=Location(""),
            message=f"{release.name} is gone, and with it {', '.join(sorted(release.packages))}",
            bump=Bump.MAJOR,
        )
