"""What a wheel brings: unpacking one, building one of the tree, and telling whether two bring the same."""

from __future__ import annotations

__all__ = ["Contents", "built", "contents_of", "differing", "release_of"]

import hashlib
import importlib.util
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Mapping
from pathlib import Path

from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.message import DecodeError
from packaging.version import Version

from orki_codegen.gate.console import installed_commands
from orki_codegen.gate.metadata import installed_extras, installed_python
from orki_codegen.gate.past import Release
from orki_contract.errors import InvalidContract, InvalidSetting
from orki_contract.images import IMAGE_NAME
from orki_contract.read import read_image

Contents = Mapping[str, str]
"""A digest for each file."""


def release_of(wheel: Path, folder: Path, name: str, version: Version, origin: str) -> Release:
    """Unpacks a wheel into an empty folder.

    Raises:
        InvalidContract: It is no wheel, or an image in it cannot be read.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
            images = [each for each in archive.namelist() if each.rpartition("/")[2] == IMAGE_NAME]
            for each in images:
                read_image(archive.read(each))
    except (zipfile.BadZipFile, OSError) as error:
        raise InvalidContract(f"the wheel {wheel.name} of {origin} cannot be read: {error}") from error
    except InvalidContract as error:
        raise InvalidContract(f"the wheel {wheel.name} of {origin} cannot be read: {error.message}") from error
    packages = frozenset(each.rpartition("/")[0].replace("/", ".") for each in images)
    return Release(
        name=name,
        version=version,
        origin=origin,
        packages=packages,
        imports=(folder,),
        commands=installed_commands(folder),
        wheel=wheel,
        extras=installed_extras(folder),
        python=installed_python(folder),
    )


def contents_of(wheel: Path) -> Contents:
    """The digest of each file that a wheel brings, without what only its building decides."""
    found = {}
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            # The folder carries the version; the record and the builder's name say nothing to users.
            shown = re.sub(r"^[^/]+\.dist-info/", "dist-info/", name)
            if not name.endswith("/") and shown not in ("dist-info/RECORD", "dist-info/WHEEL"):
                found[shown] = digest(name, archive.read(name))
    return found


def digest(name: str, content: bytes) -> str:
    """Digest of a file: of an image only the files of its own package count, as others own what they import."""
    folder, _, base = name.rpartition("/")
    if base == IMAGE_NAME:
        content = _own_files(f"{folder}/", content)
    return hashlib.sha256(content).hexdigest()


def differing(before: Contents, after: Contents) -> list[str]:
    """The names of the files that are new, gone or changed, sorted."""
    return sorted(name for name in {*before, *after} if before.get(name) != after.get(name))


def built(root: Path, folder: str, out: Path) -> Path:
    """Builds the wheel of a distribution of the tree.

    Raises:
        InvalidSetting: It cannot be built.
    """
    table = tomllib.loads((root / folder / "pyproject.toml").read_text(encoding="utf-8"))
    backend = table.get("build-system", {}).get("build-backend", "setuptools.build_meta")
    # With the backend at hand there is no need to install it once more, into an environment of its own.
    at_hand = importlib.util.find_spec(backend.partition(".")[0].partition(":")[0]) is not None
    isolation = ["--no-isolation", "--skip-dependency-check"] if at_hand else []
    command = [sys.executable, "-m", "build", "--wheel", *isolation, "--outdir", str(out), str(root / folder)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(out.glob("*.whl"))
    if ran.returncode != 0 or len(wheels) != 1:
        raise InvalidSetting(f"the wheel of {folder} cannot be built:\n{(ran.stdout + ran.stderr).strip()}")
    return wheels[0]


def _own_files(home: str, content: bytes) -> bytes:
    try:
        image = FileDescriptorSet.FromString(content)
    except DecodeError:
        return content
    own = [each for each in image.file if each.package and home.endswith(f"{each.package.replace('.', '/')}/")]
    return FileDescriptorSet(file=own).SerializeToString(deterministic=True)
