"""The tools of a bridge, their calls, and the event loop for async handlers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Iterable
from contextvars import Context
from functools import partial
from typing import Any, Final

from orki_agent.hotpath._machine import BRIDGE_CALL, BridgeCall
from orki_agent.hotpath._tool_codec import PayloadCodec, codec_of
from orki_agent.hotpath.frames import HEADER, HEADER_BYTES, NO_TRACE, REPLY_PREFIX, encode_error
from orki_contract import AsyncToolService, SyncToolService, Tool, errors
from orki_contract.masking import mask, masked_trace
from orki_contract.trace import Span

_log = logging.getLogger("orki_agent.hotpath")

_PASSED_ON: Final = (errors.ToolFailed, errors.InvalidArgument, errors.Overloaded, errors.TooLarge)
"""Errors of a handler that reach the caller unchanged; any other becomes `ToolFailed`."""

_INITIAL: Final = BRIDGE_CALL.initial
_pack: Final = HEADER.pack

_QUICK_RUNS: Final = 16
"""Number of quick runs in a row after which a tool that blocked runs on the reading thread again."""


class ToolHandler:
    """A tool and its handler.

    Attributes:
        detached: Whether the handler does not run on the reading thread: an async handler, or a sync one that blocked.
        quick_runs: Quick runs in a row since the handler blocked.
    """

    def __init__(self, tool: Tool[Any, Any], handler: Callable[[Any, Any], Any], is_async: bool) -> None:
        self.opcode: Final = tool.contract.opcode
        self.name: Final = tool.contract.full_name
        self.handler: Final = handler
        self.is_async: Final = is_async
        self.request: Final[PayloadCodec] = codec_of(tool.request)
        self.decode: Final = self.request.decode
        self.response: Final[PayloadCodec] = codec_of(tool.response)
        self.timeout: Final = tool.contract.timeout
        self.detached = is_async
        self.quick_runs = 0

    def ran_detached(self, duration: float, quick: float) -> None:
        """Record the duration of a run on a thread of its own; runs below `quick` seconds are quick."""
        self.quick_runs = self.quick_runs + 1 if duration < quick else 0
        if self.quick_runs >= _QUICK_RUNS:
            self.detached, self.quick_runs = False, 0


def handlers_of(services: Iterable[AsyncToolService | SyncToolService]) -> dict[int, ToolHandler]:
    """Return the tools of services by opcode.

    Raises:
        InvalidSetting: Two tools have one opcode, or a service has no tools.
    """
    handlers: dict[int, ToolHandler] = {}
    for service in services:
        known: object = service  # callers may not run a type checker
        if not isinstance(known, AsyncToolService | SyncToolService) or not service.TOOLS:
            raise errors.InvalidSetting(f"{type(service).__name__} is no tool service: derive it from a generated base")
        for tool in service.TOOLS:
            entry = ToolHandler(tool, getattr(service, tool.attribute), isinstance(service, AsyncToolService))
            if entry.opcode in handlers:
                other = handlers[entry.opcode].name
                raise errors.InvalidSetting(f"{entry.name} and {other} both have opcode {entry.opcode:#06x}")
            handlers[entry.opcode] = entry
    if not handlers:
        raise errors.InvalidSetting("a tool bridge needs at least one tool service")
    return handlers


Origin = tuple[str, Span | None]
"""A client's name, and the span in which it calls."""


class Call(BridgeCall):
    """A call: the `orki_contract.ToolCall` of its handler, and the state that the bridge keeps.

    Attributes:
        timeout_us: The caller's timeout in microseconds; 0 for the contract's.
        started: Start of the timeout on the monotonic clock; unset while `deadline` is 0.
        deadline: End of the timeout on the monotonic clock; 0 before `start_clock`.
        cancel: Cancels an async handler; unset for a sync one, which has to check `cancelled`.
    """

    __slots__ = ("_origin", "cancel", "cancelled", "deadline", "started", "timeout_us", "tool")

    started: float
    cancel: Callable[[], object]

    def __init__(self, origin: Origin, tool: ToolHandler, correlation: int, timeout_us: int) -> None:
        self.correlation = correlation
        self.state = _INITIAL
        self._origin = origin
        self.tool = tool
        self.timeout_us = timeout_us
        self.cancelled = False
        self.deadline = 0.0

    @property
    def client(self) -> str:
        return self._origin[0]

    @property
    def span(self) -> Span | None:
        return self._origin[1]

    def start_clock(self, now: float, max_timeout_us: int) -> None:
        self.started = now
        limit = min(self.timeout_us, max_timeout_us) / 1_000_000 if self.timeout_us else self.tool.timeout
        self.deadline = now + limit

    def tell_cancelled(self) -> None:
        self.cancelled = True
        if hasattr(self, "cancel"):
            self.cancel()


