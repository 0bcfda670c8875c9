"""Parsed descriptors of an image, with orki's options and source locations.

An image is a serialized `google.protobuf.FileDescriptorSet`; buf's `Image` and the files of a `CodeGeneratorRequest`
have the same format. Each image is parsed with its own descriptor pool, because its options are extensions that the
image itself defines. The process's default pool is not used.
"""

from __future__ import annotations

__all__ = [
    "OPTIONS_PACKAGE",
    "Location",
    "MessageNode",
    "MethodNode",
    "Path",
    "Schema",
    "ServiceNode",
    "field_path",
    "is_repeated",
    "reachable",
    "without_source",
]

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from typing import Any, Final, TypeVar, cast

from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor import Descriptor
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    MethodDescriptorProto,
    ServiceDescriptorProto,
)
from google.protobuf.message import DecodeError, Message

from orki_contract._literals import is_repeated, literal_places
from orki_contract.errors import InvalidContract

OPTIONS_PACKAGE: Final = "orki.options.v1"
"""Proto package of the options that make a proto a contract."""

# Field numbers of descriptor.proto; source paths consist of them.
_FILE_MESSAGE, _FILE_ENUM, _FILE_SERVICE = 4, 5, 6
_MESSAGE_NESTED, _MESSAGE_ENUM, _SERVICE_METHOD = 3, 4, 2

# Field numbers of the `options` fields of descriptor.proto.
_OPTIONS_FIELDS: Final = {
    "google.protobuf.FileOptions": 8,
    "google.protobuf.MessageOptions": 7,
    "google.protobuf.FieldOptions": 8,
    "google.protobuf.MethodOptions": 4,
}

Path = tuple[int, ...]


@dataclass(frozen=True, order=True, slots=True)
class Location:
    """A location in a proto file.

    Attributes:
        file: Import path of the file.
        line: From 1; 0 if the image has no source information.
        column: From 1; 0 if the image has no source information.
    """

    file: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file


@dataclass(frozen=True, slots=True, eq=False)
class MessageNode:
    """A message, top-level or nested."""

    file: FileDescriptorProto
    full_name: str
    proto: DescriptorProto
    path: Path


@dataclass(frozen=True, slots=True, eq=False)
class MethodNode:
    """One rpc of a service."""

    service: str
    proto: MethodDescriptorProto
    path: Path

    @property
    def full_name(self) -> str:
        """`package.Service/Method`."""
        return f"{self.service}/{self.proto.name}"


@dataclass(frozen=True, slots=True, eq=False)
class ServiceNode:
    """A service and its rpcs."""

    file: FileDescriptorProto
    full_name: str
    proto: ServiceDescriptorProto
    path: Path

    @property
    def methods(self) -> Iterator[MethodNode]:
        """The rpcs in file order."""
        for index, method in enumerate(self.proto.method):
            yield MethodNode(self.full_name, method, (*self.path, _SERVICE_METHOD, index))


N = TypeVar("N", MessageNode, ServiceNode)


