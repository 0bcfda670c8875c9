"""The command `orki-codegen`: what a repository of the user's own needs of the generator."""

from __future__ import annotations

__all__ = ["main"]

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from orki_codegen import generate
from orki_codegen._buf import Buf
from orki_codegen._gate import command as gate
from orki_codegen._new_repository import bring_up_to_date, lay_out, names_for
from orki_codegen._reference import pages
from orki_codegen._workspace import find_workspace
from orki_contract.errors import InvalidSetting, OrkiError
from orki_contract.printing import print_line
from orki_contract.read import read_image

_INIT: Final = """\
Makes a repository of your own: a first contract (a task, a stream with a group, a tool), an agent, a consumer, their
tests, a noxfile with its launcher, a workflow; and generates the code. What is there already stays as it is.

Its README names the two commands that come next: ./noxw -s demo and ./noxw.
"""

_VENDOR: Final = """\
Writes buf.yaml, buf.gen.yaml and proto/orki/options/v1/options.proto where they are missing. What is there already
stays; options.proto is brought up to date, as it is a copy of orki's.
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
    founding = commands.add_parser("init", help="make a repository of your own", description=_INIT, formatter_class=raw)
    founding.add_argument("folder", metavar="FOLDER", type=Path, nargs="?", default=Path(), help="where; default: here")
    founding.add_argument("--name", default="", help="of the distribution; default: the folder's name")
    founding.add_argument("--package", default="", help="proto package; default: made from the name")
    commands.add_parser(
        "vendor", help="write or renew buf's files and the options", description=_VENDOR, formatter_class=raw
    )
    gate.register(commands)
    given = parser.parse_args(arguments)
    if given.command == "gate":
        return gate.run(given)
    if given.command == "generate":
        return generate.main(["--check"] if given.check else [])
    try:
        if given.command == "docs":
            _docs(given.folder)
        elif given.command == "init":
            return _init(given.folder, given.name, given.package)
        else:
            for line in bring_up_to_date(Path.cwd()):
                print_line(line)
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
    print_line(f"{len(made)} pages written to {folder}")


def _init(folder: Path, name: str, package: str) -> int:
    """Writes what is missing, and generates.

    Raises:
        InvalidSetting: A name cannot be used, or a file cannot be written.
    """
    root = folder.absolute()
    if root.exists() and not root.is_dir():
        raise InvalidSetting(f"{folder} is a file: name a folder, which need not be there yet")
    names = names_for(name or re.sub(r"[-_. ]+", "-", root.resolve().name.lower()), package)
    written, kept = lay_out(root, names)
    for place in kept:
        print_line(f"{place} is there already, and stays as it is")
    print_line(f"{len(written)} files written below {folder}: distribution {names.name}, proto package {names.package}")
    status = generate.run(root, check=False)
    if status == 0:
        print_line(f"next, in {folder}: ./noxw -s demo (what it does), ./noxw (what must be green)")
    return status


if __name__ == "__main__":
    sys.exit(main())
