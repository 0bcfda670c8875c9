"""Which package index this machine uses, as uv and pip are told: by variables first, then by their files."""

from __future__ import annotations

__all__ = ["IndexSettings", "index_settings"]

import configparser
import os
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pypi_simple import PYPI_SIMPLE_ENDPOINT

from orki_contract.errors import InvalidSetting

_ADDRESSES: Final = ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "PIP_INDEX_URL")
_CERTIFICATES: Final = ("REQUESTS_CA_BUNDLE", "PIP_CERT", "SSL_CERT_FILE")
_PIP_SECTIONS: Final = ("global", "download", "install")


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexSettings:
    """How to reach the index.

    Attributes:
        url: The address of its simple API, with a slash at the end; it may hold a name and a password.
        certificates: A file of certificates to trust; None for the usual ones.
    """

    url: str
    certificates: str | None


def index_settings(given: str | None, environment: Mapping[str, str] = os.environ) -> IndexSettings:
    """What is given, else what uv or pip is told, else the public index.

    Args:
        given: An address, such as that of `--index`.
        environment: The process's variables.

    Raises:
        InvalidSetting: A file of uv's or pip's cannot be read.
    """
    home = Path(environment.get("HOME", "/"))
    config = Path(environment.get("XDG_CONFIG_HOME") or home / ".config")
    usual = (Path("/etc/pip.conf"), home / ".pip/pip.conf", config / "pip/pip.conf")
    pip = dict(_of_pip(_files(environment.get("PIP_CONFIG_FILE"), *usual)))
    addresses = [environment.get(name) for name in _ADDRESSES]
    addresses += _of_uv(_files(environment.get("UV_CONFIG_FILE"), config / "uv/uv.toml", Path("/etc/uv/uv.toml")))
    addresses += [pip.get("index-url")]
    url = given or next(filter(None, addresses), None) or PYPI_SIMPLE_ENDPOINT
    bundles = [*(environment.get(name) for name in _CERTIFICATES), pip.get("cert")]
    return IndexSettings(url=url if url.endswith("/") else f"{url}/", certificates=next(filter(None, bundles), None))


def _files(named: str | None, *usual: Path) -> list[Path]:
    """A file that a variable names stands for all others."""
    return [path for path in ([Path(named)] if named else usual) if path.is_file()]


def _of_pip(files: list[Path]) -> Iterator[tuple[str, str]]:
    """The settings of its files; later ones, and narrower sections, go before."""
    for path in files:
        parser = configparser.RawConfigParser()
        try:
            parser.read_string(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, configparser.Error) as error:
            raise InvalidSetting(f"pip's settings cannot be read: {path}: {error}") from error
        for section in _PIP_SECTIONS:
            if parser.has_section(section):
                yield from parser.items(section)


def _of_uv(files: list[Path]) -> list[str | None]:
    """The default index of each file, the first one counts."""
    found: list[str | None] = []
    for path in files:
        try:
            table: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise InvalidSetting(f"uv's settings cannot be read: {path}: {error}") from error
        defaults = [each.get("url") for each in table.get("index", []) if each.get("default")]
        found += [*defaults, table.get("index-url"), table.get("pip", {}).get("index-url")]
    return found
