"""docs/peer-bugs.md names, for each bug of another library, tests that exist."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROW = re.compile(r"^\| (.+) \| (.+) \| (.+) \| (.+) \|$", re.MULTILINE)
TEST = re.compile(r"`(\w+\.py)::(\w+)`")


def rows() -> list[list[str]]:
    """Return the cells of each row without the heading."""
    return [list(cells) for cells in ROW.findall((ROOT / "docs/peer-bugs.md").read_text(encoding="utf-8"))][1:]


@cache
def functions_of(file: str) -> frozenset[str]:
    """Return the functions of the test file with this name, which no other folder may have."""
    found = [path for pattern in ("packages/*/tests", "tests") for path in ROOT.glob(f"{pattern}/**/{file}")]
    assert len(found) == 1, f"{file} is {len(found)} files"
    return frozenset(re.findall(r"^(?:async )?def (test_\w+)\(", found[0].read_text(encoding="utf-8"), re.MULTILINE))


def test_each_row_names_tests_that_exist_or_says_why_not() -> None:
    assert rows()
    missing = []
    for peer, _, answer, cell in rows():
        named = TEST.findall(cell)
        rest = TEST.sub("", cell).replace(", ", "")
        assert rest == ("" if named else "none"), f"{peer}: {cell!r} is no list of tests"
        assert named or answer.startswith("Does not apply"), f"{peer} has no test and does not say why"
        missing += [f"{peer}: {file}::{test}" for file, test in named if test not in functions_of(file)]
    assert missing == []


def test_each_bug_has_one_row() -> None:
    bugs = [(peer, bug) for peer, bug, *_ in rows()]
    assert len(set(bugs)) == len(bugs)
    numbered = [peer for peer, _ in bugs if re.search(r"\d", peer)]
    assert len(set(numbered)) == len(numbered)


def test_each_test_that_was_written_for_a_bug_has_a_row() -> None:
    named = {test for *_, cell in rows() for _, test in TEST.findall(cell)}
    assert functions_of("test_server_peer_bugs.py") <= named
