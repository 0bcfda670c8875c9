"""The distributions of the workspace and the Python interpreters of this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FOLDERS = ("packages/*", "codegen", "examples/*")
SUPPORTED = ("3.11", "3.12", "3.13")

_PROBE = "import sys; sys.exit('%d.%d' % sys.version_info[:2] != sys.argv[1])"


@dataclass(frozen=True, slots=True)
class Distribution:
    """One distribution of the workspace.

    Attributes:
        name: Its name on an index, such as `orki-agent`.
        folder: The folder of its pyproject.toml, relative to the workspace's root.
    """

    name: str
    folder: Path
    pyproject: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def requirement(self) -> str:
        """The requirement that installs it from the workspace's root with every extra."""
        extras = ",".join(sorted(self.pyproject["project"].get("optional-dependencies", {})))
        return f"./{self.folder}{f'[{extras}]' if extras else ''}"


def distributions(root: Path, folders: tuple[str, ...] = FOLDERS) -> tuple[Distribution, ...]:
    """Find the distributions below the workspace's root, sorted by name."""
    found = []
    for pattern in folders:
        for file in root.glob(f"{pattern}/pyproject.toml"):
            pyproject = tomllib.loads(file.read_text(encoding="utf-8"))
            found.append(Distribution(pyproject["project"]["name"], file.parent.relative_to(root), pyproject))
    return tuple(sorted(found, key=lambda each: each.name))


def source_roots(root: Path) -> tuple[Path, ...]:
    """Return every `src` and `gen` folder that holds a module, relative to the workspace's root and sorted."""
    candidates = (each.folder / name for each in distributions(root) for name in ("gen", "src"))
    return tuple(sorted(path for path in candidates if any((root / path).rglob("*.py"))))


def current_python() -> str:
    """Return the Python version that runs the sessions, such as `3.11`."""
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def find_python(version: str) -> Path | None:
    """Return an installed interpreter of a version such as `3.12`, or None.

    Searches the PATH, then the folders of pyenv and uv. Downloads nothing.
    """
    candidates = []
    if on_path := shutil.which(f"python{version}"):
        candidates.append(Path(on_path))
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    uv = Path(os.environ.get("UV_PYTHON_INSTALL_DIR") or Path.home() / ".local/share/uv/python")
    candidates += sorted((pyenv / "versions").glob(f"{version}.*/bin/python"), reverse=True)
    candidates += sorted(uv.glob(f"cpython-{version}.*/bin/python{version}"), reverse=True)
    return next((candidate for candidate in candidates if _is_version(candidate, version)), None)


def _is_version(candidate: Path, version: str) -> bool:
    # A name on the PATH may be a shim for a version that is not installed, so the interpreter is run.
    command = [str(candidate), "-I", "-c", _PROBE, version]
    try:
        return subprocess.run(command, capture_output=True, timeout=30, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False
