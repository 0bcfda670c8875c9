"""A contract that can be edited: descriptors with their options, and back to an image."""

from __future__ import annotations

__all__ = ["Draft", "compilable"]

import functools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorSet

from orki_contract.descriptors import Schema

_Field = FieldDescriptorProto
JUDGED = "acme/"


@dataclass(frozen=True, slots=True)
class Spot:
    """A message with its place in the tree."""

    file: Any
    siblings: Any
    proto: Any
    full_name: str


class Draft:
    """The files of an image, parsed so that options can be read and written by their names.

    Attributes:
        files: By path; edit them.
        told: What was edited, in words.
        touched: Names of option fields that were edited, and kinds of fields that were retyped.
    """

    def __init__(self, image: bytes) -> None:
        self.schema = _schema(image)
        self.files: dict[str, Any] = {}
        for name, file in self.schema.files.items():
            copy = type(file)()
            copy.CopyFrom(file)
            copy.ClearField("source_code_info")
            self.files[name] = copy
        self.told: list[str] = []
        self.touched: set[str] = set()

    def image(self) -> bytes:
        """The edited files as an image."""
        whole = FileDescriptorSet()
        for file in self.files.values():
            whole.file.add().ParseFromString(file.SerializeToString())
        return whole.SerializeToString()

    def extension(self, name: str) -> Any:
        """An option of orki's, as a key of `Extensions`."""
        return self.schema.pool.FindExtensionByName(f"orki.options.v1.{name}")

    def option(self, options: Any, name: str) -> Any:
        """An option's value, or None where it is not set."""
        extension = self.extension(name)
        return options.Extensions[extension] if options.HasExtension(extension) else None

    @property
    def own(self) -> list[Any]:
        """The files that may be edited."""
        return [file for name, file in sorted(self.files.items()) if name.startswith(JUDGED)]

    def messages(self) -> list[Spot]:
        """Every message that may be edited, without the entries of maps."""
        return [spot for file in self.own for spot in _messages(file, file.message_type, file.package)]

    def frames(self) -> list[Spot]:
        """Every frame."""
        return [spot for spot in self.messages() if self.option(spot.proto.options, "frame") is not None]

    def enums(self) -> list[tuple[Any, Any, str]]:
        """Every enum: its file, itself, its full name."""
        found = [(file, enum, f"{file.package}.{enum.name}") for file in self.own for enum in file.enum_type]
        for spot in self.messages():
            found += [(spot.file, enum, f"{spot.full_name}.{enum.name}") for enum in spot.proto.enum_type]
        return found

    def methods(self) -> list[tuple[Any, Any, Any]]:
        """Every rpc: its file, its service, itself."""
        return [(file, service, method) for file in self.own for service in file.service for method in service.method]

    def fields(self, rng: random.Random) -> tuple[Spot, Any] | None:
        """Some field of some message."""
        spots = [spot for spot in self.messages() if len(spot.proto.field)]
        if not spots:
            return None
        spot = rng.choice(spots)
        return spot, rng.choice(list(spot.proto.field))

    def renamed(self, before: str, after: str) -> None:
        """Points every reference to a message or enum, and to what is nested in it, to its new name."""
        for file in self.own:
            for spot in _messages(file, file.message_type, file.package, maps=True):
                for field in spot.proto.field:
                    if field.type_name == f".{before}" or field.type_name.startswith(f".{before}."):
                        field.type_name = f".{after}{field.type_name[len(before) + 1 :]}"
        for _, _, method in self.methods():
            for name in ("input_type", "output_type"):
                if getattr(method, name) == f".{before}":
                    setattr(method, name, f".{after}")


@functools.lru_cache(maxsize=4)
def _schema(image: bytes) -> Schema:
    """Drafts copy its files, so one serves many."""
    return Schema(image)


def _messages(file: Any, siblings: Any, scope: str, *, maps: bool = False) -> Iterator[Spot]:
    for proto in siblings:
        full_name = f"{scope}.{proto.name}"
        if maps or not proto.options.map_entry:
            yield Spot(file, siblings, proto, full_name)
            yield from _messages(file, proto.nested_type, full_name, maps=maps)


def compilable(draft: Draft) -> bool:
    """Whether a compiler would take it; what a pool of descriptors lets pass is looked at here."""
    for file in draft.own:
        plain = file.syntax == "proto3"
        for _, enum, _ in (each for each in draft.enums() if each[0] is file):
            numbers = [value.number for value in enum.value]
            names = [value.name for value in enum.value]
            if not numbers or len(set(names)) != len(names):
                return False
            if (plain or file.syntax == "editions") and numbers[0] != 0:
                return False
            if len(set(numbers)) != len(numbers) and not enum.options.allow_alias:
                return False
            if any(each.start <= number <= each.end for each in enum.reserved_range for number in numbers):
                return False
        for spot in (each for each in draft.messages() if each.file is file):
            if not _message_compiles(spot.proto, plain=plain):
                return False
    return True


def _message_compiles(proto: Any, *, plain: bool) -> bool:
    numbers = [field.number for field in proto.field]
    names = [field.name for field in proto.field]
    if len(set(numbers)) != len(numbers) or len(set(names)) != len(names):
        return False
    if any(each.start <= number < each.end for each in proto.reserved_range for number in numbers):
        return False
    if set(names) & set(proto.reserved_name):
        return False
    if len({field.json_name or field.name for field in proto.field}) != len(names):
        return False
    maps = {nested.name for nested in proto.nested_type if nested.options.map_entry}
    for field in proto.field:
        if field.type_name.rpartition(".")[2] in maps and field.label != _Field.LABEL_REPEATED:
            return False
        required = field.label == _Field.LABEL_REQUIRED
        if plain and (required or field.default_value or field.type == _Field.TYPE_GROUP):
            return False
        if field.proto3_optional and not plain:
            return False
        if field.HasField("oneof_index") and field.label != _Field.LABEL_OPTIONAL:
            return False
        if field.proto3_optional and not field.HasField("oneof_index"):
            return False
    used = {field.oneof_index for field in proto.field if field.HasField("oneof_index")}
    return used == set(range(len(proto.oneof_decl)))
