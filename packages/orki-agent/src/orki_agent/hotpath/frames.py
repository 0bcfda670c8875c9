"""The codec of the hot path: bytes to frames and frames to bytes. It knows no socket and no clock.

The layout is `proto/orki/hotpath/v1/frame.proto`. The header is read and written with one `struct.Struct` of its own,
because both ends do it for every call; a test holds it to the generated `FrameHeader.FRAME`.
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

__all__ = [
    "BUFFER_BYTES",
    "CALL_WORD",
    "FIRST_TOOL_OPCODE",
    "FLAG_ERROR",
    "FLAG_REPLY",
    "HEADER",
    "HEADER_BYTES",
    "MAGIC",
    "NO_TRACE",
    "OP_CANCEL",
    "OP_CONTRACT",
    "OP_ERROR",
    "OP_HELLO",
    "OP_WELCOME",
    "PROTOCOL",
    "REPLY_WORD",
    "Fields",
    "Frame",
    "FrameDecoder",
    "decode_error",
    "encode_call",
    "encode_cancel",
    "encode_error",
    "encode_hello",
    "encode_reply",
    "encode_welcome",
]

MAGIC: Final = 0x4BF7
PROTOCOL: Final = 1
HEADER_BYTES: Final = 56
BUFFER_BYTES: Final = 65_536
FIRST_TOOL_OPCODE: Final = 0x0100
"""Lower opcodes are the protocol's own (`ControlOpcode`)."""

FLAG_REPLY: Final = int(FrameFlag.FRAME_FLAG_REPLY)
FLAG_ERROR: Final = int(FrameFlag.FRAME_FLAG_ERROR)
OP_HELLO: Final = int(ControlOpcode.CONTROL_OPCODE_HELLO)
OP_WELCOME: Final = int(ControlOpcode.CONTROL_OPCODE_WELCOME)
OP_ERROR: Final = int(ControlOpcode.CONTROL_OPCODE_ERROR)
OP_CANCEL: Final = int(ControlOpcode.CONTROL_OPCODE_CANCEL)
OP_CONTRACT: Final = int(ControlOpcode.CONTROL_OPCODE_CONTRACT)

NO_TRACE: Final = bytes(28)
"""What stands in the header outside a trace: flags, three reserved bytes, trace id and span id, all zero."""

MAX_MESSAGE_CHARS: Final = 1_000
_STEP_BYTES: Final = 1 << 20

# magic, protocol and flags as one word | opcode, block length | total length, block version | correlation | timeout |
# trace flags, reserved bytes, trace id and span id as one string of 28 bytes
HEADER: Final = Struct("<IHHIH2xQI28s")
_pack: Final = HEADER.pack
_unpack_from: Final = HEADER.unpack_from

CALL_WORD: Final = MAGIC | PROTOCOL << 16
_MAGIC_BYTES: Final = MAGIC.to_bytes(2, "little")
REPLY_WORD: Final = CALL_WORD | FLAG_REPLY << 24
_ERROR_WORD: Final = CALL_WORD | (FLAG_REPLY | FLAG_ERROR) << 24


