"""Whether a distribution brings anything else than what users have, where no API and no contract changed."""

from __future__ import annotations

__all__ = ["content_remarks"]

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from orki_codegen.gate.members import Member
from orki_codegen.gate.past import Release
from orki_codegen.gate.remarks import Remark
from orki_codegen.gate.wheels import Contents, built, contents_of, differing, digest
from orki_contract.descriptors import Location
from orki_contract.findings import Bump

RULE: Final = "CONTENT_CHANGED"

_SHOWN: Final = 3


def content_remarks(root: Path, member: Member, release: Release) -> Iterator[Remark]:
    """One remark, if what the distribution brings differs from a release of it.

    A wheel is held against the wheel that the tree gives; the sources of a commit are held against the tree's.

    Raises:
        InvalidSetting: The tree's wheel cannot be built.
    """
    if release.wheel is not None:
        before = contents_of(release.wheel)
        with tempfile.TemporaryDirectory(prefix="orki-gate-") as folder:
            after = contents_of(built(root, member.folder, Path(folder)))
        if release.version != member.version:
            before, after = _without_version(before), _without_version(after)
    elif release.folder is not None:
        before, after = _sources(release.folder), _sources(root / member.folder)
    else:
        return
    names = differing(before, after)
    if not names:
        return
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    yield Remark(
        rule=RULE,
        package=member.name,
        subject=member.name,
        place=_place(root, member, names[0]),
        message=f"no API and no contract changed, and yet other files: {', '.join(names[:_SHOWN])}{more}",
        bump=Bump.PATCH,
    )


def _without_version(contents: Contents) -> Contents:
    """Without the metadata, which hold the version."""
    return {name: each for name, each in contents.items() if name != "dist-info/METADATA"}


def _sources(folder: Path) -> Contents:
    """What a wheel is made of, as far as folders tell: `src`, `gen`, and pyproject.toml without its version."""
    found = {}
    for path in sorted(each for name in ("src", "gen") for each in (folder / name).rglob("*")):
        name = path.relative_to(folder).as_posix()
        hidden = any(part.startswith(".") or part == "__pycache__" for part in Path(name).parts)
        if path.is_file() and not hidden:
            found[name] = digest(name, path.read_bytes())
    settings = (folder / "pyproject.toml").read_text(encoding="utf-8")
    found["pyproject.toml"] = digest("", re.sub(r"(?m)^version\s*=.*$", "", settings).encode())
    return found


def _place(root: Path, member: Member, name: str) -> Location:
    """Where a file of a wheel lies in the tree."""
    for folder in ("gen", "src", ""):
        path = root / member.folder / folder / name
        if path.is_file():
            return Location(path.relative_to(root).as_posix(), 1, 1)
    return Location(f"{member.folder}/pyproject.toml", 1, 1)
