"""Installs packages of npm for a session: `python -m nox_sessions.npm MANIFEST TOOLS`.

MANIFEST is a folder with package.json and package-lock.json. The packages are installed again only when the lock file
changes.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path


def install(manifest: Path, tools: Path) -> str:
    """Install the locked packages by digest, without running their scripts, and return the path of node.

    Raises:
        SystemExit: node or npm is missing.
    """
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        sys.exit(f"{manifest.name} needs node (20 or newer) and npm on the PATH")
    digest = hashlib.sha256((manifest / "package-lock.json").read_bytes()).hexdigest()
    stamp = tools / "made-from"
    if stamp.is_file() and stamp.read_text(encoding="ascii") == digest:
        return node
    shutil.rmtree(tools, ignore_errors=True)
    tools.mkdir(parents=True)
    for name in ("package.json", "package-lock.json"):
        shutil.copy(manifest / name, tools)
    subprocess.run([npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"], cwd=tools, check=True)
    stamp.write_text(digest, encoding="ascii")
    return node


if __name__ == "__main__":
    install(Path(sys.argv[1]).absolute(), Path(sys.argv[2]).absolute())
