"""`SyncToolClient`: tool calls for blocking callers."""

from __future__ import annotations

import threading
from time import monotonic, perf_counter_ns
from types import TracebackType
from typing import Any, Self, TypeVar

from orki_agent.hotpath._handshake import hello_frame
from orki_agent.hotpath._options import CallHook, ToolClientOptions, ToolRecord
from orki_agent.hotpath._platform import SYSTEM, Platform, after_fork, check_path
from orki_agent.hotpath._sync_transport import SyncTransport
from orki_agent.hotpath._tool_codec import RemoteTool
from orki_agent.hotpath.frames import (
    HEADER_BYTES,
    NO_TRACE,
    pack_span,
)
from orki_contract import Payload, Tool
from orki_contract.errors import (
    LocalProtocolError,
    OrkiError,
    PeerLost,
    ToolFailed,
    TooManyCalls,
)
from orki_contract.trace import Span, current_span

TQ = TypeVar("TQ", bound=Payload)
TR = TypeVar("TR", bound=Payload)


class SyncToolClient:
    """A channel of tool calls (`orki_contract.SyncToolChannel`) that threads may share.

    It connects at the first call and reconnects after a loss. Each call in progress has its own connection, so threads
    only wait for each other beyond `max_connections`.
    """

    def __init__(
        self,
        path: str,
        token: bytes,
        *,
        name: str,
        options: ToolClientOptions | None = None,
        on_call: CallHook | None = None,
        platform: Platform = SYSTEM,
    ) -> None:
        """Describe the bridge; nothing is sent.

        Args:
            path: The bridge's `path`.
            token: The bridge's `token`.
            name: Name of the caller for the tools' handlers; 1 to 256 bytes.
            options: Limits.
            on_call: Called with a `ToolRecord` after each call.
            platform: System calls.

        Raises:
            InvalidSetting: Path, token or name have the wrong length.
        """
        self._path = check_path(path)
        self._hello = hello_frame(token, name)
        self._options = options or ToolClientOptions()
        self._on_call = on_call
        self._platform = platform
        self._tools: dict[Tool[Any, Any], RemoteTool] = {}
        self._trace: tuple[Span | None, bytes] = (None, NO_TRACE)
        self._closed = False
        self._reset()
        after_fork(self)

    def call(self, tool: Tool[TQ, TR], request: TQ, *, timeout: float | None = None) -> TR:
        """Call a tool and return its response.

        Args:
            tool: The tool.
            request: Its request.
            timeout: Timeout in seconds; None for the contract's.

        Raises:
            ToolDeadline, ToolFailed, ToolCancelled, PeerLost, UnknownOpcode, TooManyCalls, FrameTooLarge.
            ContractMismatch: The bridge's contract of the tool's service is incompatible; nothing was sent.
            UnknownMethod: The bridge does not serve the tool's service; nothing was sent.
            InvalidArgument: The request has another class, or the timeout is out of range.
            LocalProtocolError: The client is closed.
        """
        remote = self._tools.get(tool) or self._add_tool(tool)
        timeout_us = remote.timeout_us if timeout is None else remote.timeout_in_us(timeout)
        span = current_span()
        if self._on_call is None:
            return self._call(remote, request, timeout_us, span, None)  # type: ignore[no-any-return]
        return self._recorded(self._on_call, remote, request, timeout_us, span)  # type: ignore[no-any-return]

    def close(self) -> None:
        """Close the connections; a call in progress ends with its reply or with `PeerLost`. Idempotent."""
        with self._changed:
            self._closed = self._notify = True
            self._changed.notify_all()
        self._drop_idle()

    def after_fork(self) -> None:
        """Close the parent's connections in a forked child, which opens its own."""
        for transport in tuple(self._transports):
            transport.close()
        self._reset()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _reset(self) -> None:
        self._idle: list[SyncTransport] = []
        self._transports: set[SyncTransport] = set()
        self._changed = threading.Condition()
        self._opening = 0
        self._waiting = 0
        self._notify = self._closed

    def _add_tool(self, tool: Tool[Any, Any]) -> RemoteTool:
        remote = self._tools[tool] = RemoteTool(tool)
        return remote

    def _recorded(self, on_call: CallHook, tool: RemoteTool, request: Any, timeout_us: int, span: Span | None) -> Any:
        sizes = [HEADER_BYTES, 0]
        reason = code = 0
        start = perf_counter_ns()
        try:
            return self._call(tool, request, timeout_us, span, sizes)
        except OrkiError as error:
            reason = error.reason
            code = error.code if isinstance(error, ToolFailed) else 0
            raise
        finally:
            duration = perf_counter_ns() - start
            on_call(ToolRecord(tool.method, duration, sizes[0] - HEADER_BYTES, sizes[1], reason, code, span))

    def _call(self, tool: RemoteTool, request: Any, timeout_us: int, span: Span | None, sizes: list[int] | None) -> Any:
        """Make a call on a connection of its own; set `sizes` to the lengths of frame and reply."""
        try:
            transport: SyncTransport | None = self._idle.pop()
        except IndexError:
            transport = None
        fresh = transport is None
        if transport is None:
            transport = self._open(timeout_us)
        trace = self._trace
        if trace[0] is not span:
            trace = self._trace = (span, pack_span(span))
        try:
            if tool.service not in transport.checked:
                transport.check_contract(tool.service)
            response = transport.call(tool, request, timeout_us, trace[1])
        except BaseException as error:
            if sizes is not None:
                sizes[0] = transport.sent_bytes
            self._failed(transport, error)
            if fresh or not isinstance(error, PeerLost) or error.fully_written:
                raise
        else:
            if sizes is not None:
                sizes[:] = transport.sent_bytes, transport.reply_bytes
            self._idle.append(transport)
            if self._notify:
                self._notify_waiting()
            return response
        # The connection was lost while idle and the bridge has not seen the call: try again on a new one.
        self._drop_idle()
        return self._call(tool, request, timeout_us, span, sizes)

    def _failed(self, transport: SyncTransport, error: BaseException) -> None:
        """Keep a connection after an error that leaves it usable; close it otherwise."""
        if isinstance(error, OrkiError) and transport.usable:
            self._idle.append(transport)
        else:
            self._drop(transport)
        if self._notify:
            self._notify_waiting()

    def _open(self, timeout_us: int) -> SyncTransport:
        """Return a new connection or, at `max_connections`, the next one that becomes idle.

        Raises:
            TooManyCalls: None was returned in time, or too many calls wait already.
        """
        deadline = monotonic() + timeout_us / 1_000_000
        with self._changed:
            while self._opening + len(self._transports) >= self._options.max_connections and not self._closed:
                transport = self._wait(deadline)
                if transport is not None:
                    return transport
            if self._closed:
                raise LocalProtocolError("the tool client is closed")
            self._opening += 1
        transport = None
        try:
            transport = SyncTransport(self._path, self._hello, self._options, self._platform)
        finally:
            with self._changed:
                self._opening -= 1
                if transport is not None:
                    self._transports.add(transport)
        return transport

    def _wait(self, deadline: float) -> SyncTransport | None:
        """Wait for a change; return a connection if one is idle. Call with the lock held."""
        maximum = self._options.max_connections
        if self._waiting >= self._options.max_waiting:
            raise TooManyCalls(f"{maximum} calls are in progress and {self._waiting} wait, which is the maximum")
        self._waiting += 1
        self._notify = True  # from now on, returning a connection notifies
        try:
            try:
                return self._idle.pop()
            except IndexError:
                left = deadline - monotonic()
            if left <= 0:
                raise TooManyCalls(f"{maximum} other calls were in progress until the deadline; nothing was sent")
            self._changed.wait(left)
            return None
        finally:
            self._waiting -= 1
            self._notify = self._waiting > 0 or self._closed

    def _notify_waiting(self) -> None:
        """Notify a waiting call that a connection was returned; close it if the client is closed."""
        with self._changed:
            self._changed.notify()
        if self._closed:
            self._drop_idle()

    def _drop(self, transport: SyncTransport) -> None:
        transport.close()
        with self._changed:
            self._transports.discard(transport)

    def _drop_idle(self) -> None:
        while True:
            try:
                transport = self._idle.pop()
            except IndexError:
                return
            self._drop(transport)
