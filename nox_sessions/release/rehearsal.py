"""Rehearse a year of releases on this machine: publish, install, run, change, be refused, raise the version, publish.

    python -m nox_sessions.release.rehearsal WORKSPACE FOLDER [--only LETTERS]

It plays the last commit, in FOLDER, which is emptied first. Exit status: 0 all went as it must; 1 something did not.
"""

from __future__ import annotations

__all__ = ["main"]

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

from nox_sessions.release.scenarios import SCENARIOS, Scenario
from nox_sessions.release.stage import Published, Stage, clear, local_index
from nox_sessions.release.versions import breaking, raised

LETTERS = "abcdefgh"

# How the gate ends, for each distribution whose version promises too little.
ASKED = re.compile(r"(\S+) promises \S+, and must promise (\S+) at the least")

# What an operator may set without a release: inside the bounds of the contract, and only there. By installed wheels: a
# server, publishers, and the operator's command.
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
    assert refused == 1 and "10000 to 10000000" in why, why
    assert entries() == 12_000
    taken, said = streams("tune", "tools", "--max-entries", "10000")
    assert taken == 0, said
    assert 10_000 <= entries() < 10_200
    asyncio.run(publish(1_000))
    assert 10_000 <= entries() < 10_200
    print("inside its bounds, and only there")
