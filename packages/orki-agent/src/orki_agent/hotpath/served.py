"""What a bridge serves, and one call of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any, Final

from orki_agent.hotpath.frames import encode_error, encode_reply
from orki_agent.hotpath.payloads import PayloadCodec, codec_of
from orki_contract import AsyncToolService, SyncToolService, Tool
from orki_contract.errors import (
    FrameTooLarge,
    InvalidArgument,
    InvalidResponse,
    InvalidSetting,
    Overloaded,
    TooLarge,
    ToolCancelled,
    ToolFailed,
)
from orki_contract.trace import Span

__all__ = ["Call", "Origin", "ServedTool", "error_frame", "reply_frame", "served_tools"]

_log = logging.getLogger("orki_agent.hotpath")

_FOR_THE_CALLER: Final = (ToolFailed, InvalidArgument, Overloaded, TooLarge)
"""Errors that a handler may raise to its caller as they are; any other stands for something that happened inside."""

QUICK_TURNS: Final = 16
"""So many quick runs in a row bring a tool that was seen to block back onto its connection's reading thread."""


class ServedTool:
    """One tool and its handler.

    Attributes:
        opcode: Number of the tool.
        name: Full name.
        handler: Called with request and call; a coroutine function where `is_async`.
        is_async: Whether the handler runs on the bridge's event loop.
        decode: Of the request.
        response: Codec of the response.
        seconds: Longest time of a call that names none.
        apart: Whether it does not run on the reading thread: async handlers never do, sync ones once seen to block.
        quick: Quick runs in a row since it was seen to block.
    """

    __slots__ = ("apart", "decode", "handler", "is_async", "name", "opcode", "quick", "request", "response", "seconds")

    def __init__(self, tool: Tool[Any, Any], handler: Callable[[Any, Any], Any], is_async: bool) -> None:
        self.opcode: Final = tool.contract.opcode
        self.name: Final = tool.contract.full_name
        self.handler: Final = handler
        self.is_async: Final = is_async
        self.request: Final[PayloadCodec] = codec_of(tool.request)
        self.decode: Final = self.request.decode
        self.response: Final[PayloadCodec] = codec_of(tool.response)
        self.seconds: Final = tool.contract.timeout_ms / 1_000
        self.apart = is_async
        self.quick = 0

    def ran_apart(self, seconds: float, quick_seconds: float) -> None:
        """Notes how long a run on a thread of its own took."""
        self.quick = self.quick + 1 if seconds < quick_seconds else 0
        if self.quick >= QUICK_TURNS:
            self.apart, self.quick = False, 0


def served_tools(services: Iterable[AsyncToolService | SyncToolService]) -> dict[int, ServedTool]:
    """The tools of some services by opcode.

    Raises:
        InvalidSetting: Two tools have one opcode, or a service has no tools.
    """
    served: dict[int, ServedTool] = {}
    for service in services:
        known: object = service  # whatever the type checker was told
        if not isinstance(known, AsyncToolService | SyncToolService) or not service.TOOLS:
            raise InvalidSetting(f"{type(service).__name__} is no tool service: derive it from a generated base")
        for tool in service.TOOLS:
            entry = ServedTool(tool, getattr(service, tool.attribute), isinstance(service, AsyncToolService))
            if entry.opcode in served:
                other = served[entry.opcode].name
                raise InvalidSetting(f"{entry.name} and {other} both have opcode {entry.opcode:#06x}")
            served[entry.opcode] = entry
    if not served:
        raise InvalidSetting("a tool bridge needs at least one tool service")
    return served


Origin = tuple[str, Span | None]
"""Name of a client, and the span in which it calls."""


class Call:
    """One call: what its handler is told (`orki_contract.ToolCall`), and what the bridge needs to end it.

    Attributes:
        tool: Which.
        correlation: Its number on its connection.
        timeout_us: Time that its caller gives it, in microseconds; 0 for the contract's.
        cancelled: Whether nobody waits for the answer any more.
        started: When its clock was started, on the monotonic clock.
        deadline: When it must have ended; 0 before its clock is started.
        cancel: Ends an async handler; a sync one has to look at `cancelled`.
    """

    __slots__ = ("_origin", "cancel", "cancelled", "correlation", "deadline", "started", "timeout_us", "tool")

    started: float
    cancel: Callable[[], object]

    def __init__(self, origin: Origin, tool: ServedTool, correlation: int, timeout_us: int) -> None:
        self._origin = origin
        self.tool = tool
        self.correlation = correlation
        self.timeout_us = timeout_us
        self.cancelled = False
        self.deadline = 0.0

    @property
    def client(self) -> str:
        """Name that the caller gave in its hello."""
        return self._origin[0]

    @property
    def span(self) -> Span | None:
        """The caller's span."""
        return self._origin[1]

    def start_clock(self, now: float, longest_us: int) -> None:
        """Says that the call's time runs from now."""
        self.started = now
        self.deadline = now + (min(self.timeout_us, longest_us) / 1_000_000 if self.timeout_us else self.tool.seconds)

    def abandon(self) -> None:
        """Tells the handler that nobody waits any more."""
        self.cancelled = True
        if hasattr(self, "cancel"):
            self.cancel()


def reply_frame(call: Call, reply: Any, max_frame_bytes: int) -> bytes:
    """The frame for what a handler returned; an ErrorFrame where that cannot travel."""
    tool = call.tool
    codec = tool.response
    if type(reply) is not codec.kind:
        found = f"{tool.name} returned {type(reply).__name__} instead of {codec.kind.__name__}"
        return encode_error(call.correlation, InvalidResponse(found))
    try:
        body = codec.encode(reply)
    except Exception as error:
        found = f"{tool.name} returned a reply that cannot be encoded: {error}"
        return encode_error(call.correlation, InvalidResponse(found))
    frame = encode_reply(tool.opcode, codec.block_length, codec.version, call.correlation, body)
    if len(frame) > max_frame_bytes:
        found = f"the reply of {tool.name} makes a frame of {len(frame)} bytes, at most {max_frame_bytes} pass"
        return encode_error(call.correlation, FrameTooLarge(found))
    return frame


def error_frame(call: Call, error: BaseException) -> bytes:
    """The ErrorFrame for what a handler raised: typed, in words, without a traceback (that goes to the log here)."""
    if isinstance(error, _FOR_THE_CALLER):
        return encode_error(call.correlation, error)
    if call.cancelled:
        return encode_error(call.correlation, ToolCancelled(f"{call.tool.name} was cancelled"))
    _log.error("the handler of %s failed", call.tool.name, exc_info=error)
    return encode_error(call.correlation, ToolFailed(f"{call.tool.name}: {type(error).__name__}: {error}"))
