"""The vocabulary's values: order, JSON, look-ups."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orki_contract import AUDIT_GROUP, Backoff, Contract, Group, Retention, Start, Stream, TaskContext, TaskMethod
from orki_contract.errors import UnknownGroup
from orki_contract.model import dump, to_json

STREAM = Stream(name="s", message="m.M", retention=Retention(max_entries=1), groups=(AUDIT_GROUP, Group(name="g")))


def test_values_are_ordered_and_hashable() -> None:
    later = Stream(name="t", message="m.M", retention=Retention(max_entries=1))
    assert sorted({later, STREAM}) == [STREAM, later]
    assert Group(name="g", start=Start.EARLIEST) < Group(name="g", start=Start.LATEST)


def test_json_has_every_field() -> None:
    method = TaskMethod(service="p.S", name="M", request="p.Q", response="p.R")
    shown = json.loads(to_json(Contract(streams=(STREAM,), tasks=(method,))))
    assert shown["streams"][0]["groups"][1]["start"] == "earliest"
    assert shown["tasks"][0]["backoff"] == {"initial": 1.0, "maximum": 60.0, "multiplier": 2.0}
    assert dump(()) == []


def test_an_undeclared_group_lists_those_that_are() -> None:
    assert STREAM.group("g").name == "g"
    with pytest.raises(UnknownGroup, match="declared: audit, g"):
        STREAM.group("nobody")


def test_dead_letter_streams_have_a_default() -> None:
    assert STREAM.dead_letter(Group(name="g")) == "s.g.dead"
    assert STREAM.dead_letter(Group(name="g", dead_letter="morgue")) == "morgue"


@given(st.integers(1, 10_000), st.floats(1, 1e300))
def test_backoff_grows_to_its_maximum_and_never_overflows(failed: int, multiplier: float) -> None:
    backoff = Backoff(initial=0.01, maximum=5.0, multiplier=multiplier)
    assert 0.01 <= backoff.delay(failed) <= backoff.delay(failed + 1) <= 5.0


def test_contexts_take_one_or_two_parameters_at_run_time() -> None:
    assert TaskContext[int] is TaskContext[int, str]
