"""How a request or a response lies in a frame: a generated frame as block and tail, a protobuf message as the tail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import DecodeError, Message

from orki_contract import FrameBase, Tool
from orki_contract.errors import FrameMalformed

__all__ = ["PayloadCodec", "ToolCodec", "codec_of", "tool_codec"]


@dataclass(frozen=True, slots=True)
class PayloadCodec:
    """One class of payload.

    Attributes:
        kind: The class.
        block_length: Length of its block in bytes; 0 for a message.
        version: Version of its layout; 0 for a message.
        encode: Payload to block and tail.
        decode: Block and tail, and the received block's length and version, to payload; raises `FrameMalformed`.
    """

    kind: type[Any]
    block_length: int
    version: int
    encode: Callable[[Any], bytes]
    decode: Callable[[memoryview, int, int], Any]


@dataclass(frozen=True, slots=True)
class ToolCodec:
    """Both payloads of a tool."""

    request: PayloadCodec
    response: PayloadCodec


def codec_of(kind: type[Any]) -> PayloadCodec:
    """How payloads of this class travel."""
    if not issubclass(kind, Message):
        return _frame_codec(kind)
    name, parse = kind.DESCRIPTOR.full_name, kind.FromString

    def decode(body: memoryview, block_length: int, version: int) -> Message:
        try:
            return parse(bytes(body[block_length:]))
        except DecodeError:
            raise FrameMalformed(f"a tail of {len(body) - block_length} bytes that is no {name}") from None

    return PayloadCodec(kind, 0, 0, kind.SerializeToString, decode)


def tool_codec(tool: Tool[Any, Any]) -> ToolCodec:
    """How a tool's request and response travel."""
    return ToolCodec(codec_of(tool.request), codec_of(tool.response))


def _frame_codec(kind: type[Any]) -> PayloadCodec:
    if issubclass(kind, FrameBase):
        return PayloadCodec(kind, kind.FRAME.block_length, kind.FRAME.version, kind.encode, kind.decode)

    # A class that only keeps to `FrameType` is not told the version.
    def decode(body: memoryview, block_length: int, version: int) -> Any:
        return kind.decode(body, block_length)

    return PayloadCodec(kind, kind.FRAME.block_length, kind.FRAME.version, kind.encode, decode)