"""


class WrongError(Exception):
    """Something did not go as it must; the text says what, and holds the output."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Play it, and tell each step with its time."""
    parser = argparse.ArgumentParser(prog="rehearsal", allow_abbrev=False)
    parser.add_argument("workspace", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", metavar="LETTERS", help="a plain first release, and these changes")
    given = parser.parse_args(arguments)
    if strange := set(given.only or LETTERS) - set(LETTERS):
        parser.error(f"--only takes letters of {LETTERS}, and {', '.join(sorted(strange))} is none of them")
    folder = given.folder.absolute()
    clear(folder)
    play = _Play()
    try:
        with local_index(folder / "index") as url:
            stage = Stage(given.workspace.absolute(), folder, url)
            play.tell(f"the commit {stage.build()[:10]} in {stage.clone}")
            if changed := stage.git("status", "--short", cwd=stage.workspace).splitlines():
                play.tell(f"what is not committed is not played: {len(changed)} paths")
            _first_release(play, stage, whole=given.only is None)
            letters = given.only or LETTERS
            if "h" in letters:
                _install_and_run(play, stage)
            for scenario in SCENARIOS:
                if scenario.name[0] in letters:
                    _scenario(play, stage, scenario)
            if "g" in letters:
                _ranges_are_checked(play, stage)
            if "h" in letters:
                _tuning_is_no_release(play, stage)
    except WrongError as error:
        print(f"rehearsal: {error}", file=sys.stderr)
        return 1
    play.tell("all went as it must")
    return 0


class _Play:
    """Tells what happens, with the seconds since the beginning."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def tell(self, line: str) -> None:
        print(f"[{time.monotonic() - self._began:5.0f} s] {line}", flush=True)


def _must(condition: bool, what: str, output: str) -> None:
    if not condition:
        raise WrongError(f"{what}. The output:\n{output}")


def _first_release(play: _Play, stage: Stage, *, whole: bool) -> None:
    """Publish all for the first time; in the whole play it is killed once the index has something, and goes on."""
    left = stage.publish_and_die() if whole else frozenset[str]()
    if whole:
        log = stage.files.with_name("killed.log").read_text(encoding="utf-8", errors="replace")
        _must(bool(left), "the first release brought nothing to the index", log)
    done = stage.publish()
    _must(done.status == 0, "the first release does not go through", done.output)
    _must(bool(done.brought), f"it was killed too late: {len(left)} files were there", done.output)
    _must(not any(name.startswith("review_fleet") for name in stage.listed()), "a private one went up", done.output)
    killed = f"killed after {len(left)} files, then " if left else ""
    play.tell(f"first release: {killed}{len(done.brought)} files brought to the index")
    if whole:
        again = stage.publish()
        _must(
            again.status == 0 and again.document["outcome"] == "unchanged", "the same again is no no-op", again.output
        )
        play.tell("the same again: nothing to do")
    stage.commit("first release")


def _install_and_run(play: _Play, stage: Stage) -> None:
    """Install from the index as a stranger would, and run the demo from wheels alone."""
    home = stage.stranger()
    for wheel in sorted(stage.files.glob("*.whl")):
        if not wheel.name.startswith("orki_codegen"):
            _must(_is_installed(wheel, home), f"{wheel.name} was not installed from this index", "")
    play.tell("installed orki-agent and orki-server from the index, each with the bytes that were uploaded")
    empty, told = home / "empty", home / "demo.json"
    empty.mkdir()
    command = [str(home / "bin/python"), "-I", "-m", "review_fleet.demo", str(stage.clone / "nox_sessions")]
    command += ["--json", str(told)]
    demo = subprocess.run(
        command, cwd=empty, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, timeout=600
    )
    _must(demo.returncode == 0 and isinstance(json.loads(told.read_text("utf-8")), dict), "the demo fails", demo.stdout)
    play.tell("the demo runs from installed wheels")


def _is_installed(wheel: Path, home: Path) -> bool:
    """Tell whether each file of a wheel is in an environment as the wheel has it, but for what installers write."""
    (site,) = home.glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith(("/", "RECORD"))]
        return all((site / name).is_file() and (site / name).read_bytes() == archive.read(name) for name in names)


def _scenario(play: _Play, stage: Stage, scenario: Scenario) -> None:
    """Make a change; without the version it is refused, with the version it goes through."""
    for edit in scenario.edits:
        edit.apply(stage.clone)
    stage.generate()
    told = stage.python("-m", "orki_contract", "diff", "HEAD", ".")
    refused = stage.publish()
    _must_be_refused(refused, scenario, stage.versions().of(scenario.owner))
    for word in scenario.affected:
        _must(word in refused.output and word in told, f"{scenario.name}: nobody says that {word} is concerned", told)
    if scenario.affected:
        _too_little_is_refused(stage, scenario)
    for follower in scenario.follow:
        follower.apply(stage.clone)
    rose = stage.versions().raise_for(scenario.owner, scenario.bump)
    done = stage.publish()
    _must(done.status == 0, f"{scenario.name}: refused with {', '.join(rose)} raised", done.output)
    brought = {name.partition("-")[0].replace("_", "-") for name in done.brought}
    wanted = {name for name in rose if name != "review-fleet"}
    _must(brought == wanted, f"{scenario.name}: published {sorted(brought)}, not {sorted(wanted)}", done.output)
    others = f", and the ranges of {', '.join(sorted(wanted - {scenario.owner}))}" if len(wanted) > 1 else ", it alone"
    play.tell(
        f"{scenario.name}: refused by {scenario.rule}, published as {scenario.owner}"
        f" {stage.versions().of(scenario.owner)} ({scenario.bump}){others}"
    )
    stage.commit(scenario.name)


def _must_be_refused(refused: Published, scenario: Scenario, before: Version) -> None:
    """The gate names the change, and asks its owner, and nobody else, for the version that the change is worth."""
    _must(refused.status == 1 and not refused.brought, f"{scenario.name}: not refused", refused.output)
    gate = refused.document.get("gate") or []
    found = [each for each in gate if each["rule"] == scenario.rule and each["package"] == scenario.owner]
    _must(bool(found), f"{scenario.name}: {scenario.rule} of {scenario.owner} is not named", refused.output)
    asked = dict(ASKED.findall(refused.output))
    wanted = {scenario.owner: str(raised(before, scenario.bump))}
    _must(asked == wanted, f"{scenario.name}: the gate asks for {asked}, not {wanted}", refused.output)


def _too_little_is_refused(stage: Stage, scenario: Scenario) -> None:
    """A patch is no promise of a break."""
    versions = stage.versions()
    before = versions.of(scenario.owner)
    versions.raise_for(scenario.owner, "patch")
    refused = stage.publish()
    _must(refused.status == 1 and not refused.brought, f"{scenario.name}: a patch was enough", refused.output)
    versions.set(scenario.owner, before)


def _ranges_are_checked(play: _Play, stage: Stage) -> None:
    """A version that no sibling's range admits is refused, whatever changed.

    The gate is asked first, in the environment that stands: no new one can be made of distributions that do not fit.
    """
    versions = stage.versions()
    before = versions.of("orki-contract")
    after = breaking(before)
    versions.set("orki-contract", after)
    verdict = stage.files.with_name("ranges.json")
    gate = ["-m", "orki_codegen.cli", "gate", "--against", "index", "--index", f"{stage.url}simple/"]
    told = stage.python(*gate, "--json", str(verdict))
    remarks = json.loads(verdict.read_text(encoding="utf-8"))
    named = {each["package"] for each in remarks if each["rule"] == "SIBLING_RANGE"}
    wanted = set(versions.dependants("orki-contract"))
    _must(named == wanted, f"g: the gate names the ranges of {sorted(named)}, not of {sorted(wanted)}", told)
    refused = stage.publish()
    _must(refused.status != 0 and not refused.brought, "g: published against the siblings' ranges", refused.output)
    versions.set("orki-contract", before)
    play.tell(f"g: orki-contract {after} is refused by the ranges of {len(wanted)} siblings")


def _tuning_is_no_release(play: _Play, stage: Stage) -> None:
    """What a deployment sets is in no distribution: installed publishers keep to it, and nothing is to publish."""
    python = str(stage.files.with_name("stranger") / "bin/python")
    tuned = subprocess.run(
        [python, "-I", "-c", TUNED],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
        timeout=300,
    )
    _must(tuned.stdout.strip() == "inside its bounds, and only there", "h: the setting is not taken", tuned.stdout)
    done = stage.publish()
    _must(done.status == 0 and done.document["outcome"] == "unchanged", "h: something was published", done.output)
    play.tell("h: a deployment keeps less of a stream, inside its bounds: trimmed, and no release")


if __name__ == "__main__":
    sys.exit(main())
