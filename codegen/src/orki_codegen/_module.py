"""The content of a generated module: its names, its imports and the parts that the template prints.

Names from a proto are never changed. An import that clashes with one gets another alias (`oc_`).
"""

from __future__ import annotations

import keyword
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields

from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto

from orki_codegen._code import WIDTH, Call, Code, Raw, Sequence, expression, quote, width
from orki_contract.descriptors import MessageNode, MethodNode, Schema, ServiceNode, field_path
from orki_contract.model import TASK_MESSAGES, FrameField, Group, Scalar, Stream, TaskMethod, ToolMethod
from orki_contract.naming import class_name, constant_name, frame_class, module_path, reference, snake_name, unused
from orki_contract.read import FileContract, ReadContract

_PYTHON_TYPES = {
    FieldDescriptorProto.TYPE_BOOL: "bool",
    FieldDescriptorProto.TYPE_FLOAT: "float",
    FieldDescriptorProto.TYPE_DOUBLE: "float",
    FieldDescriptorProto.TYPE_BYTES: "bytes",
    FieldDescriptorProto.TYPE_STRING: "str",
}
# Attributes of the generated classes and of the module; a message of such a name is not re-exported.
_HIDDEN = frozenset({"TASKS", "TOOLS", "annotations"})


@dataclass(frozen=True, slots=True)
class Names:
    """Aliases of the imports of a module, which no declaration uses."""

    oc: str
    abstractmethod: str
    final: str
    literal: str
    builtins: str


@dataclass(frozen=True, slots=True)
class StreamConstant:
    """A stream of the file, or external groups on another stream."""

    constant: str
    groups_alias: str
    groups: Code
    annotation: Sequence
    value: Code
    comment: str


@dataclass(frozen=True, slots=True)
class Method:
    """One task or tool: its constant and its method; `messages` are the further messages of a task."""

    constant: str
    attribute: str
    value: Code
    request: str
    response: str
    messages: tuple[Code, ...]
    comment: str


@dataclass(frozen=True, slots=True)
class Service:
    """A task or tool service."""

    kind: str
    name: str
    methods: tuple[Method, ...]
    members: Code
    comment: str


@dataclass(frozen=True, slots=True)
class FrameMember:
    """A field of a frame class."""

    name: str
    annotation: str
    value: Code
    comment: str


@dataclass(frozen=True, slots=True)
class FrameClass:
    """A frame message."""

    name: str
    decorator: Code
    members: tuple[FrameMember, ...]
    comment: str


@dataclass(frozen=True, slots=True)
class Module:
    """The input of the template."""

    path: str
    source: str
    names: Names
    imports: tuple[str, ...]
    streams: tuple[StreamConstant, ...]
    subscriptions: tuple[StreamConstant, ...]
    frames: tuple[FrameClass, ...]
    services: tuple[Service, ...]


def build(read: ReadContract, file: FileContract) -> Module:
    """Build the module of one file with declarations."""
    return _Builder(read, file).module()


