"""What the declarations of a proto file are called in Python: one rule for generator, validator and docs."""

from __future__ import annotations

__all__ = ["class_name", "constant_name", "frame_class", "module_path", "reference", "snake_name", "unused"]

import re
from collections.abc import Collection

_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_BETWEEN = re.compile(r"[^A-Za-z0-9]+")


def snake_name(name: str) -> str:
    """`ReadFile` → `read_file`, `GetHTTPUrl` → `get_http_url`."""
    return _BETWEEN.sub("_", _HUMP.sub("_", name)).lower()


def constant_name(name: str) -> str:
    """`ReadFile` → `READ_FILE`, `review-findings` → `REVIEW_FINDINGS`."""
    return snake_name(name).upper()


def class_name(name: str) -> str:
    """`review_findings` → `ReviewFindings`."""
    return "".join(part[:1].upper() + part[1:] for part in _BETWEEN.split(name))


def module_path(file: str, suffix: str) -> str:
    """Path of the module that a proto file becomes: `acme/v1/my-file.proto`, `_pb2` → `acme/v1/my_file_pb2.py`.

    As protoc has it: a dash becomes an underscore.
    """
    return f"{file.removesuffix('.proto').replace('-', '_')}{suffix}.py"


def frame_class(full_name: str, package: str) -> str:
    """Name of the class of a frame: nested messages are joined by an underscore."""
    return _local(full_name, package).replace(".", "_")


def reference(full_name: str, package: str) -> str:
    """How a message is reached from its `_pb2` module: `Outer.Inner`."""
    return _local(full_name, package)


def unused(name: str, taken: Collection[str]) -> str:
    """The name, with as many underscores behind it as make it none of those that are taken."""
    while name in taken:
        name += "_"
    return name


def _local(full_name: str, package: str) -> str:
    return full_name.removeprefix(f"{package}.") if package else full_name
