"""Files as a git commit holds them."""

from __future__ import annotations

__all__ = ["checked_out", "commit_of"]

import subprocess
from collections.abc import Callable
from pathlib import Path

from orki_contract.errors import InvalidContract


def commit_of(ref: str) -> str | None:
    """The id of the commit that a ref names in the repository around the working directory; None for none."""
    # A leading dash would be an option of git's.
    if ref.startswith("-"):
        return None
    try:
        ran = _git("rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}")
    except FileNotFoundError:
        return None
    return ran.stdout.decode().strip() if ran.returncode == 0 else None


def checked_out(commit: str, folder: Path, wanted: Callable[[str], bool]) -> None:
    """Writes some files of a commit into a folder.

    Args:
        commit: Its id.
        folder: An empty folder.
        wanted: Chooses files by their paths.

    Raises:
        InvalidContract: git cannot read the commit, as in a clone without its history.
    """
    names = _checked(_git("ls-tree", "-r", "-z", "--name-only", "--full-tree", commit), commit).split(b"\0")
    # A path with a newline cannot be asked for, and no proto has one.
    chosen = [name for name in names if name and b"\n" not in name and wanted(name.decode(errors="surrogateescape"))]
    asked = b"".join(commit.encode() + b":" + name + b"\n" for name in chosen)
    answer = _checked(_git("cat-file", "--batch", sent=asked), commit)
    at = 0
    for name in chosen:
        end = answer.index(b"\n", at)
        head = answer[at:end].split(b" ")
        if len(head) != 3 or head[1] != b"blob":
            raise InvalidContract(f"git does not give {name.decode(errors='replace')} of {commit[:10]}: {head!r}")
        size = int(head[2])
        place = folder / name.decode(errors="surrogateescape")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(answer[end + 1 : end + 1 + size])
        at = end + 1 + size + 1


def _git(*arguments: str, sent: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["git", *arguments], input=sent, capture_output=True, check=False)


def _checked(ran: subprocess.CompletedProcess[bytes], commit: str) -> bytes:
    if ran.returncode != 0:
        said = ran.stderr.decode(errors="replace").strip()
        raise InvalidContract(f"git cannot read the commit {commit[:10]}: {said}")
    return ran.stdout
