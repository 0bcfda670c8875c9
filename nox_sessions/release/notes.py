"""Turn the fragments in a distribution's changes/ into its CHANGELOG.md.

    python -m nox_sessions.release.notes DIST VERSION [--draft]

Exit status: 0 written (or shown, with `--draft`); 1 the fragments or the version do not fit; 2 the command is wrong.
"""

from __future__ import annotations

__all__ = ["main"]

import argparse
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from nox_sessions.layout import distributions

CONFIG = "towncrier.toml"


def main(arguments: Sequence[str] | None = None) -> int:
    """Render as the arguments say; the working directory is the workspace's root."""
    parser = argparse.ArgumentParser(prog="notes", description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("distribution", metavar="DIST", help="as orki-events")
    parser.add_argument("version", metavar="VERSION", help="the version that is released, as 1.2.0")
    parser.add_argument("--draft", action="store_true", help="print it, and change nothing")
    given = parser.parse_args(arguments)
    root = Path.cwd()
    folders = {canonicalize_name(each.name): root / each.folder for each in distributions(root)}
    name = canonicalize_name(given.distribution)
    if not (folders.get(name, root) / "changes").is_dir():
        known = sorted(each for each, folder in folders.items() if (folder / "changes").is_dir())
        parser.error(f"{given.distribution} has no changes/ here; there are {', '.join(known)}")
    try:
        version = Version(given.version)
    except InvalidVersion:
        parser.error(f"{given.version} is no version, such as 1.2.0")
    problem = _problem(folders[name], version)
    if problem is not None and not (given.draft and problem.startswith("pyproject")):
        print(f"{name}: {problem}", file=sys.stderr)
        return 1
    return _render(root, folders[name], name, version, draft=given.draft)


def _problem(folder: Path, version: Version) -> str | None:
    """Say why there cannot be notes, if so."""
    promised = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    if Version(promised) != version:
        return f"pyproject.toml says {promised}, and the notes shall be of {version}: set the version there first"
    if not [path for path in (folder / "changes").glob("*.md") if path.name != "README.md"]:
        return "changes/ holds no fragment: what do those who upgrade have to know? changes/README.md says how"
    changelog = folder / "CHANGELOG.md"
    if changelog.is_file() and f"\n## {version} (" in changelog.read_text(encoding="utf-8"):
        return f"CHANGELOG.md has notes of {version} already, and what is released never changes: raise the version"
    return None


def _render(root: Path, folder: Path, name: str, version: Version, *, draft: bool) -> int:
    """Let towncrier do it; it removes the fragments, and tells git where there is one."""
    command = [sys.executable, "-m", "towncrier", "build", "--config", str(root / CONFIG), "--dir", str(folder)]
    command += ["--name", name, "--version", str(version), "--draft" if draft else "--yes"]
    changelog = folder / "CHANGELOG.md"
    if not draft and not changelog.exists():
        start = tomllib.loads((root / CONFIG).read_text(encoding="utf-8"))["tool"]["towncrier"]["start_string"]
        changelog.write_text(f"# Changes of {name}\n\n{start}", encoding="utf-8")
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
