"""The slices of the script: parts of it that need less time for their definitions."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from redis import Redis

from orki_server._keys import ShardKeys
from orki_server._store import slices
from orki_server._store.batcher import shard_script
from orki_server._store.slices import defined, script_for, sliced, statements

WHOLE = shard_script(60.0)
FORWARD = {"EVENTS", "lanes_by_method", "open_queues", "pop", "write_lanes", "set_lineage", "owns_budget"}
"""Names that are declared before they get their value."""


def test_the_statements_are_the_whole_script() -> None:
    """Only comments, empty lines and the borders of blocks are left out."""
    lines = [line for line in WHOLE.text.split("\n") if line and not line.startswith("--")]
    found = [line for each in statements(WHOLE.text) for line in each.split("\n") if line and not line.startswith("--")]
    left = Counter(lines) - Counter(found)
    assert not Counter(found) - Counter(lines)
    borders = r"local [\w, ]+ = \(function\(\)|return [\w, ]+|do|end|end\)\(\)"
    assert [line for line in left if not re.fullmatch(borders, line)] == []


def test_no_two_statements_define_the_same_name() -> None:
    """A slice has no blocks, so that a name would hide another one."""
    names = Counter(name for each in statements(WHOLE.text) for name in defined(each))
    assert {name for name, count in names.items() if count > 1} <= FORWARD


@pytest.mark.parametrize("group", slices._GROUPS, ids=lambda group: "-".join(sorted(group)))
def test_a_slice_has_its_operations_and_runs(redis_url: str, group: frozenset[str]) -> None:
    slice_ = sliced(WHOLE, group)
    operations = set(re.findall(r"^OPS\.(\w+) =", slice_.text, re.MULTILINE))
    assert operations == group
    assert slice_.text.count("function") < WHOLE.text.count("function") * 0.8
    with Redis.from_url(redis_url) as redis:
        assert redis.eval(slice_.text, 1, ShardKeys(0).base, "tester", "") == []


@pytest.mark.parametrize(
    ("operations", "is_slice"),
    [({"succeed"}, True), ({"submit", "offer"}, True), ({"submit", "succeed"}, True), ({"read"}, False)],
)
def test_a_batch_gets_the_smallest_slice_that_has_its_operations(operations: set[str], is_slice: bool) -> None:
    chosen = script_for(WHOLE, operations)
    assert (chosen is not WHOLE) is is_slice
    assert all(f"OPS.{each} =" in chosen.text for each in operations)
    fitting = [group for group in slices._GROUPS if group >= operations]
    assert len(chosen.text) == min([len(sliced(WHOLE, group).text) for group in fitting] or [len(WHOLE.text)])
