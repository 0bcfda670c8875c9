"""Renders the reference pages of proto packages from the same model as the code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from google.protobuf.descriptor_pb2 import EnumDescriptorProto, FieldDescriptorProto, FileDescriptorProto
from jinja2 import Environment, PackageLoader, StrictUndefined

from orki_codegen._tree import MARK
from orki_contract.descriptors import MessageNode, Path, Schema, ServiceNode, field_path, is_repeated
from orki_contract.model import Budget, ExternalGroup, Frame, Retention, Stream, TaskMethod, ToolMethod, duration_text
from orki_contract.read import ReadContract

REFERENCE: Final = "docs/reference"
"""Folder of the pages, relative to the root."""

_ENVIRONMENT: Final = Environment(
    loader=PackageLoader("orki_codegen"),
    undefined=StrictUndefined,
    autoescape=False,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def pages(read: ReadContract, packages: Sequence[str], places: Mapping[str, str]) -> dict[str, bytes]:
    """Return the text of each page by name: one for each package, and `README.md` as the index.

    Args:
        read: The contract of the repository.
        packages: The proto packages to describe, sorted. Files without a package have no contract and no page.
        places: The path of each proto file, by its import path.
    """
    described = [_Page(read, name, places) for name in packages if name]
    made = {f"{page.package}.md": _render("package.md.j2", page=page) for page in described}
    made["README.md"] = _render("index.md.j2", pages=described)
    return made


def _render(template: str, **values: object) -> bytes:
    mark = f"{MARK.decode()}: change the protos, then `nox -s generate`. -->"
    text = _ENVIRONMENT.get_template(template).render(mark=mark, **values)
    return (text.rstrip("\n") + "\n").encode()


@dataclass(frozen=True, slots=True)
class _Row:
    """One line of a table of bytes."""

    place: str
    name: str
    type: str
    since: str
    comment: str


class _Page:
    """The values that the template renders for one package."""

    def __init__(self, read: ReadContract, package: str, places: Mapping[str, str]) -> None:
        self.package = package
        self._read = read
        self._schema: Schema = read.schema
        self._files = [each for each in read.files if each.package == package]
        self.sources = [places.get(each.path, each.path) for each in self._files]
        self.streams = [stream for each in self._files for stream in each.contract.streams]
        self.subscriptions = [one for each in self._files for one in each.contract.external_groups]
        self.tasks = [task for each in self._files for task in each.contract.tasks]
        self.tools = [tool for each in self._files for tool in each.contract.tools]
        self.frames = [frame for each in self._files for frame in each.contract.frames]

    def comment(self, full_name: str) -> str:
        """The comment of a message, on one line."""
        node = self._schema.messages[full_name]
        return line(self._schema.comment(node.file.name, node.path))

    def services(self, kind: str) -> list[ServiceNode]:
        """Return the services of a kind: `task`, `tool` or `plain`."""
        names = {
            "task": {each.service for each in self.tasks},
            "tool": {each.service for each in self.tools},
            "plain": {name for each in self._files for name in each.plain_services},
        }
        return [self._schema.services[name] for name in sorted(names[kind])]

    def methods(self, service: ServiceNode) -> list[TaskMethod | ToolMethod]:
        """Return the task or tool methods of a service, by name."""
        methods: list[TaskMethod | ToolMethod] = [*self.tasks, *self.tools]
        return [each for each in methods if each.service == service.full_name]

    def rpcs(self, service: ServiceNode) -> Iterator[tuple[str, str, str, str]]:
        """Yield name, request, response and comment of each rpc of a plain service."""
        for method in service.methods:
            proto = method.proto
            takes = "stream of " * proto.client_streaming + self.link(proto.input_type.removeprefix("."))
            gives = "stream of " * proto.server_streaming + self.link(proto.output_type.removeprefix("."))
            yield proto.name, takes, gives, _cell(self._schema.comment(service.file.name, method.path))

    def text(self, service: ServiceNode, name: str = "") -> str:
        """Return the comment of a service or one of its methods on one line."""
        path: Path = service.path
        for method in service.methods:
            if method.proto.name == name:
                path = method.path
        return line(self._schema.comment(service.file.name, path))

    def readers(self, stream: Stream) -> list[ExternalGroup]:
        """Return the groups that other packages declare on a stream."""
        return [each for each in self._read.contract.external_groups if each.stream == stream.name]

    def rows(self, frame: Frame) -> Iterator[_Row]:
        """Yield the bytes of a block in order, including reserved ones, and the tail."""
        node = self._schema.messages[frame.message]
        comments = {field.name: self._field_comment(node, index) for index, field in enumerate(node.proto.field)}
        end = 0
        for field in frame.fields:
            if field.offset > end:
                yield _Row(_bytes(end, field.offset), "", "reserved", "", "")
            kind = f"{field.size} bytes" if field.scalar.value == "bytes" else field.scalar.value
            kind = f"{kind}, {self.link(field.enum)}" if field.enum else kind
            end = field.offset + field.size
            yield _Row(_bytes(field.offset, end), field.name, kind, str(field.since), comments[field.name])
        if frame.block_length > end:
            yield _Row(_bytes(end, frame.block_length), "", "reserved", "", "")
        if frame.tail:
            kind = "text, UTF-8" if frame.tail_text else "bytes"
            yield _Row(f"from {frame.block_length}", frame.tail, kind, "1", comments[frame.tail])

    def messages(self) -> list[MessageNode]:
        """Return the messages of the package except frames and map entries."""
        frames = {frame.message for frame in self.frames}
        nodes = [node for each in self._files for node in self._schema.messages_of.get(each.path, ())]
        return [node for node in nodes if node.full_name not in frames and not node.proto.options.map_entry]

    def local(self, full_name: str) -> str:
        """Return a name relative to the package."""
        return full_name.removeprefix(f"{self.package}.")

    def fields(self, node: MessageNode) -> Iterator[tuple[int, str, str, str]]:
        """Yield number, name, type and comment of each field of a message."""
        for index, field in enumerate(node.proto.field):
            sensitive = " Sensitive." if self._schema.option(field.options, "sensitive") else ""
            yield field.number, field.name, self._type(node, field), self._field_comment(node, index) + sensitive

    def enums(self) -> Iterator[tuple[str, str, list[tuple[int, str, str]]]]:
        """Yield name, comment and values (number, name, comment) of each top-level enum."""
        for each in self._files:
            file: FileDescriptorProto = self._schema.files[each.path]
            for index, enum in enumerate(file.enum_type):
                comment = line(self._schema.comment(file.name, (5, index)))
                yield enum.name, comment, self._values(file.name, (5, index), enum)

    def link(self, full_name: str) -> str:
        """Return the name of a message or enum, linked if a page describes it."""
        node = self._schema.messages.get(full_name)
        package = node.file.package if node is not None else self._schema.enums[full_name][0].package
        name = self.local(full_name)
        if package == self.package:
            return f"[{name}](#{_anchor(name)})"
        if package.startswith("google.protobuf"):
            return full_name
        return f"[{full_name}]({package}.md#{_anchor(full_name.removeprefix(f'{package}.'))})"

    def _values(self, file: str, path: Path, enum: EnumDescriptorProto) -> list[tuple[int, str, str]]:
        return [
            (value.number, value.name, _cell(self._schema.comment(file, (*path, 2, index))))
            for index, value in enumerate(enum.value)
        ]

    def _type(self, node: MessageNode, field: FieldDescriptorProto) -> str:
        kind = FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()
        if field.type_name:
            entry = self._schema.messages.get(field.type_name.removeprefix("."))
            if entry is not None and entry.proto.options.map_entry:
                key, value = (self._type(entry, each) for each in entry.proto.field)
                return f"map of {key} to {value}"
            kind = self.link(field.type_name.removeprefix("."))
        if field.HasField("oneof_index") and not field.proto3_optional:
            return f"{kind}, in {node.proto.oneof_decl[field.oneof_index].name}"
        return f"repeated {kind}" if is_repeated(field) else kind

    def _field_comment(self, node: MessageNode, index: int) -> str:
        return _cell(self._schema.comment(node.file.name, field_path(node, index)))


def line(comment: str) -> str:
    """Return a comment on one line."""
    return " ".join(comment.split())


def _cell(comment: str) -> str:
    return line(comment).replace("|", "\\|")


def _anchor(name: str) -> str:
    """Return the link fragment of a heading."""
    return "".join(each for each in name.lower().replace(" ", "-") if each.isalnum() or each in "-_")


def _bytes(first: int, end: int) -> str:
    return f"{first}" if end == first + 1 else f"{first}–{end - 1}"


def tuning(retention: Retention) -> str:
    """Describe the bounds of a retention, such as `10 to 1,000 entries and an age of 1 h to 7 days`."""
    least, most = retention.entries_bounds
    shortest, longest = retention.age_bounds
    words = [f"{least:,} to {most:,} entries"] if least < most else []
    words += [f"an age of {duration_text(shortest)} to {duration_text(longest)}"] if shortest < longest else []
    return " and ".join(words)


def budget(value: Budget) -> str:
    """Return a budget as a text."""
    amounts = {
        "tokens": value.tokens,
        "millionths of a dollar": value.cost_micros,
        "calls": value.calls,
    }
    return ", ".join(f"{amount:,} {name}" for name, amount in amounts.items() if amount) or "no limit"


_ENVIRONMENT.globals.update(duration=duration_text, tuning=tuning, budget=budget)
