"""Each rule of change in the gate: its break needs the rule's bump, and its harmless twin none."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from evolution_pairs import PAIRS, Pair, lay_out
from gate_trees import evaluation_of

from orki_codegen._gate.findings import Evaluation
from orki_contract.findings import RULES, Bump

pytestmark = pytest.mark.timeout(300)

NEEDED = {Bump.MAJOR: "2.0.0", Bump.MINOR: "1.1.0"}


def name_of(pair: Pair) -> str:
    """Return the distribution that owns the pair's packages."""
    return pair.folder.strip("/").replace("_", "-")


def workspace(root: Path, version: str) -> Path:
    """Return one side of all pairs, each owned by its own distribution."""
    top = lay_out(root, PAIRS, version)
    for pair in PAIRS:
        texts = [text for files in pair.files.values() for text in files.values()]
        packages = sorted({found for text in texts for found in re.findall(r"^package ([\w.]+);", text, re.MULTILINE)})
        folder = top / "packages" / name_of(pair)
        folder.mkdir(parents=True)
        table = f'[project]\nname = "{name_of(pair)}"\nversion = "1.0.0"\n[tool.orki]\ncontracts = {packages}\n'
        (folder / "pyproject.toml").write_text(table, encoding="utf-8")
    return top


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workspace(tmp_path_factory.mktemp("gate"), "old")


@pytest.fixture(scope="module")
def broken(old: Path) -> Evaluation:
    """The evaluation of all breaks."""
    return evaluation_of(old, workspace(old.parent, "new"))


@pytest.fixture(scope="module")
def harmless(old: Path) -> Evaluation:
    """The evaluation of all harmless twins."""
    return evaluation_of(old, workspace(old.parent, "twin"))


def test_each_rule_has_a_pair() -> None:
    assert {pair.rule for pair in PAIRS} == set(RULES)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
def test_a_break_needs_the_bump_of_its_rule(pair: Pair, broken: Evaluation) -> None:
    name, bump = name_of(pair), RULES[pair.rule].bump
    own = [each for each in broken.findings if each.package == name]
    told = [each for each in own if each.rule == pair.rule]
    assert told
    assert {each.bump for each in told} == {bump}
    assert {str(each.needs) for each in told} == {NEEDED[bump]}
    assert all(each.fails for each in told)
    assert broken.bumps[name] is bump or any(each.rule in pair.also for each in own)
    assert all(each.location.file.startswith("proto/") for each in told)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
def test_its_twin_breaks_nothing(pair: Pair, harmless: Evaluation) -> None:
    name = name_of(pair)
    found = [str(each) for each in harmless.findings if each.package == name and each.bump is Bump.MAJOR]
    assert found == []
    if RULES[pair.rule].bump is Bump.MINOR:
        assert harmless.bumps[name] in (None, Bump.PATCH)


def test_buf_reports_breaks_by_its_own_rules(broken: Evaluation) -> None:
    ours = {each.package for each in broken.findings if each.rule in RULES and each.bump is Bump.MAJOR}
    theirs = {each.package for each in broken.findings if each.rule not in RULES and each.bump is Bump.MAJOR}
    assert theirs == {name_of(pair) for pair in PAIRS if pair.seen}
    assert theirs < ours | theirs
