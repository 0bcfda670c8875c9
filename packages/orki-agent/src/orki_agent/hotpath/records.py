"""What a client tells about each finished call."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from orki_contract.trace import Span

__all__ = ["CallHook", "ToolRecord"]


class ToolRecord(NamedTuple):
    """One finished call, as the client saw it.

    Attributes:
        method: The tool, as `package.Service/Method`.
        duration_ns: From the call to its end, in nanoseconds.
        request_bytes: Block and tail of the request.
        reply_bytes: Block and tail of the reply; 0 without one.
        reason: Number of the `orki.errors.v1.Reason` for which it failed; 0 when it did not.
        tool_code: The tool's own error code; 0 without one.
        span: Span in which it was called.
    """

    method: str
    duration_ns: int
    request_bytes: int
    reply_bytes: int
    reason: int
    tool_code: int
    span: Span | None


CallHook = Callable[[ToolRecord], object]
"""Called after each call, in the caller's thread or loop: it must be quick (a deque's `append`) and must not raise."""
