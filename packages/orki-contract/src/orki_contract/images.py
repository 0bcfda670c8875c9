"""Contract images: shipped in packages, found in folders and wheels, their digests and message classes.

`contract.binpb` is next to the generated code of every proto package: `orki/events/v1/contract.binpb` for
`orki.events.v1`. It is a serialized FileDescriptorSet with the package's files and all their imports, including options
and without source information, sorted by path.
"""

from __future__ import annotations

__all__ = [
    "IMAGE_NAME",
    "Image",
    "image_of",
    "images_in",
    "message_class",
    "package_images",
    "package_version",
    "service_digest",
    "source_folder",
    "stream_digest",
]

import hashlib
import json
import os
import zipfile
from collections.abc import Collection, Iterable
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from importlib import metadata, resources
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from google.protobuf import message_factory
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet
from google.protobuf.message import Message

from orki_contract.descriptors import MessageNode, Schema, reachable, without_source
from orki_contract.errors import InvalidContract
from orki_contract.model import DURATIONS, Stream, TaskMethod, ToolMethod, dump, milliseconds
from orki_contract.read import read_schema

IMAGE_NAME: Final = "contract.binpb"
"""File name of the image next to the generated code of a proto package."""


def image_of(package: str) -> bytes:
    """Return the image of an installed proto package, such as `acme.review.v1`.

    Raises:
        InvalidContract: The package is not installed or has no image.
    """
    try:
        return (resources.files(package) / IMAGE_NAME).read_bytes()
    except (ModuleNotFoundError, ValueError, TypeError) as error:
        raise InvalidContract(f'no proto package "{package}" is installed: {error}') from error
    except OSError as error:
        raise InvalidContract(
            f'the installed package "{package}" has no {IMAGE_NAME}: its generated code is incomplete; '
            "generate it again or reinstall its wheel"
        ) from error


def package_images(image: bytes, packages: Iterable[str]) -> dict[str, bytes]:
    """Extract the image of each package from a larger image.

    Raises:
        InvalidContract: The image cannot be parsed or has no file of a package.
    """
    files = dict(sorted(Schema(image).plain.items()))

    @cache
    def bare(name: str) -> FileDescriptorProto:
        return without_source(files[name])

    owned: dict[str, list[str]] = {}
    for name, file in files.items():
        owned.setdefault(file.package, []).append(name)
    cut = {}
    for package in packages:
        if package not in owned:
            raise InvalidContract(f'the image has no file of the package "{package}"')
        wanted = reachable(files, owned[package])
        chosen = FileDescriptorSet(file=[bare(name) for name in sorted(wanted)])
        cut[package] = chosen.SerializeToString(deterministic=True)
    return cut


def service_digest(image: bytes, service: str) -> str:
    """Return the digest of a task or tool service: its methods, and the shape of every message that they reach.

    The digest ignores comments, file names, the order of declarations, unreachable messages and explicit defaults.

    Args:
        image: An image with the service and its imports.
        service: Full name of the service.

    Returns:
        `sha256:` and 64 hex digits.

    Raises:
        InvalidContract: The image has no task or tool service of that name.
    """
    read = read_schema(Schema(image))
    methods: list[TaskMethod | ToolMethod] = [each for each in read.contract.tasks if each.service == service]
    methods += [each for each in read.contract.tools if each.service == service]
    if not methods:
        raise InvalidContract(f'the image declares no task or tool service "{service}"')
    roots = {name for each in methods for name in (each.request, each.response)}
    for task in read.contract.tasks:
        if task.service == service:
            roots |= {*task.messages}
    return _digest(read.schema, methods, roots - {""})


def stream_digest(image: bytes, stream: str) -> str:
    """Return the digest of a stream: its declaration with the owner's groups, and the shapes of reachable messages.

    Raises:
        InvalidContract: The image declares no stream of that name.
    """
    read = read_schema(Schema(image))
    for each in read.contract.streams:
        if each.name == stream:
            return _digest(read.schema, [each], {each.message})
    raise InvalidContract(f'the image declares no stream "{stream}"')


def message_class(image: bytes, full_name: str) -> type[Message]:
    """Return a class for a message, in its own pool, to decode messages without generated code.

    Creating a class takes milliseconds, so keep the class.

    Raises:
        InvalidContract: The image cannot be parsed or has no such message.
    """
    schema = Schema(image)
    if full_name not in schema.messages:
        raise InvalidContract(f'the image has no message "{full_name}"')
    return message_factory.GetMessageClass(schema.pool.FindMessageTypeByName(full_name))


