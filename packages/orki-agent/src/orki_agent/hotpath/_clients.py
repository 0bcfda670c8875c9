"""`AsyncToolClient` and `SyncToolClient`: tool calls for coroutines and for blocking callers."""

from __future__ import annotations

import asyncio
import threading
from abc import ABC, abstractmethod
from collections import deque
from time import monotonic, perf_counter_ns
from typing import Any, Self, TypeVar

from orki_agent.hotpath._async_transport import AsyncTransport, open_transport
from orki_agent.hotpath._handshake import hello_frame
from orki_agent.hotpath._options import CallHook, ToolClientOptions, ToolRecord
from orki_agent.hotpath._platform import SYSTEM, Platform, after_fork, check_path
from orki_agent.hotpath._sync_transport import SyncTransport
from orki_agent.hotpath._tool_codec import RemoteTool
from orki_agent.hotpath.frames import HEADER_BYTES, NO_TRACE, pack_span
from orki_contract import Payload, Tool
from orki_contract.errors import LocalProtocolError, OrkiError, PeerLost, ToolCancelled, ToolFailed, TooManyCalls
from orki_contract.trace import Span, current_span

TQ = TypeVar("TQ", bound=Payload)
TR = TypeVar("TR", bound=Payload)


class _ToolClient(ABC):
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
        """Store the bridge's address; nothing is sent before the first call.

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
        self._reset()
        after_fork(self)

    @abstractmethod
    def after_fork(self) -> None: ...

    @abstractmethod
    def _reset(self) -> None:
        """Set the state of a client without connections."""

    def _add_tool(self, tool: Tool[Any, Any]) -> RemoteTool:
        remote = self._tools[tool] = RemoteTool(tool)
        return remote


class AsyncToolClient(_ToolClient):
    """A channel of tool calls (`orki_contract.ToolChannel`) on one connection, for the tasks of one event loop.

    It connects at the first call and reconnects after a loss. Cancelling a task cancels its call at the bridge.
    """

    _refusal = ""

    async def call(self, tool: Tool[TQ, TR], request: TQ, *, timeout: float | None = None) -> TR:
        """Call a tool and return its response. Arguments and errors are those of `SyncToolClient.call`.

        Raises:
            LocalProtocolError: Also if the client belongs to another event loop or was made before a fork.
        """
        remote = self._tools.get(tool) or self._add_tool(tool)
        span = current_span()
        if self._on_call is None:
            response, _ = await self._call(remote, request, timeout, span, None)
            return response  # type: ignore[no-any-return]
        sizes = [0]
        reply_bytes = reason = code = 0
        start = perf_counter_ns()
        try:
            response, reply_bytes = await self._call(remote, request, timeout, span, sizes)
            return response  # type: ignore[no-any-return]
        except OrkiError as error:
            reason = error.reason
            code = error.code if isinstance(error, ToolFailed) else 0
            raise
        except asyncio.CancelledError:
            reason = ToolCancelled.reason
            raise
        finally:
            duration = perf_counter_ns() - start
            self._on_call(ToolRecord(remote.method, duration, sizes[0], reply_bytes, reason, code, span))

    async def connect(self) -> Self:
        """Connect now instead of at the first call.

        Raises:
            PeerLost: No bridge serves the path.
            PeerRefused: The bridge refuses the token or the user, or its own user is not trusted.
        """
        if self._transport is None or not self._transport.alive:
            await self._connect()
        return self

    async def close(self) -> None:
        """Close the connection; calls in progress end with `PeerLost`. Idempotent."""
        self._refusal = self._refusal or "the tool client is closed"
        if self._opening is not None:
            self._opening.cancel()
            await asyncio.gather(self._opening, return_exceptions=True)
        if self._transport is not None:
            self._transport.close()
        self._changed()

    def after_fork(self) -> None:
        """Close the descriptor in a forked child, which cannot use the parent's event loop."""
        self._refusal = "the tool client was made before a fork: make another one in the child"
        if self._transport is not None:
            self._transport.close_descriptor()

    async def __aenter__(self) -> Self:
        return await self.connect()

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    def _reset(self) -> None:
        self._transport: AsyncTransport | None = None
        self._opening: asyncio.Task[AsyncTransport] | None = None
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def _call(
        self, tool: RemoteTool, request: Any, timeout: float | None, span: Span | None, sizes: list[int] | None
    ) -> tuple[Any, int]:
        timeout_us = tool.timeout_us if timeout is None else tool.timeout_in_us(timeout)
        transport = self._transport
        if (
            transport is None
            or not transport.ready
            or self._waiters
            or tool.service not in transport.checked
            or asyncio.get_running_loop() is not self._loop
        ):
            transport = await self._ready(tool.service, timeout_us)
        trace = self._trace
        if trace[0] is not span:
            trace = self._trace = (span, pack_span(span))
        number = transport.next_number
        frame = tool.frame(request, number, timeout_us, trace[1])
        if len(frame) > transport.max_frame_bytes:
            raise tool.too_long(len(frame), transport.max_frame_bytes)
        if sizes is not None:
            sizes[0] = len(frame) - HEADER_BYTES
        try:
            future = transport.call(tool, frame, timeout_us)
        except PeerLost:
            # The connection was lost while idle and the bridge has not seen the call: try again.
            transport = await self._ready(tool.service, timeout_us)
            number = transport.next_number
            future = transport.call(tool, tool.frame(request, number, timeout_us, trace[1]), timeout_us)
        try:
            return await future
        except asyncio.CancelledError:
            transport.cancel(number)
            raise

    async def _ready(self, service: str, timeout_us: int) -> AsyncTransport:
        """Return an open connection with room for a call of the service, after the contract check."""
        while True:
            transport = self._transport
            if transport is None or not transport.alive or asyncio.get_running_loop() is not self._loop:
                transport = await self._connect()
            if transport.full or self._waiters:
                transport = await self._room(transport, timeout_us)
            if service in transport.checked:
                return transport
            await transport.check_contract(service)

    async def _connect(self) -> AsyncTransport:
        """Return an open connection. Concurrent callers wait for the same attempt."""
        if self._refusal:
            raise LocalProtocolError(self._refusal)
        loop = asyncio.get_running_loop()
        self._loop = self._loop or loop
        if self._loop is not loop:
            raise LocalProtocolError("a tool client serves one event loop: make one client for each")
        if self._opening is None:
            self._opening = loop.create_task(self._open())
            self._opening.add_done_callback(_retrieve)
        opening = self._opening
        # Cancelling one caller must not cancel the attempt, and `close` must not cancel the callers.
        await asyncio.wait((opening,))
        if opening.cancelled():
            raise PeerLost("the tool client was closed before it was connected", fully_written=False)
        return opening.result()

    async def _open(self) -> AsyncTransport:
        try:
            self._transport = await open_transport(
                self._path, self._hello, self._options, self._platform, self._changed
            )
            return self._transport
        finally:
            self._opening = None

    async def _room(self, transport: AsyncTransport, timeout_us: int) -> AsyncTransport:
        """Wait until a call may be sent.

        Raises:
            TooManyCalls: No call ended in time, or too many calls wait already.
        """
        if len(self._waiters) >= self._options.max_waiting:
            raise TooManyCalls(f"{len(self._waiters)} tool calls wait for another to end, which is the maximum")
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_us / 1_000_000
        first = True
        while first or transport.full:
            waiter: asyncio.Future[None] = loop.create_future()
            # A call that was woken and found no room stays first.
            (self._waiters.append if first else self._waiters.appendleft)(waiter)
            first = False
            timer = loop.call_at(deadline, _give_up, waiter)
            if not transport.full:
                self._changed()
            try:
                await waiter
            except BaseException:
                if waiter in self._waiters:
                    self._waiters.remove(waiter)
                elif not transport.full:
                    self._changed()
                raise
            finally:
                timer.cancel()
            if not transport.alive:
                transport = await self._connect()
        return transport

    def _changed(self) -> None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return


