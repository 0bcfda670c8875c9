"""Build a distribution's CHANGELOG.md from the fragments in its changes/ folder.

    python -m nox_sessions.release.notes DIST VERSION [--draft]

Exit status: 0 written (or printed, with `--draft`); 1 the fragments or the version are wrong; 2 wrong usage.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from nox_sessions.workspace import distributions

CONFIG = "towncrier.toml"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or print the notes; the working directory must be the workspace's root."""
    parser = argparse.ArgumentParser(prog="notes", description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("distribution", metavar="DIST", help="such as orki-events")
    parser.add_argument("version", metavar="VERSION", help="the version to release, such as 1.2.0")
    parser.add_argument("--draft", action="store_true", help="print the notes and change nothing")
    given = parser.parse_args(arguments)
    root = Path.cwd()
    folders = {canonicalize_name(each.name): root / each.folder for each in distributions(root)}
    name = canonicalize_name(given.distribution)
    if not (folders.get(name, root) / "changes").is_dir():
        known = sorted(each for each, folder in folders.items() if (folder / "changes").is_dir())
        parser.error(f"{given.distribution} has no changes/ folder; the distributions with one are {', '.join(known)}")
    try:
        version = Version(given.version)
    except InvalidVersion:
        parser.error(f"{given.version} is not a version such as 1.2.0")
    problem = _problem(folders[name], version)
    if problem is not None and not (given.draft and problem.startswith("pyproject")):
        print(f"{name}: {problem}", file=sys.stderr)
        return 1
    return _render(root, folders[name], name, version, draft=given.draft)


def _problem(folder: Path, version: Version) -> str | None:
    """Return the reason why notes cannot be written, or None."""
    promised = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    if Version(promised) != version:
        return f"pyproject.toml has version {promised}, not {version}: set the version there first"
    if not [path for path in (folder / "changes").glob("*.md") if path.name != "README.md"]:
        return "changes/ has no fragment: describe the changes for users, see changes/README.md"
    changelog = folder / "CHANGELOG.md"
    if changelog.is_file() and f"\n## {version} (" in changelog.read_text(encoding="utf-8"):
        return f"CHANGELOG.md already has notes of {version}, and released notes never change: raise the version"
    return None


def _render(root: Path, folder: Path, name: str, version: Version, *, draft: bool) -> int:
    """Run towncrier, which also removes the fragments from the folder and from git."""
    command = [sys.executable, "-m", "towncrier", "build", "--config", str(root / CONFIG), "--dir", str(folder)]
    command += ["--name", name, "--version", str(version), "--draft" if draft else "--yes"]
    changelog = folder / "CHANGELOG.md"
    if not draft and not changelog.exists():
        start = tomllib.loads((root / CONFIG).read_text(encoding="utf-8"))["tool"]["towncrier"]["start_string"]
        changelog.write_text(f"# Changes of {name}\n\n{start}", encoding="utf-8")
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
