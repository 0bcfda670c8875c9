"""Bad input to a running bridge gives its sender a typed error and does not disturb another client."""

from __future__ import annotations

import os
import random
import resource
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hotpath_tools import ECHO, Ask, RawPeer, SampleTools, echo_frame, sleep_frame, until

from orki.errors.v1.errors_pb2 import Reason
from orki.hotpath.v1.tool_orki import HelloFrame, WelcomeFrame
from orki_agent.hotpath import BridgeOptions, SyncToolClient, ToolBridge
from orki_agent.hotpath.frames import (
    FLAG_REPLY,
    HEADER,
    HEADER_BYTES,
    MAGIC,
    NO_TRACE,
    PROTOCOL,
    Frame,
    decode_error,
    encode_call,
    encode_cancel,
    encode_error,
    encode_hello,
    encode_reply,
    encode_welcome,
)
from orki_contract.errors import (
    FrameMalformed,
    FrameTooLarge,
    FrameVersion,
    HelloTimeout,
    InvalidArgument,
    OrkiError,
    PeerRefused,
    RemoteProtocolError,
    ToolCancelled,
    ToolDeadline,
    ToolFailed,
    TooManyCalls,
    UnknownOpcode,
)

EVERY_KIND = {
    "hello": encode_hello(HelloFrame(token=bytes(32), protocol_min=1, protocol_max=1, client="x")),
    "welcome": encode_welcome(WelcomeFrame(max_frame_bytes=1, max_calls=1, protocol=1)),
    "error": encode_error(3, ToolFailed("no", code=4)),
    "cancel": encode_cancel(3),
    "call": echo_frame(3, b"tail"),
    "reply": encode_reply(0x0101, 16, 1, 3, Ask(1, 2, b"tail").encode()),
}


@pytest.fixture
def bridge() -> Iterator[ToolBridge]:
    options = BridgeOptions(handshake_timeout=1.0, frame_timeout=0.5)
    with ToolBridge(SampleTools(), options=options) as running:
        yield running


@pytest.fixture
def other_client(bridge: ToolBridge) -> Iterator[list[object]]:
    """A second client that keeps calling; each of its calls must succeed."""
    stop, failed = threading.Event(), list[object]()

    def call() -> None:
        with SyncToolClient(bridge.path, bridge.token, name="other") as client:
            while not stop.is_set():
                try:
                    assert client.call(ECHO, Ask(5, 6, b"w")) == Ask(5, 6, b"w")
                except (OrkiError, AssertionError) as error:
                    failed.append(error)
                time.sleep(0.001)

    thread = threading.Thread(target=call)
    thread.start()
    yield failed
    stop.set()
    thread.join()
    assert failed == []


def error_of(peer: RawPeer) -> OrkiError:
    """Return the error with which the bridge ends the connection."""
    last = peer.frames()[-1]
    assert last.correlation == 0
    return decode_error(last)


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_a_frame_cut_off_at_any_byte_gets_no_answer(bridge: ToolBridge, other_client: list[object], kind: str) -> None:
    whole = EVERY_KIND[kind]
    for end in range(len(whole)):
        with RawPeer(bridge) as peer:
            peer.send(whole[:end])
            peer.sock.shutdown(socket.SHUT_WR)
            assert peer.frames() == []
    assert other_client == []


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_a_frame_cut_off_at_any_byte_before_the_hello_gets_no_answer(bridge: ToolBridge, kind: str) -> None:
    whole = EVERY_KIND[kind]
    for end in range(len(whole)):
        with RawPeer(bridge, hello=False) as peer:
            peer.send(whole[:end])
            peer.sock.shutdown(socket.SHUT_WR)
            assert peer.frames() == []


