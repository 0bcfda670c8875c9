"""Codecs of requests and responses, and a tool as its client calls it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from google.protobuf.message import DecodeError, Message

from orki_agent.hotpath.frames import encode_call
from orki_contract import FrameBase, Tool
from orki_contract.errors import FrameMalformed, FrameTooLarge, InvalidArgument, OrkiError
from orki_contract.model import milliseconds

MAX_TIMEOUT: Final = 4_294.0
"""Longest timeout in seconds that the header can hold: microseconds in 32 bits."""


@dataclass(frozen=True, slots=True)
class PayloadCodec:
    """Encodes and decodes one class of request or response.

    A generated frame becomes block and tail; a protobuf message becomes the tail.

    Attributes:
        block_length: Length of its block in bytes; 0 for a message.
        version: Version of its layout; 0 for a message.
        encode: Returns block and tail of a payload.
        decode: Returns the payload for block and tail, the received block's length and its version; raises
            `FrameMalformed`.
    """

    kind: type[Any]
    block_length: int
    version: int
    encode: Callable[[Any], bytes]
    decode: Callable[[memoryview, int, int], Any]


def codec_of(kind: type[Any]) -> PayloadCodec:
    if not issubclass(kind, Message):
        return _frame_codec(kind)
    name, parse = kind.DESCRIPTOR.full_name, kind.FromString

    def decode(body: memoryview, block_length: int, version: int) -> Message:
        try:
            return parse(bytes(body[block_length:]))
        except DecodeError:
            raise FrameMalformed(f"the tail of {len(body) - block_length} bytes is no {name}") from None

    return PayloadCodec(kind, 0, 0, kind.SerializeToString, decode)


def _frame_codec(kind: type[Any]) -> PayloadCodec:
    if issubclass(kind, FrameBase):
        return PayloadCodec(kind, kind.FRAME.block_length, kind.FRAME.version, kind.encode, kind.decode)

    # A class that only implements `FrameType` does not take the version.
    def decode(body: memoryview, block_length: int, version: int) -> Any:
        return kind.decode(body, block_length)

    return PayloadCodec(kind, kind.FRAME.block_length, kind.FRAME.version, kind.encode, decode)


class RemoteTool:
    """Opcode, codecs and default timeout of a tool, computed once."""

    def __init__(self, tool: Tool[Any, Any]) -> None:
        request, response = codec_of(tool.request), codec_of(tool.response)
        self.opcode: Final = tool.contract.opcode
        self.method: Final = tool.contract.full_name
        self.service: Final = tool.contract.service
        self.timeout_us: Final = milliseconds(tool.contract.timeout) * 1_000
        self.request: Final = tool.request
        self.response: Final = tool.response
        self.block_length: Final = request.block_length
        self.version: Final = request.version
        self.encode: Final = request.encode
        self.decode: Final = response.decode

    def frame(self, request: Any, number: int, timeout_us: int, trace: bytes) -> bytes:
        """Encode a call.

        Raises:
            InvalidArgument: The request has another class than the tool's.
            FrameMalformed: A value of the request does not fit its field of the frame.
        """
        if type(request) is not self.request:
            raise self.wrong_class(request)
        body = self.encode(request)
        return encode_call(self.opcode, self.block_length, self.version, number, timeout_us, trace, body)

    def wrong_class(self, request: Any) -> InvalidArgument:
        # With the modules, because a generated frame and its message class have the same name.
        wanted, given = (f"{each.__module__}.{each.__qualname__}" for each in (self.request, type(request)))
        return InvalidArgument(f"{self.method} takes {wanted}, not {given}")

    def too_long(self, length: int, maximum: int) -> FrameTooLarge:
        return FrameTooLarge(f"the request of {self.method} makes a frame of {length} bytes, the maximum is {maximum}")

    def unreadable(self, error: Exception) -> FrameMalformed:
        reason = error.message if isinstance(error, OrkiError) else f"{type(error).__name__}: {error}"
        return FrameMalformed(f"the reply of {self.method} is no {self.response.__name__}: {reason}")

    def timeout_in_us(self, timeout: float | None) -> int:
        """Return a call's timeout in microseconds: the caller's in seconds, or the contract's.

        Raises:
            InvalidArgument: The timeout is not positive, or too long for the header.
        """
        if timeout is None:
            return self.timeout_us
        if not 0 < timeout <= MAX_TIMEOUT:
            raise InvalidArgument(f"timeout is {timeout!r} s, it must be more than 0 and at most {MAX_TIMEOUT:.0f}")
        return max(1, int(timeout * 1_000_000))
