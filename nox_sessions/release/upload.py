"""Upload built files; an interrupted upload can be repeated, and no published file is replaced.

    python -m nox_sessions.release.upload --index URL [--upload URL] [--only DIST...] [--dry-run] [--json FILE]

Exit status: 0 all files are on the index (or would be uploaded, with `--dry-run`); 1 refused, nothing was uploaded;
2 failed, and the same command continues where this one stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import netrc
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

from packaging.utils import NormalizedName, canonicalize_name
from packaging.version import InvalidVersion, Version

from nox_sessions.release.plan import (
    BuiltError,
    Release,
    State,
    Step,
    but_for_copies,
    conflicts,
    plan,
    read_releases,
    same_but_for_copies,
    unmet,
)

if TYPE_CHECKING:
    # The environment that runs nox has no orki-codegen, and it parses the options.
    from orki_codegen._gate.index import Index

# The last part of the URL of a simple API (PEP 503); devpi uses the second one.
PAGES = ("simple", "+simple")


class AddressError(ValueError):
    """An index URL that cannot be used."""


class RefusedError(Exception):
    """The files must not be uploaded; one line for each reason."""


class FailedError(Exception):
    """The files could not be uploaded."""


@dataclass(frozen=True, slots=True)
class Address:
    """The two URLs of an index.

    Attributes:
        simple: The URL of its simple API, with a slash at the end.
        upload: The URL to which files are posted.
    """

    simple: str
    upload: str

    @classmethod
    def parse(cls, index: str, upload: str | None = None) -> Address:
        """Derive the missing URL.

        If the index ends in `/simple`, uploads go to the parent path, as on most private indexes. Otherwise its simple
        API is expected in `simple/` below it. An index with uploads on another host needs both URLs.

        Raises:
            AddressError: A URL is not http or https, or has a password, query or fragment.
        """
        base = _checked("--index", index)
        base = base if base.endswith("/") else f"{base}/"
        last = base.rstrip("/").rpartition("/")[2]
        simple = base if last in PAGES else f"{base}simple/"
        if upload is not None:
            # The slash at the end is significant on some indexes, so the URL is used as given.
            return cls(simple, _checked("--upload", upload))
        return cls(simple, base.rstrip("/").removesuffix(last) if last in PAGES else base)


def _checked(option: str, url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise AddressError(f"{option} {url}: not an address that begins with http:// or https://")
    if parts.username is not None or parts.password is not None:
        bare = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
        raise AddressError(
            f"{option} {bare}: contains a name or password, which other users of this machine can read. Put them into"
            " UV_PUBLISH_USERNAME and UV_PUBLISH_PASSWORD, or UV_PUBLISH_TOKEN; for reading, into ~/.netrc"
        )
    if parts.query or parts.fragment:
        raise AddressError(f"{option} {url}: an index URL has no query or fragment")
    return url


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """The options of `publish`.

    Attributes:
        only: The normalized names of the distributions to upload; empty for all.
        version: The version in the tag, which the distribution in `only` must have; None without a tag.
        dry_run: Whether to stop before the upload.
        json: The file for the outcome, or None.
        folder: The folder of the built files.
        settle: How long the index may take to list an uploaded file, in seconds.
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
        """Parse a command line; wrong usage exits with status 2."""
        parser = argparse.ArgumentParser(
            prog="publish",
            allow_abbrev=False,
            description="Upload the distributions of the workspace, dependencies first.",
            epilog="Credentials: UV_PUBLISH_TOKEN, or UV_PUBLISH_USERNAME and UV_PUBLISH_PASSWORD."
            " ORKI_INDEX and ORKI_UPLOAD are the defaults of --index and --upload.",
        )
        parser.add_argument("--index", metavar="URL", help="the index, as given to pip")
        parser.add_argument("--upload", metavar="URL", help="the upload URL, if it cannot be derived")
        which = parser.add_mutually_exclusive_group()
        which.add_argument("--only", nargs="+", action="extend", default=[], metavar="DIST", help="upload only these")
        which.add_argument("--tag", metavar="DIST-vVERSION", help="upload only DIST, at VERSION")
        parser.add_argument("--dry-run", action="store_true", help="do everything except the upload")
        parser.add_argument("--json", type=Path, metavar="FILE", help="write the outcome to this file")
        parser.add_argument("--dist", type=Path, default=Path("dist"), metavar="DIR", help="folder of the built files")
        parser.add_argument("--settle", type=float, default=120.0, metavar="SECONDS", help="maximum wait for listing")
        given = parser.parse_args(arguments)
        # A workflow sets a missing variable to an empty text.
        index = given.index or os.environ.get("ORKI_INDEX")
        if not index:
            parser.error("--index URL is missing, and the variable ORKI_INDEX is not set")
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

    def outcome(self, outcome: str, text: str, status: int, **more: object) -> None:
        """Write the outcome to the JSON file, if there is one."""
        if self.json is not None:
            document = {
                "outcome": outcome,
                "status": status,
                "text": text,
                "index": self.address.simple,
                "upload": self.address.upload,
                "dry_run": self.dry_run,
                "files": [],
                **more,
            }
            self.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _tagged(tag: str) -> tuple[NormalizedName, Version]:
    """Parse a tag such as `orki-events-v1.2.0`, with or without `refs/tags/`."""
    name, _, version = tag.removeprefix("refs/tags/").rpartition("-v")
    try:
        if not name:
            raise InvalidVersion
        return canonicalize_name(name, validate=True), Version(version)
    except ValueError:
        raise ValueError(f"--tag {tag}: not of the form DISTRIBUTION-vVERSION, such as orki-events-v1.2.0") from None


