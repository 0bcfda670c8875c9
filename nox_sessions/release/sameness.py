"""Tell whether a built file brings what the index has under its name, though the bytes differ.

A distribution's `contract.binpb` holds copies of the contracts that it imports. When their owner changes them, the copy
changes with them; the distribution itself did not, so it needs no release, and what is published stays as it is.
"""

from __future__ import annotations

__all__ = ["same_but_for_copies"]

import io
import tarfile
import zipfile
from collections.abc import Iterator

from orki_codegen.gate.wheels import digest


def same_but_for_copies(name: str, here: bytes, there: bytes) -> bool:
    """Compare two wheels, or two sdists, file by file, but for the copies of contracts that others own.

    Args:
        name: the file's name, which tells whether it is a wheel.
        here: the bytes that were built.
        there: the bytes that the index has.
    """
    members = _of_wheel if name.endswith(".whl") else _of_sdist
    try:
        return dict(members(here)) == dict(members(there))
    except (zipfile.BadZipFile, tarfile.TarError, EOFError):
        return False


def _of_wheel(content: bytes) -> Iterator[tuple[str, str]]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for name in archive.namelist():
            # The record only repeats the digests of all other files.
            if not name.endswith((".dist-info/RECORD", "/")):
                yield name, digest(name, archive.read(name))


def _of_sdist(content: bytes) -> Iterator[tuple[str, str]]:
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        for member in archive:
            if (file := archive.extractfile(member)) is not None:
                yield member.name, digest(member.name, file.read())
