"""Which files of a tree are reviewed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["python_files"]


def python_files(root: Path) -> list[bytes]:
    """Paths of the regular `*.py` files below `root`, relative to it, sorted; links and dot-folders are not followed.

    A folder that cannot be read is passed over, like one that vanishes while it is walked.
    """
    return sorted(_walk(os.fsencode(root), b""))


def _walk(folder: bytes, prefix: bytes) -> Iterator[bytes]:
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            if not entry.name.startswith(b"."):
                yield from _walk(entry.path, prefix + entry.name + b"/")
        elif entry.name.endswith(b".py") and entry.is_file(follow_symlinks=False):
            yield prefix + entry.name
