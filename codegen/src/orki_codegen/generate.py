"""Generates the code of every owner from proto/: `python -m orki_codegen.generate [--check]`."""

from __future__ import annotations

__all__ = ["HELP", "Generated", "generate", "main", "run"]

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Final, NamedTuple

from orki_codegen._asyncapi import DOCUMENT, document
from orki_codegen._buf import Buf
from orki_codegen._outline import Subject, changes, outline
from orki_codegen._reference import REFERENCE, pages
from orki_codegen._tree import Difference, Tree, compare, install
from orki_codegen._workspace import Owner, Workspace, find_workspace
from orki_contract.errors import InvalidContract, OrkiError
from orki_contract.images import IMAGE_NAME, package_images
from orki_contract.printing import print_line
from orki_contract.read import ReadContract, read_image
from orki_contract.validate import Owners, validate

HELP: Final = """\
Read all proto files in the modules of buf.yaml, check their contracts, and write the Python code, the images
(contract.binpb), an AsyncAPI document of the streams (asyncapi.json) and the reference page of every proto package.
`[tool.orki] contracts` in the pyproject.toml files names the owner of each package. Only the gen/ folders of the owners
and docs/reference/ are changed, and nothing is written if there is an error.
"""


class Generated(NamedTuple):
    """The files below each generated folder, in memory, and the contract of the protos."""

    trees: tuple[Tree, ...]
    read: ReadContract


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status is 1 for invalid protos or a difference with `--check`."""
    parser = argparse.ArgumentParser(
        prog="python -m orki_codegen.generate", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing, and fail if anything would change")
    return run(Path.cwd(), check=parser.parse_args(arguments).check)


def run(root: Path, *, check: bool) -> int:
    """Generate or compare the code of one repository and return the exit status."""
    try:
        workspace = find_workspace(root)
        generated = generate(workspace, print_line)
        differences = [(tree, compare(root, tree)) for tree in generated.trees]
        if check:
            return _report_drift(differences)
        _report_changes(workspace, generated, differences)
        for tree, found in differences:
            install(root, tree, found)
    except OrkiError as error:
        print(error.message, file=sys.stderr)
        return 1
    return 0


def generate(workspace: Workspace, log: Callable[[str], None]) -> Generated:
    """Generate all files of a workspace; `log` is called with a line for every step.

    Raises:
        InvalidContract: The protos are invalid; the message has a line for each violation.
        InvalidSetting: The workspace or the toolchain is invalid.
    """
    buf = Buf(workspace.root)
    with ThreadPoolExecutor(2) as pool:
        asked = pool.submit(buf.image), pool.submit(buf.files)
        image, places = asked[0].result(), asked[1].result()
        texts = {name: (workspace.root / path).read_text(encoding="utf-8") for name, path in places.items()}
        read = read_image(image, texts)
        log(f"{len(places)} proto files, {len(workspace.owners)} owners")
        found = validate(read, Owners(packages=workspace.declared(), files=places))
        if found:
            lines = [*map(str, found), f"{len(found)} violations: nothing was written" if len(found) > 1 else ""]
            raise InvalidContract("\n".join(filter(None, lines)))

        # A file without a package is plain protobuf and has no image.
        images = package_images(image, {*workspace.declared()} - {""})

        def make(owner: Owner) -> Tree:
            tree = _owner_tree(buf, read, images, places, owner)
            log(f"{owner.name}: {len(tree.files)} files made")
            return tree

        trees = list(pool.map(make, workspace.owners))
    trees += [Tree(owner=folder, root=f"{folder}/gen", files={}) for folder in workspace.former]
    owned = sorted(workspace.declared())
    trees.append(Tree(owner="reference", root=REFERENCE, files=pages(read, owned, places), marked=True))
    return Generated(trees=tuple(trees), read=read)


def _owner_tree(
    buf: Buf, read: ReadContract, images: Mapping[str, bytes], places: Mapping[str, str], owner: Owner
) -> Tree:
    packages = {package for package, _ in owner.packages}
    own = [places[file.path] for file in read.files if file.package in packages]
    with tempfile.TemporaryDirectory(prefix="orki-generate-") as temporary:
        buf.generate(_fewest_paths(own, [*places.values()]), Path(temporary))
        made = Path(temporary, "gen")
        files = {path.relative_to(made).as_posix(): path.read_bytes() for path in made.rglob("*") if path.is_file()}
    for package in packages & images.keys():
        folder = package.replace(".", "/")
        files[f"{folder}/{IMAGE_NAME}"] = images[package]
        if (described := document(read, package)) is not None:
            files[f"{folder}/{DOCUMENT}"] = described
    for folder in {str(PurePosixPath(name).parent) for name in files} - {"."}:
        files[f"{folder}/py.typed"] = b""
    return Tree(owner=owner.name, root=f"{owner.folder}/gen", files=files)


def _fewest_paths(own: Sequence[str], every: Sequence[str]) -> list[str]:
    """Return the fewest paths that select exactly these files: folders if all their files are selected, else files."""
    foreign = {str(parent) for path in {*every} - {*own} for parent in PurePosixPath(path).parents}
    folders = {path: str(PurePosixPath(path).parent) for path in own}
    return sorted({path if folder in foreign else folder for path, folder in folders.items()})


def _report_drift(differences: Sequence[tuple[Tree, Difference]]) -> int:
    lines = [line for tree, found in differences for line in found.lines(tree)]
    if lines:
        print(
            *lines,
            "Generated code is out of date: run `nox -s generate` and commit the result.",
            sep="\n",
            file=sys.stderr,
        )
        return 1
    print_line("generated code is up to date")
    return 0


def _report_changes(workspace: Workspace, generated: Generated, differences: Sequence[tuple[Tree, Difference]]) -> None:
    """Report the contract changes and the number of written files of each owner."""
    by_root = {tree.root: found for tree, found in differences}
    for owner in workspace.owners:
        root = f"{owner.folder}/gen"
        found = by_root[root]
        if found.empty:
            continue
        packages = [package for package, _ in owner.packages if package]
        lines = changes(_installed(workspace.root / root), outline(generated.read, packages))
        print_line(f"{owner.name}: {found.summary()}")
        for line in lines or ["contract unchanged: only comments, paths or the generator changed"]:
            print_line(f"  {line}")
    for tree, found in differences:
        if not found.empty and tree.root not in {f"{owner.folder}/gen" for owner in workspace.owners}:
            print_line(f"{tree.root}: {found.summary()}")
    if all(found.empty for _, found in differences):
        print_line("nothing changed")


def _installed(root: Path) -> dict[str, Subject]:
    """Return the outline of an existing gen folder, ignoring unreadable images."""
    found: dict[str, Subject] = {}
    for path in sorted(root.glob(f"**/{IMAGE_NAME}")):
        package = path.parent.relative_to(root).as_posix().replace("/", ".")
        try:
            found.update(outline(read_image(path.read_bytes()), [package]))
        except InvalidContract as error:
            print_line(f"{path.relative_to(root)}: {error.message}; it is rewritten")
    return found


if __name__ == "__main__":
    sys.exit(main())
