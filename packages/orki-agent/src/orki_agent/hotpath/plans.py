"""What a client works out once for each tool."""

from __future__ import annotations

from typing import Any, Final

from orki_agent.hotpath.frames import HEADER_BYTES
from orki_agent.hotpath.payloads import codec_of
from orki_contract import Tool
from orki_contract.errors import FrameMalformed, FrameTooLarge, InvalidArgument, OrkiError

__all__ = ["MAX_SECONDS", "Plan"]

MAX_SECONDS: Final = 4_294.0
"""Longest timeout that the header can hold: microseconds in 32 bits."""


class Plan:
    """How one tool is called."""

    __slots__ = (
        "_decode",
        "_encode",
        "block_length",
        "method",
        "opcode",
        "request",
        "response",
        "timeout_us",
        "version",
    )

    def __init__(self, tool: Tool[Any, Any]) -> None:
        request, response = codec_of(tool.request), codec_of(tool.response)
        self.opcode: Final = tool.contract.opcode
        self.method: Final = tool.contract.full_name
        self.timeout_us: Final = tool.contract.timeout_ms * 1_000
        self.request: Final = tool.request
        self.response: Final = tool.response
        self.block_length: Final = request.block_length
        self.version: Final = request.version
        self._encode: Final = request.encode
        self._decode: Final = response.decode

    def body(self, request: Any, max_frame_bytes: int) -> bytes:
        """The request's block and tail.

        Raises:
            InvalidArgument: It is of another class than the tool's request.
            FrameMalformed: It holds values that its frame cannot.
            FrameTooLarge: The bridge does not take frames of that length.
        """
        if type(request) is not self.request:
            raise InvalidArgument(f"{self.method} takes {self.request.__name__}, not {type(request).__name__}")
        body = self._encode(request)
        if len(body) + HEADER_BYTES > max_frame_bytes:
            raise FrameTooLarge(
                f"the request of {self.method} makes a frame of {len(body) + HEADER_BYTES} bytes, "
                f"the bridge takes {max_frame_bytes}"
            )
        return body

    def reply(self, body: memoryview, block_length: int, version: int) -> Any:
        """The reply in a frame's body.

        Raises:
            FrameMalformed: It is not the tool's response.
        """
        try:
            return self._decode(body, block_length, version)
        except Exception as error:
            what = error.message if isinstance(error, OrkiError) else f"{type(error).__name__}: {error}"
            raise FrameMalformed(f"the reply of {self.method} is no {self.response.__name__}: {what}") from None

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
