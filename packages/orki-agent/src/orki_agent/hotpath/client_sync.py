"""`SyncToolClient`: tool calls for blocking callers."""

from __future__ import annotations

import threading
from time import monotonic, perf_counter_ns
from types import TracebackType
from typing import Any, Self, TypeVar

from orki_agent.hotpath.frames import HEADER_BYTES, NO_TRACE
from orki_agent.hotpath.greeting import hello_frame
from orki_agent.hotpath.options import ToolClientOptions
from orki_agent.hotpath.plans import Plan
from orki_agent.hotpath.records import CallHook, ToolRecord
from orki_agent.hotpath.seam import SYSTEM, Seam, after_fork, check_path
from orki_agent.hotpath.traces import pack_span
from orki_agent.hotpath.wire_sync import BlockingWire
from orki_contract import Payload, Tool
from orki_contract.errors import LocalProtocolError, OrkiError, PeerLost, ToolFailed, TooManyCalls
from orki_contract.trace import Span, current_span

__all__ = ["SyncToolClient"]

TQ = TypeVar("TQ", bound=Payload)
TR = TypeVar("TR", bound=Payload)


class SyncToolClient:
    """A channel of tool calls (`orki_contract.SyncToolChannel`); threads may share it.

    It connects when it is first called and again after a loss. Each call in progress has a connection of its own, so
    threads do not wait for each other until there are `max_connections` of them.
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
        """Describes the bridge; nothing is sent yet.

        Args:
            path: The bridge's `path`.
            token: The bridge's `token`.
            name: What the tools' handlers are told of the caller; 1 to 256 bytes.
            options: Limits.
            on_call: Called with a `ToolRecord` after each call.
            seam: Operating system.

        Raises:
            InvalidSetting: Path, token or name cannot be right.
        """
        self._path = check_path(path)
        self._hello = hello_frame(token, name)
        self._options = options or ToolClientOptions()
        self._on_call = on_call
        self._seam = seam
        self._plans: dict[Tool[Any, Any], Plan] = {}
        self._trace: tuple[Span | None, bytes] = (None, NO_TRACE)
        self._closed = False
        self._reset()
        after_fork(self)

    def call(self, tool: Tool[TQ, TR], request: TQ, *, timeout: float | None = None) -> TR:
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
            LocalProtocolError: The client is closed.
        """
        plan = self._plans.get(tool) or self._plan(tool)
        micros = plan.timeout_us if timeout is None else plan.micros(timeout)
        span = current_span()
        if self._on_call is None:
            return self._call(plan, request, micros, span, None)  # type: ignore[no-any-return]
        return self._recorded(plan, request, micros, span)  # type: ignore[no-any-return]

    def close(self) -> None:
        """Closes the connections; calls in progress end with `PeerLost` or their reply. Idempotent."""
        with self._changed:
            self._closed = self._attention = True
            self._changed.notify_all()
        self._drop_idle()

    def after_fork(self) -> None:
        """A forked child leaves its parent's connections alone and opens its own."""
        for wire in tuple(self._wires):
            wire.close()
        self._reset()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _reset(self) -> None:
        self._idle: list[BlockingWire] = []
        self._wires: set[BlockingWire] = set()
        self._changed = threading.Condition()
        self._opening = 0
        self._waiting = 0
        self._attention = self._closed

    def _plan(self, tool: Tool[Any, Any]) -> Plan:
        plan = self._plans[tool] = Plan(tool)
        return plan

    def _recorded(self, plan: Plan, request: Any, micros: int, span: Span | None) -> Any:
        sizes = [HEADER_BYTES, 0]
        reason = code = 0
        start = perf_counter_ns()
        try:
            return self._call(plan, request, micros, span, sizes)
        except OrkiError as error:
            reason = error.reason
            code = error.code if isinstance(error, ToolFailed) else 0
            raise
        finally:
            duration = perf_counter_ns() - start
            assert self._on_call is not None
            self._on_call(ToolRecord(plan.method, duration, sizes[0] - HEADER_BYTES, sizes[1], reason, code, span))

    def _call(self, plan: Plan, request: Any, micros: int, span: Span | None, sizes: list[int] | None) -> Any:
        """One call on a connection of its own; `sizes` takes the lengths of frame and reply."""
        try:
            wire: BlockingWire | None = self._idle.pop()
        except IndexError:
            wire = None
        fresh = wire is None
        if wire is None:
            wire = self._open(micros)
        trace = self._trace
        if trace[0] is not span:
            trace = self._trace = (span, pack_span(span))
        try:
            if plan.service not in wire.agreed:
                wire.agree(plan.service)
            response = wire.call(plan, request, micros, trace[1])
        except BaseException as error:
            if sizes is not None:
                sizes[0] = wire.sent_bytes
            self._failed(wire, error)
            if fresh or not isinstance(error, PeerLost) or error.fully_written:
                raise
        else:
            if sizes is not None:
                sizes[:] = wire.sent_bytes, wire.reply_bytes
            self._idle.append(wire)
            if self._attention:
                self._attend()
            return response
        # The connection was lost while it rested, and the bridge saw nothing of this call: as good as never tried.
        self._drop_idle()
        return self._call(plan, request, micros, span, sizes)

    def _failed(self, wire: BlockingWire, error: BaseException) -> None:
        """Keeps a connection that only carried an error; after anything else nobody knows what comes next on it."""
        if isinstance(error, OrkiError) and wire.usable:
            self._idle.append(wire)
        else:
            self._drop(wire)
        if self._attention:
            self._attend()

    def _open(self, micros: int) -> BlockingWire:
        """A new connection, or the next that is given back once there are enough.

        Raises:
            TooManyCalls: None was given back in time, or too many wait already.
        """
        deadline = monotonic() + micros / 1_000_000
        with self._changed:
            while self._opening + len(self._wires) >= self._options.max_connections and not self._closed:
                wire = self._wait(deadline)
                if wire is not None:
                    return wire
            if self._closed:
                raise LocalProtocolError("the tool client is closed")
            self._opening += 1
        wire = None
        try:
            wire = BlockingWire(self._path, self._hello, self._options, self._seam)
        finally:
            with self._changed:
                self._opening -= 1
                if wire is not None:
                    self._wires.add(wire)
        return wire

    def _wait(self, deadline: float) -> BlockingWire | None:
        """Waits for a change; gives a connection if one rests. Called with the lock held."""
        most = self._options.max_connections
        if self._waiting >= self._options.max_waiting:
            raise TooManyCalls(f"{most} calls are in progress and {self._waiting} wait, the most that may")
        self._waiting += 1
        self._attention = True  # from now on whoever gives a connection back says so
        try:
            try:
                return self._idle.pop()
            except IndexError:
                left = deadline - monotonic()
            if left <= 0:
                raise TooManyCalls(f"{most} calls were in progress for the whole time of this one; nothing was sent")
            self._changed.wait(left)
            return None
        finally:
            self._waiting -= 1
            self._attention = self._waiting > 0 or self._closed

    def _attend(self) -> None:
        """Tells those who wait that a connection was given back; closes it when the client is closed."""
        with self._changed:
            self._changed.notify()
        if self._closed:
            self._drop_idle()

    def _drop(self, wire: BlockingWire) -> None:
        wire.close()
        with self._changed:
            self._wires.discard(wire)

    def _drop_idle(self) -> None:
        while True:
            try:
                wire = self._idle.pop()
            except IndexError:
                return
            self._drop(wire)
