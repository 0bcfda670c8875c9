"""Who owns which proto package."""

from __future__ import annotations

__all__ = ["RULES", "judge"]

from collections.abc import Collection, Mapping, Sequence
from typing import Final

from orki_contract.descriptors import OPTIONS_PACKAGE, Location
from orki_contract.rules.judge import Judge, Rule, listed

RULES: Final[dict[Rule, str]] = {
    "ORKI_OWNER_ONE": "A proto package belongs to one distribution.",
    "ORKI_OWNER_MISSING": "Every proto package of the tree belongs to a distribution.",
    "ORKI_OWNER_UNKNOWN": "A distribution owns proto packages that exist.",
    "ORKI_OWNER_OPTIONS": "Nobody owns the options: they are never generated.",
}


def judge(judge: Judge, owners: Mapping[str, Sequence[Location]], files: Collection[str]) -> None:
    """Judges who owns what.

    Args:
        judge: Hears it.
        owners: The places that claim each proto package.
        files: Paths of the tree's own files; imports from elsewhere need no owner here.
    """
    packages: dict[str, str] = {}
    for path in sorted(files):
        if path in judge.schema.files:
            packages.setdefault(judge.schema.files[path].package, path)
    for package, places in sorted(owners.items()):
        if package == OPTIONS_PACKAGE:
            judge.say("ORKI_OWNER_OPTIONS", places[0], f"{package} is never generated: remove it from contracts")
        elif package not in packages:
            known = listed(sorted(set(packages) - {OPTIONS_PACKAGE}))
            judge.say(
                "ORKI_OWNER_UNKNOWN",
                places[0],
                f'no proto file has the package "{package}": correct the name, or remove it (there are {known})',
            )
        for place in places[1:]:
            judge.say("ORKI_OWNER_ONE", place, f"{package} belongs to {places[0].file} already: keep one of the two")
    for package, path in sorted(packages.items()):
        if package != OPTIONS_PACKAGE and package not in owners:
            judge.say(
                "ORKI_OWNER_MISSING",
                judge.schema.location(path, (2,)),
                f'nobody owns the package "{package}": name it in one pyproject.toml, '
                f'under [tool.orki], contracts = ["{package}"]',
            )