class Schema:
    """The parsed files of an image.

    Attributes:
        pool: The private pool with all files.
        plain: The files by path, with options as unknown fields.
        files: The files by path, sorted, with parsed options.
    """

    def __init__(self, image: bytes, texts: Mapping[str, str] | None = None) -> None:
        """Parse an image.

        Args:
            image: A serialized FileDescriptorSet.
            texts: Texts of the files by path, if available; they make locations inside options exact.

        Raises:
            InvalidContract: The image is not a serialized FileDescriptorSet, or it lacks an imported file.
        """
        try:
            plain = FileDescriptorSet.FromString(image)
        except DecodeError as error:
            raise InvalidContract(f"the image is not a serialized FileDescriptorSet: {error}") from error
        self.plain: Final = {file.name: file for file in plain.file}
        self.pool = descriptor_pool.DescriptorPool()
        _fill(self.pool, plain.file)
        options = [file.name for file in plain.file if file.package == OPTIONS_PACKAGE]
        parsed = _with_options(self.pool, sorted(options), image) if options else plain
        self._texts: Final = texts or {}
        self._sources: Final[dict[str, tuple[dict[Path, Sequence[int]], dict[Path, str]]]] = {}
        self._literals: Final[dict[tuple[str, Path], Mapping[Path, tuple[int, int]]]] = {}
        self.files: Final = {file.name: file for file in sorted(parsed.file, key=lambda file: file.name)}

    @classmethod
    def of_files(cls, files: Sequence[FileDescriptorProto]) -> Schema:
        """Create a schema from files, such as those of a CodeGeneratorRequest. Errors are those of the constructor."""
        return cls(FileDescriptorSet(file=files).SerializeToString())

    @cached_property
    def messages(self) -> Mapping[str, MessageNode]:
        """Messages by full name, in file order."""
        found: dict[str, MessageNode] = {}
        for file in self.files.values():
            for index, proto in enumerate(file.message_type):
                for node in _messages(file, file.package, proto, (_FILE_MESSAGE, index)):
                    found[node.full_name] = node
        return found

    @cached_property
    def messages_of(self) -> Mapping[str, Sequence[MessageNode]]:
        """Messages of each file by path, in file order."""
        return _by_file(self.messages.values())

    @cached_property
    def stream_messages(self) -> Mapping[str, str]:
        """Full names of stream messages by stream name; of a duplicate name, only the first message."""
        found: dict[str, str] = {}
        for node in self.messages.values():
            option = self.option(node.proto.options, "stream")
            if option is not None:
                found.setdefault(option.name, node.full_name)
        return found

    @cached_property
    def enums(self) -> Mapping[str, tuple[FileDescriptorProto, EnumDescriptorProto]]:
        """Enums by full name, with their files."""
        found = {}
        for file in self.files.values():
            for enum in file.enum_type:
                found[_join(file.package, enum.name)] = (file, enum)
        for node in self.messages.values():
            for enum in node.proto.enum_type:
                found[_join(node.full_name, enum.name)] = (node.file, enum)
        return found

    @cached_property
    def services_of(self) -> Mapping[str, Sequence[ServiceNode]]:
        """Services of each file by path, in file order."""
        return _by_file(self.services.values())

    @cached_property
    def services(self) -> Mapping[str, ServiceNode]:
        """Services by full name."""
        found = {}
        for file in self.files.values():
            for index, proto in enumerate(file.service):
                name = _join(file.package, proto.name)
                found[name] = ServiceNode(file, name, proto, (_FILE_SERVICE, index))
        return found

    def option(self, options: Message, name: str) -> Any:
        """Return the value of an orki option; None if it is not set.

        Args:
            options: A `…Options` message of this schema.
            name: The option's name, such as `stream`.
        """
        extension = self._extensions.get(name)
        if extension is None or extension.containing_type is not options.DESCRIPTOR:
            return None
        if extension.is_extension and is_repeated(extension):
            return options.Extensions[extension] or None
        return options.Extensions[extension] if options.HasExtension(extension) else None

    def option_number(self, name: str) -> int:
        """Return the field number of an orki option; 0 if the image does not define it."""
        extension = self._extensions.get(name)
        return extension.number if extension is not None else 0

    def imports(self, path: str) -> frozenset[str]:
        """Return the paths of the file and of all its direct and indirect imports."""
        return reachable(self.files, [path])

    def location(self, file: str, path: Path = ()) -> Location:
        """Return the location of an element; the nearest enclosing element if it has none.

        Compilers record no location of a message inside an option's value: that of its first part is returned instead.
        """
        spans, _ = self._source(file)
        if path not in spans:
            inside = [span for known, span in spans.items() if known[: len(path)] == path]
            if inside and path:
                first = min((span[0], span[1]) for span in inside)
                return Location(file, first[0] + 1, first[1] + 1)
        for length in range(len(path), 0, -1):
            span = spans.get(path[:length])
            if span is not None:
                return Location(file, span[0] + 1, span[1] + 1)
        return Location(file, *((1, 1) if spans else (0, 0)))

    def locate(self, file: str, path: Path, options: Message, option: str, *inside: str | int) -> Location:
        """Return the location of an option or of a part of its value; the nearest enclosing element if absent.

        Args:
            file: The file.
            path: Source path of the element that carries the option.
            options: The element's options.
            option: The option's name, such as `stream`.
            inside: Names of fields, each followed by an index if the field is repeated: `"groups", 2, "name"`.
        """
        whole: Path = (*path, _OPTIONS_FIELDS[options.DESCRIPTOR.full_name], self.option_number(option))
        value: Any = self.option(options, option)
        steps = list(inside)
        if steps and isinstance(steps[0], int):
            whole += (steps[0],)
            value = value[steps.pop(0)]
        if not isinstance(value, Message):
            return self.location(file, whole)
        part: Path = ()
        at: Any = value
        for step in steps:
            if isinstance(step, str) and step not in at.DESCRIPTOR.fields_by_name:
                # Options that are older than the field.
                break
            part += (step if isinstance(step, int) else at.DESCRIPTOR.fields_by_name[step].number,)
            at = at[step] if isinstance(step, int) else getattr(at, step)
        places = self._literal(file, whole, value)
        for length in range(len(part), 0, -1):
            place = places.get(part[:length])
            if place is not None:
                return Location(file, *place)
        return self.location(file, (*whole, *part))

    def comment(self, file: str, path: Path) -> str:
        """Return the leading comment of an element without comment marks; empty for none."""
        return self._source(file)[1].get(path, "")

    @cached_property
    def _extensions(self) -> dict[str, Any]:
        prefix = f"{OPTIONS_PACKAGE}."
        found = {}
        for file in self.files.values():
            if file.package == OPTIONS_PACKAGE:
                for extension in file.extension:
                    found[extension.name] = self.pool.FindExtensionByName(prefix + extension.name)
        return found

    def _literal(self, file: str, option: Path, value: Message) -> Mapping[Path, tuple[int, int]]:
        known = self._literals.get((file, option))
        if known is None:
            text, span = self._texts.get(file), self._source(file)[0].get(option)
            known = {}
            if text is not None and span is not None:
                start = sum(len(line) for line in text.splitlines(keepends=True)[: span[0]]) + span[1]
                known = literal_places(text, start, cast("Descriptor", value.DESCRIPTOR))
            self._literals[file, option] = known
        return known

    def _source(self, file: str) -> tuple[dict[Path, Sequence[int]], dict[Path, str]]:
        """Return the spans and the leading comments of a file by path."""
        if file not in self._sources:
            spans: dict[Path, Sequence[int]] = {}
            comments = {}
            for location in self.files[file].source_code_info.location:
                path = tuple(location.path)
                spans.setdefault(path, location.span)
                if location.leading_comments:
                    comments[path] = location.leading_comments
            self._sources[file] = (spans, comments)
        return self._sources[file]


