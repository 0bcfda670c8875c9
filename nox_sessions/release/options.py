"""What `publish` is told."""

from __future__ import annotations

__all__ = ["Options"]

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.utils import canonicalize_name

from nox_sessions.release.address import Address, AddressError


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What `publish` is told.

    Attributes:
        address: the index.
        only: the normal names of the distributions to upload; empty for all.
        dry_run: whether to do everything but upload.
        json: where to write the outcome for a program, or None.
        folder: where the built files are.
        settle: how long the index may take to show what it was given, in seconds; those behind a cache take a while.
    """

    address: Address
    only: tuple[str, ...]
    dry_run: bool
    json: Path | None
    folder: Path
    settle: float

    @classmethod
    def parse(cls, arguments: Sequence[str] | None) -> Options:
        """Read a command line; what is wrong with it is said on stderr, and ends the process with status 2."""
        parser = argparse.ArgumentParser(
            prog="publish",
            allow_abbrev=False,
            description="Upload the distributions of the workspace, in the order in which they depend on each other.",
            epilog="Credentials: UV_PUBLISH_TOKEN, or UV_PUBLISH_USERNAME and UV_PUBLISH_PASSWORD.",
        )
        parser.add_argument("--index", required=True, metavar="URL", help="the index, as one gives it to pip")
        parser.add_argument("--upload", metavar="URL", help="where it takes uploads, if that cannot be derived")
        parser.add_argument("--only", nargs="+", action="extend", default=[], metavar="DIST", help="these alone")
        parser.add_argument("--dry-run", action="store_true", help="do everything but upload")
        parser.add_argument("--json", type=Path, metavar="FILE", help="write the outcome for a program")
        parser.add_argument("--dist", type=Path, default=Path("dist"), metavar="DIR", help="where the built files are")
        parser.add_argument("--settle", type=float, default=120.0, metavar="SECONDS", help="wait so long for its pages")
        given = parser.parse_args(arguments)
        try:
            address = Address.parse(given.index, given.upload)
        except AddressError as error:
            parser.error(str(error))
        return cls(
            address=address,
            only=tuple(canonicalize_name(name) for name in given.only),
            dry_run=given.dry_run,
            json=given.json,
            folder=given.dist,
            settle=given.settle,
        )
