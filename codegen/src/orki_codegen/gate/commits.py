"""Releases as a git commit holds them."""

from __future__ import annotations

__all__ = ["past_at", "resolved", "text_at"]

import subprocess
from pathlib import Path
from typing import Final

from orki_codegen.gate.members import find_members
from orki_codegen.gate.past import Past, Release
from orki_contract.errors import InvalidSetting
from orki_contract.versions import checked_out, commit_of, version_at

# Where neither contracts nor modules that users import lie; the rest of a commit is written out.
_LEFT_OUT: Final = frozenset({"benchmarks", "docs", "tests"})
_SOURCES: Final = frozenset({"gen", "src"})
_ALWAYS: Final = (".proto", ".binpb", ".toml", ".yaml", ".lock")


def resolved(ref: str) -> str:
    """The id of the commit that a ref names.

    Raises:
        InvalidSetting: There is no such commit here.
    """
    commit = commit_of(ref)
    if commit is not None:
        return commit
    told = _git("rev-parse", "--is-shallow-repository")
    if told == "true":
        raise InvalidSetting(
            f'this clone is shallow and has no commit "{ref}": fetch its history (`git fetch --unshallow`; '
            "`fetch-depth: 0` for a workflow's checkout), then ask again"
        )
    if told is None:
        raise InvalidSetting(f'"{ref}" cannot be read: this folder is in no git repository, or there is no git')
    raise InvalidSetting(f'this repository has no commit "{ref}": is the name right, and was it fetched (`git fetch`)?')


def past_at(commit: str, folder: Path, origin: str, *, stands_in: bool = False) -> Past:
    """Everything as a commit has it.

    Args:
        commit: Its id.
        folder: An empty folder, to write the files into.
        origin: What to call it.
        stands_in: Whether it stands for what was never published.

    Raises:
        InvalidContract: git cannot read it, or its contract cannot be read.
        InvalidSetting: A pyproject.toml of it cannot be read.
    """
    checked_out(commit, folder, _wanted)
    # The workspace may be a folder of the repository.
    root = folder / (_git("rev-parse", "--show-prefix") or "")
    releases = {
        member.name: Release(
            name=member.name,
            version=member.version,
            origin=origin,
            packages=member.contracts,
            imports=tuple(each for each in (root / member.folder / "src", root / member.folder) if each.is_dir()),
            commands=member.commands,
            api=member.api or frozenset(),
            folder=root / member.folder,
            extras=frozenset(member.extras),
            python=member.python,
        )
        for member in find_members(root).values()
    }
    return Past(releases=releases, contract=version_at(str(root)), stands_in=stands_in)


def _wanted(path: str) -> bool:
    folders = set(path.split("/")[:-1])
    return path.endswith(_ALWAYS) or bool(folders & _SOURCES) or not folders & _LEFT_OUT


def text_at(commit: str, path: str) -> str | None:
    """The text of a file of the workspace at a commit; None where it is not there."""
    return _git("show", f"{commit}:./{path}")


def _git(*arguments: str) -> str | None:
    try:
        ran = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return ran.stdout.strip() if ran.returncode == 0 else None
