"""Find the Python versions that this machine has, without asking for any to be downloaded."""

from __future__ import annotations

__all__ = ["SUPPORTED", "current", "find"]

import os
import shutil
import subprocess
import sys
from pathlib import Path

SUPPORTED = ("3.11", "3.12", "3.13")

_PROBE = "import sys; sys.exit('%d.%d' % sys.version_info[:2] != sys.argv[1])"


def current() -> str:
    """Return the version that the sessions run on, such as `3.11`."""
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def _answers(candidate: Path, version: str) -> bool:
    """Run it: a name on the PATH may be a shim that knows no such version."""
    command = [str(candidate), "-I", "-c", _PROBE, version]
    try:
        return subprocess.run(command, capture_output=True, timeout=30, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def find(version: str) -> Path | None:
    """Return an interpreter of a version such as `3.12`, or None.

    Looks on the PATH, then where pyenv and uv keep what they installed.
    """
    candidates = []
    if on_path := shutil.which(f"python{version}"):
        candidates.append(Path(on_path))
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    uv = Path(os.environ.get("UV_PYTHON_INSTALL_DIR") or Path.home() / ".local/share/uv/python")
    candidates += sorted((pyenv / "versions").glob(f"{version}.*/bin/python"), reverse=True)
    candidates += sorted(uv.glob(f"cpython-{version}.*/bin/python{version}"), reverse=True)
    return next((candidate for candidate in candidates if _answers(candidate, version)), None)
