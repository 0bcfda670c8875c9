"""The frame codec: any split gives the same frames, and invalid bytes are refused before memory is allocated."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orki.errors.v1.errors_pb2 import Reason
from orki.hotpath.v1.frame_orki import FrameHeader
from orki.hotpath.v1.tool_orki import HelloFrame, WelcomeFrame
from orki_agent.hotpath.frames import (
    BUFFER_BYTES,
    FLAG_ERROR,
    FLAG_REPLY,
    HEADER,
    HEADER_BYTES,
    MAGIC,
    NO_TRACE,
    PROTOCOL,
    Frame,
    FrameDecoder,
    decode_error,
    encode_call,
    encode_cancel,
    encode_error,
    encode_hello,
    encode_reply,
    encode_welcome,
    pack_span,
    unpack_span,
)
from orki_contract.errors import (
    FrameMalformed,
    FrameTooLarge,
    FrameVersion,
    OrkiError,
    PeerRefused,
    ToolFailed,
    UnknownOpcode,
)
from orki_contract.trace import Span, new_span

CAP = 200_000
HUGE = 16_000_000

Outcome = tuple[list[tuple[object, ...]], type[OrkiError] | None]

u64 = st.integers(0, (1 << 64) - 1)
traces = st.binary(min_size=16, max_size=16).flatmap(
    lambda trace_id: st.binary(min_size=8, max_size=8).map(lambda span_id: b"\1\0\0\0" + trace_id + span_id)
)
bodies = st.one_of(st.binary(max_size=300), st.sampled_from((b"x" * 70_000, b"y" * (CAP - HEADER_BYTES))))


@st.composite
def frames(draw: st.DrawFn) -> bytes:
    body = draw(bodies)
    block_length = draw(st.integers(0, min(len(body), 65_535)))
    opcode = draw(st.integers(0, 65_535))
    if draw(st.booleans()):
        return encode_reply(opcode, block_length, draw(st.integers(0, 65_535)), draw(u64), body)
    timeout = draw(st.integers(0, (1 << 32) - 1))
    return encode_call(opcode, block_length, draw(st.integers(0, 65_535)), draw(u64), timeout, draw(traces), body)


def pieces(whole: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({0, len(whole), *(cut % (len(whole) + 1) for cut in cuts)})
    return [whole[start:end] for start, end in pairwise(places)]


def decode(chunks: list[bytes], cap: int = CAP) -> Outcome:
    """Return all frames with copied bodies, and the error that ended the stream."""
    decoder = FrameDecoder(cap)
    found: list[tuple[object, ...]] = []
    try:
        for chunk in chunks:
            for frame in decoder.feed(chunk):
                found.append((*frame[:-1], bytes(frame.body)))
        decoder.finish()
    except OrkiError as error:
        assert decoder.broken
        return found, type(error)
    return found, None


def test_the_header_matches_the_contract() -> None:
    """The struct of the hot path equals the layout of `frame.proto`."""
    span = new_span()
    body = b"block and tail"
    generated = FrameHeader(
        magic=MAGIC,
        protocol=PROTOCOL,
        flags=0,
        opcode=0x0102,
        block_length=5,
        total_length=HEADER_BYTES + len(body),
        block_version=3,
        correlation=1 << 60,
        timeout_us=250_000,
        trace_flags=span.flags,
        trace_id=bytes.fromhex(span.trace_id),
        span_id=bytes.fromhex(span.span_id),
    )
    assert FrameHeader.FRAME.block_length == HEADER_BYTES == HEADER.size
    assert encode_call(0x0102, 5, 3, 1 << 60, 250_000, pack_span(span), body) == generated.encode() + body
    assert generated.encode()[0] == 0xF7
    [frame] = FrameDecoder(CAP).feed(generated.encode() + body)
    read = FrameHeader.decode(generated.encode(), HEADER_BYTES)
    assert frame[:6] == (read.flags, read.opcode, read.block_length, read.block_version, 1 << 60, read.timeout_us)
    assert unpack_span(frame.trace) == span


@given(st.lists(frames(), max_size=4), st.lists(st.integers(0, 1 << 30), max_size=12))
def test_any_split_of_a_stream_gives_the_same_frames(whole: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(whole)
    expected, error = decode([stream])
    assert error is None
    assert len(expected) == len(whole)
    assert decode(pieces(stream, cuts)) == (expected, None)


@given(
    st.lists(frames(), min_size=1, max_size=2), st.integers(0, 1 << 30), st.integers(0, 255), st.integers(0, 1 << 30)
)
def test_a_changed_byte_has_the_same_outcome_for_any_split(whole: list[bytes], at: int, by: int, cut: int) -> None:
    stream = bytearray(b"".join(whole))
    stream[at % min(len(stream), 2 * HEADER_BYTES)] ^= by
    once = decode([bytes(stream)])
    assert decode(pieces(bytes(stream), [cut])) == once
    assert decode(pieces(bytes(stream), list(range(150)))) == once


@given(st.binary(min_size=1, max_size=200))
def test_garbage_is_no_frame(garbage: bytes) -> None:
    found, error = decode([garbage])
    assert found == []
    assert error in (FrameMalformed, FrameVersion, FrameTooLarge)
    if garbage[0] != 0xF7:
        with pytest.raises(FrameMalformed, match="f7 4b"):
            list(FrameDecoder(CAP).feed(garbage[:1]))


def test_a_stream_that_ends_inside_a_frame_is_malformed() -> None:
    whole = encode_call(0x0101, 4, 1, 9, 0, NO_TRACE, b"blocktail")
    assert decode([whole]) != ([], None)
    for end in range(1, len(whole)):
        assert decode([whole[:end]]) == ([], FrameMalformed)


def test_a_bad_frame_ends_the_stream_after_the_good_ones() -> None:
    good = encode_call(0x0101, 0, 0, 1, 0, NO_TRACE, b"")
    decoder = FrameDecoder(CAP)
    found = decoder.feed(good + b"\0" + good)
    assert next(found).correlation == 1
    with pytest.raises(FrameMalformed):
        next(found)
    for _ in range(2):
        with pytest.raises(FrameMalformed):
            list(decoder.feed(good))
    with pytest.raises(FrameMalformed):
        decoder.next_frame()


def test_another_protocol_version_is_reported() -> None:
    frame = bytearray(encode_cancel(1))
    frame[2] = 9
    with pytest.raises(FrameVersion, match="version 9"):
        list(FrameDecoder(CAP).feed(frame))
    with pytest.raises(FrameVersion):
        list(FrameDecoder(CAP).feed(frame[:3]))


@pytest.mark.parametrize(("total", "block"), [(0, 0), (HEADER_BYTES - 1, 0), (HEADER_BYTES, 1), (HEADER_BYTES + 9, 10)])
def test_lengths_that_contradict_each_other_are_malformed(total: int, block: int) -> None:
    head = HEADER.pack(MAGIC | PROTOCOL << 16, 0x0101, block, total, 1, 1, 0, NO_TRACE)
    with pytest.raises(FrameMalformed, match="cannot hold"):
        list(FrameDecoder(CAP).feed(head))


@pytest.mark.parametrize("total", [CAP + 1, 1 << 31, (1 << 32) - 1])
def test_a_length_over_the_maximum_is_refused_before_memory_is_allocated(total: int) -> None:
    head = HEADER.pack(MAGIC | PROTOCOL << 16, 0x0101, 0, total, 1, 1, 0, NO_TRACE)
    decoder = FrameDecoder(CAP)
    tracemalloc.start()
    try:
        with pytest.raises(FrameTooLarge, match=str(total)):
            list(decoder.feed(head[:12]))
        assert tracemalloc.get_traced_memory()[1] < BUFFER_BYTES
    finally:
        tracemalloc.stop()


def test_a_frame_of_maximum_length_is_accepted_and_its_memory_freed() -> None:
    body = bytes(CAP - HEADER_BYTES)
    decoder = FrameDecoder(CAP)
    [frame] = decoder.feed(encode_reply(0x0101, 0, 0, 1, body))
    assert bytes(frame.body) == body
    assert len(decoder.writable()) == BUFFER_BYTES


def test_memory_grows_with_the_bytes_that_arrive() -> None:
    body = bytes(range(256)) * (HUGE // 256)
    whole = encode_reply(0x0101, 0, 0, 1, body)
    decoder = FrameDecoder(len(whole))
    tracemalloc.start()
    try:
        assert list(decoder.feed(whole[:1_000])) == []
        assert tracemalloc.get_traced_memory()[1] < 1_500_000
        frames = list(decoder.feed(whole[1_000:2_000_000]))
        assert tracemalloc.get_traced_memory()[1] < HUGE
        for start in range(2_000_000, len(whole), 1_000_001):
            frames += [
                frame._replace(body=memoryview(bytes(frame.body)))
                for frame in decoder.feed(whole[start : start + 1_000_001])
            ]
    finally:
        tracemalloc.stop()
    assert [bytes(frame.body) for frame in frames] == [body]
    assert len(decoder.writable()) == BUFFER_BYTES


def test_unknown_flags_and_reserved_bytes_are_ignored() -> None:
    frame = bytearray(encode_reply(0x0101, 0, 0, 7, b"x"))
    frame[3] |= 0xF0
    frame[14:16] = b"\xff\xff"
    [read] = FrameDecoder(CAP).feed(frame)
    assert (read.correlation, read.flags & FLAG_REPLY, bytes(read.body)) == (7, FLAG_REPLY, b"x")


@given(st.text(max_size=2_000), st.integers(-(1 << 31), (1 << 31) - 1), u64)
def test_errors_are_decoded_as_encoded(message: str, code: int, correlation: int) -> None:
    [frame] = FrameDecoder(CAP).feed(encode_error(correlation, ToolFailed(message, code=code)))
    error = decode_error(frame)
    assert isinstance(error, ToolFailed)
    assert (frame.correlation, frame.flags, error.code) == (correlation, FLAG_REPLY | FLAG_ERROR, code)
    assert error.message == message[:1_000]


def test_errors_other_than_tool_failures_have_no_code() -> None:
    for error in (UnknownOpcode("0x0101"), PeerRefused("no")):
        [frame] = FrameDecoder(CAP).feed(encode_error(0, error))
        assert type(decode_error(frame)) is type(error)


def test_an_unknown_reason_is_still_an_error() -> None:
    [frame] = FrameDecoder(CAP).feed(encode_error(1, PeerRefused("no")))
    body = bytearray(frame.body)
    body[:4] = (9_999).to_bytes(4, "little")
    error = decode_error(frame._replace(body=memoryview(body)))
    assert type(error) is OrkiError
    assert "9999" in str(error)


def test_a_broken_error_frame_is_malformed() -> None:
    [frame] = FrameDecoder(CAP).feed(encode_error(1, PeerRefused("no")))
    with pytest.raises(FrameMalformed):
        decode_error(frame._replace(body=frame.body[:3]))
    with pytest.raises(FrameMalformed):
        decode_error(frame._replace(body=memoryview(bytes(frame.body) + b"\xff")))


def test_handshake_frames_match_the_contract() -> None:
    hello = HelloFrame(token=bytes(32), protocol_min=1, protocol_max=2, client="ä")
    welcome = WelcomeFrame(max_frame_bytes=1, max_calls=2, protocol=1)
    first, second = FrameDecoder(CAP).feed(encode_hello(hello) + encode_welcome(welcome))
    assert HelloFrame.decode(bytes(hello.encode()), 40) == hello
    assert (first.opcode, first.flags, second.opcode, second.flags) == (1, 0, 2, FLAG_REPLY)
    assert isinstance(first, Frame)
    assert PeerRefused.reason == Reason.REASON_PEER_REFUSED


@pytest.mark.parametrize("span", [Span("0" * 32, "1" * 16), Span("1" * 32, "0" * 16)])
def test_a_trace_with_a_zero_id_is_none(span: Span) -> None:
    assert unpack_span(pack_span(span)) is None
    assert pack_span(None) == NO_TRACE
