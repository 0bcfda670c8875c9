"""Reads the contract model from descriptors.

Reading does not validate: an absent or invalid option gives the default. Use `orki_contract.validate` for images from
other sources.
"""

from __future__ import annotations

__all__ = [
    "PROGRESS_POLICIES",
    "FileContract",
    "ReadContract",
    "merged",
    "read_image",
    "read_schema",
    "resolve",
    "seconds_of",
]

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto

from orki_contract._frames import scalar_size
from orki_contract.descriptors import Location, MessageNode, MethodNode, Path, Schema, field_path
from orki_contract.model import (
    AUDIT_GROUP,
    TASK_MESSAGES,
    Backoff,
    Budget,
    Contract,
    Durability,
    ExternalGroup,
    Frame,
    FrameField,
    Group,
    Overflow,
    ProgressPolicy,
    Retention,
    Scalar,
    SensitiveField,
    Start,
    Stream,
    TaskMethod,
    ToolMethod,
)

_Field = FieldDescriptorProto

_BY_TYPE: Final[Mapping[int, Scalar]] = {
    _Field.TYPE_BOOL: Scalar.BOOL,
    _Field.TYPE_INT32: Scalar.I32,
    _Field.TYPE_SINT32: Scalar.I32,
    _Field.TYPE_SFIXED32: Scalar.I32,
    _Field.TYPE_ENUM: Scalar.I32,
    _Field.TYPE_UINT32: Scalar.U32,
    _Field.TYPE_FIXED32: Scalar.U32,
    _Field.TYPE_INT64: Scalar.I64,
    _Field.TYPE_SINT64: Scalar.I64,
    _Field.TYPE_SFIXED64: Scalar.I64,
    _Field.TYPE_UINT64: Scalar.U64,
    _Field.TYPE_FIXED64: Scalar.U64,
    _Field.TYPE_FLOAT: Scalar.F32,
    _Field.TYPE_DOUBLE: Scalar.F64,
    _Field.TYPE_BYTES: Scalar.BYTES,
}

# By the numbers of orki.options.v1.Scalar.
_BY_OPTION: Final[Mapping[int, Scalar]] = {1: Scalar.U8, 2: Scalar.U16, 3: Scalar.I8, 4: Scalar.I16}


