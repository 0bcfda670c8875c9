"""Releases as a package index holds them (its simple API, PEP 503 and 691)."""

from __future__ import annotations

__all__ = ["Index", "Published"]

import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Final

from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version
from pypi_simple import DistributionPackage, NoSuchProjectError, PyPISimple

from orki_codegen.gate.index_settings import IndexSettings
from orki_contract.errors import InvalidSetting

_SECONDS: Final = 30.0
_GONE: Final = (404, 410)


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """One wheel of an index.

    Attributes:
        version: Its version.
        file: What the index tells of it.
        uploaded: When it came there; None where the index does not tell.
    """

    version: Version
    file: DistributionPackage
    uploaded: datetime | None


class Index:
    """One package index."""

    def __init__(self, settings: IndexSettings) -> None:
        self._client = PyPISimple(settings.url)
        if settings.certificates is not None:
            self._client.s.verify = settings.certificates
        self._url = settings.url

    @property
    def label(self) -> str:
        """Its address for people, without a password."""
        return re.sub(r"//[^/@]*@", "//", self._url)

    def __enter__(self) -> Index:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._client.s.close()

    def check(self) -> None:
        """Makes sure that there is an index at all: one that is not there knows no package either.

        Raises:
            InvalidSetting: There is none.
        """
        try:
            status = self._client.s.head(self._url, timeout=_SECONDS, allow_redirects=True).status_code
        except (OSError, ValueError) as error:
            raise self._unreadable("", error) from error
        if status in _GONE or status >= 500:
            raise InvalidSetting(
                f"there is no package index at {self.label}: it answers {status}. Name the address of its simple API, "
                "which mostly ends in /simple/"
            )

    def wheels(self, name: str) -> list[Published] | None:
        """Every wheel of a distribution that was not withdrawn, oldest version first; None where nothing is there.

        Raises:
            InvalidSetting: The index cannot be read, or has releases and no wheel that could be compared.
        """
        try:
            page = self._client.get_project_page(name, timeout=_SECONDS)
        except NoSuchProjectError:
            return None
        except (OSError, ValueError, RuntimeError) as error:
            raise self._unreadable(name, error) from error
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
                f"{self.label} has releases of {name}, and no wheel that was not withdrawn: nobody can tell what its "
                "users have. Publish wheels too, or compare with a git ref"
            )
        return sorted(found, key=lambda each: (each.version, each.file.filename)) or None

    def fetch(self, wheel: Published, folder: Path) -> Path:
        """Downloads a wheel into a folder.

        Raises:
            InvalidSetting: It cannot be read, or is not what the index says.
        """
        path = folder / wheel.file.filename
        try:
            self._client.download_package(wheel.file, path, verify=bool(wheel.file.digests), timeout=_SECONDS)
        except (OSError, ValueError, RuntimeError) as error:
            raise self._unreadable(wheel.file.filename, error) from error
        return path

    def _unreadable(self, what: str, error: Exception) -> InvalidSetting:
        said = re.sub(r"//[^/@\s]*@", "//", str(error))
        return InvalidSetting(
            f"the package index {self.label} cannot be read{f' for {what}' if what else ''}: {said}. Without it "
            "nobody knows what users have: try again, name another index with --index, or compare with a git ref"
        )
