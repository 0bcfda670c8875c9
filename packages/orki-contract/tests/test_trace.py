"""W3C Trace Context, version 00."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orki_contract.trace import Span, current_span, new_span, parse_traceparent, use_span

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
SPAN = "00f067aa0ba902b7"


def test_round_trip() -> None:
    span = new_span()
    assert parse_traceparent(span.traceparent) == span


def test_the_example_of_the_standard_is_parsed() -> None:
    assert parse_traceparent(f"00-{TRACE}-{SPAN}-01") == Span(TRACE, SPAN, "", 1)


def test_a_later_version_may_have_more_parts() -> None:
    assert parse_traceparent(f"01-{TRACE}-{SPAN}-00-more") == Span(TRACE, SPAN, "", 0)


@pytest.mark.parametrize(
    "value",
    [
        "",
        "00",
        f"00-{TRACE}-{SPAN}",
        f"00-{TRACE}-{SPAN}-01-more",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-0x",
        f"00-{TRACE[:-1]}-{SPAN}-01",
    ],
)
def test_an_invalid_traceparent_gives_no_span(value: str) -> None:
    assert parse_traceparent(value) is None


@given(st.text(max_size=80))
def test_garbage_never_raises(value: str) -> None:
    span = parse_traceparent(value)
    assert span is None or span.trace_id in value


def test_children_stay_in_the_trace() -> None:
    root = new_span()
    child = root.child()
    assert (child.trace_id, child.parent_id, child.flags) == (root.trace_id, root.span_id, root.flags)
    assert child.span_id != root.span_id


def test_the_current_span_is_restored_after_an_error() -> None:
    assert current_span() is None
    span = new_span()

    def fail() -> None:
        with use_span(span):
            raise LookupError(current_span())

    with pytest.raises(LookupError, match=span.span_id):
        fail()
    assert current_span() is None