class _Report:
    """Prints the progress and writes the outcome."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._steps: tuple[Step, ...] = ()
        self._uploaded: set[str] = set()

    def planned(self, steps: Sequence[Step]) -> None:
        self._steps = tuple(steps)
        for step in steps:
            print(f"{step.file.name}: {step.state.value}", flush=True)

    def uploaded(self, step: Step) -> None:
        self._uploaded.add(step.file.name)

    def end(self, outcome: str, text: str, status: int) -> int:
        print(text, file=sys.stderr if status else sys.stdout, flush=True)
        self._options.outcome(outcome, text, status, files=[self._entry(step) for step in self._steps])
        return status

    def _entry(self, step: Step) -> dict[str, str | None]:
        state = step.state.name.lower()
        return {
            "distribution": step.release.name,
            "version": str(step.release.version),
            "file": step.file.name,
            "sha256": step.file.sha256,
            "before": state,
            "sha256_there": step.there,
            "now": "uploaded" if step.file.name in self._uploaded else state,
        }


def main(arguments: Sequence[str] | None = None) -> int:
    """Upload and return the exit status."""
    from orki_contract.errors import OrkiError

    options = Options.parse(arguments)
    report = _Report(options)
    try:
        _upload(options, report)
    except (RefusedError, BuiltError) as error:
        return report.end("refused", str(error), 1)
    except FailedError as error:
        return report.end("failed", str(error), 2)
    except OrkiError as error:
        return report.end("failed", error.message, 2)
    except KeyboardInterrupt:
        return report.end("failed", "interrupted; the same command continues from here", 2)
    return 0


def open_index(address: Address) -> Index:
    """Return a client of the index that reads with the credentials of ~/.netrc, or of the upload to the same host."""
    from orki_codegen._gate.index import Index, index_settings

    try:
        known = netrc.netrc().authenticators(urlsplit(address.simple).hostname or "")
    except (FileNotFoundError, netrc.NetrcParseError):
        known = None
    name, password = os.environ.get("UV_PUBLISH_USERNAME"), os.environ.get("UV_PUBLISH_PASSWORD")
    same = urlsplit(address.simple).netloc == urlsplit(address.upload).netloc
    credentials = (name, password) if name and password and same and known is None else None
    return Index(index_settings(address.simple), same_host=True, credentials=credentials)


def _upload(options: Options, report: _Report) -> None:
    built = read_releases(options.folder)
    chosen = _chosen(built, options)
    own = {each.name for each in built}
    with open_index(options.address) as index:
        there = {name: index.digests(name) for name in sorted(own)}
        steps = but_for_copies(plan(chosen, there), partial(_same, index))
        report.planned(steps)
        if problems := conflicts(steps) + unmet(chosen, there, own):
            raise RefusedError("\n".join(problems))
        missing = [step for step in steps if step.state is State.MISSING]
        if options.dry_run:
            report.end("planned", f"dry run: {len(missing)} to upload, {len(steps) - len(missing)} already there", 0)
            return
        for number, step in enumerate(missing, 1):
            print(f"[{number}/{len(missing)}] {step.file.name}", flush=True)
            _post(options.address, step)
            report.uploaded(step)
        if not missing:
            copies = dict.fromkeys(step.release.name for step in steps if step.state is State.COPIES)
            rest = f", except copies of other owners' contracts in {', '.join(copies)}" if copies else ""
            report.end("unchanged", f"all files are on the index already, byte for byte{rest}: nothing to do", 0)
            return
        _wait_until_listed(index, missing, options.settle)
    report.end("published", f"{len(missing)} uploaded, {len(steps) - len(missing)} already there", 0)


def _same(index: Index, step: Step) -> bool:
    """Return whether the index's file equals the built one except for copies of other owners' contracts."""
    there = index.read(step.file.name)
    if hashlib.sha256(there).hexdigest() != step.there:
        raise FailedError(f"{step.file.name}: the bytes on the index do not have the digest on its page")
    return same_but_for_copies(step.file.name, step.file.path.read_bytes(), there)


def _chosen(built: Sequence[Release], options: Options) -> tuple[Release, ...]:
    """Return the releases to upload; choosing a private one is refused."""
    public = {each.name: each for each in built if not each.private}
    for name in options.only:
        if name not in public:
            known = any(each.name == name for each in built)
            why = "is private and never uploaded" if known else "is not a distribution of this workspace"
            raise RefusedError(f"{name} {why}; the public ones are {', '.join(sorted(public))}")
        if options.version not in {None, public[name].version}:
            raise RefusedError(f"the tag has {name} {options.version}, and its pyproject.toml {public[name].version}")
    for each in built:
        if each.private:
            print(f"{each.name} {each.version}: private, not uploaded", flush=True)
    return tuple(each for each in public.values() if not options.only or each.name in options.only)


def _post(address: Address, step: Step) -> None:
    """Upload one file with uv, which finds the credentials: UV_PUBLISH_*, the keyring, or trusted publishing."""
    beside = Path(sys.executable).parent / "uv"
    uv = str(beside) if beside.is_file() else shutil.which("uv")
    if uv is None:
        raise FailedError("uv is neither beside this Python nor on the PATH: start the session with ./noxw")
    command = [uv, "publish", "--quiet", "--no-config", "--publish-url", address.upload, str(step.file.path)]
    # Without a terminal uv reports missing credentials instead of asking for them.
    done = subprocess.run(
        command,
        env={**os.environ, **_anonymous(address)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        denied = any(word in done.stdout for word in ("Missing credentials", "401", "403"))
        hint = " Set UV_PUBLISH_TOKEN, or UV_PUBLISH_USERNAME and UV_PUBLISH_PASSWORD." if denied else ""
        raise FailedError(
            f"{done.stdout.strip()}\n{step.file.name}: not uploaded to {address.upload}.{hint} Earlier files are"
            " uploaded; the same command continues from here"
        )


def _anonymous(address: Address) -> dict[str, str]:
    """Return variables with a name and password for a local index without credentials, because uv requires them."""
    local = urlsplit(address.upload).hostname in {"127.0.0.1", "::1", "localhost"}
    if not local or any(os.environ.get(f"UV_PUBLISH_{name}") for name in ("TOKEN", "USERNAME", "PASSWORD")):
        return {}
    return {"UV_PUBLISH_USERNAME": "anonymous", "UV_PUBLISH_PASSWORD": "anonymous"}


def _wait_until_listed(index: Index, steps: Sequence[Step], timeout: float) -> None:
    """Wait until the index lists the uploaded files; raise FailedError if it does not within `timeout` seconds."""
    waiting = list(steps)
    end = time.monotonic() + timeout
    while True:
        there = {name: index.digests(name) for name in sorted({step.release.name for step in waiting})}
        waiting = [step for step in waiting if there[step.release.name].get(step.file.name) != step.file.sha256]
        if not waiting:
            return
        if time.monotonic() > end:
            raise FailedError(
                f"uploaded, but not listed by the index: {', '.join(step.file.name for step in waiting)}."
                " Check that --index and --upload belong to one index"
            )
        time.sleep(1.0)


if __name__ == "__main__":
    sys.exit(main())
