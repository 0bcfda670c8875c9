"""The files of orki's that a repository of the user's own holds as copies."""

from __future__ import annotations

__all__ = ["VENDORED", "bring_up_to_date"]

from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Final

from orki_contract.errors import InvalidSetting

VENDORED: Final[Mapping[str, str]] = {
    "buf.yaml": "buf.yaml",
    "buf.gen.yaml": "buf.gen.yaml",
    "options.proto": "proto/orki/options/v1/options.proto",
}
"""Where each lies, by its name in this package."""


def bring_up_to_date(root: Path) -> Iterator[str]:
    """Writes what is missing, and renews options.proto, which nobody edits; a line on each file.

    Raises:
        InvalidSetting: A file cannot be written.
    """
    for name, place in VENDORED.items():
        content = (resources.files("orki_codegen") / "vendored" / name).read_bytes()
        path = root / place
        if path.is_file() and (path.read_bytes() == content or name != "options.proto"):
            yield f"{place} is there already"
            continue
        word = "brought up to date" if path.is_file() else "written"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        except OSError as error:
            raise InvalidSetting(f"{place} cannot be written: {error.strerror}") from error
        yield f"{place} {word}"
