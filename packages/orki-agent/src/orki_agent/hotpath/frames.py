"""The codec of the hot path: bytes to frames and frames to bytes. It does no I/O.

`proto/orki/hotpath/v1/frame.proto` defines the layout. One `struct.Struct` reads and writes the header, because both
ends do so for every call; a test compares it with the generated `FrameHeader.FRAME`.
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct
from typing import Final, NamedTuple

from orki.hotpath.v1.frame_pb2 import FrameFlag
from orki.hotpath.v1.tool_orki import CancelFrame, ErrorFrame, HelloFrame, WelcomeFrame
from orki.hotpath.v1.tool_pb2 import ControlOpcode
from orki_contract import FrameType
from orki_contract.errors import FrameMalformed, FrameTooLarge, FrameVersion, OrkiError, Reason, ToolFailed, error_for
from orki_contract.trace import Span

__all__ = [
    "HEADER_BYTES",
    "NO_TRACE",
    "OP_CONTRACT",
    "Frame",
    "FrameDecoder",
    "decode_error",
    "encode_call",
    "encode_cancel",
    "encode_error",
    "encode_hello",
    "encode_reply",
    "encode_welcome",
    "pack_span",
    "unpack_span",
]

MAGIC: Final = 0x4BF7
PROTOCOL: Final = 1
HEADER_BYTES: Final = 56
BUFFER_BYTES: Final = 65_536
FIRST_TOOL_OPCODE: Final = 0x0100
"""Lower opcodes belong to the protocol (`ControlOpcode`)."""

FLAG_REPLY: Final = int(FrameFlag.FRAME_FLAG_REPLY)
FLAG_ERROR: Final = int(FrameFlag.FRAME_FLAG_ERROR)
OP_HELLO: Final = int(ControlOpcode.CONTROL_OPCODE_HELLO)
OP_WELCOME: Final = int(ControlOpcode.CONTROL_OPCODE_WELCOME)
OP_ERROR: Final = int(ControlOpcode.CONTROL_OPCODE_ERROR)
OP_CANCEL: Final = int(ControlOpcode.CONTROL_OPCODE_CANCEL)
OP_CONTRACT: Final = int(ControlOpcode.CONTROL_OPCODE_CONTRACT)

NO_TRACE: Final = bytes(28)
"""Header bytes of a call outside a trace: flags, three reserved bytes, trace id and span id, all zero."""

MAX_MESSAGE_CHARS: Final = 1_000
_STEP_BYTES: Final = 1 << 20

# magic, protocol and flags as one word | opcode, block length | total length, block version | correlation | timeout |
# trace flags, reserved bytes, trace id and span id as 28 bytes
HEADER: Final = Struct("<IHHIH2xQI28s")
_pack: Final = HEADER.pack
_unpack_from: Final = HEADER.unpack_from

CALL_PREFIX: Final = MAGIC | PROTOCOL << 16
_MAGIC_BYTES: Final = MAGIC.to_bytes(2, "little")
REPLY_PREFIX: Final = CALL_PREFIX | FLAG_REPLY << 24
_ERROR_PREFIX: Final = CALL_PREFIX | (FLAG_REPLY | FLAG_ERROR) << 24


class Frame(NamedTuple):
    """A decoded frame.

    Attributes:
        flags: Bit set of `FrameFlag`.
        opcode: The tool's opcode, or one of `ControlOpcode`.
        block_length: Length of the block at the start of `body`, in bytes.
        version: Version of the block's layout.
        correlation: Number of the call; 0 in the handshake and in an error that ends the connection.
        timeout_us: The caller's timeout in microseconds; 0 for none.
        trace: 28 bytes: trace flags, three reserved bytes, trace id, span id.
        body: Block and tail: a view of the decoder's buffer, valid until the decoder is used again.
    """

    flags: int
    opcode: int
    block_length: int
    version: int
    correlation: int
    timeout_us: int
    trace: bytes
    body: memoryview


Fields = tuple[int, int, int, int, int, int, bytes, memoryview]
"""A frame as a plain tuple in the order of `Frame`, which costs less to make than a `Frame`."""


class FrameDecoder:
    """Splits a stream of bytes into frames.

    Bytes enter through `writable` and the argument of `next_frame`, so that a socket can receive into the buffer, or
    through `feed`. Frames leave through `next_frame` or `feed`. Each check is made as soon as its bytes have arrived
    and in their order, so the outcome does not depend on how the stream was split. A frame longer than
    `max_frame_bytes` is refused before memory is allocated for it. After an error the decoder raises the same error
    again, because the start of the next frame is unknown.

    Attributes:
        max_frame_bytes: Longest accepted frame, header included; may change between frames.
        filled: End of the used part of the buffer; 0 if no byte of an incomplete frame is held.
    """

    __slots__ = ("_buffer", "_failure", "_small", "_start", "_view", "filled", "max_frame_bytes")

    def __init__(self, max_frame_bytes: int) -> None:
        """Make a decoder for frames of at most `max_frame_bytes`."""
        self.max_frame_bytes = max_frame_bytes
        self.filled = 0
        self._small = bytearray(BUFFER_BYTES)
        self._buffer = self._small
        self._view = memoryview(self._buffer)
        self._start = 0
        self._failure: OrkiError | None = None

    @property
    def broken(self) -> bool:
        """Whether an earlier error makes the decoder unusable."""
        return self._failure is not None

    def writable(self) -> memoryview:
        """Return the buffer for the next bytes. Fill it when `next_frame` returned None, then pass it their number."""
        if not self.filled:
            return self._view
        if self.filled == len(self._buffer):
            self._to_front()
        return self._view[self.filled :]

    def next_frame(self, received: int = 0) -> Fields | None:
        """Return the next complete frame, or None if more bytes are needed.

        Args:
            received: Number of bytes written to the start of `writable()`.

        Raises:
            FrameMalformed: The bytes are no frame of this protocol.
            FrameVersion: The frame has another protocol version.
            FrameTooLarge: The frame is longer than `max_frame_bytes`.
        """
        if received and not self.filled:
            # Fast path for the usual case: the bytes are exactly one frame.
            prefix, opcode, block_length, total, version, correlation, timeout_us, trace = _unpack_from(self._small)
            if (
                total == received
                and prefix & 0xFFFFFF == CALL_PREFIX
                and HEADER_BYTES + block_length <= total <= self.max_frame_bytes
            ):
                body = self._view[HEADER_BYTES:total]
                return prefix >> 24, opcode, block_length, version, correlation, timeout_us, trace, body
        start = self._start
        self.filled = filled = self.filled + received
        have = filled - start
        if have < HEADER_BYTES:
            if have:
                self._check(have)
                self._wait_for(HEADER_BYTES)
            return None
        prefix, opcode, block_length, total, version, correlation, timeout_us, trace = _unpack_from(self._buffer, start)
        if prefix & 0xFFFFFF != CALL_PREFIX or not HEADER_BYTES + block_length <= total <= self.max_frame_bytes:
            self._check(have)
        if have < total:
            self._wait_for(total)
            return None
        body = self._view[start + HEADER_BYTES : start + total]
        if have == total:
            self._start = self.filled = 0
            if self._buffer is not self._small:
                self._use(self._small)
        else:
            self._start = start + total
        return prefix >> 24, opcode, block_length, version, correlation, timeout_us, trace, body

    def feed(self, chunk: bytes | bytearray | memoryview) -> Iterator[Frame]:
        """Add bytes and yield the frames that are complete. Iterate to the end.

        Raises:
            FrameMalformed, FrameVersion, FrameTooLarge: See `next_frame`; frames before the bad one are yielded first.
        """
        rest = memoryview(chunk)
        received = 0
        while True:
            while (fields := self.next_frame(received)) is not None:
                received = 0
                yield Frame(*fields)
            if not rest:
                return
            room = self.writable()
            received = min(len(room), len(rest))
            room[:received] = rest[:received]
            rest = rest[received:]

    def finish(self) -> None:
        """Check that the stream did not end inside a frame.

        Raises:
            FrameMalformed: The stream ended inside a frame.
        """
        if self._failure is None and self.filled:
            self._fail(FrameMalformed(f"the stream ended {self.filled - self._start} bytes into a frame"))

    def _wait_for(self, total: int) -> None:
        """Make room for a frame of `total` bytes, the first of which are in the buffer.

        The peer may never send that many, so memory grows with the bytes that arrive: to one mebibyte or four times
        the bytes held.
        """
        if self._start + total <= len(self._buffer):
            return
        if total <= len(self._buffer):
            self._to_front()
        elif self._buffer is self._small or self.filled == len(self._buffer):
            held = self._view[self._start : self.filled]
            self._use(bytearray(min(total, max(_STEP_BYTES, 4 * len(held)))))
            self._view[: len(held)] = held
            self._start, self.filled = 0, len(held)

    def _to_front(self) -> None:
        held = self._buffer[self._start : self.filled]
        self._view[: len(held)] = held
        self._start, self.filled = 0, len(held)

    def _use(self, buffer: bytearray) -> None:
        self._buffer = buffer
        self._view = memoryview(buffer)

    def _check(self, have: int) -> None:
        """Check the part of a header that has arrived, in the order of its bytes."""
        if self._failure is not None:
            raise self._failure
        head = bytes(self._buffer[self._start : self._start + min(have, HEADER_BYTES)])
        if not _MAGIC_BYTES.startswith(head[:2]):
            self._fail(FrameMalformed(f"a frame starts with the bytes f7 4b, this one with {head[:2].hex(' ')}"))
        if have > 2 and head[2] != PROTOCOL:
            self._fail(FrameVersion(f"the frame has protocol version {head[2]}, this side uses version {PROTOCOL}"))
        if have < 12:
            return
        block_length, total = int.from_bytes(head[6:8], "little"), int.from_bytes(head[8:12], "little")
        if total > self.max_frame_bytes:
            self._fail(FrameTooLarge(f"the frame has {total} bytes, the maximum is {self.max_frame_bytes}"))
        if total < HEADER_BYTES + block_length:
            self._fail(
                FrameMalformed(
                    f"a frame of {total} bytes cannot hold a header of {HEADER_BYTES} and a block of {block_length}"
                )
            )

    def _fail(self, error: OrkiError) -> None:
        self._failure = error
        self.max_frame_bytes = -1  # So every later frame goes through `_check`, which raises again.
        raise error


def encode_call(
    opcode: int, block_length: int, version: int, correlation: int, timeout_us: int, trace: bytes, body: bytes
) -> bytes:
    """Encode a call; `body` is block and tail, `trace` is as in `Frame`."""
    return (
        _pack(CALL_PREFIX, opcode, block_length, HEADER_BYTES + len(body), version, correlation, timeout_us, trace)
        + body
    )


def encode_reply(opcode: int, block_length: int, version: int, correlation: int, body: bytes) -> bytes:
    """Encode the reply to a call."""
    return _pack(REPLY_PREFIX, opcode, block_length, HEADER_BYTES + len(body), version, correlation, 0, NO_TRACE) + body


def encode_error(correlation: int, error: OrkiError) -> bytes:
    """Encode the ErrorFrame that answers a call or, with correlation 0, ends a connection. Long messages are cut."""
    code = error.code if isinstance(error, ToolFailed) else 0
    message = error.message.encode(errors="replace").decode()[:MAX_MESSAGE_CHARS]
    return _encode(
        _ERROR_PREFIX, OP_ERROR, correlation, ErrorFrame(reason=error.reason, tool_code=code, message=message)
    )


def decode_error(frame: Frame) -> OrkiError:
    """Return the typed error of an ErrorFrame.

    Raises:
        FrameMalformed: The frame is no ErrorFrame.
    """
    answer = ErrorFrame.decode(frame.body, frame.block_length, frame.version)
    error = error_for(Reason.ValueType(answer.reason), answer.message)
    if isinstance(error, ToolFailed):
        error.code = answer.tool_code
    return error


def encode_hello(hello: HelloFrame) -> bytes:
    """Encode the frame that opens a connection."""
    return _encode(CALL_PREFIX, OP_HELLO, 0, hello)


def encode_welcome(welcome: WelcomeFrame) -> bytes:
    """Encode the frame that accepts a connection."""
    return _encode(REPLY_PREFIX, OP_WELCOME, 0, welcome)


def encode_cancel(correlation: int) -> bytes:
    """Encode the frame that cancels a call."""
    return _encode(CALL_PREFIX, OP_CANCEL, correlation, CancelFrame())


def _encode(prefix: int, opcode: int, correlation: int, payload: FrameType) -> bytes:
    body, layout = payload.encode(), payload.FRAME
    total = HEADER_BYTES + len(body)
    return _pack(prefix, opcode, layout.block_length, total, layout.version, correlation, 0, NO_TRACE) + body


def pack_span(span: Span | None) -> bytes:
    """Return the header's 28 trace bytes for a span, or for none."""
    if span is None:
        return NO_TRACE
    return b"%c\0\0\0%b%b" % (span.flags, bytes.fromhex(span.trace_id), bytes.fromhex(span.span_id))


def unpack_span(trace: bytes) -> Span | None:
    """Return the span of the header's trace bytes, or None if either id is zero (invalid in W3C Trace Context)."""
    trace_id, span_id = trace[4:20], trace[20:28]
    if not any(trace_id) or not any(span_id):
        return None
    return Span(trace_id.hex(), span_id.hex(), "", trace[0])
