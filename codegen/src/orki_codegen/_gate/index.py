"""A client of package indexes (simple API, PEP 503 and 691), and the index settings of uv and pip."""

from __future__ import annotations

import base64
import configparser
import hashlib
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Final
from urllib.parse import unquote, urljoin, urlsplit

from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version
from pypi_simple import PYPI_SIMPLE_ENDPOINT, DistributionPackage, NoSuchProjectError, ProjectPage, PyPISimple

from orki_contract.errors import InvalidSetting

_TIMEOUT: Final = 30.0
_MISSING: Final = (404, 410)
_DENIED: Final = (401, 403)
_ADDRESSES: Final = ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "PIP_INDEX_URL")
_CERTIFICATES: Final = ("REQUESTS_CA_BUNDLE", "PIP_CERT", "SSL_CERT_FILE")
_PIP_SECTIONS: Final = ("global", "download", "install")


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexSettings:
    """The address of an index.

    Attributes:
        url: The URL of its simple API, with a slash at the end; it may contain a name and a password.
        certificates: A file of trusted certificates; None for the default ones.
    """

    url: str
    certificates: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """One wheel of an index; `uploaded` is None if the index does not report the time."""

    version: Version
    file: DistributionPackage
    uploaded: datetime | None


class Index:
    """One package index; a context manager.

    Args:
        settings: The address of the index.
        same_host: Whether a redirect to another host counts as an unknown project. Some indexes redirect requests for
            unknown projects to a public index, where the name may belong to somebody else.
        credentials: A name and password for the index's own host; ~/.netrc is used without them.
    """

    def __init__(
        self, settings: IndexSettings, *, same_host: bool = False, credentials: tuple[str, str] | None = None
    ) -> None:
        self._client = PyPISimple(settings.url)
        self._url = settings.url
        self._host = urlsplit(settings.url).netloc
        self._urls: dict[str, str] = {}
        if settings.certificates is not None:
            self._client.s.verify = settings.certificates
        if same_host:
            self._client.s.hooks["response"].append(_refuse_other_hosts)
        if credentials is not None:
            token = base64.b64encode(":".join(credentials).encode()).decode()
            self._client.s.auth = self._authorization(f"Basic {token}")

    @property
    def label(self) -> str:
        """Its URL for messages, without a password."""
        return re.sub(r"//[^/@]*@", "//", self._url)

    def __enter__(self) -> Index:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._client.s.close()

    def check(self) -> None:
        """Check that the URL is an index; a wrong URL would look like an index without packages.

        Raises:
            InvalidSetting: The URL is not that of an index.
        """
        try:
            status = self._client.s.head(self._url, timeout=_TIMEOUT, allow_redirects=True).status_code
        except (OSError, ValueError) as error:
            raise self._unreadable("", error) from error
        if status in _MISSING or status >= 500:
            raise InvalidSetting(
                f"there is no package index at {self.label}: it answers {status}. Give the URL of its simple API, "
                "which usually ends in /simple/"
            )

    def wheels(self, name: str) -> list[Published] | None:
        """Return the wheels of a distribution that are not yanked, oldest version first; None for an unknown one.

        Raises:
            InvalidSetting: The index cannot be read, or it has releases but no wheel to compare with.
        """
        page = self._page(name)
        if page is None:
            return None
        found = []
        for file in page.packages:
            if file.package_type != "wheel" or file.is_yanked or canonicalize_name(file.project or "") != name:
                continue
            try:
                version = Version(file.version or "")
            except InvalidVersion:
                continue
            found.append(Published(version=version, file=file, uploaded=file.upload_time))
        if page.packages and not found:
            raise InvalidSetting(
                f"{self.label} has releases of {name} but no wheel that is not yanked, so there is nothing to compare "
                "with: publish wheels too, or compare with a git ref"
            )
        return sorted(found, key=lambda each: (each.version, each.file.filename)) or None

    def digests(self, name: str) -> dict[str, str]:
        """Return the SHA-256 of each file of a project; empty for an unknown project.

        If the page has no digest of a file, the file is downloaded.

        Raises:
            InvalidSetting: The index cannot be read.
        """
        page = self._page(name)
        found = {}
        for file in page.packages if page is not None else ():
            # The text of a link may be anything; the name is at the end of its URL.
            filename = unquote(urlsplit(file.url).path.rpartition("/")[2])
            self._urls[filename] = file.url
            digest = file.digests.get("sha256") or hashlib.sha256(self.read(filename)).hexdigest()
            found[filename] = digest.lower()
        return found

    def read(self, filename: str) -> bytes:
        """Return the bytes of a file that `digests` has listed.

        Raises:
            InvalidSetting: The file cannot be read.
        """
        try:
            answer = self._client.s.get(self._urls[filename], timeout=_TIMEOUT)
            answer.raise_for_status()
        except (OSError, ValueError, _OtherHost) as error:
            raise self._unreadable(filename, error) from error
        return bytes(answer.content)

    def fetch(self, wheel: Published, folder: Path) -> Path:
        """Download a wheel into a folder.

        Raises:
            InvalidSetting: The wheel cannot be read, or its digest is wrong.
        """
        path = folder / wheel.file.filename
        try:
            self._client.download_package(wheel.file, path, verify=bool(wheel.file.digests), timeout=_TIMEOUT)
        except (OSError, ValueError, RuntimeError) as error:
            raise self._unreadable(wheel.file.filename, error) from error
        return path

    def _page(self, name: str) -> ProjectPage | None:
        try:
            return self._client.get_project_page(name, timeout=_TIMEOUT)
        except (NoSuchProjectError, _OtherHost):
            return None
        except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
            if _status(error) in _MISSING:
                return None
            raise self._unreadable(name, error) from error

    def _authorization(self, value: str) -> Any:
        def authorize(request: Any) -> Any:
            if urlsplit(request.url).netloc == self._host:
                request.headers["Authorization"] = value
            return request

        return authorize

    def _unreadable(self, subject: str, error: Exception) -> InvalidSetting:
        status = _status(error)
        reason = re.sub(r"//[^/@\s]*@", "//", str(error)) if status is None else f"it answers {status}"
        hint = ". Credentials for reading go into ~/.netrc" if status in _DENIED else ""
        return InvalidSetting(
            f"the package index {self.label} cannot be read{f' for {subject}' if subject else ''}: {reason}{hint}. "
            "Try again, or give another index with --index"
        )