class _Builder:
    """Builds one module; imports are added as needed."""

    def __init__(self, read: ReadContract, file: FileContract) -> None:
        self.read = read
        self.schema: Schema = read.schema
        self.file = file
        self.frames = {frame.message for each in read.files for frame in each.contract.frames}
        self.taken = self._declared()
        self.exports = self._exports()
        self.taken.update(self.exports.values())
        self.aliases: dict[str, str] = {}
        self.names = Names(
            oc=self._alias("oc"),
            abstractmethod=self._alias("abstractmethod"),
            final=self._alias("Final"),
            literal=self._alias("Literal"),
            # A field of a frame may hide a built-in type.
            builtins=self._alias("builtins") if {"bool", "bytes", "float", "int", "str"} & self.taken else "",
        )

    def module(self) -> Module:
        """Build all parts in order, then the imports."""
        streams = tuple(map(self._stream, self.file.contract.streams))
        subscriptions = tuple(self._subscriptions())
        nodes = self.schema.messages_of.get(self.file.path, ())
        frames = tuple(self._frame(node) for node in nodes if node.full_name in self.frames)
        services = tuple(map(self._service, self._services()))
        path = module_path(self.file.path, "_orki")
        imports = tuple(self._import_lines(streams + subscriptions, frames, services))
        return Module(path, self.file.path, self.names, imports, streams, subscriptions, frames, services)

    def _declared(self) -> set[str]:
        """Return all names that the protos define in the module, at any level."""
        contract = self.file.contract
        names: set[str] = set()
        for name in (*(each.name for each in contract.streams), *(each.stream for each in contract.external_groups)):
            names |= {constant_name(name), f"{class_name(name)}Group"}
        for frame in contract.frames:
            names.add(frame_class(frame.message, self.file.package))
            names |= {field.name for field in frame.fields} | {frame.tail}
        for method in contract.tasks + contract.tools:
            names |= {constant_name(method.name), snake_name(method.name)}
        for service in self._services():
            names |= {service.proto.name + suffix for suffix in ("Base", "SyncBase", "Client", "SyncClient")}
        return names

    def _exports(self) -> dict[str, str]:
        """Return the names of the re-exported messages and enums, by full name.

        The module re-exports the messages and enums of its file and the payloads of its methods. A name that clashes
        with another name of the module is not re-exported; the code then uses its `_pb2` module.
        """
        path = self.file.path
        own = [node.full_name for node in self.schema.messages_of.get(path, ())]
        own += [name for name, (file, _) in self.schema.enums.items() if file.name == path]
        own = [name for name in own if name not in self.frames and "." not in self._local(name)]
        contract = self.file.contract
        used = {each.message for each in contract.external_groups}
        for method in contract.tasks + contract.tools:
            used |= {method.request, method.response}
        for task in contract.tasks:
            used |= {*task.messages}
        foreign = [name for name in used if self._file_of(name).name != path and "." not in self._local(name)]
        exports: dict[str, str] = {}
        for names in (own, foreign):
            count = Counter(map(self._local, names))
            hidden = self.taken.union(exports.values(), _HIDDEN, keyword.kwlist)
            exports |= {name: local for name in names if count[local := self._local(name)] == 1 and local not in hidden}
        return exports

    def _alias(self, name: str) -> str:
        alias = unused(name, self.taken)
        self.taken.add(alias)
        return alias

    def _services(self) -> list[ServiceNode]:
        with_options = {each.service for each in self.file.contract.tasks + self.file.contract.tools}
        return [each for each in self.schema.services_of.get(self.file.path, ()) if each.full_name in with_options]

    def _stream(self, stream: Stream) -> StreamConstant:
        node = self.schema.messages[stream.message]
        message = self._message(stream.message)
        value = Call(f"{self.names.oc}.EventStream", (Raw(message), expression(stream, self.names.oc)))
        return self._constant(
            stream.name, message, stream.groups, value, self.schema.comment(node.file.name, node.path)
        )

    def _subscriptions(self) -> Iterator[StreamConstant]:
        subscriptions = self.file.contract.external_groups
        for name in sorted({each.stream for each in subscriptions}):
            own = [each for each in subscriptions if each.stream == name]
            owner = self.schema.messages[own[0].message].file.name
            source = f"{self._module(owner, '_orki')}.{constant_name(name)}"
            groups = [each.group for each in own]
            value = Call(f"{source}.with_groups", tuple(expression(group, self.names.oc) for group in groups))
            yield self._constant(name, self._message(own[0].message), groups, value, "")

    def _constant(
        self, stream: str, message: str, groups: Iterable[Group], value: Code, comment: str
    ) -> StreamConstant:
        alias = f"{class_name(stream)}Group"
        stream_type = Sequence((Raw(message), Raw(alias)), f"{self.names.oc}.EventStream")
        return StreamConstant(
            constant=constant_name(stream),
            groups_alias=alias,
            groups=Sequence(tuple(Raw(quote(group.name)) for group in groups), self.names.literal),
            annotation=Sequence((stream_type,), self.names.final),
            value=value,
            comment=comment,
        )

    def _frame(self, node: MessageNode) -> FrameClass:
        frame = next(each for each in self.file.contract.frames if each.message == node.full_name)
        layouts = {field.name: field for field in frame.fields}
        members = []
        for index, proto in enumerate(node.proto.field):
            comment = self.schema.comment(node.file.name, field_path(node, index))
            members.append(self._member(proto, layouts.get(proto.name), comment))
        # The order of FrameBase: version 1, the tail, later versions.
        order = {proto.name: _rank(layouts.get(proto.name), proto.number) for proto in node.proto.field}
        layout = (("version", Raw(f"{frame.version}")), ("block_length", Raw(f"{frame.block_length}")))
        return FrameClass(
            name=frame_class(node.full_name, self.file.package),
            decorator=Call(f"{self.names.oc}.frame", (Raw(quote(frame.message)),), layout),
            members=tuple(sorted(members, key=lambda member: order[member.name])),
            comment=self.schema.comment(node.file.name, node.path),
        )

    def _member(self, proto: FieldDescriptorProto, layout: FrameField | None, comment: str) -> FrameMember:
        if proto.type == FieldDescriptorProto.TYPE_ENUM:
            annotation = f"{self._message(proto.type_name.removeprefix('.'))}.ValueType"
        else:
            annotation = _PYTHON_TYPES.get(proto.type, "int")
            if self.names.builtins:
                annotation = f"{self.names.builtins}.{annotation}"
        oc = self.names.oc
        if layout is None:
            empty = '""' if proto.type == FieldDescriptorProto.TYPE_STRING else 'b""'
            return FrameMember(proto.name, annotation, Call(f"{oc}.tail", named=(("default", Raw(empty)),)), comment)
        named: list[tuple[str, Code]] = [("number", Raw(str(layout.number)))]
        if layout.scalar is Scalar.BYTES:
            named.append(("size", Raw(str(layout.size))))
        if layout.enum:
            named.append(("enum", Raw(quote(layout.enum))))
        if layout.since > 1:
            annotation = f"{annotation} | None"
            named += [("since", Raw(str(layout.since))), ("default", Raw("None"))]
        positional = (Raw(str(layout.offset)), expression(layout.scalar, oc))
        return FrameMember(proto.name, annotation, Call(f"{oc}.at", positional, tuple(named)), comment)

    def _service(self, node: ServiceNode) -> Service:
        declared = {each.full_name: each for each in self.file.contract.tasks + self.file.contract.tools}
        methods = tuple(self._method(method, declared[method.full_name]) for method in node.methods)
        return Service(
            kind="Task" if any(each.service == node.full_name for each in self.file.contract.tasks) else "Tool",
            name=node.proto.name,
            methods=methods,
            members=Sequence(tuple(Raw(method.constant) for method in methods)),
            comment=self.schema.comment(node.file.name, node.path),
        )

    def _method(self, node: MethodNode, method: TaskMethod | ToolMethod) -> Method:
        attribute = snake_name(method.name)
        request, response = self._payload(method.request), self._payload(method.response)
        named: list[tuple[str, Code]] = []
        messages: list[Code] = []
        if isinstance(method, ToolMethod):
            named.append(("opcode", Raw(f"0x{method.opcode:04X}")))
        named += [("request", Raw(request)), ("response", Raw(response))]
        if isinstance(method, TaskMethod):
            # The messages of a context; without a checkpoint and an answer these are bytes.
            declared = {each: getattr(method, each) for each in TASK_MESSAGES}
            named += [(each, Raw(self._payload(name))) for each, name in declared.items() if name]
            shown = declared if method.checkpoint or method.answer else TASK_MESSAGES[:2]
            default = {"checkpoint": "bytes", "answer": "bytes"}
            messages = [
                Raw(self._payload(declared[each]) if declared[each] else default.get(each, "None")) for each in shown
            ]
        named += _settings(method, self.names.oc)
        kind = "Task" if isinstance(method, TaskMethod) else "Tool"
        positional = (Raw(quote(method.full_name)),)
        return Method(
            constant=constant_name(method.name),
            attribute=attribute,
            value=Call(f"{self.names.oc}.{kind}.declare", positional, tuple(named)),
            request=request,
            response=response,
            messages=tuple(messages),
            comment=self.schema.comment(self.file.path, node.path),
        )

    def _payload(self, full_name: str) -> str:
        """Return the class of a message; the frame class for a frame."""
        if full_name not in self.frames or full_name in self.exports:
            return self._message(full_name)
        node = self.schema.messages[full_name]
        name = frame_class(full_name, node.file.package)
        return name if node.file.name == self.file.path else f"{self._module(node.file.name, '_orki')}.{name}"

    def _message(self, full_name: str) -> str:
        """Return the name of the protobuf class of a message or an enum in the module."""
        file, local = self._file_of(full_name), self._local(full_name)
        outermost = full_name.removesuffix(local) + local.partition(".")[0]
        return local if outermost in self.exports else f"{self._module(file.name, '_pb2')}.{local}"

    def _file_of(self, full_name: str) -> FileDescriptorProto:
        node = self.schema.messages.get(full_name)
        return node.file if node is not None else self.schema.enums[full_name][0]

    def _local(self, full_name: str) -> str:
        return reference(full_name, self._file_of(full_name).package)

    def _module(self, file: str, suffix: str) -> str:
        """Import the generated module of a proto file and return its alias."""
        dotted = _dotted(file, suffix)
        if dotted not in self.aliases:
            base = dotted.rpartition(".")[2]
            alias = dotted.replace(".", "_") if base in self.taken else base
            if file == self.file.path and suffix == "_pb2":
                alias = "pb"
            self.aliases[dotted] = self._alias(alias)
        return self.aliases[dotted]

    def _import_lines(
        self, streams: tuple[StreamConstant, ...], frames: tuple[FrameClass, ...], services: tuple[Service, ...]
    ) -> list[str]:
        names = self.names
        lines = []
        if names.builtins and frames:
            lines.append(_import("", "builtins", names.builtins))
        if services:
            lines.append(_import("abc", "abstractmethod", names.abstractmethod))
        typing = [("Final", names.final)] * bool(streams or services) + [("Literal", names.literal)] * bool(streams)
        if typing:
            members = ", ".join(name if name == alias else f"{name} as {alias}" for name, alias in typing)
            lines.append(f"from typing import {members}")
        lines += [""] * bool(lines) + [_import("", "orki_contract", names.oc)]
        found = [(dotted, _import(*dotted.rpartition(".")[::2], alias)) for dotted, alias in self.aliases.items()]
        exported: dict[str, list[str]] = {}
        for full_name, local in self.exports.items():
            suffix = "_orki" if full_name in self.frames else "_pb2"
            exported.setdefault(_dotted(self._file_of(full_name).name, suffix), []).append(local)
        found += [(dotted, line) for dotted, names in exported.items() for line in _reexports(dotted, sorted(names))]
        return lines + [line for _, line in sorted(found)]