class Frame(NamedTuple):
    """One frame as it lies on the wire.

    Attributes:
        flags: Bit set of `FrameFlag`.
        opcode: Tool's opcode, or one of `ControlOpcode`.
        block_length: Length of the block at the start of `body`, in bytes.
        version: Version of the block's layout.
        correlation: Number of the call; 0 in the handshake.
        timeout_us: Time that the caller gives the call, in microseconds; 0 for none.
        trace: 28 bytes: trace flags, three reserved bytes, trace id, span id.
        body: Block and tail. A view of the decoder's buffer: valid until the decoder is touched again.
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
"""A frame as a bare tuple, in the order of `Frame`: naming its fields would cost more than reading it."""


class FrameDecoder:
    """Cuts a stream of bytes into frames, whatever pieces it comes in.

    Bytes go in by `writable` and the argument of `next_frame` (so that a socket can receive straight into the buffer),
    or by `feed`; frames come out of `next_frame` or `feed`. Each check is made as soon as the bytes that it needs are
    there, in the order in which they lie, so that the outcome does not depend on how the stream was split. A frame
    longer than `max_frame_bytes` is refused before a byte is allocated for it. After an error the decoder is poisoned:
    it raises the same error again, since nobody knows where the next frame begins.

    Attributes:
        max_frame_bytes: Longest frame that is taken, header included; may be changed between frames.
        filled: How far the buffer is in use; 0 when every byte that came has left in a frame.
    """

    __slots__ = ("_buffer", "_failure", "_small", "_start", "_view", "filled", "max_frame_bytes")

    def __init__(self, max_frame_bytes: int) -> None:
        """Prepares a decoder for frames of at most so many bytes."""
        self.max_frame_bytes = max_frame_bytes
        self.filled = 0
        self._small = bytearray(BUFFER_BYTES)
        self._buffer = self._small
        self._view = memoryview(self._buffer)
        self._start = 0
        self._failure: OrkiError | None = None

    @property
    def broken(self) -> bool:
        """Whether an error has poisoned the decoder."""
        return self._failure is not None

    def writable(self) -> memoryview:
        """Where the next bytes belong, once `next_frame` has given None; tell it then how many were put there."""
        if not self.filled:
            return self._view
        if self.filled == len(self._buffer):
            self._to_front()
        return self._view[self.filled :]

    def next_frame(self, received: int = 0) -> Fields | None:
        """The fields of the next whole frame, or None when more bytes are needed.

        Args:
            received: How many bytes were put at the start of what `writable` gave.

        Raises:
            FrameMalformed: The bytes are not a frame of this protocol.
            FrameVersion: The frame is of another version of the protocol.
            FrameTooLarge: The frame is longer than `max_frame_bytes`.
        """
        if received and not self.filled:
            # By far the most frequent: what came is one frame, no more and no less.
            word, opcode, block_length, total, version, correlation, timeout_us, trace = _unpack_from(self._small)
            if (
                total == received
                and word & 0xFFFFFF == CALL_WORD
                and HEADER_BYTES + block_length <= total <= self.max_frame_bytes
            ):
                body = self._view[HEADER_BYTES:total]
                return word >> 24, opcode, block_length, version, correlation, timeout_us, trace, body
        start = self._start
        self.filled = filled = self.filled + received
        have = filled - start
        if have < HEADER_BYTES:
            self._wait_for_header(have)
            return None
        word, opcode, block_length, total, version, correlation, timeout_us, trace = _unpack_from(self._buffer, start)
        if word & 0xFFFFFF != CALL_WORD or not HEADER_BYTES + block_length <= total <= self.max_frame_bytes:
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
        return word >> 24, opcode, block_length, version, correlation, timeout_us, trace, body

    def feed(self, chunk: bytes | bytearray | memoryview) -> Iterator[Frame]:
        """Puts bytes in and gives the frames that are now whole; to be iterated to its end.

        Raises:
            FrameMalformed, FrameVersion, FrameTooLarge: as `next_frame`, after the frames before the bad one.
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
        """Says that the stream has ended.

        Raises:
            FrameMalformed: It ended in the middle of a frame.
        """
        if self._failure is None and self.filled:
            self._fail(FrameMalformed(f"the stream ended {self.filled - self._start} bytes into a frame"))

    def _wait_for_header(self, have: int) -> None:
        if have:
            self._check(have)
            self._wait_for(HEADER_BYTES)

    def _wait_for(self, total: int) -> None:
        """Makes room for a frame of `total` bytes that lies in the buffer in part.

        A length is only a promise: memory is taken as the bytes come, a mebibyte or four times what is here.
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
        """Looks at what is there of a header, first byte first."""
        if self._failure is not None:
            raise self._failure
        head = bytes(self._buffer[self._start : self._start + min(have, HEADER_BYTES)])
        if not _MAGIC_BYTES.startswith(head[:2]):
            self._fail(FrameMalformed(f"a frame starts with the bytes f7 4b, this began with {head[:2].hex(' ')}"))
        if have > 2 and head[2] != PROTOCOL:
            self._fail(FrameVersion(f"frame of protocol version {head[2]}, this side speaks version {PROTOCOL}"))
        if have < 12:
            return
        block_length, total = int.from_bytes(head[6:8], "little"), int.from_bytes(head[8:12], "little")
        if total > self.max_frame_bytes:
            self._fail(FrameTooLarge(f"frame of {total} bytes, at most {self.max_frame_bytes} are taken here"))
        if total < HEADER_BYTES + block_length:
            self._fail(
                FrameMalformed(
                    f"frame of {total} bytes cannot hold {HEADER_BYTES} of header and {block_length} of block"
                )
            )

    def _fail(self, error: OrkiError) -> None:
        self._failure = error
        self.max_frame_bytes = -1  # so that every later frame comes by `_check`, without a look at `_failure` for each
        raise error


def encode_call(
    opcode: int, block_length: int, version: int, correlation: int, timeout_us: int, trace: bytes, body: bytes
) -> bytes:
    """A call's frame; `body` is block and tail, `trace` is as in `Frame`."""
    return (
        _pack(CALL_WORD, opcode, block_length, HEADER_BYTES + len(body), version, correlation, timeout_us, trace) + body
    )


def encode_reply(opcode: int, block_length: int, version: int, correlation: int, body: bytes) -> bytes:
    """The frame that answers a call."""
    return _pack(REPLY_WORD, opcode, block_length, HEADER_BYTES + len(body), version, correlation, 0, NO_TRACE) + body


def encode_error(correlation: int, error: OrkiError) -> bytes:
    """The ErrorFrame that answers a call, or with correlation 0 ends a connection. Long messages are cut."""
    code = error.code if isinstance(error, ToolFailed) else 0
    message = error.message.encode(errors="replace").decode()[:MAX_MESSAGE_CHARS]
    return _encode(_ERROR_WORD, OP_ERROR, correlation, ErrorFrame(reason=error.reason, tool_code=code, message=message))


def decode_error(frame: Frame) -> OrkiError:
    """The typed error that an ErrorFrame stands for.

    Raises:
        FrameMalformed: It is not an ErrorFrame.
    """
    answer = ErrorFrame.decode(frame.body, frame.block_length, frame.version)
    error = error_for(Reason.ValueType(answer.reason), answer.message)
    if isinstance(error, ToolFailed):
        error.code = answer.tool_code
    return error


def encode_hello(hello: HelloFrame) -> bytes:
    """The frame that opens a connection."""
    return _encode(CALL_WORD, OP_HELLO, 0, hello)


def encode_welcome(welcome: WelcomeFrame) -> bytes:
    """The frame that accepts a connection."""
    return _encode(REPLY_WORD, OP_WELCOME, 0, welcome)


def encode_cancel(correlation: int) -> bytes:
    """The frame that asks for the end of a call."""
    return _encode(CALL_WORD, OP_CANCEL, correlation, CancelFrame())


def _encode(word: int, opcode: int, correlation: int, payload: FrameType) -> bytes:
    body, layout = payload.encode(), payload.FRAME
    total = HEADER_BYTES + len(body)
    return _pack(word, opcode, layout.block_length, total, layout.version, correlation, 0, NO_TRACE) + body