class _OtherHost(Exception):
    """The index redirects to another host."""


def _refuse_other_hosts(answer: Any, *_: Any, **__: Any) -> None:
    if answer.is_redirect:
        target = urlsplit(urljoin(answer.url, answer.headers["Location"]))
        if target.netloc != urlsplit(answer.url).netloc:
            raise _OtherHost


def _status(error: Exception) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def index_settings(given: str | None, environment: Mapping[str, str] = os.environ) -> IndexSettings:
    """Return the index at the given URL, else that of the settings of uv or pip, else the public index.

    Environment variables take precedence over files.

    Raises:
        InvalidSetting: A settings file of uv or pip cannot be read.
    """
    home = Path(environment.get("HOME", "/"))
    config = Path(environment.get("XDG_CONFIG_HOME") or home / ".config")
    usual = (Path("/etc/pip.conf"), home / ".pip/pip.conf", config / "pip/pip.conf")
    pip = dict(_pip_settings(_files(environment.get("PIP_CONFIG_FILE"), *usual)))
    addresses = [environment.get(name) for name in _ADDRESSES]
    addresses += _uv_indexes(_files(environment.get("UV_CONFIG_FILE"), config / "uv/uv.toml", Path("/etc/uv/uv.toml")))
    addresses += [pip.get("index-url")]
    url = given or next(filter(None, addresses), None) or PYPI_SIMPLE_ENDPOINT
    bundles = [*(environment.get(name) for name in _CERTIFICATES), pip.get("cert")]
    return IndexSettings(url=url if url.endswith("/") else f"{url}/", certificates=next(filter(None, bundles), None))


def _files(named: str | None, *usual: Path) -> list[Path]:
    # A file that a variable names replaces all others.
    return [path for path in ([Path(named)] if named else usual) if path.is_file()]


def _pip_settings(files: list[Path]) -> Iterator[tuple[str, str]]:
    """Yield settings; later files and narrower sections take precedence."""
    for path in files:
        parser = configparser.RawConfigParser()
        try:
            parser.read_string(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, configparser.Error) as error:
            raise InvalidSetting(f"pip's settings cannot be read: {path}: {error}") from error
        for section in _PIP_SECTIONS:
            if parser.has_section(section):
                yield from parser.items(section)


def _uv_indexes(files: list[Path]) -> list[str | None]:
    """Return the default indexes; the first one is used."""
    found: list[str | None] = []
    for path in files:
        try:
            table: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise InvalidSetting(f"uv's settings cannot be read: {path}: {error}") from error
        defaults = [each.get("url") for each in table.get("index", []) if each.get("default")]
        found += [*defaults, table.get("index-url"), table.get("pip", {}).get("index-url")]
    return found