@pytest.mark.parametrize("hello", [True, False])
@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", FrameMalformed),
        (b"\0", FrameMalformed),
        (bytes(200), FrameMalformed),
        (b"\xf7\x4b\x02" + bytes(53), FrameVersion),
        (HEADER.pack(MAGIC | PROTOCOL << 16, 0x0101, 0, 0, 1, 1, 0, NO_TRACE), FrameMalformed),
        (HEADER.pack(MAGIC | PROTOCOL << 16, 0x0101, 0, HEADER_BYTES - 1, 1, 1, 0, NO_TRACE), FrameMalformed),
        (HEADER.pack(MAGIC | PROTOCOL << 16, 0x0101, 17, HEADER_BYTES + 16, 1, 1, 0, NO_TRACE), FrameMalformed),
        (HEADER.pack(MAGIC | PROTOCOL << 16, 0x0101, 0, (16 << 20) + 1, 1, 1, 0, NO_TRACE), FrameTooLarge),
        (HEADER.pack(MAGIC | PROTOCOL << 16, 0x0101, 0, (1 << 32) - 1, 1, 1, 0, NO_TRACE), FrameTooLarge),
    ],
)
def test_bytes_that_are_no_frame_get_a_typed_error(
    bridge: ToolBridge, other_client: list[object], sent: bytes, expected: type[OrkiError], hello: bool
) -> None:
    with RawPeer(bridge, hello=hello) as peer:
        peer.send(sent)
        assert type(error_of(peer)) is expected
    assert other_client == []


def test_random_garbage_does_not_disturb_another_client(bridge: ToolBridge, other_client: list[object]) -> None:
    chosen = random.Random(20)
    for _ in range(100):
        with RawPeer(bridge, hello=chosen.random() < 0.8) as peer:
            sent = bytearray(echo_frame(chosen.randrange(1, 9), chosen.randbytes(chosen.randrange(200))))
            for _ in range(chosen.randrange(1, 4)):
                sent[chosen.randrange(HEADER_BYTES)] = chosen.randrange(256)
            peer.send(bytes(sent))
            peer.sock.shutdown(socket.SHUT_WR)
            for frame in peer.frames():
                assert frame.flags & FLAG_REPLY
    assert other_client == []


def test_a_long_frame_before_the_hello_is_refused(bridge: ToolBridge) -> None:
    with RawPeer(bridge, hello=False) as peer:
        peer.send(HEADER.pack(MAGIC | PROTOCOL << 16, 1, 40, 2_000, 1, 0, 0, NO_TRACE))
        assert type(error_of(peer)) is FrameTooLarge


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (echo_frame(1), RemoteProtocolError),
        (EVERY_KIND["welcome"], RemoteProtocolError),
        (EVERY_KIND["error"], RemoteProtocolError),
        (EVERY_KIND["cancel"], RemoteProtocolError),
        (EVERY_KIND["hello"], PeerRefused),
        (encode_hello(HelloFrame(token=bytes(32), protocol_min=2, protocol_max=3, client="x")), PeerRefused),
        (encode_call(1, 40, 1, 0, 0, NO_TRACE, bytes(40) + b"\xff"), FrameMalformed),
        (encode_call(1, 8, 1, 0, 0, NO_TRACE, bytes(40)), FrameMalformed),
    ],
)
def test_a_connection_without_a_valid_hello_is_refused(
    bridge: ToolBridge, sent: bytes, expected: type[OrkiError]
) -> None:
    with RawPeer(bridge, hello=False) as peer:
        peer.send(sent)
        error = error_of(peer)
    assert type(error) is expected
    assert bridge.token.hex() not in str(error)
    assert repr(bridge.token) not in str(error)


@pytest.mark.parametrize(
    ("low", "high", "name", "expected"),
    [
        (2, 9, "x", FrameVersion),
        (0, 0, "x", FrameVersion),
        (1, 1, "", InvalidArgument),
        (1, 1, "n" * 257, InvalidArgument),
    ],
)
def test_a_hello_with_the_token_is_still_validated(
    bridge: ToolBridge, low: int, high: int, name: str, expected: type[OrkiError]
) -> None:
    hello = HelloFrame(token=bridge.token, protocol_min=low, protocol_max=high, client=name)
    with RawPeer(bridge, hello=False) as peer:
        peer.send(encode_hello(hello))
        assert type(error_of(peer)) is expected


