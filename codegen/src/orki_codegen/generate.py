"""From proto/ to the generated code of every owner: `python -m orki_codegen.generate [--check]`."""

from __future__ import annotations

__all__ = ["HELP", "Generated", "generate", "main", "run"]

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

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
Reads every proto file below the modules of buf.yaml, checks the contracts in them against all rules, and writes the
Python code, the images (contract.binpb) and the reference pages of every proto package. Who owns which package is
read from `[tool.orki] contracts` of the pyproject.toml files. Nothing is written where anything is wrong; and nothing
but the owners' gen/ and docs/reference/ is ever touched.
"""

_STALE: Final = "Generated code is not what the protos say: run `nox -s generate` and commit what it writes."


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """What a run made, in memory.

    Attributes:
        trees: The files below each generated folder.
        read: The contract that they were made from.
    """

    trees: tuple[Tree, ...]
    read: ReadContract


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; 0: done, or nothing to do; 1: the protos are wrong, or `--check` found a difference."""
    parser = argparse.ArgumentParser(
        prog="python -m orki_codegen.generate",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="write nothing, and fail if anything would change")
    return run(Path.cwd(), check=parser.parse_args(arguments).check)


def run(root: Path, *, check: bool) -> int:
    """Generates, or compares, in one repository; the exit status is that of `main`."""
    try:
        workspace = find_workspace(root)
        generated = generate(workspace, _tell)
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


def generate(workspace: Workspace, tell: Callable[[str], None]) -> Generated:
    """Makes all generated files of a workspace.

    Args:
        workspace: The repository.
        tell: Takes a line on every step.

    Raises:
        InvalidContract: The protos are wrong; the message has a line for every place.
        InvalidSetting: The workspace or the toolchain is.
    """
    buf = Buf(workspace.root)
    with ThreadPoolExecutor(2) as pool:
        asked = pool.submit(buf.image), pool.submit(buf.files)
        image, places = asked[0].result(), asked[1].result()
        texts = {name: (workspace.root / path).read_text(encoding="utf-8") for name, path in places.items()}
        read = read_image(image, texts)
        tell(f"{len(places)} proto files, {len(workspace.owners)} owners")
        found = validate(read, Owners(packages=workspace.declared(), files=places))
        if found:
            lines = [*map(str, found), f"{len(found)} violations: nothing was written" if len(found) > 1 else ""]
            raise InvalidContract("\n".join(filter(None, lines)))

        # A file without a package is plain protobuf, never a contract: it has no folder in which an image could lie.
        images = package_images(image, {*workspace.declared()} - {""})

        def make(owner: Owner) -> Tree:
            tree = _owner_tree(buf, read, images, places, owner)
            tell(f"{owner.name}: {len(tree.files)} files made")
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
        files[f"{package.replace('.', '/')}/{IMAGE_NAME}"] = images[package]
    for folder in {str(PurePosixPath(name).parent) for name in files} - {"."}:
        files[f"{folder}/py.typed"] = b""
    return Tree(owner=owner.name, root=f"{owner.folder}/gen", files=files)


def _fewest_paths(own: Sequence[str], every: Sequence[str]) -> list[str]:
    """The fewest paths that choose exactly these files: folders where all below is chosen, else files."""
    foreign = {str(parent) for path in {*every} - {*own} for parent in PurePosixPath(path).parents}
    folders = {path: str(PurePosixPath(path).parent) for path in own}
    return sorted({path if folder in foreign else folder for path, folder in folders.items()})


def _report_drift(differences: Sequence[tuple[Tree, Difference]]) -> int:
    lines = [line for tree, found in differences for line in found.lines(tree)]
    if lines:
        print("\n".join([*lines, _STALE]), file=sys.stderr)
        return 1
    print_line("generated code is what the protos say")
    return 0


def _report_changes(workspace: Workspace, generated: Generated, differences: Sequence[tuple[Tree, Difference]]) -> None:
    """Says for each owner how its contract changed, and how many files are written for it."""
    by_root = {tree.root: found for tree, found in differences}
    for owner in workspace.owners:
        root = f"{owner.folder}/gen"
        found = by_root[root]
        if found.empty:
            continue
        packages = [package for package, _ in owner.packages if package]
        told = changes(_installed(workspace.root / root), outline(generated.read, packages))
        _tell(f"{owner.name}: {found.summary()}")
        for line in told or ["contract unchanged: only comments, places or the generator changed"]:
            _tell(f"  {line}")
    for tree, found in differences:
        if not found.empty and tree.root not in {f"{owner.folder}/gen" for owner in workspace.owners}:
            _tell(f"{tree.root}: {found.summary()}")
    if all(found.empty for _, found in differences):
        _tell("nothing changed")


def _installed(root: Path) -> dict[str, Subject]:
    """The outline of what lies in a gen folder already; what cannot be read there counts as nothing."""
    found: dict[str, Subject] = {}
    for path in sorted(root.glob(f"**/{IMAGE_NAME}")):
        package = path.parent.relative_to(root).as_posix().replace("/", ".")
        try:
            found.update(outline(read_image(path.read_bytes()), [package]))
        except InvalidContract as error:
            _tell(f"{path.relative_to(root)}: {error.message}; it is written anew")
    return found


def _tell(line: str) -> None:
    print_line(line)


if __name__ == "__main__":
    sys.exit(main())
