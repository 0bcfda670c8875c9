"""What `publish` is told."""

from __future__ import annotations

__all__ = ["Options"]

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.utils import NormalizedName, canonicalize_name
from packaging.version import InvalidVersion, Version

from nox_sessions.release.address import Address, AddressError


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What `publish` is told.

    Attributes:
        address: the index.
        only: the normal names of the distributions to upload; empty for all.
        version: the version that the one in `only` must have, as a tag says; None without a tag.
        dry_run: whether to do everything but upload.
        json: where to write the outcome for a program, or None.
        folder: where the built files are.
        settle: how long the index may take to show what it was given, in seconds; those behind a cache take a while.
    """

    address: Address
    only: tuple[str, ...]
    version: Version | None
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
            epilog="Credentials: UV_PUBLISH_TOKEN, or UV_PUBLISH_USERNAME and UV_PUBLISH_PASSWORD."
            " ORKI_INDEX and ORKI_UPLOAD stand for --index and --upload where these are not given.",
        )
        parser.add_argument("--index", metavar="URL", help="the index, as one gives it to pip")
        parser.add_argument("--upload", metavar="URL", help="where it takes uploads, if that cannot be derived")
        which = parser.add_mutually_exclusive_group()
        which.add_argument("--only", nargs="+", action="extend", default=[], metavar="DIST", help="these alone")
        which.add_argument("--tag", metavar="DIST-vVERSION", help="this one alone, and only at this version")
        parser.add_argument("--dry-run", action="store_true", help="do everything but upload")
        parser.add_argument("--json", type=Path, metavar="FILE", help="write the outcome for a program")
        parser.add_argument("--dist", type=Path, default=Path("dist"), metavar="DIR", help="where the built files are")
        parser.add_argument("--settle", type=float, default=120.0, metavar="SECONDS", help="wait so long for its pages")
        given = parser.parse_args(arguments)
        # A variable that a workflow sets from nothing is empty; it counts as unset.
        index = given.index or os.environ.get("ORKI_INDEX")
        if not index:
            parser.error("--index URL is missing, and so is the variable ORKI_INDEX: which index?")
        only, version = tuple(canonicalize_name(name) for name in given.only), None
        try:
            address = Address.parse(index, given.upload or os.environ.get("ORKI_UPLOAD") or None)
            if given.tag is not None:
                name, version = _tagged(given.tag)
                only = (name,)
        except (AddressError, ValueError) as error:
            parser.error(str(error))
        return cls(
            address=address,
            only=only,
            version=version,
            dry_run=given.dry_run,
            json=given.json,
            folder=given.dist,
            settle=given.settle,
        )


def _tagged(tag: str) -> tuple[NormalizedName, Version]:
    """Read a tag such as `orki-events-v1.2.0`; `refs/tags/` may stand before it."""
    name, _, version = tag.removeprefix("refs/tags/").rpartition("-v")
    try:
        if not name:
            raise InvalidVersion
        return canonicalize_name(name, validate=True), Version(version)
    except ValueError:
        raise ValueError(f"--tag {tag}: a tag is a distribution and its version, as orki-events-v1.2.0") from None