def reply_frame(call: Call, reply: Any, max_frame_bytes: int) -> bytes:
    """Return the frame for a handler's result; an ErrorFrame if the result cannot be sent."""
    tool = call.tool
    codec = tool.response
    if type(reply) is not codec.kind:
        reason = f"{tool.name} returned {type(reply).__name__} instead of {codec.kind.__name__}"
        return encode_error(call.correlation, errors.InvalidResponse(reason))
    try:
        body = codec.encode(reply)
    except Exception as error:
        reason = f"{tool.name} returned a reply that cannot be encoded: {error}"
        return encode_error(call.correlation, errors.InvalidResponse(reason))
    length = HEADER_BYTES + len(body)
    if length > max_frame_bytes:
        reason = f"the reply of {tool.name} makes a frame of {length} bytes, the maximum is {max_frame_bytes}"
        return encode_error(call.correlation, errors.FrameTooLarge(reason))
    # Inlined `encode_reply`: the function call would add measurably to each tool call.
    return (
        _pack(REPLY_PREFIX, tool.opcode, codec.block_length, length, codec.version, call.correlation, 0, NO_TRACE)
        + body
    )


def error_frame(call: Call, error: BaseException, request: object = None) -> bytes:
    """Return the ErrorFrame for a handler's exception, without the request's sensitive values.

    Tracebacks are logged here and not sent.
    """
    if isinstance(error, _PASSED_ON):
        text = mask(error.message, (request,))
        return encode_error(call.correlation, error if text == error.message else type(error)(text))
    if call.cancelled:
        return encode_error(call.correlation, errors.ToolCancelled(f"{call.tool.name} was cancelled"))
    if (trace := masked_trace(error, (request,))) is None:
        _log.error("the handler of %s failed", call.tool.name, exc_info=error)
    else:
        _log.error("the handler of %s failed\n%s", call.tool.name, trace.rstrip())
    text = mask(f"{type(error).__name__}: {error}", (request,))
    return encode_error(call.correlation, errors.ToolFailed(f"{call.tool.name}: {text}"))


Finish = Callable[[Call, bytes], object]
"""Takes a call and its answer. Runs on the event loop, so it must not block."""


class HandlerLoop:
    """Runs each async handler as a task of one event loop, in a thread of its own."""

    def __init__(self, max_frame_bytes: int) -> None:
        self._max_frame_bytes = max_frame_bytes
        self._runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        self._loop = self._runner.get_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._run, name="orki-tools-async", daemon=True)
        self._thread.start()

    def start(self, call: Call, request: Any, context: Context, finish: Finish) -> None:
        try:
            self._loop.call_soon_threadsafe(self._start, call, request, context, finish)
        except RuntimeError:
            finish(call, encode_error(call.correlation, errors.ToolCancelled("the bridge stops")))

    def close(self, timeout: float) -> bool:
        """Cancel the tasks and stop the loop; return whether its thread has ended."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        with self._runner:  # cancels the tasks at its end
            self._loop.run_forever()

    def _start(self, call: Call, request: Any, context: Context, finish: Finish) -> None:
        task = self._loop.create_task(self._serve(call, request, finish), context=context)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        call.cancel = partial(self._cancel, task)
        if call.cancelled:  # cancelled before the task existed
            task.cancel()

    def _cancel(self, task: asyncio.Task[None]) -> None:
        with contextlib.suppress(RuntimeError):  # a closed loop has ended its tasks
            self._loop.call_soon_threadsafe(task.cancel)

    async def _serve(self, call: Call, request: Any, finish: Finish) -> None:
        try:
            reply = await call.tool.handler(request, call)
        except BaseException as error:
            call.cancelled = call.cancelled or isinstance(error, asyncio.CancelledError)
            finish(call, error_frame(call, error, request))
            return
        finish(call, reply_frame(call, reply, self._max_frame_bytes))