def reachable(files: Mapping[str, FileDescriptorProto], roots: Iterable[str]) -> frozenset[str]:
    """Return the paths of some files and of all their direct and indirect imports."""
    seen: set[str] = set()
    waiting = list(roots)
    while waiting:
        name = waiting.pop()
        if name not in seen and name in files:
            seen.add(name)
            waiting.extend(files[name].dependency)
    return frozenset(seen)


def without_source(file: FileDescriptorProto) -> FileDescriptorProto:
    """Return a copy of the file without source information and without the fields that buf adds to its images."""
    kept = type(file)()
    for field, value in file.ListFields():
        if field.name == "source_code_info":
            continue
        if is_repeated(field) or field.message_type is not None:
            getattr(kept, field.name).MergeFrom(value)
        else:
            setattr(kept, field.name, value)
    return kept


def field_path(message: MessageNode, index: int) -> Path:
    """Return the source path of a message's field."""
    return (*message.path, 2, index)


def _by_file(nodes: Iterable[N]) -> dict[str, list[N]]:
    found: dict[str, list[N]] = {}
    for node in nodes:
        found.setdefault(node.file.name, []).append(node)
    return found


def _join(scope: str, name: str) -> str:
    return f"{scope}.{name}" if scope else name


def _messages(file: FileDescriptorProto, scope: str, proto: DescriptorProto, path: Path) -> Iterator[MessageNode]:
    full_name = _join(scope, proto.name)
    yield MessageNode(file, full_name, proto, path)
    for index, nested in enumerate(proto.nested_type):
        yield from _messages(file, full_name, nested, (*path, _MESSAGE_NESTED, index))


def _fill(pool: descriptor_pool.DescriptorPool, files: Sequence[FileDescriptorProto]) -> None:
    """Add the files in import order; their order in an image is arbitrary."""
    by_name = {file.name: file for file in files}
    for name, file in sorted(by_name.items()):
        for imported in file.dependency:
            if imported not in by_name:
                raise InvalidContract(f"the image lacks {imported}, which {name} imports: build the image with imports")
    try:
        order = list(TopologicalSorter({name: file.dependency for name, file in by_name.items()}).static_order())
    except CycleError as error:
        raise InvalidContract(f"import cycle: {', '.join(error.args[1])}") from error
    for name in order:
        try:
            pool.AddSerializedFile(by_name[name].SerializeToString())
        except TypeError as error:
            raise InvalidContract(f"{name} is not valid: {error}") from error


def _with_options(pool: descriptor_pool.DescriptorPool, options: list[str], image: bytes) -> FileDescriptorSet:
    """Parse the image with the pool's classes, which know orki's options."""
    classes = message_factory.GetMessageClassesForFiles(["google/protobuf/descriptor.proto", *options], pool)
    return cast("FileDescriptorSet", classes["google.protobuf.FileDescriptorSet"].FromString(image))
