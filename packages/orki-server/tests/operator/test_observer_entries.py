"""The cursor of the feed: formatting, parsing, and refusing other text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orki_contract.errors import InvalidArgument, TooLarge
from orki_server._observers.entries import MAX_CURSOR, format_feed_cursor, parse_feed_cursor

NAMES = st.from_regex(r"[a-z][a-z0-9_.-]{0,20}", fullmatch=True)
IDS = st.builds("{}-{}".format, st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
CURSORS = st.lists(IDS, min_size=1, max_size=4).map("_".join)


@given(st.dictionaries(NAMES, CURSORS, max_size=10))
def test_a_cursor_round_trips(cursors: dict[str, str]) -> None:
    word = format_feed_cursor(cursors)
    assert parse_feed_cursor(word) == cursors
    assert word.isascii()
    assert word.isprintable()
    assert word, "an empty id is not sent back"


@given(st.text(max_size=60))
def test_an_unknown_cursor_is_refused(word: str) -> None:
    if word not in ("", "nowhere"):
        with pytest.raises(InvalidArgument, match="Last-Event-ID"):
            parse_feed_cursor(word)
    assert parse_feed_cursor("") == {}


@pytest.mark.parametrize(
    "word", ["tasks", "tasks=", "tasks=$", "tasks=1-1;tasks=1-2", "a=1-1;", ";", "A=1-1", "a=1-1_"]
)
def test_malformed_cursors_are_refused(word: str) -> None:
    with pytest.raises(InvalidArgument):
        parse_feed_cursor(word)


def test_a_cursor_larger_than_a_header_is_refused() -> None:
    many = {f"stream{number}": "1700000000000-0" for number in range(MAX_CURSOR // 20)}
    with pytest.raises(TooLarge, match=r"\?stream=NAME"):
        format_feed_cursor(many)
    with pytest.raises(InvalidArgument):
        parse_feed_cursor(";".join(f"s{number}=1-1" for number in range(MAX_CURSOR)))