@pytest.mark.parametrize(
    "sent",
    [
        EVERY_KIND["reply"],
        EVERY_KIND["welcome"],
        EVERY_KIND["hello"],
        EVERY_KIND["error"],
        echo_frame(0),
        encode_cancel(0),
        sleep_frame(4, 500) + echo_frame(4),
    ],
)
def test_an_illegal_frame_ends_the_connection(bridge: ToolBridge, other_client: list[object], sent: bytes) -> None:
    with RawPeer(bridge) as peer:
        peer.send(sent)
        assert type(error_of(peer)) is RemoteProtocolError
    assert other_client == []


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (encode_call(0x0999, 0, 0, 7, 0, NO_TRACE, b""), UnknownOpcode),
        (encode_call(0x0006, 0, 0, 7, 0, NO_TRACE, b""), UnknownOpcode),
        (encode_call(0x0005, 0, 0, 7, 0, NO_TRACE, b""), FrameMalformed),
        (encode_call(0x0101, 11, 1, 7, 0, NO_TRACE, bytes(11)), FrameMalformed),
        (encode_call(0x0104, 0, 0, 7, 0, NO_TRACE, b"\x0a\xff"), FrameMalformed),
        (encode_call(0x0104, 0, 0, 7, 0, NO_TRACE, b"\x0a\x02\xff\xff"), FrameMalformed),
    ],
)
def test_a_bad_call_is_answered_and_the_connection_stays_open(
    bridge: ToolBridge, sent: bytes, expected: type[OrkiError]
) -> None:
    with RawPeer(bridge) as peer:
        peer.send(sent + echo_frame(8))
        answers = {frame.correlation: frame for frame in (frame_of(peer), frame_of(peer))}
    assert type(decode_error(answers[7])) is expected
    assert Ask.decode(answers[8].body, 16) == Ask(1, 2, b"hello")


def frame_of(peer: RawPeer) -> Frame:
    frame = peer.frame()
    assert frame is not None
    return frame


def test_a_longer_block_of_a_newer_client_is_decoded(bridge: ToolBridge) -> None:
    body = Ask(1, 2).encode() + b"newer   " + b"tail"
    with RawPeer(bridge) as peer:
        peer.send(encode_call(0x0101, 24, 2, 1, 0, NO_TRACE, body))
        assert Ask.decode(frame_of(peer).body, 16) == Ask(1, 2, b"tail")


def test_a_cancelled_call_is_answered_and_an_unknown_cancel_is_ignored(bridge: ToolBridge) -> None:
    with RawPeer(bridge) as peer:
        peer.send(encode_cancel(99) + sleep_frame(1, 20_000))
        time.sleep(0.05)
        peer.send(encode_cancel(1) + encode_cancel(1) + echo_frame(2))
        first, second = frame_of(peer), frame_of(peer)
    assert (first.correlation, type(decode_error(first))) == (1, ToolCancelled)
    assert second.correlation == 2


def test_calls_beyond_the_limit_or_their_deadline_are_answered() -> None:
    with ToolBridge(SampleTools(), options=BridgeOptions(max_calls=2, call_timeout=0.1)) as bridge:
        with RawPeer(bridge) as peer:
            peer.send(sleep_frame(1, 20_000, timeout_us=4_000_000_000) + sleep_frame(2, 20_000, timeout_us=30_000))
            peer.send(echo_frame(3))
            answers = [frame_of(peer) for _ in range(3)]
    kinds = {frame.correlation: type(decode_error(frame)) for frame in answers}
    assert kinds == {1: ToolDeadline, 2: ToolDeadline, 3: TooManyCalls}


def test_a_length_allocates_no_memory_before_its_bytes_arrive() -> None:
    big = 512 << 20
    before = resident_bytes()
    with ToolBridge(SampleTools(), options=BridgeOptions(max_frame_bytes=big)) as bridge:
        with RawPeer(bridge) as first, RawPeer(bridge) as second:
            for peer in (first, second):
                peer.send(HEADER.pack(MAGIC | PROTOCOL << 16, 0x0101, 0, big, 1, 1, 0, NO_TRACE) + b"x" * 1_000)
            with RawPeer(bridge) as third:
                third.send(HEADER.pack(MAGIC | PROTOCOL << 16, 0x0101, 0, big + 1, 1, 1, 0, NO_TRACE))
                assert type(error_of(third)) is FrameTooLarge
            assert resident_bytes() - before < 64 << 20


