"""Versions of a contract: an image, a wheel, a folder, a git ref, or an installed package."""

from __future__ import annotations

__all__ = ["ContractVersion", "checked_out", "commit_of", "version_at"]

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.message import DecodeError

from orki_contract.errors import InvalidContract, InvalidSetting
from orki_contract.images import IMAGE_NAME, Image, images_in, owned_packages
from orki_contract.read import ReadContract, read_image


@dataclass(frozen=True, slots=True, kw_only=True)
class ContractVersion:
    """A version of a contract and its origin.

    Attributes:
        label: A description of the version's origin.
        packages: The proto packages that shipped images own; None for all packages.
        paths: Paths of source files by import path, as far as known.
    """

    label: str
    read: ReadContract
    packages: frozenset[str] | None
    paths: Mapping[str, str] = field(default_factory=dict)


def version_at(source: str) -> ContractVersion:
    """Read a version of a contract.

    Args:
        source: Path of an image, a wheel or a folder; else a git ref of the repository around the working directory;
            else the name of an installed distribution or proto package. A folder or the tree of a ref is compiled by
            buf if it has a buf.yaml and buf is installed; otherwise its images are read.

    Raises:
        InvalidContract: The source does not exist, has no contract, or cannot be read.
        InvalidSetting: Reading it requires buf, which is not installed.
    """
    if not Path(source).exists():
        commit = commit_of(source)
        if commit is not None:
            with tempfile.TemporaryDirectory(prefix="orki-contract-") as folder:
                checked_out(commit, Path(folder), _wanted)
                return _folder(Path(folder), f"git {source} ({commit[:10]})")
    if Path(source).is_dir():
        return _folder(Path(source), source)
    try:
        return _of_images(source, images_in(source))
    except InvalidContract as error:
        if Path(source).exists():
            raise
        raise InvalidContract(f"{error.message}; there is no git ref of that name either") from error


def _wanted(path: str) -> bool:
    name = path.rpartition("/")[2]
    return name.endswith(".proto") or name in ("buf.yaml", "buf.lock", "buf.work.yaml", IMAGE_NAME)


def _folder(folder: Path, label: str) -> ContractVersion:
    configured = (folder / "buf.yaml").is_file() or (folder / "buf.work.yaml").is_file()
    buf = _find_buf()
    if configured and buf is not None:
        return _compiled(buf, folder, label)
    try:
        return _of_images(label, images_in(str(folder)))
    except InvalidContract:
        protos = any(folder.glob("**/*.proto"))
        if protos and buf is not None:
            return _compiled(buf, folder, label)
        if protos:
            raise InvalidSetting(
                f"{label} has protos but no {IMAGE_NAME}, and buf is not installed: "
                "install orki-codegen, which includes it"
            ) from None
        raise InvalidContract(f"{label} has no proto file and no {IMAGE_NAME}") from None


def _find_buf() -> str | None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return shutil.which("buf", path=path)


def _compiled(buf: str, folder: Path, label: str) -> ContractVersion:
    """Compile a folder with buf; the texts of its files make locations inside options exact."""
    image = _run(buf, folder, label, "build", "--as-file-descriptor-set", "--output", "-")
    listed = _run(buf, folder, label, "ls-files", "--format", "json").decode()
    entries = [json.loads(line) for line in listed.splitlines() if line]
    paths = {entry["import_path"]: entry["path"] for entry in entries}
    texts = {name: (folder / path).read_text(encoding="utf-8") for name, path in paths.items()}
    return ContractVersion(label=label, read=_read(image, label, texts), packages=None, paths=paths)


def _run(buf: str, folder: Path, label: str, *arguments: str) -> bytes:
    ran = subprocess.run([buf, *arguments], cwd=folder, capture_output=True, check=False)
    if ran.returncode != 0:
        output = (ran.stderr + ran.stdout).decode(errors="replace").strip()
        raise InvalidContract(f"buf cannot compile {label}:\n{output}")
    return ran.stdout


def _of_images(label: str, images: Iterable[Image]) -> ContractVersion:
    """Merge all images of a wheel, a folder or a distribution into one contract."""
    found = list(images)
    if len(found) == 1 and not found[0].shipped:
        return ContractVersion(label=label, read=_read(found[0].content, found[0].place, {}), packages=None)
    files: dict[str, bytes] = {}
    own: set[str] = set()
    for image in found:
        try:
            parsed = FileDescriptorSet.FromString(image.content)
        except DecodeError as error:
            raise InvalidContract(f"{image.place}: the image is not a serialized FileDescriptorSet: {error}") from error
        packages = owned_packages(image, parsed.file)
        own |= packages
        for file in parsed.file:
            content = file.SerializeToString()
            # A package's own image is authoritative. Shared imports, such as the options, only grow, so of two
            # versions the longer one is newer.
            if file.package in packages or len(content) > len(files.get(file.name, b"")):
                files[file.name] = content
    merged = FileDescriptorSet()
    for _, content in sorted(files.items()):
        merged.file.add().ParseFromString(content)
    return ContractVersion(label=label, read=_read(merged.SerializeToString(), label, {}), packages=frozenset(own))


def _read(image: bytes, label: str, texts: Mapping[str, str]) -> ReadContract:
    try:
        return read_image(image, texts)
    except InvalidContract as error:
        raise InvalidContract(f"{label}: {error.message}") from error


def commit_of(ref: str) -> str | None:
    """Return the commit id of a git ref in the repository of the working directory; None if there is none."""
    # git would take a leading dash for an option.
    if ref.startswith("-"):
        return None
    try:
        ran = _git("rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}")
    except FileNotFoundError:
        return None
    return ran.stdout.decode().strip() if ran.returncode == 0 else None


def checked_out(commit: str, folder: Path, wanted: Callable[[str], bool]) -> None:
    """Write the files of a commit whose paths are `wanted` into an empty folder.

    Raises:
        InvalidContract: git cannot read the commit, as in a shallow clone.
    """
    names = _checked(_git("ls-tree", "-r", "-z", "--name-only", "--full-tree", commit), commit).split(b"\0")
    # The batch protocol cannot request a path with a newline; protos have none.
    chosen = [name for name in names if name and b"\n" not in name and wanted(name.decode(errors="surrogateescape"))]
    asked = b"".join(commit.encode() + b":" + name + b"\n" for name in chosen)
    answer = _checked(_git("cat-file", "--batch", sent=asked), commit)
    at = 0
    for name in chosen:
        end = answer.index(b"\n", at)
        head = answer[at:end].split(b" ")
        if len(head) != 3 or head[1] != b"blob":
            raise InvalidContract(f"git does not give {name.decode(errors='replace')} of {commit[:10]}: {head!r}")
        size = int(head[2])
        place = folder / name.decode(errors="surrogateescape")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(answer[end + 1 : end + 1 + size])
        at = end + 1 + size + 1


def _git(*arguments: str, sent: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["git", *arguments], input=sent, capture_output=True, check=False)


def _checked(ran: subprocess.CompletedProcess[bytes], commit: str) -> bytes:
    if ran.returncode != 0:
        output = ran.stderr.decode(errors="replace").strip()
        raise InvalidContract(f"git cannot read the commit {commit[:10]}: {output}")
    return ran.stdout
