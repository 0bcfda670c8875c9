"""Import every module of some installed wheels: `python -I import_everything.py WHEEL...`.

A script of its own, because the environment under test holds nothing but the wheels.
"""

from __future__ import annotations

import importlib
import sys
import zipfile
from pathlib import Path, PurePosixPath


def modules(wheel: Path) -> list[str]:
    """Return the dotted names of a wheel's modules, except `__main__`, which would run."""
    with zipfile.ZipFile(wheel) as archive:
        files = [PurePosixPath(name) for name in archive.namelist() if name.endswith(".py")]
    names = []
    for file in files:
        parts = file.parent.parts if file.stem == "__init__" else (*file.parent.parts, file.stem)
        if parts[-1] != "__main__" and all(part.isidentifier() for part in parts):
            names.append(".".join(parts))
    return sorted(names)


def main(wheels: list[str]) -> int:
    """Import all modules and return the number of wheels with a module that fails."""
    failing = 0
    for wheel in map(Path, wheels):
        wrong = []
        names = modules(wheel)
        for name in names:
            try:
                importlib.import_module(name)
            except Exception as error:
                wrong.append(f"{name}: {type(error).__name__}: {error}")
        print(f"{wheel.name}: {len(names) - len(wrong)} of {len(names)} modules import", *wrong, sep="\n  ")
        failing += bool(wrong)
    return failing


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
