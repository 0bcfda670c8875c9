"""The layout of entries: keys, partitions, envelopes, ids and cursors."""

from __future__ import annotations

import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orki.events.v1.envelope_pb2 import Envelope
from orki.events.v1.usage_pb2 import UsageEvent
from orki_contract.errors import EventUndecodable, InvalidArgument
from orki_contract.model import Retention, Stream
from orki_contract.trace import Span, new_span
from orki_events.entries import (
    EntryId,
    decode_envelope,
    encode_envelope,
    envelope_span,
    event_id_of,
    format_cursor,
    new_event_id,
    parse_cursor,
    parse_id,
    partition_of,
    predecessor,
    split_entry,
    stream_key,
    stream_keys,
    tagged_key,
)

ID = bytes(range(16))


def stream(partitions: int, key: str = "agent_id") -> Stream:
    return Stream(
        name="usage",
        message="orki.events.v1.UsageEvent",
        retention=Retention(max_entries=10),
        partitions=partitions,
        partition_key=key if partitions > 1 else "",
    )


def test_the_hash_tag_of_a_key_is_its_partition() -> None:
    assert stream_keys(stream(1)) == ("orki:ev:{usage}",)
    assert stream_keys(stream(3)) == ("orki:ev:{usage:0}", "orki:ev:{usage:1}", "orki:ev:{usage:2}")
    assert stream_keys(stream(1), "groups") == ("orki:groups:{usage}",)
    assert tagged_key("ev", "usage.work.dead") == "orki:ev:{usage.work.dead}"


@pytest.mark.parametrize(
    ("value", "raw", "partition"),
    [
        ("agent-1", b"agent-1", 1),
        ("käse", b"k\xc3\xa4se", 7),
        ("", b"", 0),
        (42, b"42", 0),
        (-7, b"-7", 7),
        (b"\x00\xff", b"\x00\xff", 2),
    ],
)
def test_the_partition_is_the_crc_of_the_key_value(value: str | int | bytes, raw: bytes, partition: int) -> None:
    assert partition_of(value, 8) == zlib.crc32(raw) % 8 == partition


def test_known_partitions_never_change() -> None:
    """Servers store these numbers: another hash would split every key over two partitions."""
    assert [partition_of(f"agent-{number}", 8) for number in range(8)] == [7, 1, 3, 5, 6, 0, 2, 4]
    # The standard check value of CRC-32.
    assert partition_of("123456789", 2**32) == 0xCBF43926


def test_the_partition_key_field_selects_the_partition() -> None:
    assert stream_key(stream(1), UsageEvent(agent_id="a")) == "orki:ev:{usage}"
    for field, message in (("agent_id", UsageEvent(agent_id="a")), ("attempt", UsageEvent(attempt=12))):
        value = getattr(message, field)
        assert stream_key(stream(4, field), message) == f"orki:ev:{{usage:{partition_of(value, 4)}}}"


@given(
    st.binary(min_size=16, max_size=16),
    st.text(max_size=30),
    st.integers(0, 2**64 - 1),
    st.integers(-(2**62), 2**62),
    st.booleans(),
)
def test_an_envelope_survives_encoding_and_decoding(
    event_id: bytes, producer: str, sequence: int, time_us: int, traced: bool
) -> None:
    span = new_span().child() if traced else None
    raw = encode_envelope(event_id=event_id, producer=producer, sequence=sequence, time_us=time_us, span=span)
    envelope = decode_envelope(raw)
    assert (envelope.event_id, envelope.producer, envelope.sequence) == (event_id, producer, sequence)
    assert envelope.time_us == time_us
    assert envelope_span(envelope) == span
    assert event_id_of(raw) == event_id


def test_the_event_id_is_found_in_any_field_order() -> None:
    tail_first = Envelope(producer="p").SerializeToString() + Envelope(event_id=ID).SerializeToString()
    assert event_id_of(tail_first) == ID


@pytest.mark.parametrize("raw", [b"", b"\xff", b"\x0a\x10short", Envelope(event_id=b"x").SerializeToString()])
def test_invalid_envelopes_are_refused(raw: bytes) -> None:
    with pytest.raises(EventUndecodable):
        decode_envelope(raw)
    with pytest.raises(EventUndecodable):
        event_id_of(raw)


def test_invalid_event_ids_and_entries_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="16 bytes, not 3"):
        encode_envelope(event_id=b"abc", producer="", sequence=1, time_us=0, span=None)
    for fields in ([], [b"e"], [b"e", b"x"], [b"d", b"x", b"f", b"y"]):
        with pytest.raises(EventUndecodable, match="lacks the field e or d"):
            split_entry(fields)


def test_fields_are_found_in_any_order_and_among_others() -> None:
    assert split_entry([b"e", b"1", b"d", b"2"]) == (b"1", b"2")
    assert split_entry([b"e", b"1", b"d", b"2", b"x", b"3"]) == (b"1", b"2")
    assert split_entry([b"new", b"0", b"d", b"2", b"e", b"1"]) == (b"1", b"2")


def test_a_missing_parent_or_an_invalid_traceparent_is_accepted() -> None:
    assert envelope_span(Envelope(traceparent="nonsense")) is None
    assert envelope_span(Envelope()) is None
    root = Span("a" * 32, "b" * 16)
    assert envelope_span(Envelope(traceparent=root.traceparent)) == root


def test_event_ids_are_unique() -> None:
    assert len({new_event_id() for _ in range(1_000)}) == 1_000


def test_entry_ids_are_ordered_and_have_predecessors() -> None:
    assert parse_id(b"5-0") < parse_id("5-10") < parse_id("50-0")
    assert predecessor(parse_id("5-1")) == EntryId(5, 0)
    assert predecessor(parse_id("5-0")) == EntryId(4, 2**64 - 1)
    assert str(predecessor(parse_id("0-0"))) == "0-0"
    for wrong in ("5", "-1-0", "5-", "a-b", "5-0 ", f"{2**64}-0", "5-0-0", ""):
        with pytest.raises(InvalidArgument):
            parse_id(wrong)


@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)), min_size=1, max_size=5))
def test_a_cursor_survives_formatting_and_parsing(places: list[tuple[int, int]]) -> None:
    words = [f"{ms}-{sequence}" for ms, sequence in places]
    assert parse_cursor(format_cursor(words), len(words)) == words
    with pytest.raises(InvalidArgument, match="partitions"):
        parse_cursor(format_cursor(words), len(words) + 1)