def _dotted(file: str, suffix: str) -> str:
    return module_path(file, suffix).removesuffix(".py").replace("/", ".")


def _reexports(module: str, names: list[str]) -> list[str]:
    """Return import lines in which each name is its own alias, which type checkers treat as re-exports."""
    lines: list[str] = []
    for name in names:
        pair = f"{name} as {name}"
        longer = f"{lines[-1]}, {pair}" if lines else ""
        if longer and width(longer) <= WIDTH:
            lines[-1] = longer
        elif width(line := f"from {module} import {pair}") <= WIDTH:
            lines.append(line)
        else:
            lines.append(f"from {module} import (\n    {pair},\n)")
    return lines


def _import(package: str, name: str, alias: str) -> str:
    renamed = f"{name} as {alias}" if alias != name else name
    return f"from {package} import {renamed}" if package else f"import {renamed}"


def _rank(layout: FrameField | None, number: int) -> tuple[int, int, int]:
    if layout is None:
        return (1, 0, 0)
    return (0, 0, 0) if layout.since == 1 else (2, layout.since, number)


def _settings(method: TaskMethod | ToolMethod, vocabulary: str) -> list[tuple[str, Code]]:
    """Return the settings of a method that differ from the defaults."""
    skip = {"service", "name", "request", "response", *TASK_MESSAGES, "opcode"}
    return [
        (field.name, expression(getattr(method, field.name), vocabulary))
        for field in fields(method)
        if field.name not in skip and getattr(method, field.name) != field.default
    ]