def resident_bytes() -> int:
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def test_a_connection_without_a_hello_is_closed(bridge: ToolBridge, other_client: list[object]) -> None:
    start = time.monotonic()
    with RawPeer(bridge, hello=False) as peer:
        assert type(error_of(peer)) is HelloTimeout
    assert time.monotonic() - start < 10
    assert other_client == []


@pytest.mark.parametrize("hello", [True, False])
def test_a_frame_that_arrives_too_slowly_ends_the_connection(
    bridge: ToolBridge, other_client: list[object], hello: bool
) -> None:
    start = time.monotonic()
    with RawPeer(bridge, hello=hello) as peer:
        gone = False
        for byte in echo_frame(1):
            try:
                peer.send(bytes([byte]))
            except (BrokenPipeError, ConnectionResetError):
                gone = True
                break
            time.sleep(0.05)
        assert gone
        assert type(error_of(peer)) is FrameMalformed
    assert time.monotonic() - start < 10
    assert other_client == []


def test_the_frame_deadline_restarts_with_each_frame(bridge: ToolBridge) -> None:
    """A stream may go on without a pause between frames for longer than `frame_timeout`."""
    half = len(echo_frame(1)) // 2
    with RawPeer(bridge) as peer:
        peer.send(echo_frame(1)[:half])
        start, number = time.monotonic(), 1
        while time.monotonic() - start < 1.5:
            peer.send(echo_frame(number)[half:] + echo_frame(number + 1)[:half])
            assert frame_of(peer).correlation == number
            number += 1
            time.sleep(0.01)


def test_an_idle_client_stays_connected_after_its_hello(bridge: ToolBridge) -> None:
    with RawPeer(bridge) as peer:
        time.sleep(1.3)
        peer.send(echo_frame(1))
        assert frame_of(peer).correlation == 1


def test_a_client_that_does_not_read_is_closed_and_delays_nobody(
    bridge: ToolBridge, other_client: list[object]
) -> None:
    with RawPeer(bridge) as peer:
        grow = Ask(4 << 20, 0).encode()
        for number in range(1, 9):
            peer.send(encode_call(0x0105, 16, 1, number, 20_000_000, NO_TRACE, grow))
        time.sleep(2)
        assert other_client == []
        received = 0
        until(lambda: not takes(peer), what="the bridge ended the connection")
        peer.sock.settimeout(5)
        try:
            while chunk := peer.sock.recv(1 << 20):
                received += len(chunk)
        except ConnectionResetError:
            pass
    assert received < 8 * (4 << 20)


def takes(peer: RawPeer) -> bool:
    try:
        peer.send(echo_frame(100))
    except (BrokenPipeError, ConnectionResetError):
        return False
    return True


def test_unexpected_file_descriptors_are_closed(bridge: ToolBridge) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with RawPeer(bridge) as peer, socket.socket(socket.AF_UNIX) as smuggled:
        frame = echo_frame(1)
        socket.send_fds(peer.sock, [frame], [smuggled.fileno()] * 100)
        assert frame_of(peer).correlation == 1
        # The peer's two ends and the sent socket belong to this test.
        assert len(os.listdir("/proc/self/fd")) <= before + 3


def test_broken_connections_leave_no_state(bridge: ToolBridge) -> None:
    for number in range(300):
        with RawPeer(bridge, hello=number % 3 == 0) as peer:
            if number % 2:
                peer.send(echo_frame(1)[: number % 60])
            peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    running = bridge._running
    assert running is not None
    until(lambda: not running.monitor.connections, what="the bridge has closed all connections")
    assert FrameMalformed.reason == Reason.REASON_FRAME_MALFORMED
