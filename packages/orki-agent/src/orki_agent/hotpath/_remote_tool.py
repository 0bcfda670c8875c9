"""A tool as its client calls it."""

from __future__ import annotations

from typing import Any, Final

from orki_agent.hotpath.frames import codec_of, encode_call
from orki_contract import Tool
from orki_contract.errors import FrameMalformed, FrameTooLarge, InvalidArgument, OrkiError

MAX_TIMEOUT: Final = 4_294.0
"""Longest timeout in seconds that the header can hold: microseconds in 32 bits."""


class RemoteTool:
    """Opcode, codecs and default timeout of a tool, computed once."""

    __slots__ = (
        "block_length",
        "decode",
        "encode",
        "method",
        "opcode",
        "request",
        "response",
        "service",
        "timeout_us",
        "version",
    )

    def __init__(self, tool: Tool[Any, Any]) -> None:
        request, response = codec_of(tool.request), codec_of(tool.response)
        self.opcode: Final = tool.contract.opcode
        self.method: Final = tool.contract.full_name
        self.service: Final = tool.contract.service
        self.timeout_us: Final = tool.contract.timeout_ms * 1_000
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
            FrameMalformed: The request holds values that its frame cannot.
        """
        if type(request) is not self.request:
            raise self.wrong_class(request)
        body = self.encode(request)
        return encode_call(self.opcode, self.block_length, self.version, number, timeout_us, trace, body)

    def wrong_class(self, request: Any) -> InvalidArgument:
        """Return the error for a request of another class."""
        # With the modules, because a generated frame and its message class have the same name.
        wanted, given = (f"{each.__module__}.{each.__qualname__}" for each in (self.request, type(request)))
        return InvalidArgument(f"{self.method} takes {wanted}, not {given}")

    def too_long(self, length: int, maximum: int) -> FrameTooLarge:
        """Return the error for a frame that exceeds the bridge's limit."""
        return FrameTooLarge(f"the request of {self.method} makes a frame of {length} bytes, the maximum is {maximum}")

    def unreadable(self, error: Exception) -> FrameMalformed:
        """Return the error for a reply that `decode` refused."""
        reason = error.message if isinstance(error, OrkiError) else f"{type(error).__name__}: {error}"
        return FrameMalformed(f"the reply of {self.method} is no {self.response.__name__}: {reason}")

    def timeout_in_us(self, timeout: float | None) -> int:
        """Return a call's timeout in microseconds: the caller's in seconds, or the contract's.

        Raises:
            InvalidArgument: It is not positive, or too long for the header.
        """
        if timeout is None:
            return self.timeout_us
        if not 0 < timeout <= MAX_TIMEOUT:
            raise InvalidArgument(f"timeout is {timeout!r} s, it must be more than 0 and at most {MAX_TIMEOUT:.0f}")
        return max(1, int(timeout * 1_000_000))
