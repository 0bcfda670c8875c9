"""Packages that carry protos of other people's: installed as they are pinned, beside the environments, for tests."""

from __future__ import annotations

__all__ = ["packages"]

from pathlib import Path

import nox

from nox_sessions.environments import Environment, uv

PINS = Path("tests/foreign")
FOLDERS = {"newest": "requirements.txt", "earlier": "earlier.txt"}


def packages(session: nox.Session, environment: Environment) -> Path:
    """Install them, each file by its hash and without what it depends on; return the folder that holds the folders."""
    top = Path(session.cache_dir).parent.absolute() / "foreign"
    for name, pins in FOLDERS.items():
        folder, text = top / name, (PINS / pins).read_text(encoding="ascii")
        stamp = folder.with_suffix(".made-from")
        if not stamp.is_file() or stamp.read_text(encoding="ascii") != text:
            command = [
                "pip",
                "install",
                "--quiet",
                "--python",
                environment.python,
                "--target",
                str(folder),
                "--no-deps",
            ]
            command += ["--upgrade", "--only-binary", ":all:", "--require-hashes", "--requirement", str(PINS / pins)]
            session.run(uv(), *command, external=True)
            stamp.write_text(text, encoding="ascii")
    return top
