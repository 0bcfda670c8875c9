"""Every rule of change has a pair that breaks it, as the real buf reports, and a twin that breaks nothing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from evolution_pairs import PAIRS, ROOT, Pair, lay_out

from orki_codegen.checks._procedures import BREAKING, CATEGORIES, LINT, category_of
from orki_contract.findings import RULES, Bump, Finding, findings
from orki_contract.read import ReadContract, read_image

pytestmark = pytest.mark.timeout(300)

BROKEN = 100  # buf's exit status for "there are findings"
BARE = json.dumps({"version": "v2", "modules": [{"path": "proto"}], "breaking": {"use": ["FILE"]}})

MAJOR = [pair for pair in PAIRS if RULES[pair.rule].bump is Bump.MAJOR]
MINOR = [pair for pair in PAIRS if RULES[pair.rule].bump is Bump.MINOR]

Report = tuple[str, str, int, str]
"""Rule, file, line and message."""


def buf(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    environment = {**os.environ, "PATH": path}
    command = ["buf", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def reported(done: subprocess.CompletedProcess[str]) -> list[Report]:
    """Rule, file, line and message of everything that buf reports."""
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == (BROKEN if lines else 0), done.stderr
    return [
        (each["type"], each.get("path", "").removeprefix("proto/"), each["start_line"], each["message"])
        for each in lines
    ]


class Trees:
    """Some pairs in three trees."""

    def __init__(self, root: Path, pairs: Sequence[Pair]) -> None:
        self.old, self.new, self.twin = (lay_out(root, pairs, version) for version in ("old", "new", "twin"))
        self._images: dict[Path, ReadContract] = {}

    def breaking(self, tree: Path, *arguments: str) -> list[Report]:
        """What buf reports of a tree against the old one."""
        return reported(buf(tree, "breaking", "--against", str(self.old), "--error-format", "json", *arguments))

    def read(self, tree: Path) -> ReadContract:
        """The tree's contract."""
        if tree not in self._images:
            target = tree / "image.binpb"
            done = buf(tree, "build", "--as-file-descriptor-set", "--output", str(target))
            assert done.returncode == 0, done.stderr
            self._images[tree] = read_image(target.read_bytes())
        return self._images[tree]


@pytest.fixture(scope="module")
def grove(tmp_path_factory: pytest.TempPathFactory) -> Trees:
    """All pairs."""
    return Trees(tmp_path_factory.mktemp("pairs"), PAIRS)


@pytest.fixture(scope="module")
def broken(grove: Trees) -> list[Report]:
    """What buf reports of the breaks."""
    return grove.breaking(grove.new)


@pytest.fixture(scope="module")
def found(grove: Trees) -> tuple[Finding, ...]:
    """What findings say of the breaks, those that ask for a minor version included."""
    return findings(grove.read(grove.old), grove.read(grove.new))


def test_each_rule_has_a_pair_and_each_pair_a_rule() -> None:
    assert {pair.rule for pair in PAIRS} == set(RULES)
    assert {pair.rule for pair in MAJOR} == set(BREAKING)


def test_buf_accepts_a_tree_as_its_own_past(grove: Trees) -> None:
    assert grove.breaking(grove.old) == []


@pytest.mark.parametrize("pair", MAJOR, ids=lambda pair: pair.name)
def test_a_break_is_reported_on_its_line(pair: Pair, broken: list[Report]) -> None:
    ours = [line for line in broken if pair.folder in f"{line[1]} {line[3]}" and line[0].startswith("ORKI_")]
    expected_also = {rule for rule in pair.also if rule in BREAKING}
    assert {rule for rule, *_ in ours} == {pair.rule} | expected_also
    places = {(file, line) for rule, file, line, _ in ours if rule == pair.rule}
    if any(old for _, _, old in pair.marks):
        # Nothing of it is left: buf shows the file, or none, and the message tells where it stood.
        said = " ".join(message for rule, _, _, message in ours if rule == pair.rule)
        told = {(file, int(line)) for file, line in re.findall(r"formerly at (\S+?):(\d+):\d+", said)}
        assert told == {(file, line) for file, line, _ in pair.marks}
    else:
        assert places == {(file, line) for file, line, _ in pair.marks}


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
def test_a_change_asks_for_the_bump_of_its_rule(pair: Pair, found: tuple[Finding, ...]) -> None:
    own = [each for each in found if pair.folder in f"{each.location.file} {each.before.file}"]
    known = {each.rule for each in own}
    bump = RULES[pair.rule].bump
    assert pair.rule in known
    assert {each.rule for each in own if each.bump is Bump.MAJOR} - {pair.rule} <= pair.also
    assert {each.bump for each in own if each.rule == pair.rule} == {bump}
    if bump is Bump.MINOR:
        assert known - {pair.rule} <= pair.also
        places = {(each.location.file, each.location.line) for each in own if each.rule == pair.rule}
        assert {(file, line) for file, line, _ in pair.marks} <= places