def _retrieve(opening: asyncio.Task[AsyncTransport]) -> None:
    """Mark the exception as retrieved, because all callers may have been cancelled."""
    if not opening.cancelled():
        opening.exception()


def _give_up(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_exception(TooManyCalls("no call in flight ended in time; nothing was sent"))


class SyncToolClient(_ToolClient):
    """A channel of tool calls (`orki_contract.SyncToolChannel`) that threads may share.

    It connects at the first call and reconnects after a loss. Each call in progress has its own connection, so threads
    only wait for each other beyond `max_connections`.
    """

    _closed = False

    def call(self, tool: Tool[TQ, TR], request: TQ, *, timeout: float | None = None) -> TR:
        """Call a tool and return its response.

        Args:
            tool: The tool.
            request: Its request.
            timeout: Timeout in seconds; None for the contract's.

        Raises:
            ToolDeadline, ToolFailed, ToolCancelled, PeerLost, UnknownOpcode, TooManyCalls, FrameTooLarge: It failed.
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

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _reset(self) -> None:
        self._idle: list[SyncTransport] = []
        self._transports: set[SyncTransport] = set()
        self._changed = threading.Condition()
        self._opening = 0
        self._waiting = 0
        self._notify = self._closed

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
        """Make a call on a connection of its own; set `sizes` to the lengths of the frame and the reply."""
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
            TooManyCalls: No connection was returned in time, or too many calls wait already.
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
