"""The command `orki-codegen`."""

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
Create a repository with a first contract (a task, a stream with a group, a tool), an agent, a consumer, tests, a
noxfile with its launcher and a workflow, and generate the code. Existing files are kept.

Next, run ./noxw -s demo and ./noxw in it.
"""

_VENDOR: Final = """\
Write buf.yaml, buf.gen.yaml and proto/orki/options/v1/options.proto. Existing settings are kept; options.proto is
updated.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(prog="orki-codegen", description="Generate code and pages from contracts.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    raw = argparse.RawDescriptionHelpFormatter
    generating = commands.add_parser(
        "generate", help="write the generated code", description=generate.HELP, formatter_class=raw
    )
    generating.add_argument("--check", action="store_true", help="write nothing, and fail if anything would change")
    documenting = commands.add_parser(
        "docs", help="write the reference pages", description="Write the reference pages into a folder."
    )
    documenting.add_argument("folder", metavar="FOLDER", type=Path, help="target folder, created if missing")
    founding = commands.add_parser("init", help="create a repository", description=_INIT, formatter_class=raw)
    founding.add_argument(
        "folder", metavar="FOLDER", type=Path, nargs="?", default=Path(), help="default: the current folder"
    )
    founding.add_argument("--name", default="", help="name of the distribution; default: the name of the folder")
    founding.add_argument("--package", default="", help="proto package; default: derived from the name")
    commands.add_parser(
        "vendor", help="write the buf files and update the options", description=_VENDOR, formatter_class=raw
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
    """Write missing files and generate the code.

    Raises:
        InvalidSetting: A name cannot be used, or a file cannot be written.
    """
    root = folder.absolute()
    if root.exists() and not root.is_dir():
        raise InvalidSetting(f"{folder} is a file: give a folder")
    names = names_for(name or re.sub(r"[-_. ]+", "-", root.resolve().name.lower()), package)
    written, kept = lay_out(root, names)
    for path in kept:
        print_line(f"{path} exists already and is kept")
    print_line(f"{len(written)} files written below {folder}: distribution {names.name}, proto package {names.package}")
    status = generate.run(root, check=False)
    if status == 0:
        print_line(f"next, in {folder}: ./noxw -s demo (the example), ./noxw (all checks)")
    return status


if __name__ == "__main__":
    sys.exit(main())