PROGRESS_POLICIES: Final[Mapping[int, ProgressPolicy]] = {
    0: ProgressPolicy.BLOCK,
    1: ProgressPolicy.BLOCK,
    2: ProgressPolicy.KEEP_LATEST,
    3: ProgressPolicy.DROP,
}
"""The policies by the numbers of orki.options.v1.ProgressPolicy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileContract:
    """The declarations of one file.

    Attributes:
        path: Import path of the file.
        plain_services: Full names of the services without orki options.
    """

    path: str
    package: str
    contract: Contract
    plain_services: tuple[str, ...]

    @property
    def empty(self) -> bool:
        """Whether no code is generated for the file."""
        parts = self.contract
        return not (parts.streams or parts.external_groups or parts.tasks or parts.tools or parts.frames)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadContract:
    """A contract with its source locations.

    Attributes:
        contract: The declarations of all files, each part sorted.
        files: Each file, by path.
        locations: Location of each declaration. Keys: full names of messages (streams, frames), `Service/Method`
            (tasks, tools), `package:stream/group` (external groups).
    """

    contract: Contract
    files: tuple[FileContract, ...]
    locations: Mapping[str, Location]
    schema: Schema


def read_image(image: bytes, texts: Mapping[str, str] | None = None) -> ReadContract:
    """Read a serialized FileDescriptorSet or buf Image with its imports.

    Args:
        image: The bytes.
        texts: Texts of the files by path, if available; they make locations inside options exact.

    Raises:
        InvalidContract: The image cannot be parsed or lacks an imported file.
    """
    return read_schema(Schema(image, texts))


def read_schema(schema: Schema) -> ReadContract:
    """Read the contract of a schema."""
    locations: dict[str, Location] = {}
    files = tuple(_file(schema, file, locations) for file in schema.files.values())
    contract = merged(each.contract for each in files)
    return ReadContract(contract=contract, files=files, locations=locations, schema=schema)


def merged(parts: Iterable[Contract]) -> Contract:
    """Merge several contracts; each part is sorted."""
    every = list(parts)

    def joined(name: str) -> tuple[Any, ...]:
        return tuple(sorted(each for part in every for each in getattr(part, name)))

    return Contract(**{field.name: joined(field.name) for field in fields(Contract)})


def seconds_of(duration: Any, default: float = 0.0) -> float:
    """Return a `google.protobuf.Duration` in seconds, rounded down to milliseconds; `default` if it is None."""
    if duration is None:
        return default
    return float(duration.seconds * 1_000 + duration.nanos // 1_000_000) / 1_000


def resolve(package: str, name: str) -> str:
    """Return the full name of a message: a name without a dot belongs to the package."""
    return f"{package}.{name}" if name and "." not in name and package else name


def _file(schema: Schema, file: FileDescriptorProto, locations: dict[str, Location]) -> FileContract:
    streams, frames, sensitive = [], [], []
    for node in schema.messages_of.get(file.name, ()):
        if (options := schema.option(node.proto.options, "stream")) is not None:
            streams.append(_stream(node, options))
            locations[node.full_name] = schema.location(file.name, node.path)
        if (options := schema.option(node.proto.options, "frame")) is not None:
            frames.append(_frame(schema, node, options))
            locations[node.full_name] = schema.location(file.name, node.path)
        for index, field in enumerate(node.proto.field):
            if schema.option(field.options, "sensitive"):
                sensitive.append(SensitiveField(message=node.full_name, field=field.name))
                locations[f"{node.full_name}.{field.name}"] = schema.location(file.name, field_path(node, index))
    tasks: list[TaskMethod] = []
    tools: list[ToolMethod] = []
    plain = []
    for service in schema.services_of.get(file.name, ()):
        mark = len(tasks) + len(tools)
        for method in service.methods:
            if (options := schema.option(method.proto.options, "task")) is not None:
                tasks.append(_task(file, method, options))
            elif (options := schema.option(method.proto.options, "tool")) is not None:
                tools.append(_tool(method, options))
            locations[method.full_name] = schema.location(file.name, method.path)
        if mark == len(tasks) + len(tools):
            plain.append(service.full_name)
    external_groups = list(_external_groups(schema, file, locations))
    contract = Contract(
        streams=tuple(sorted(streams)),
        external_groups=tuple(sorted(external_groups)),
        tasks=tuple(sorted(tasks)),
        tools=tuple(sorted(tools)),
        frames=tuple(sorted(frames)),
        sensitive=tuple(sorted(sensitive)),
    )
    return FileContract(path=file.name, package=file.package, contract=contract, plain_services=tuple(sorted(plain)))


# Numbers of orki.options.v1. Other rules report unknown ones.
_OVERFLOWS: Final = {2: Overflow.BLOCK, 3: Overflow.FAIL}
_DURABILITIES: Final = {2: Durability.FSYNC, 3: Durability.REPLICAS}


def _group(option: Any) -> Group:
    return Group(
        name=option.name,
        start=Start.LATEST if option.start == 2 else Start.EARLIEST,
        max_deliveries=option.max_deliveries or Group(name="").max_deliveries,
        ack_deadline=seconds_of(_set(option, "ack_deadline"), Group(name="").ack_deadline),
        dead_letter=option.dead_letter,
        max_dead_letters=getattr(option, "max_dead_letters", 0) or Group(name="").max_dead_letters,
        max_dead_letter_age=seconds_of(_set(option, "max_dead_letter_age")),
    )


def _stream(node: MessageNode, option: Any) -> Stream:
    groups = {group.name: group for group in (AUDIT_GROUP, *map(_group, option.groups))}
    retention = Retention(
        max_entries=option.retention.max_entries,
        max_age=seconds_of(_set(option.retention, "max_age")),
        overflow=_OVERFLOWS.get(option.retention.overflow, Overflow.DROP_OLDEST),
        # Images built with older options have no bounds, and no limits that were added later.
        least_entries=getattr(option.retention, "least_entries", 0),
        most_entries=getattr(option.retention, "most_entries", 0),
        least_age=seconds_of(_set(option.retention, "least_age")),
        most_age=seconds_of(_set(option.retention, "most_age")),
        max_bytes=getattr(option.retention, "max_bytes", 0),
        ceiling_entries=getattr(option.retention, "ceiling_entries", 0),
    )
    durability = _DURABILITIES.get(getattr(option, "durability", 0), Durability.MEMORY)
    return Stream(
        name=option.name,
        message=node.full_name,
        retention=retention,
        partitions=option.partitions or 1,
        partition_key=option.partition_key,
        groups=tuple(sorted(groups.values())),
        durability=durability,
        replicas=(option.replicas or 1) if durability is Durability.REPLICAS else 0,
    )


def _external_groups(
    schema: Schema, file: FileDescriptorProto, locations: dict[str, Location]
) -> Iterator[ExternalGroup]:
    for index, option in enumerate(schema.option(file.options, "consume") or ()):
        group = _group(option.group)
        path: Path = (8, schema.option_number("consume"), index)
        locations[f"{file.package}:{option.stream}/{group.name}"] = schema.location(file.name, path)
        message = schema.stream_messages.get(option.stream, "")
        yield ExternalGroup(package=file.package, stream=option.stream, message=message, group=group)


def _task(file: FileDescriptorProto, method: MethodNode, option: Any) -> TaskMethod:
    default = TaskMethod(service="", name="", request="", response="")
    backoff = option.retry_backoff
    return TaskMethod(
        service=method.service,
        name=method.proto.name,
        request=method.proto.input_type.removeprefix("."),
        response=method.proto.output_type.removeprefix("."),
        # An image may hold options of an older version, which lacks fields.
        **{each: resolve(file.package, getattr(option, each, "")) for each in TASK_MESSAGES},
        heartbeat_timeout=seconds_of(_set(option, "heartbeat_timeout"), default.heartbeat_timeout),
        attempt_timeout=seconds_of(_set(option, "attempt_timeout"), default.attempt_timeout),
        stall_timeout=seconds_of(_set(option, "stall_timeout")),
        total_timeout=seconds_of(_set(option, "total_timeout")),
        max_attempts=option.max_attempts or default.max_attempts,
        backoff=Backoff(
            initial=seconds_of(_set(backoff, "initial"), default.backoff.initial),
            maximum=seconds_of(_set(backoff, "maximum"), default.backoff.maximum),
            multiplier=backoff.multiplier or default.backoff.multiplier,
        ),
        cancel_grace=seconds_of(_set(option, "cancel_grace"), default.cancel_grace),
        budget=_budget(getattr(option, "budget", None)),
        durability=getattr(option, "durability", ""),
        # It may also hold a policy of a newer version.
        progress_policy=PROGRESS_POLICIES.get(getattr(option, "progress_policy", 0), default.progress_policy),
    )


def _budget(option: Any) -> Budget:
    if option is None:
        return Budget()
    return Budget(tokens=option.tokens, cost_micros=option.cost_micros, calls=option.calls)


def _tool(method: MethodNode, option: Any) -> ToolMethod:
    default = ToolMethod(service="", name="", opcode=0, request="", response="")
    return ToolMethod(
        service=method.service,
        name=method.proto.name,
        opcode=option.opcode,
        request=method.proto.input_type.removeprefix("."),
        response=method.proto.output_type.removeprefix("."),
        timeout=seconds_of(_set(option, "timeout"), default.timeout),
        idempotent=option.idempotent,
    )


def _frame(schema: Schema, node: MessageNode, option: Any) -> Frame:
    block = []
    tail: FieldDescriptorProto | None = None
    for field in node.proto.field:
        offset = schema.option(field.options, "offset")
        scalar = _BY_OPTION.get(schema.option(field.options, "scalar") or 0) or _BY_TYPE.get(field.type)
        if offset is None:
            if field.type in (_Field.TYPE_BYTES, _Field.TYPE_STRING):
                tail = field
        elif scalar is not None:
            size = scalar_size(scalar, schema.option(field.options, "size") or 0)
            enum = field.type_name.removeprefix(".") if field.type == _Field.TYPE_ENUM else ""
            since = schema.option(field.options, "since") or 1
            known = FrameField(
                offset=offset, name=field.name, number=field.number, scalar=scalar, size=size, since=since, enum=enum
            )
            block.append(known)
    return Frame(
        message=node.full_name,
        version=option.version,
        block_length=option.block_length,
        fields=tuple(sorted(block)),
        tail=tail.name if tail is not None else "",
        tail_text=tail is not None and tail.type == _Field.TYPE_STRING,
    )


def _set(message: Any, field: str) -> Any:
    """Return the value of a submessage field; None if it is absent or unknown to the image's options."""
    return getattr(message, field) if field in message.DESCRIPTOR.fields_by_name and message.HasField(field) else None
