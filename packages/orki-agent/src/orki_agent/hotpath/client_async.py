"""`AsyncToolClient`: tool calls for coroutines."""

from __future__ import annotations

import asyncio
from collections import deque
from time import perf_counter_ns
from types import TracebackType
from typing import Any, Self, TypeVar

from orki_agent.hotpath.frames import HEADER_BYTES, NO_TRACE
from orki_agent.hotpath.greeting import hello_frame
from orki_agent.hotpath.options import ToolClientOptions
from orki_agent.hotpath.plans import Plan
from orki_agent.hotpath.records import CallHook, ToolRecord
from orki_agent.hotpath.seam import SYSTEM, Seam, after_fork, check_path
from orki_agent.hotpath.traces import pack_span
from orki_agent.hotpath.wire_async import LoopWire, open_wire
from orki_contract import Payload, Tool
from orki_contract.errors import LocalProtocolError, OrkiError, PeerLost, ToolCancelled, ToolFailed, TooManyCalls
from orki_contract.trace import Span, current_span

__all__ = ["AsyncToolClient"]

TQ = TypeVar("TQ", bound=Payload)
TR = TypeVar("TR", bound=Payload)


class AsyncToolClient:
    """A channel of tool calls (`orki_contract.ToolChannel`) on one connection, for the tasks of one event loop.

    It connects when it is first called and again after a loss. A cancelled task cancels its call at the bridge.
    """

    def __init__(
        self,
        path: str,
        token: bytes,
        *,
        name: str,
        options: ToolClientOptions | None = None,
        on_call: CallHook | None = None,
        seam: Seam = SYSTEM,
    ) -> None:
        """Describes the bridge; nothing is sent yet. Arguments and errors as those of `SyncToolClient`."""
        self._path = check_path(path)
        self._hello = hello_frame(token, name)
        self._options = options or ToolClientOptions()
        self._on_call = on_call
        self._seam = seam
        self._plans: dict[Tool[Any, Any], Plan] = {}
        self._trace: tuple[Span | None, bytes] = (None, NO_TRACE)
        self._wire: LoopWire | None = None
        self._opening: asyncio.Task[LoopWire] | None = None
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._refusal = ""
        after_fork(self)

    async def call(self, tool: Tool[TQ, TR], request: TQ, *, timeout: float | None = None) -> TR:
        """One call.

        Args:
            tool: Which.
            request: Its request.
            timeout: Longest time in seconds; None for the contract's.

        Raises:
            ToolDeadline, ToolFailed, ToolCancelled, PeerLost, UnknownOpcode, TooManyCalls, FrameTooLarge.
            ContractMismatch: The bridge serves the tool's service under a contract that does not fit; nothing was sent.
            UnknownMethod: The bridge does not serve the tool's service; nothing was sent.
            InvalidArgument: The request is of another class, or the timeout out of range.
            LocalProtocolError: The client is closed, of another event loop, or of a process that forked this one.
        """
        plan = self._plans.get(tool) or self._plan(tool)
        span = current_span()
        if self._on_call is None:
            response, _ = await self._call(plan, request, timeout, span, None)
            return response  # type: ignore[no-any-return]
        sizes = [0]
        reply_bytes = reason = code = 0
        start = perf_counter_ns()
        try:
            response, reply_bytes = await self._call(plan, request, timeout, span, sizes)
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
            self._on_call(ToolRecord(plan.method, duration, sizes[0], reply_bytes, reason, code, span))

    async def connect(self) -> Self:
        """Connects now instead of at the first call.

        Raises:
            PeerLost: Nobody serves the path.
            PeerRefused: The bridge refuses the token or the user, or belongs to somebody else.
        """
        if self._wire is None or not self._wire.alive:
            await self._connect()
        return self

    async def close(self) -> None:
        """Closes the connection; calls in progress end with `PeerLost`. Idempotent."""
        self._refusal = self._refusal or "the tool client is closed"
        if self._opening is not None:
            self._opening.cancel()
            await asyncio.gather(self._opening, return_exceptions=True)
        if self._wire is not None:
            self._wire.close()
        self._changed()

    def after_fork(self) -> None:
        """A forked child has no event loop to go on with."""
        self._refusal = "the process was forked since: make a tool client of its own in the child"
        if self._wire is not None:
            self._wire.let_go()

    async def __aenter__(self) -> Self:
        return await self.connect()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _plan(self, tool: Tool[Any, Any]) -> Plan:
        plan = self._plans[tool] = Plan(tool)
        return plan

    async def _call(
        self, plan: Plan, request: Any, timeout: float | None, span: Span | None, sizes: list[int] | None
    ) -> tuple[Any, int]:
        micros = plan.timeout_us if timeout is None else plan.micros(timeout)
        wire = self._wire
        if (
            wire is None
            or not wire.alive
            or wire.full
            or self._waiters
            or plan.service not in wire.agreed
            or asyncio.get_running_loop() is not self._loop
        ):
            wire = await self._ready(plan.service, micros)
        trace = self._trace
        if trace[0] is not span:
            trace = self._trace = (span, pack_span(span))
        number = wire.next_number
        frame = plan.frame(request, number, micros, trace[1])
        if len(frame) > wire.max_frame_bytes:
            raise plan.too_long(len(frame), wire.max_frame_bytes)
        if sizes is not None:
            sizes[0] = len(frame) - HEADER_BYTES
        try:
            future = wire.call(plan, frame, micros)
        except PeerLost:
            # The bridge went away while the connection rested, and saw nothing of this call: try once more.
            wire = await self._ready(plan.service, micros)
            number = wire.next_number
            future = wire.call(plan, plan.frame(request, number, micros, trace[1]), micros)
        try:
            return await future
        except asyncio.CancelledError:
            wire.cancel(number)
            raise

    async def _ready(self, service: str, micros: int) -> LoopWire:
        """A connection that takes a call of the service now: alive, with room, and of a contract that fits."""
        while True:
            wire = self._wire
            if wire is None or not wire.alive or asyncio.get_running_loop() is not self._loop:
                wire = await self._connect()
            if wire.full or self._waiters:
                wire = await self._room(wire, micros)
            if service in wire.agreed:
                return wire
            await wire.agree(service)

    async def _connect(self) -> LoopWire:
        """A live connection; who comes while one is being opened waits for the same."""
        if self._refusal:
            raise LocalProtocolError(self._refusal)
        loop = asyncio.get_running_loop()
        self._loop = self._loop or loop
        if self._loop is not loop:
            raise LocalProtocolError("a tool client serves one event loop: make one for each")
        if self._opening is None:
            self._opening = loop.create_task(self._open())
            self._opening.add_done_callback(_heard)
        opening = self._opening
        # One caller's cancellation is not everybody's; nor is the opening's, by `close`, one of its callers'.
        await asyncio.wait((opening,))
        if opening.cancelled():
            raise PeerLost("the tool client was closed before it was connected", fully_written=False)
        return opening.result()

    async def _open(self) -> LoopWire:
        try:
            self._wire = await open_wire(self._path, self._hello, self._options, self._seam, self._changed)
            return self._wire
        finally:
            self._opening = None

    async def _room(self, wire: LoopWire, micros: int) -> LoopWire:
        """Waits until a call may be sent.

        Raises:
            TooManyCalls: None ended in time, or too many wait already.
        """
        if len(self._waiters) >= self._options.max_waiting:
            raise TooManyCalls(f"{len(self._waiters)} tool calls wait for a free place, the most that may")
        loop = asyncio.get_running_loop()
        deadline = loop.time() + micros / 1_000_000
        first = True
        while first or wire.full:
            waiter: asyncio.Future[None] = loop.create_future()
            # Who was woken and found the place taken keeps its turn.
            (self._waiters.append if first else self._waiters.appendleft)(waiter)
            first = False
            timer = loop.call_at(deadline, _give_up, waiter)
            if not wire.full:
                self._changed()
            try:
                await waiter
            except BaseException:
                if waiter in self._waiters:
                    self._waiters.remove(waiter)
                elif not wire.full:
                    self._changed()
                raise
            finally:
                timer.cancel()
            if not wire.alive:
                wire = await self._connect()
        return wire

    def _changed(self) -> None:
        """Wakes the first of those who wait for room."""
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return


def _heard(opening: asyncio.Task[LoopWire]) -> None:
    """Whoever waits hears how it ended; when nobody does any more, nobody needs to."""
    if not opening.cancelled():
        opening.exception()


def _give_up(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_exception(TooManyCalls("no place among the calls in flight became free in time; nothing was sent"))
