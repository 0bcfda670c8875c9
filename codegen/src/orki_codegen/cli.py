"""The command `orki-codegen`: what a repository of the user's own needs of the generator."""

from __future__ import annotations

__all__ = ["main"]

import argparse
import sys
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Final

from orki_codegen import generate
from orki_codegen.buf import Buf
from orki_codegen.reference import pages
from orki_codegen.workspace import find_workspace
from orki_contract.exceptions import InvalidSetting, OrkiError
from orki_contract.read import read_image

_VENDORED: Final[Mapping[str, str]] = {
    "buf.yaml": "buf.yaml",
    "buf.gen.yaml": "buf.gen.yaml",
    "options.proto": "proto/orki/options/v1/options.proto",
}

_INIT: Final = """\
Makes a repository ready for contracts: writes buf.yaml, buf.gen.yaml and proto/orki/options/v1/options.proto where they
are missing. What is there already stays; options.proto is brought up to date, as it is vendored.

Then write protos below proto/, name each proto package in the pyproject.toml of the distribution that carries it
([tool.orki] contracts = ["acme.review.v1"]), and run `orki-codegen generate`.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(prog="orki-codegen", description="Turns contracts into code and pages.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    raw = argparse.RawDescriptionHelpFormatter
    generating = commands.add_parser(
        "generate", help="write the generated code of every owner", description=generate.HELP, formatter_class=raw
    )
    generating.add_argument("--check", action="store_true", help="write nothing, and fail if anything would change")
    documenting = commands.add_parser(
        "docs", help="write the reference pages alone", description="Writes the reference pages into a folder."
    )
    documenting.add_argument("folder", metavar="FOLDER", type=Path, help="where; made if it is missing")
    commands.add_parser("init", help="make a repository ready", description=_INIT, formatter_class=raw)
    given = parser.parse_args(arguments)
    if given.command == "generate":
        return generate.main(["--check"] if given.check else [])
    try:
        if given.command == "docs":
            _docs(given.folder)
        else:
            _init(Path.cwd())
    except OrkiError as error:
        print(f"orki-codegen: {error.message}", file=sys.stderr)
        return 1
    return 0


def _docs(folder: Path) -> None:
    workspace = find_workspace(Path.cwd())
    buf = Buf(workspace.root)
    made = pages(read_image(buf.image()), sorted(workspace.declared()), buf.files())
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in made.items():
        (folder / name).write_bytes(content)
    print(f"{len(made)} pages written to {folder}")


def _init(root: Path) -> None:
    """Writes what is missing.

    Raises:
        InvalidSetting: A file cannot be written.
    """
    for name, place in _VENDORED.items():
        content = (resources.files("orki_codegen") / "vendored" / name).read_bytes()
        path = root / place
        if path.is_file() and (path.read_bytes() == content or name != "options.proto"):
            print(f"{place} is there already")
            continue
        word = "brought up to date" if path.is_file() else "written"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        except OSError as error:
            raise InvalidSetting(f"{place} cannot be written: {error.strerror}") from error
        print(f"{place} {word}")


if __name__ == "__main__":
    sys.exit(main())
