"""What a client works out once for each tool."""

from __future__ import annotations

from typing import Any, Final

from orki_agent.hotpath.frames import encode_call
from orki_agent.hotpath.payloads import codec_of
from orki_contract import Tool
from orki_contract.errors import FrameMalformed, FrameTooLarge, InvalidArgument, OrkiError

__all__ = ["MAX_SECONDS", "Plan"]

MAX_SECONDS: Final = 4_294.0
"""Longest timeout that the header can hold: microseconds in 32 bits."""


class Plan:
    """How one tool is called."""

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

    def frame(self, request: Any, number: int, micros: int, trace: bytes) -> bytes:
        """The call's frame.

        Raises:
            InvalidArgument: The request is of another class than the tool's.
            FrameMalformed: It holds values that its frame cannot.
        """
        if type(request) is not self.request:
            raise self.wrong(request)
        return encode_call(self.opcode, self.block_length, self.version, number, micros, trace, self.encode(request))

    def wrong(self, request: Any) -> InvalidArgument:
        """The error for a request of another class."""
        # With their modules: a frame's class has the name of the message class that stands for it elsewhere.
        wanted, given = (f"{each.__module__}.{each.__qualname__}" for each in (self.request, type(request)))
        return InvalidArgument(f"{self.method} takes {wanted}, not {given}")

    def too_long(self, length: int, most: int) -> FrameTooLarge:
        """The error for a frame that the bridge would not take."""
        return FrameTooLarge(f"the request of {self.method} makes a frame of {length} bytes, the bridge takes {most}")

    def unreadable(self, error: Exception) -> FrameMalformed:
        """The error for a reply that `decode` did not take."""
        what = error.message if isinstance(error, OrkiError) else f"{type(error).__name__}: {error}"
        return FrameMalformed(f"the reply of {self.method} is no {self.response.__name__}: {what}")

    def micros(self, timeout: float | None) -> int:
        """A call's timeout in microseconds: the caller's, or the contract's.

        Raises:
            InvalidArgument: It is not positive, or longer than the header can say.
        """
        if timeout is None:
            return self.timeout_us
        if not 0 < timeout <= MAX_SECONDS:
            raise InvalidArgument(f"a timeout of {timeout!r} s; it must be more than 0 and at most {MAX_SECONDS:.0f}")
        return max(1, int(timeout * 1_000_000))
