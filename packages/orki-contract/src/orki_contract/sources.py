"""Where a contract can be read from: an image, a folder, a wheel, or what is installed."""

from __future__ import annotations

__all__ = ["Image", "images_in"]

import os
import zipfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from orki_contract.errors import InvalidContract
from orki_contract.images import IMAGE_NAME, image_of
from orki_contract.provenance import source_folder


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """An image and where it was found.

    Attributes:
        place: For people.
        content: The serialized FileDescriptorSet.
        shipped: Whether it is the image of one proto package, as wheels ship it; what else is in it was imported.
    """

    place: str
    content: bytes
    shipped: bool


def images_in(source: str) -> list[Image]:
    """Every image that a source holds, sorted by where it lies.

    Args:
        source: Path of an image, of a wheel or of a folder (searched for `contract.binpb`); or name of an installed
            distribution (`orki-events`) or proto package (`orki.events.v1`).

    Raises:
        InvalidContract: There is no such source, or it holds no image.
    """
    path = Path(source)
    if path.is_dir():
        found = _in_folder(path)
        kind = f"the folder {source}"
    elif path.is_file() and zipfile.is_zipfile(path):
        found = _in_wheel(path)
        kind = f"the wheel {source}"
    elif path.is_file():
        return [Image(place=source, content=_read(path), shipped=path.name == IMAGE_NAME)]
    else:
        found = _installed(source)
        kind = f"the installed distribution {source}"
    if not found:
        raise InvalidContract(f"{kind} holds no {IMAGE_NAME}, so no contract: was its code generated?")
    return [Image(place=place, content=found[place], shipped=True) for place in sorted(found)]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidContract(f"{path} cannot be read: {error.strerror}") from error


def _in_folder(root: Path) -> dict[str, bytes]:
    """The images below a folder; hidden folders hold environments and caches, not contracts."""
    found = {}
    for folder, names, files in os.walk(root):
        names[:] = [name for name in names if not name.startswith(".")]
        if IMAGE_NAME in files:
            path = Path(folder, IMAGE_NAME)
            found[str(path)] = _read(path)
    return found


def _in_wheel(path: Path) -> dict[str, bytes]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = sorted(name for name in archive.namelist() if name.rpartition("/")[2] == IMAGE_NAME)
            return {f"{path}!{name}": archive.read(name) for name in names}
    except (zipfile.BadZipFile, OSError) as error:
        raise InvalidContract(f"the wheel {path} cannot be read: {error}") from error


def _installed(name: str) -> dict[str, bytes]:
    try:
        files = metadata.distribution(name).files or []
    except (metadata.PackageNotFoundError, ValueError):
        try:
            return {name: image_of(name)}
        except InvalidContract as error:
            raise InvalidContract(
                f'"{name}" is no file or folder, no installed distribution and no installed proto package: '
                f"{error.message}"
            ) from error
    found = {}
    for file in files:
        if file.name == IMAGE_NAME:
            package = ".".join(file.parent.parts)
            found[package] = image_of(package)
    return found or _editable(name)


def _editable(name: str) -> dict[str, bytes]:
    """The images of a distribution that is installed from its source folder, whose metadata lists no files.

    They lie below the folders that its `.pth` files put on the path; where those name none, below `gen` and `src` of
    the source folder.
    """
    distribution = metadata.distribution(name)
    roots: list[Path] = []
    for file in distribution.files or []:
        if file.suffix == ".pth":
            lines = Path(str(distribution.locate_file(file))).read_text(encoding="utf-8").splitlines()
            roots += [Path(line) for line in lines if line and not line.startswith(("import ", "import\t", "#"))]
    if not roots:
        folder = source_folder(distribution)
        roots = [folder / "gen", folder / "src"] if folder is not None else []
    return {place: content for root in roots for place, content in _in_folder(root).items()}
