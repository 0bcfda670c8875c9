"""Python names of proto declarations."""

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
    """Return the path of a generated module: `acme/v1/my-file.proto`, `_pb2` → `acme/v1/my_file_pb2.py`.

    As in protoc, a dash becomes an underscore.
    """
    return f"{file.removesuffix('.proto').replace('-', '_')}{suffix}.py"


def frame_class(full_name: str, package: str) -> str:
    """Return the class name of a frame; names of nested messages are joined by an underscore."""
    return reference(full_name, package).replace(".", "_")


def reference(full_name: str, package: str) -> str:
    """Return the name of a message within its `_pb2` module, such as `Outer.Inner`."""
    return full_name.removeprefix(f"{package}.") if package else full_name


def unused(name: str, taken: Collection[str]) -> str:
    """Append underscores to the name until it is not taken."""
    while name in taken:
        name += "_"
    return name