def _digest(schema: Schema, declared: Iterable[Stream | TaskMethod | ToolMethod], roots: Iterable[str]) -> str:
    shapes = {}
    waiting = sorted(roots)
    while waiting:
        name = waiting.pop()
        if name not in shapes and name in schema.messages:
            shapes[name] = _shape(schema, schema.messages[name])
            waiting.extend(field["message"] for field in shapes[name]["fields"] if "message" in field)
    whole = {"declared": [_sparse(each) for each in sorted(declared, key=lambda each: each.name)], "messages": shapes}
    text = json.dumps(whole, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return f"sha256:{hashlib.sha256(text.encode('ascii')).hexdigest()}"


def _shape(schema: Schema, node: MessageNode) -> dict[str, Any]:
    """Return everything about a message that affects its encoding or its class."""
    descriptor = schema.pool.FindMessageTypeByName(node.full_name)
    shape: dict[str, Any] = {"fields": []}
    for field in sorted(node.proto.field, key=lambda field: field.number):
        resolved = descriptor.fields_by_number[field.number]
        # Type and presence come from the pool, which knows what an edition's features mean.
        entry: dict[str, Any] = {
            "name": field.name,
            "number": field.number,
            "type": resolved.type,
            "label": field.label,
            "presence": resolved.has_presence,
        }
        if field.HasField("oneof_index") and not field.proto3_optional:
            entry["oneof"] = node.proto.oneof_decl[field.oneof_index].name
        if resolved.message_type is not None:
            entry["message"] = resolved.message_type.full_name
        if resolved.enum_type is not None:
            values = sorted((value.number, value.name) for value in resolved.enum_type.values)
            entry["enum"] = {"name": resolved.enum_type.full_name, "values": values}
        if field.HasField("default_value"):
            entry["default"] = field.default_value
        for option in ("sensitive", "offset", "scalar", "size", "since"):
            if (value := schema.option(field.options, option)) is not None:
                entry[option] = value
        shape["fields"].append(entry)
    frame = schema.option(node.proto.options, "frame")
    if frame is not None:
        shape["frame"] = [frame.version, frame.block_length]
    if node.proto.options.map_entry:
        shape["map"] = True
    return shape


def _sparse(value: Any) -> Any:
    """Return the value as `dump` does, but without defaults and with durations in whole milliseconds.

    So fields that are added to the model later do not change existing digests.
    """
    if is_dataclass(value) and not isinstance(value, type):
        given = {each.name: getattr(value, each.name) for each in fields(value)}
        given = {each.name: given[each.name] for each in fields(value) if given[each.name] != each.default}
        return {
            f"{name}_ms" if name in DURATIONS else name: milliseconds(each) if name in DURATIONS else _sparse(each)
            for name, each in given.items()
        }
    if isinstance(value, tuple):
        return [_sparse(item) for item in value]
    return dump(value)


@cache
def package_version(package: str) -> str:
    """Return the version of the distribution that installed a proto package, such as `1.2.0`; empty if unknown.

    The result is cached: reading the lists of installed files takes some milliseconds.
    """
    try:
        place = os.path.realpath(str(resources.files(package) / IMAGE_NAME))
    except (ModuleNotFoundError, ValueError, TypeError):
        return ""
    wanted = f"{package.replace('.', '/')}/{IMAGE_NAME},"
    for distribution in metadata.distributions():
        listed = (distribution.read_text("RECORD") or "").replace("\\", "/")
        if wanted in listed and os.path.realpath(str(distribution.locate_file(wanted[:-1]))) == place:
            return distribution.version
        source = source_folder(distribution)
        if source is not None and Path(place).is_relative_to(os.path.realpath(source)):
            return distribution.version
    return ""


def source_folder(distribution: metadata.Distribution) -> Path | None:
    """Return the source folder of a distribution that was installed from one (PEP 610); else None."""
    parts = urlsplit(json.loads(distribution.read_text("direct_url.json") or "{}").get("url", ""))
    return Path(unquote(parts.path)) if parts.scheme == "file" else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """An image and its origin.

    Attributes:
        place: A description of the image's origin.
        content: The serialized FileDescriptorSet.
        shipped: Whether it is the shipped image of one proto package; its other packages are imports.
    """

    place: str
    content: bytes
    shipped: bool


def owned_packages(image: Image, files: Collection[FileDescriptorProto]) -> set[str]:
    """Return the packages that a shipped image owns: that of its folder, else those that no other package imports."""
    home = image.place.replace("!", "/").rpartition("/")[0]
    package_of = {file.name: file.package for file in files}
    packages = set(package_of.values())
    placed = {each for each in packages if each and f"/{home}".endswith("/" + each.replace(".", "/"))}
    imported = {
        package_of[path]
        for file in files
        for path in file.dependency
        if package_of.get(path, file.package) != file.package
    }
    return placed or packages & {image.place} or packages - imported


def images_in(source: str) -> list[Image]:
    """Return every image of a source, sorted by path.

    Args:
        source: Path of an image, of a wheel or of a folder (searched for `contract.binpb`); or name of an installed
            distribution (`orki-events`) or proto package (`orki.events.v1`).

    Raises:
        InvalidContract: The source does not exist or has no image.
    """
    path = Path(source)
    if path.is_dir():
        found = _in_folder(path)
        kind = f"the folder {source}"
    elif path.is_file() and zipfile.is_zipfile(path):
        found = _in_wheel(path)
        kind = f"the wheel {source}"
    elif path.is_file():
        return [Image(place=source, content=_read_file(path), shipped=path.name == IMAGE_NAME)]
    else:
        found = _installed(source)
        kind = f"the installed distribution {source}"
    if not found:
        raise InvalidContract(f"{kind} holds no {IMAGE_NAME}, so no contract: was its code generated?")
    return [Image(place=place, content=found[place], shipped=True) for place in sorted(found)]


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidContract(f"{path} cannot be read: {error.strerror}") from error


def _in_folder(root: Path) -> dict[str, bytes]:
    found = {}
    for folder, names, files in os.walk(root):
        # Hidden folders hold environments and caches, not contracts.
        names[:] = [name for name in names if not name.startswith(".")]
        if IMAGE_NAME in files:
            path = Path(folder, IMAGE_NAME)
            found[str(path)] = _read_file(path)
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
    """Return the images of a distribution that is installed from its source folder, whose metadata lists no files.

    Its `.pth` files name the folders with the images; without them, `gen` and `src` of the source folder are searched.
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
