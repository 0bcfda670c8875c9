"""Names that are invalid or ambiguous in Python."""

from __future__ import annotations

import keyword
import sys
from collections.abc import Iterator
from typing import Final

from orki_contract._rules.report import Report, Rule
from orki_contract.descriptors import Location, field_path
from orki_contract.naming import class_name, constant_name, frame_class, module_path, reference, snake_name
from orki_contract.read import FileContract

RULES: Final[dict[Rule, str]] = {
    "ORKI_NAME_KEYWORD": "No generated name is a Python keyword.",
    "ORKI_NAME_RESERVED": "No frame field or method has a name that generated classes reserve.",
    "ORKI_NAME_CLASH": "No two declarations of a file have the same Python name.",
    "ORKI_NAME_MODULE": "No two files become the same Python module.",
    "ORKI_NAME_FILE": "A file's name is a valid Python module name.",
    "ORKI_PACKAGE_FOLDER": "A file with a contract is in the folder that its package names.",
    "ORKI_PACKAGE_SHADOWS": "A package's first part is not a module of Python, protobuf or orki.",
}

# Attributes of FrameBase and of the generated classes.
_RESERVED: Final = frozenset({"FRAME", "decode", "encode"})
_TAKEN_PACKAGES: Final = frozenset({"google", "grpc", "orki_contract"})


def check(report: Report) -> None:
    """Check every name that generated code takes from a contract file."""
    modules: dict[str, str] = {}
    for file in report.read.files:
        if not file.empty:
            _file(report, file)
            _package(report, file)
            _declarations(report, file)
            _frame_fields(report, file)
            _methods(report, file)
            _messages(report, file)
        module = module_path(file.path, "").casefold()
        if module in modules:
            text = f"{file.path} and {modules[module]} become the same Python module: rename one"
            report.add("ORKI_NAME_MODULE", report.schema.location(file.path), text)
        modules.setdefault(module, file.path)


def _file(report: Report, file: FileContract) -> None:
    stem = file.path.removesuffix(".proto").rpartition("/")[2].replace("-", "_")
    if not stem.isidentifier():
        text = f'"{stem}" is not a valid Python module name: use letters, digits and underscores'
        report.add("ORKI_NAME_FILE", report.schema.location(file.path), text)


def _package(report: Report, file: FileContract) -> None:
    place = report.schema.location(file.path, (2,))
    parts = file.package.split(".") if file.package else []
    folder = "/".join(parts)
    if file.path.rpartition("/")[0] != folder or not parts:
        text = (
            f'the file is in "{file.path.rpartition("/")[0]}" but its package is "{file.package}": '
            "move the file or rename the package"
        )
        report.add("ORKI_PACKAGE_FOLDER", place, text)
    for part in parts:
        _keyword(report, place, part, f'the part "{part}" of package {file.package}')
    if parts and (parts[0] in sys.stdlib_module_names or parts[0] in _TAKEN_PACKAGES):
        text = (
            f'package {file.package} begins with "{parts[0]}", which is another Python module: '
            "put your own name in front"
        )
        report.add("ORKI_PACKAGE_SHADOWS", place, text)


def _declarations(report: Report, file: FileContract) -> None:
    seen: dict[str, str] = {}
    for name, subject, place in _declared(report, file):
        if seen.get(name, subject) != subject:
            text = f"{subject} and {seen[name]} would both be {name} in Python: rename one or move it to another file"
            report.add("ORKI_NAME_CLASH", place, text)
        seen.setdefault(name, subject)


def _declared(report: Report, file: FileContract) -> Iterator[tuple[str, str, Location]]:
    """Return every top-level name of a file's module, with its declaration and the declaration's location."""
    contract, places = file.contract, report.read.locations
    for stream in contract.streams:
        for name in (constant_name(stream.name), f"{class_name(stream.name)}Group"):
            yield name, f'stream "{stream.name}"', places[stream.message]
    subscribed = {each.stream: each for each in contract.external_groups}
    for subscription in subscribed.values():
        place = places[f"{file.package}:{subscription.stream}/{subscription.group.name}"]
        for name in (constant_name(subscription.stream), f"{class_name(subscription.stream)}Group"):
            yield name, f'stream "{subscription.stream}"', place
    for frame in contract.frames:
        yield frame_class(frame.message, file.package), f"frame {frame.message}", places[frame.message]
    tools = {each.service for each in contract.tools}
    methods = contract.tasks + contract.tools
    for service in report.schema.services_of.get(file.path, ()):
        if any(each.service == service.full_name for each in methods):
            suffixes = ("Base", "SyncBase", "Client") + ("SyncClient",) * (service.full_name in tools)
            for suffix in suffixes:
                place = report.schema.location(file.path, service.path)
                yield service.proto.name + suffix, f"service {service.full_name}", place
    for method in methods:
        yield constant_name(method.name), f"method {method.full_name}", places[method.full_name]


def _frame_fields(report: Report, file: FileContract) -> None:
    frames = {each.message for each in file.contract.frames}
    for node in report.schema.messages_of.get(file.path, ()):
        if node.full_name in frames:
            for index, field in enumerate(node.proto.field):
                place = report.schema.location(file.path, (*field_path(node, index), 1))
                subject = f'field "{field.name}" of frame {node.full_name}'
                _keyword(report, place, field.name, subject)
                _reserved(report, place, field.name, subject)


def _methods(report: Report, file: FileContract) -> None:
    for method in file.contract.tasks + file.contract.tools:
        place = report.read.locations[method.full_name]
        attribute = snake_name(method.name)
        subject = f"method {method.full_name}, in Python {attribute},"
        _keyword(report, place, attribute, subject)
        _reserved(report, place, attribute, subject, frozenset())


def _messages(report: Report, file: FileContract) -> None:
    """Check the names of messages and enums that the module accesses as `pb.NAME`."""
    contract = file.contract
    used = {each.message: each.message for each in contract.streams}
    for method in contract.tasks + contract.tools:
        used.update(dict.fromkeys((method.request, method.response), method.full_name))
    for task in contract.tasks:
        used.update(dict.fromkeys(task.messages, task.full_name))
    used.update({each.message: each.message for each in contract.frames})
    used.update({field.enum: each.message for each in contract.frames for field in each.fields if field.enum})
    for name, subject in used.items():
        owner = report.schema.messages.get(name)
        enum = report.schema.enums.get(name)
        package = owner.file.package if owner else enum[0].package if enum else ""
        for part in reference(name, package).split("."):
            _keyword(report, report.read.locations[subject], part, f'the part "{part}" of {name}')


def _keyword(report: Report, place: Location, name: str, subject: str) -> None:
    if keyword.iskeyword(name):
        report.add("ORKI_NAME_KEYWORD", place, f"{subject} is a Python keyword: rename it")


def _reserved(report: Report, place: Location, name: str, subject: str, taken: frozenset[str] = _RESERVED) -> None:
    if name in taken or name.startswith("_"):
        report.add("ORKI_NAME_RESERVED", place, f"{subject} has a name that generated classes reserve: rename it")
