"""Rehearse releases on a local index: publish, install, run, change, be refused, raise the version and publish again.

    python -m tests.release.rehearsal WORKSPACE FOLDER [--only LETTERS]

It uses the last commit, in FOLDER, which is emptied first. Exit status: 0 every step was as expected; 1 a step was not.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

from packaging.version import Version

from orki_codegen._gate.evaluate import least
from orki_contract.findings import Bump
from tests.release.rehearsal_scenarios import SCENARIOS, Scenario
from tests.release.rehearsal_workspace import Published, Rehearsal, clear, local_index

LETTERS = "abcdefgh"

# The line of the gate for each distribution whose version is too low.
NEEDED = re.compile(r"(\S+) has version \S+ and needs at least ([^\s:]+)")

# An operator tunes a stream within the bounds of the contract, with installed wheels: a server, publishers and the
# command `orki`.
TUNED = """
import asyncio, json, subprocess, sys
from pathlib import Path
from orki.events.v1.tool_orki import TOOLS
from orki.events.v1.tool_pb2 import ToolEvent
from orki_events import connect
from orki_server.embedded import EmbeddedServer


def streams(*arguments):
    command = [str(Path(sys.executable).with_name("orki")), "streams", "--redis", server.url, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout + done.stderr


async def publish(count):
    async with connect(server.url) as events:
        await events.publish_many(TOOLS, [ToolEvent()] * count)


def entries():
    status, said = streams("--json")
    assert status == 0, said
    (stream,) = json.loads(said)
    return stream["entries"]


with EmbeddedServer() as server:
    asyncio.run(publish(12_000))
    assert entries() == 12_000
    refused, why = streams("tune", "tools", "--max-entries", "9999")
    assert refused == 2 and "10000 to 10000000" in why, why
    assert entries() == 12_000
    taken, said = streams("tune", "tools", "--max-entries", "10000")
    assert taken == 0, said
    assert 10_000 <= entries() < 10_200
    asyncio.run(publish(1_000))
    assert 10_000 <= entries() < 10_200
    print("only within its bounds")
"""


class StepFailed(Exception):
    """A step did not have the expected outcome."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the rehearsal and print each step with its time."""
    parser = argparse.ArgumentParser(prog="rehearsal", allow_abbrev=False)
    parser.add_argument("workspace", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", metavar="LETTERS", help="only a first release and these changes")
    given = parser.parse_args(arguments)
    if strange := set(given.only or LETTERS) - set(LETTERS):
        parser.error(f"--only takes letters of {LETTERS}, not {', '.join(sorted(strange))}")
    folder = given.folder.absolute()
    clear(folder)
    log = _Log()
    try:
        with local_index(folder / "index") as url:
            rehearsal = Rehearsal(given.workspace.absolute(), folder, url)
            log.print(f"the commit {rehearsal.build()[:10]} in {rehearsal.clone}")
            if changed := rehearsal.git("status", "--short", cwd=rehearsal.workspace).splitlines():
                log.print(f"{len(changed)} uncommitted paths are ignored")
            _first_release(log, rehearsal, whole=given.only is None)
            letters = given.only or LETTERS
            if "h" in letters:
                _install_and_run(log, rehearsal)
            for scenario in SCENARIOS:
                if scenario.name[0] in letters:
                    _scenario(log, rehearsal, scenario)
            if "g" in letters:
                _ranges_are_checked(log, rehearsal)
            if "h" in letters:
                _tuning_is_no_release(log, rehearsal)
    except StepFailed as error:
        print(f"rehearsal: {error}", file=sys.stderr)
        return 1
    log.print("every step was as expected")
    return 0


class _Log:
    """Prints lines with the seconds since the start."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def print(self, line: str) -> None:
        print(f"[{time.monotonic() - self._began:5.0f} s] {line}", flush=True)


def _must(condition: bool, what: str, output: str) -> None:
    if not condition:
        raise StepFailed(f"{what}. The output:\n{output}")


def _first_release(log: _Log, rehearsal: Rehearsal, *, whole: bool) -> None:
    """Publish everything for the first time; in the full rehearsal the first attempt is killed and repeated."""
    left = rehearsal.publish_and_kill() if whole else frozenset[str]()
    if whole:
        output = rehearsal.files.with_name("killed.log").read_text(encoding="utf-8", errors="replace")
        _must(bool(left), "the first release uploaded nothing", output)
    done = rehearsal.publish()
    _must(done.status == 0, "the first release failed", done.output)
    _must(bool(done.brought), f"it was killed too late: {len(left)} files were there", done.output)
    _must(
        not any(name.startswith("review_fleet") for name in rehearsal.listed()),
        "a private distribution was uploaded",
        done.output,
    )
    killed = f"killed after {len(left)} files, then " if left else ""
    log.print(f"first release: {killed}{len(done.brought)} files uploaded")
    if whole:
        again = rehearsal.publish()
        _must(
            again.status == 0 and again.document["outcome"] == "unchanged",
            "the repeated publish was not a no-op",
            again.output,
        )
        log.print("repeated publish: nothing to do")
    rehearsal.commit("first release")


def _install_and_run(log: _Log, rehearsal: Rehearsal) -> None:
    """Install from the index and run the demo from wheels alone."""
    home = rehearsal.install()
    for wheel in sorted(rehearsal.files.glob("*.whl")):
        if not wheel.name.startswith("orki_codegen"):
            _must(_is_installed(wheel, home), f"{wheel.name} was not installed from this index", "")
    log.print("installed orki-agent and orki-server from the index, each with the bytes that were uploaded")
    empty, told = home / "empty", home / "demo.json"
    empty.mkdir()
    command = [str(home / "bin/python"), "-I", "-m", "review_fleet.demo", str(rehearsal.clone / "nox_sessions")]
    command += ["--json", str(told)]
    demo = subprocess.run(
        command, cwd=empty, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, timeout=600
    )
    _must(demo.returncode == 0 and isinstance(json.loads(told.read_text("utf-8")), dict), "the demo fails", demo.stdout)
    log.print("the demo runs from installed wheels")


def _is_installed(wheel: Path, home: Path) -> bool:
    """Return whether an environment contains each file of a wheel unchanged, except the RECORD."""
    (site,) = home.glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith(("/", "RECORD"))]
        return all((site / name).is_file() and (site / name).read_bytes() == archive.read(name) for name in names)


def _scenario(log: _Log, rehearsal: Rehearsal, scenario: Scenario) -> None:
    """Publish a change: it is refused with the old version and accepted with the new one."""
    for edit in scenario.edits:
        edit.apply(rehearsal.clone)
    rehearsal.generate()
    told = rehearsal.python("-m", "orki_contract", "diff", "HEAD", ".")
    refused = rehearsal.publish()
    _must_be_refused(refused, scenario, rehearsal.versions().of(scenario.owner))
    for word in scenario.affected:
        _must(word in refused.output and word in told, f"{scenario.name}: {word} is not reported as affected", told)
    if scenario.affected:
        _too_little_is_refused(rehearsal, scenario)
    for follower in scenario.follow:
        follower.apply(rehearsal.clone)
    rose = rehearsal.versions().raise_for(scenario.owner, scenario.bump)
    done = rehearsal.publish()
    _must(done.status == 0, f"{scenario.name}: refused with {', '.join(rose)} raised", done.output)
    brought = {name.partition("-")[0].replace("_", "-") for name in done.brought}
    wanted = {name for name in rose if name != "review-fleet"}
    _must(brought == wanted, f"{scenario.name}: published {sorted(brought)}, not {sorted(wanted)}", done.output)
    others = f", and the ranges of {', '.join(sorted(wanted - {scenario.owner}))}" if len(wanted) > 1 else ", it alone"
    log.print(
        f"{scenario.name}: refused by {scenario.rule}, published as {scenario.owner}"
        f" {rehearsal.versions().of(scenario.owner)} ({scenario.bump}){others}"
    )
    rehearsal.commit(scenario.name)


def _must_be_refused(refused: Published, scenario: Scenario, before: Version) -> None:
    """Check that the gate names the change and needs the right version of its owner alone."""
    _must(refused.status == 1 and not refused.brought, f"{scenario.name}: not refused", refused.output)
    gate = refused.document.get("gate") or []
    found = [each for each in gate if each["rule"] == scenario.rule and each["package"] == scenario.owner]
    _must(bool(found), f"{scenario.name}: {scenario.rule} of {scenario.owner} is not reported", refused.output)
    needed = dict(NEEDED.findall(refused.output))
    wanted = {scenario.owner: str(least(before, scenario.bump))}
    _must(needed == wanted, f"{scenario.name}: the gate needs {needed}, not {wanted}", refused.output)


def _too_little_is_refused(rehearsal: Rehearsal, scenario: Scenario) -> None:
    """Check that a patch is refused for a break."""
    versions = rehearsal.versions()
    before = versions.of(scenario.owner)
    versions.raise_for(scenario.owner, Bump.PATCH)
    refused = rehearsal.publish()
    _must(refused.status == 1 and not refused.brought, f"{scenario.name}: a patch was enough", refused.output)
    versions.set(scenario.owner, before)


def _ranges_are_checked(log: _Log, rehearsal: Rehearsal) -> None:
    """Check that a version outside the siblings' ranges is refused.

    The gate runs first in the existing environment, because a new one cannot be made of such distributions.
    """
    versions = rehearsal.versions()
    before = versions.of("orki-contract")
    after = least(before, Bump.MAJOR)
    versions.set("orki-contract", after)
    findings_file = rehearsal.files.with_name("ranges.json")
    gate = ["-m", "orki_codegen.cli", "gate", "--against", "index", "--index", f"{rehearsal.url}simple/"]
    told = rehearsal.python(*gate, "--json", str(findings_file))
    findings = json.loads(findings_file.read_text(encoding="utf-8"))
    named = {each["package"] for each in findings if each["rule"] == "SIBLING_RANGE"}
    wanted = set(versions.dependants("orki-contract"))
    _must(named == wanted, f"g: the gate names the ranges of {sorted(named)}, not of {sorted(wanted)}", told)
    refused = rehearsal.publish()
    _must(refused.status != 0 and not refused.brought, "g: published against the siblings' ranges", refused.output)
    versions.set("orki-contract", before)
    log.print(f"g: orki-contract {after} is refused by the ranges of {len(wanted)} siblings")


def _tuning_is_no_release(log: _Log, rehearsal: Rehearsal) -> None:
    """Check that installed publishers follow a tuned stream, and that there is nothing to publish."""
    python = str(rehearsal.files.with_name("installed") / "bin/python")
    tuned = subprocess.run(
        [python, "-I", "-c", TUNED],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
        timeout=300,
    )
    _must(tuned.stdout.strip() == "only within its bounds", "h: the setting is not taken", tuned.stdout)
    done = rehearsal.publish()
    _must(done.status == 0 and done.document["outcome"] == "unchanged", "h: something was published", done.output)
    log.print("h: a stream is tuned within its bounds: trimmed, and no release needed")


if __name__ == "__main__":
    sys.exit(main())