def test_twins_are_silent(grove: Trees) -> None:
    assert grove.breaking(grove.twin) == []


def test_twins_of_what_is_new_differ_in_nothing(grove: Trees) -> None:
    folders = tuple(pair.folder for pair in MINOR)
    said = findings(grove.read(grove.old), grove.read(grove.twin))
    assert [str(each) for each in said if each.location.file.startswith(folders)] == []


def test_bare_buf_misses_what_the_pairs_say_it_misses(grove: Trees) -> None:
    bare = [f"{file} {message}" for _, file, _, message in grove.breaking(grove.new, "--config", BARE)]
    seen = {pair.name for pair in PAIRS if any(pair.folder in line for line in bare)}
    assert seen == {pair.name for pair in PAIRS if pair.seen}
    # Those that it misses are the reason for the plugin: each was reported by it above.
    assert len([pair for pair in MAJOR if not pair.seen]) > 40


@pytest.mark.parametrize(("kind", "rules"), [("breaking", BREAKING), ("lint", LINT)])
def test_buf_is_configured_with_every_rule(kind: str, rules: dict[str, str]) -> None:
    done = buf(ROOT, "config", f"ls-{kind}-rules", "--configured-only", "--format", "json")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    configured = {each["id"]: each for each in lines if each["id"].startswith("ORKI_")}
    assert set(configured) == set(rules)
    for rule, purpose in rules.items():
        assert configured[rule]["purpose"] == purpose
        assert configured[rule]["categories"] == [category_of(rule)]
    assert {each["categories"][0] for each in configured.values()} <= set(CATEGORIES)


def test_a_category_that_is_not_named_lets_breaks_pass(tmp_path: Path) -> None:
    """Why the test above is there: buf warns, and ends as if all were well."""
    pair = next(each for each in MAJOR if each.name == "ORKI_STREAM_ENTRIES_LOWERED")
    trees = Trees(tmp_path, [pair])
    config = trees.new / "buf.yaml"
    config.write_text(config.read_text(encoding="utf-8").replace("    - ORKI_STREAM\n", ""), encoding="utf-8")
    assert trees.breaking(trees.new) == []


def test_a_plugin_that_is_missing_or_fails_ends_the_run(tmp_path: Path) -> None:
    pair = next(each for each in MAJOR if each.name == "ORKI_STREAM_ENTRIES_LOWERED")
    trees = Trees(tmp_path, [pair])
    config = trees.new / "buf.yaml"
    for other in ("orki-checks-that-is-not-there", "false"):
        text = (ROOT / "buf.yaml").read_text(encoding="utf-8")
        config.write_text(text.replace("plugin: orki-checks", f"plugin: {other}"), encoding="utf-8")
        done = buf(trees.new, "breaking", "--against", str(trees.old))
        assert done.returncode not in (0, BROKEN)


def test_the_page_tells_of_every_rule() -> None:
    page = (ROOT / "docs/compatibility.md").read_text(encoding="utf-8")
    rows = {line.split("|")[1].strip(" `"): line for line in page.splitlines() if line.startswith("| `ORKI_")}
    assert set(rows) == set(RULES)
    for name, rule in RULES.items():
        assert rule.purpose in rows[name]
        assert ("| yes |" in rows[name]) == rule.wire


def test_the_purposes_and_ids_have_the_shape_that_buf_asks_for() -> None:
    for rule in RULES.values():
        assert re.fullmatch(r"[A-Z0-9][A-Z0-9_]*[A-Z0-9]", rule.id)
        assert 3 <= len(rule.id) <= 64
        assert re.fullmatch(r"[A-Z].*[.]", rule.purpose)
        assert len(rule.purpose) <= 256
    assert not set(LINT) & set(RULES)
    assert not set(CATEGORIES) & (set(LINT) | set(RULES))
