"""Places inside of an option's value, found in the text."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from orki_contract._literals import literal_places
from orki_contract.descriptors import Schema
from orki_contract.images import image_of

OPTIONS = Schema(image_of("orki.events.v1")).pool.FindMessageTypeByName("orki.options.v1.StreamOptions")

TEXT = """\
message Event {
  option (orki.options.v1.stream) = {
    name: "a" 'b'  // two strings, one value: {
    retention: {max_entries: 5, max_age: {seconds: -1}};
    /* groups: [ */
    groups: [
      {name: "one"}, {
        max_deliveries: 3
        name: "]"
      }
    ]
    groups {name: "three"}
    groups: <name: "four">
    partitions: 2
  };
}
"""


def test_every_part_has_its_place() -> None:
    places = literal_places(TEXT, TEXT.index("(orki"), OPTIONS)
    assert places == {
        (1,): (3, 5),
        (4,): (4, 5),
        (4, 1): (4, 17),
        (4, 2): (4, 33),
        (4, 2, 1): (4, 43),
        (5,): (6, 5),
        (5, 0): (7, 7),
        (5, 0, 1): (7, 8),
        (5, 1): (7, 22),
        (5, 1, 3): (8, 9),
        (5, 1, 1): (9, 9),
        (5, 2): (12, 5),
        (5, 2, 1): (12, 13),
        (5, 3): (13, 5),
        (5, 3, 1): (13, 14),
        (2,): (14, 5),
    }


def test_a_text_may_end_anywhere() -> None:
    start = TEXT.index("(orki")
    for end in range(start, len(TEXT)):
        places = literal_places(TEXT[:end], start, OPTIONS)
        assert places.get((1,), (3, 5)) == (3, 5)
        assert places.get((4, 2, 1), (4, 43)) == (4, 43)


@given(st.text(alphabet="ab:{}[]<>,;\"'/*- \n=", max_size=60))
def test_any_text_is_read_to_its_end(text: str) -> None:
    assert all(line >= 1 and column >= 1 for line, column in literal_places(text, 0, OPTIONS).values())


def test_text_without_a_literal_has_no_locations() -> None:
    assert literal_places("option (x) = 5;", 0, OPTIONS) == {}
    assert literal_places("", 0, OPTIONS) == {}
    assert literal_places("option (x) = {unknown: {name: 1} [ext.one]: 2 name: 3};", 0, OPTIONS)[(1,)] == (1, 47)
