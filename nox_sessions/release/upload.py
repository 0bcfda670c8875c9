"""Upload what was built: nothing twice, nothing over another's bytes, and again where an upload was cut off.

    python -m nox_sessions.release.upload --index URL [--upload URL] [--only DIST...] [--dry-run] [--json FILE]

Exit status: 0 all of it is on the index (or would be uploaded, with `--dry-run`); 1 refused, and nothing was uploaded;
2 it could not be done, and the same command goes on where this one ended.
"""

from __future__ import annotations

__all__ = ["main"]

import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from nox_sessions.release.address import Address
from nox_sessions.release.files import BuiltError, Release, releases
from nox_sessions.release.options import Options
from nox_sessions.release.pages import IndexUnreadable, Pages
from nox_sessions.release.plan import State, Step, but_for_copies, conflicts, plan, unmet
from nox_sessions.release.report import Report


class RefusedError(Exception):
    """It must not be uploaded; each line says of which file, and why."""


class FailedError(Exception):
    """It could not be uploaded; the text says how far it came."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Upload as the arguments say, and return the exit status."""
    options = Options.parse(arguments)
    report = Report(options)
    try:
        _upload(options, report)
    except (RefusedError, BuiltError) as error:
        return report.end("refused", str(error), 1)
    except (FailedError, IndexUnreadable) as error:
        return report.end("failed", str(error), 2)
    except KeyboardInterrupt:
        return report.end("failed", "interrupted; the same command goes on from here", 2)
    return 0


def _upload(options: Options, report: Report) -> None:
    built = releases(options.folder)
    chosen = _chosen(built, options, report)
    pages = Pages(options.address)
    own = {each.name for each in built}
    index = {name: pages.digests(name) for name in sorted(own)}
    steps = but_for_copies(plan(chosen, index), partial(_same, pages))
    report.planned(steps)
    if problems := conflicts(steps) + unmet(chosen, index, own):
        raise RefusedError("\n".join(problems))
    missing = [step for step in steps if step.state is State.MISSING]
    if options.dry_run:
        report.end("planned", f"dry run: {len(missing)} to upload, {len(steps) - len(missing)} already there", 0)
        return
    for number, step in enumerate(missing, 1):
        report.uploading(number, len(missing), step)
        _post(options.address, step)
        report.uploaded(step)
    if not missing:
        report.end("unchanged", _nothing(steps), 0)
        return
    _settled(pages, missing, options.settle)
    report.end("published", f"{len(missing)} uploaded, {len(steps) - len(missing)} already there", 0)


def _nothing(steps: Sequence[Step]) -> str:
    """Say why there is nothing to upload."""
    copies = [step.release.name for step in steps if step.state is State.COPIES]
    rest = f", but for copies of contracts that others own in {', '.join(dict.fromkeys(copies))}" if copies else ""
    return f"all of it is on the index already, byte for byte{rest}: nothing to do"


def _same(pages: Pages, step: Step) -> bool:
    """Tell whether the index has the same but for copies; what it serves has to be what its page says."""
    # Here, as it brings the whole gate along, which takes seconds, and is hardly ever needed.
    from nox_sessions.release.sameness import same_but_for_copies

    there = pages.fetch(step.file.name)
    if hashlib.sha256(there).hexdigest() != step.there:
        raise IndexUnreadable(f"{step.file.name}: the index serves other bytes than its page says")
    return same_but_for_copies(step.file.name, step.file.path.read_bytes(), there)


def _chosen(built: Sequence[Release], options: Options, report: Report) -> tuple[Release, ...]:
    """Return the releases to upload; private ones are for no index, and asking for one is refused."""
    public = {each.name: each for each in built if not each.private}
    for name in options.only:
        if name not in public:
            known = any(each.name == name for each in built)
            why = "is private, and for no index" if known else "is no distribution of this workspace"
            raise RefusedError(f"{name} {why}; there are {', '.join(sorted(public))}")
        if options.version not in {None, public[name].version}:
            raise RefusedError(f"the tag says {name} {options.version}, and its pyproject.toml {public[name].version}")
    for each in built:
        if each.private:
            report.say(f"{each.name} {each.version}: private, stays here")
    return tuple(each for each in public.values() if not options.only or each.name in options.only)


def _post(address: Address, step: Step) -> None:
    """Hand one file to uv, which finds the credentials: UV_PUBLISH_*, keyring, or those that CI lends it."""
    beside = Path(sys.executable).parent / "uv"
    uv = str(beside) if beside.is_file() else shutil.which("uv")
    if uv is None:
        raise FailedError("uv is neither beside this Python nor on the PATH: start the session with ./noxw")
    command = [uv, "publish", "--quiet", "--no-config", "--publish-url", address.upload, str(step.file.path)]
    # No terminal: a question that nobody sees would hang, and what is missing is said instead.
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
        hint = " Set UV_PUBLISH_TOKEN, or UV_PUBLISH_USERNAME and UV_PUBLISH_PASSWORD." if _asks(done.stdout) else ""
        raise FailedError(
            f"{done.stdout.strip()}\n{step.file.name}: not uploaded to {address.upload}.{hint} What came before it is"
            " there; the same command goes on from here"
        )


def _asks(output: str) -> bool:
    """Tell whether uv was turned away for want of the right credentials."""
    return any(word in output for word in ("Missing credentials", "401", "403"))


def _anonymous(address: Address) -> dict[str, str]:
    """Return a name for an index on this very machine, where none is set: uv sends nothing without one."""
    local = urlsplit(address.upload).hostname in {"127.0.0.1", "::1", "localhost"}
    if not local or any(os.environ.get(f"UV_PUBLISH_{name}") for name in ("TOKEN", "USERNAME", "PASSWORD")):
        return {}
    return {"UV_PUBLISH_USERNAME": "anonymous", "UV_PUBLISH_PASSWORD": "anonymous"}


def _settled(pages: Pages, steps: Sequence[Step], seconds: float) -> None:
    """Wait until the index shows what it was given: an address that takes files and shows none is not the index."""
    waiting = list(steps)
    end = time.monotonic() + seconds
    while True:
        index = {name: pages.digests(name) for name in sorted({step.release.name for step in waiting})}
        waiting = [step for step in waiting if index[step.release.name].get(step.file.name) != step.file.sha256]
        if not waiting:
            return
        if time.monotonic() > end:
            raise FailedError(
                f"uploaded, and the index does not show it: {', '.join(step.file.name for step in waiting)}."
                " Do --index and --upload belong to one index?"
            )
        time.sleep(1.0)


if __name__ == "__main__":
    sys.exit(main())
