"""Which version of which distribution brought the generated code of a proto package."""

from __future__ import annotations

__all__ = ["package_version", "source_folder"]

import json
import os
from functools import cache
from importlib import metadata, resources
from pathlib import Path
from urllib.parse import unquote, urlsplit

from orki_contract.images import IMAGE_NAME


@cache
def package_version(package: str) -> str:
    """Version of the distribution that installed a proto package, such as `1.2.0`; empty where none is known.

    Reads the lists of installed files, which takes some milliseconds, once for each package.
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
    """Where a distribution lies that was installed from its source folder (PEP 610); None for any other."""
    parts = urlsplit(json.loads(distribution.read_text("direct_url.json") or "{}").get("url", ""))
    return Path(unquote(parts.path)) if parts.scheme == "file" else None
