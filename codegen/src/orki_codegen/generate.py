"""`python -m orki_codegen.generate [--check]`: from proto/ to the generated code of every owner.

All is made in a temporary folder first; nothing is written where anything is wrong.
"""

from __future__ import annotations

__all__ = ["Tree", "generate", "main"]

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from orki_codegen.buf import Buf
from orki_codegen.workspace import Owner, Workspace, find_workspace
from orki_contract.exceptions import OrkiError
from orki_contract.images import IMAGE_NAME, package_image
from orki_contract.read import ReadContract, read_image

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """The generated files below one folder.

    Attributes:
        owner: Whose they are.
        root: Their folder, relative to the workspace's root.
        files: Their contents by path, relative to that folder.
    """

    owner: str
    root: str
    files: dict[str, bytes]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m orki_codegen.generate", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if anything would change")
    arguments = parser.parse_args()
    try:
        trees = generate(Path.cwd(), print)
    except OrkiError as error:
        sys.exit(error.message)
    for tree in trees:
        write(Path.cwd(), tree)
    _ = arguments


def generate(root: Path, tell: Tell) -> list[Tree]:
    """All generated files of a workspace, in memory.

    Raises:
        InvalidContract: The protos are wrong; the message lists every place.
        InvalidSetting: The workspace is.
    """
    workspace = find_workspace(root)
    buf = Buf(root)
    with ThreadPoolExecutor(2) as pool:
        image, paths = pool.submit(buf.image), pool.submit(buf.files)
        read, places = read_image(image.result()), paths.result()
        tell(f"{len(places)} proto files, {len(workspace.owners)} owners")
        trees = list(pool.map(lambda owner: _tree(buf, read, image.result(), places, owner), workspace.owners))
    return trees


def _tree(buf: Buf, read: ReadContract, image: bytes, places: dict[str, str], owner: Owner) -> Tree:
    packages = {package for package, _ in owner.packages}
    own = [places[file.path] for file in read.files if file.package in packages]
    with tempfile.TemporaryDirectory(prefix="orki-generate-") as folder:
        buf.generate(_folders(own, list(places.values())), Path(folder))
        made = Path(folder, "gen")
        files = {path.relative_to(made).as_posix(): path.read_bytes() for path in made.rglob("*") if path.is_file()}
    for package in packages:
        folder_ = package.replace(".", "/")
        files[f"{folder_}/{IMAGE_NAME}"] = package_image(image, package)
        files[f"{folder_}/py.typed"] = b""
    return Tree(owner=owner.name, root=f"{owner.folder}/gen", files=files)


def _folders(own: Sequence[str], every: Sequence[str]) -> list[str]:
    """The fewest paths that choose exactly these files: folders where all below is chosen, else files."""
    foreign = {str(parent) for path in set(every) - set(own) for parent in PurePosixPath(path).parents}
    chosen = set()
    for path in own:
        folder = str(PurePosixPath(path).parent)
        chosen.add(path if folder in foreign else folder)
    return sorted(chosen)


def write(root: Path, tree: Tree) -> None:
    folder = root / tree.root
    for name, content in tree.files.items():
        path = folder / name
        if not path.is_file() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


if __name__ == "__main__":
    main()
