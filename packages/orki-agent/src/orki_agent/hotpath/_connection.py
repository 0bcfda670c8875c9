"""The bridge's end of one connection.

One thread at a time reads a connection. It reads a frame, runs a quick sync handler itself (one system call in, one
out) and reads the next one. If the handler blocks, the monitor detaches the call: another thread continues to read, and
the first one sends the answer and ends. A lock serialises the machine, so exactly one thread answers each call.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Callable
from contextvars import Context, copy_context
from math import inf
from time import monotonic
from typing import Any, Final

from orki.hotpath.v1.tool_orki import CancelFrame, HelloFrame
from orki_agent.hotpath import _machine as machines
from orki_agent.hotpath import frames
from orki_agent.hotpath._frame_writer import FrameWriter
from orki_agent.hotpath._handlers import Call, HandlerLoop, Origin, ToolHandler, error_frame, reply_frame
from orki_agent.hotpath._handshake import HELLO_BYTES, accept_hello
from orki_agent.hotpath._options import BridgeOptions
from orki_agent.hotpath._thread_pool import ThreadPool
from orki_contract import errors
from orki_contract.trace import Span, use_span

BLOCKING_AFTER: Final = 0.002
"""Seconds after which a handler on the reading thread counts as blocking."""
_CLOSE_AGAIN: Final = 0.02
"""Seconds between attempts to shut down a connection on which another thread is writing."""
_MAX_LISTED: Final = 32

_OPEN: Final = machines.BridgeConnectionState.OPEN
_INLINE: Final = machines.BridgeCallState.INLINE
_RETURNED: Final = machines.BRIDGE_CALL.next(_INLINE, machines.HandlerReturned, errors.LocalProtocolError)
"""The step of a call that the monitor does not detach, looked up once: it is part of every quick call."""

_log = logging.getLogger("orki_agent.hotpath")


def _context_in(span: Span | None) -> Context:
    """Return a context that holds the span and nothing else; each call runs in a copy of it."""

    def capture() -> Context:
        with use_span(span):
            return copy_context()

    return Context().run(capture)


class BridgeState:
    """The state that the connections of a bridge share.

    Attributes:
        pool: Threads that read connections, run blocking handlers and finish writes.
        handler_loop: Runs async handlers; None if there are none.
        blocked: Number of blocking handlers that run in threads of their own.
        changed: Notified when a connection closes and, while draining, when a call ends.
        monitor_asleep: Whether the monitor has to be woken to notice a new call in time.
        wakeup: Becomes readable when the monitor has to wake.
    """

    def __init__(self, options: BridgeOptions, token: bytes, tools: dict[int, ToolHandler]) -> None:
        self.options = options
        self.token = token
        self.tools = tools
        self.pool = ThreadPool("orki-tools")
        self.handler_loop: HandlerLoop | None = None
        self.max_timeout_us = int(options.call_timeout * 1_000_000)
        self.draining = False
        self.blocked = 0
        self.changed = threading.Condition()
        self.monitor_asleep = False
        self.wakeup, self._wake = socket.socketpair()
        self.wakeup.setblocking(False)
        self._wake.setblocking(False)
        self._lock = threading.Lock()

    def wake_monitor(self) -> None:
        self.monitor_asleep = False
        # A full pipe wakes the monitor as well; after `close` there is no monitor.
        with contextlib.suppress(OSError):
            self._wake.send(b"\0")

    def notify(self) -> None:
        """Wake a thread that waits for calls or connections to end."""
        with self.changed:
            self.changed.notify_all()

    def acquire_thread(self) -> bool:
        """Reserve a thread for a blocking handler; return False if `max_blocked` are in use."""
        with self._lock:
            if self.blocked >= self.options.max_blocked:
                return False
            self.blocked += 1
            return True

    def release_thread(self) -> None:
        with self._lock:
            self.blocked -= 1

    def close(self) -> None:
        self.wakeup.close()
        self._wake.close()


class Connection:
    """A connection from its acceptance to its end."""

    def __init__(
        self, sock: socket.socket, uid: int, bridge: BridgeState, closed: Callable[[Connection], None]
    ) -> None:
        """Take over an accepted, blocking socket; `run` reads it, and `closed` is called at the end."""
        self.uid = uid
        self.machine: machines.BridgeMachine[Call] = machines.BridgeMachine(bridge.options.max_calls)
        self._lock = threading.Lock()
        self._bridge = bridge
        self._tools = bridge.tools
        self._max_calls = bridge.options.max_calls
        self._max_frame_bytes = bridge.options.max_frame_bytes
        self._closed = closed
        self._sock = sock
        self._receive = sock.recv_into
        self._decoder = frames.FrameDecoder(min(self._max_frame_bytes, HELLO_BYTES))
        self._writer = FrameWriter(sock, bridge.pool, bridge.options.frame_timeout)
        self._put_now = self._writer.put_now
        self._client = ""
        self._opened = monotonic()
        self._frame_begun = 0.0
        self._seen_inline: Call | None = None
        self._trace = b""
        self._origin: Origin = ("", None)
        self._context = _context_in(None)

    def run(self) -> None:
        try:
            handed_over = self._read()
        except errors.OrkiError as error:
            self._writer.put(frames.encode_error(0, error), may_block=True)
        except OSError:
            pass  # The peer has closed the connection.
        except Exception:
            _log.exception("a defect ended a connection of a tool bridge")
        else:
            if handed_over:
                return
        self._close()

    def _read(self) -> bool:
        """Read frames; return True if another thread reads now, False at the end of the stream."""
        decoder, receive, writer = self._decoder, self._receive, self._writer
        waiting = writer.waiting
        while True:
            fields = decoder.next_frame() if decoder.filled else None
            while fields is None:
                if waiting:
                    writer.flush(may_block=True)
                if decoder.filled and not self._frame_begun:
                    self._frame_begun = monotonic()
                    self._bridge.wake_monitor()
                count = receive(decoder.writable())
                if not count:
                    return False
                fields = decoder.next_frame(count)
            if self._frame_begun:
                self._frame_begun = 0.0
            if not self._take(fields):
                return True

    def _take(self, fields: frames.Fields) -> bool:
        """Handle a frame; return False if another thread reads now."""
        flags, opcode, block_length, version, correlation, timeout_us, trace, body = fields
        machine = self.machine
        calls = machine.calls
        tool = self._tools.get(opcode)
        if (
            tool is None
            or machine.state is not _OPEN
            or flags
            or not correlation
            or (calls and (correlation in calls or len(calls) >= self._max_calls))
        ):
            handled = self._take_other(frames.Frame(*fields))
            if handled or tool is None:
                return True
        try:
            request = tool.decode(body, block_length, version)
        except Exception as error:
            self._writer.put(frames.encode_error(correlation, _malformed(tool, error)), may_block=True)
            return True
        if trace != self._trace:
            span = frames.unpack_span(trace)
            self._trace, self._origin, self._context = trace, (self._client, span), _context_in(span)
        call = Call(self._origin, tool, correlation, timeout_us)
        if tool.detached:
            return self._run_detached(call, request)
        return self._run_inline(call, request)

    def _run_inline(self, call: Call, request: Any) -> bool:
        """Run a handler on the reading thread; return False if another thread reads now."""
        bridge, machine = self._bridge, self.machine
        machine.inline = call
        # After the assignment: otherwise the monitor could find no call and go to sleep.
        if bridge.monitor_asleep:
            bridge.wake_monitor()
        try:
            reply = self._context.copy().run(call.tool.handler, request, call)
        except BaseException as error:
            answer = error_frame(call, error, request)
        else:
            answer = reply_frame(call, reply, self._max_frame_bytes)
        lock = self._lock
        lock.acquire()  # Not `with`, which takes twice as long. Nothing in between can raise.
        inline = call.state is _INLINE
        if inline:
            call.state = _RETURNED
        lock.release()
        if not inline:
            self._finish(call, answer, may_block=True)
            bridge.release_thread()
            return False
        if self._decoder.filled:
            self._writer.waiting.append(answer)  # More frames have arrived: one write will send their answers.
        else:
            self._put_now(answer)
        if bridge.draining:
            bridge.notify()
        return True

    def _run_detached(self, call: Call, request: Any) -> bool:
        """Run a handler off the reading thread; return False if this thread ran it and another reads now."""
        bridge, context = self._bridge, self._context.copy()
        if call.tool.is_async:
            self._detach(call)
            assert bridge.handler_loop is not None, "a bridge with async tools has a loop"
            bridge.handler_loop.start(call, request, context, self._finish_async)
            return True
        if not bridge.acquire_thread():
            return self._run_inline(call, request)
        self._detach(call)
        if self._writer.waiting:
            self._writer.flush(may_block=True)
        try:
            bridge.pool.start(self.run)
            handed_over = True
        except RuntimeError:
            handed_over = False  # No thread is left: this one reads again after the handler.
        try:
            reply = context.run(call.tool.handler, request, call)
        except BaseException as error:
            answer = error_frame(call, error, request)
        else:
            answer = reply_frame(call, reply, self._max_frame_bytes)
        call.tool.ran_detached(monotonic() - call.started, BLOCKING_AFTER / 4)
        self._finish(call, answer, may_block=True)
        bridge.release_thread()
        return not handed_over

    def _detach(self, call: Call) -> None:
        """Detach a call before its handler starts, and start its timeout."""
        call.start_clock(monotonic(), self._bridge.max_timeout_us)
        with self._lock:
            self.machine.detach(call)
        if self._bridge.monitor_asleep:
            self._bridge.wake_monitor()

    def _take_other(self, frame: frames.Frame) -> bool:
        """Handle any frame except a call that can run; return False for a call that can run.

        Raises:
            RemoteProtocolError, PeerRefused, FrameVersion, FrameMalformed, InvalidArgument: The connection must end.
        """
        event, correlation = _event_of(frame), frame.correlation
        if event is HelloFrame and self.machine.state is machines.BridgeConnectionState.HANDSHAKE:
            self._welcome(frame)
            return True
        with self._lock:
            self.machine.receive(event)
            if not self.machine.reading:
                return True
            refusal = self.machine.refusal(correlation) if event is machines.CallReceived else None
        if event is CancelFrame:
            self._abandon(correlation, CancelFrame, errors.ToolCancelled("the caller cancelled the call"))
            return True
        if frame.opcode not in self._tools:
            refusal = errors.UnknownOpcode(
                f"opcode {frame.opcode:#06x} is not served here; served are {self._served()}"
            )
        if refusal is None:
            return False  # Another thread has just answered the call that was in the way.
        self._writer.put(frames.encode_error(correlation, refusal), may_block=True)
        return True

    def _welcome(self, frame: frames.Frame) -> None:
        self._client, welcome = accept_hello(frame, self._bridge.token, self._bridge.options)
        with self._lock:
            self.machine.receive(HelloFrame)
            if self._bridge.draining and self.machine.reading:
                self.machine.apply(machines.DrainStarted)
        self._decoder.max_frame_bytes = self._max_frame_bytes
        self._writer.put(welcome, may_block=True)

    def _served(self) -> str:
        """List the first opcodes that users declared, for a message."""
        served = sorted((opcode, tool) for opcode, tool in self._tools.items() if opcode >= frames.FIRST_TOOL_OPCODE)
        return ", ".join(f"{opcode:#06x} ({tool.name})" for opcode, tool in served[:_MAX_LISTED])

    def end_calls(self, error: errors.OrkiError) -> None:
        """Answer every detached call with an error because the bridge stops, and cancel the call that runs inline."""
        for correlation in tuple(self.machine.calls.copy()):
            self._abandon(correlation, machines.BridgeStopped, error)
        with self._lock:
            call = self.machine.stop_inline()
        if call is not None:
            call.tell_cancelled()

    def drain(self) -> None:
        with self._lock:
            if self.machine.reading and self.machine.state is not machines.BridgeConnectionState.DRAINING:
                self.machine.apply(machines.DrainStarted)

    def expel(self, event: type, error: errors.OrkiError | None = None) -> None:
        """End the connection because of `event`, and send the error if there is one. Does not block."""
        with self._lock:
            first = self.machine.reading
            if event is machines.HelloDeadline and self.machine.state is not machines.BridgeConnectionState.HANDSHAKE:
                return  # The hello has just arrived.
            if first:
                self.machine.apply(event)
        if first and error is not None:
            self._writer.put(frames.encode_error(0, error), may_block=False)
        self._writer.shut_down()

    def close_descriptor(self) -> None:
        """Close the descriptor only, as a forked child must."""
        self._sock.close()

    def _finish_async(self, call: Call, answer: bytes) -> None:
        self._finish(call, answer, may_block=False)

    def _finish(self, call: Call, answer: bytes, *, may_block: bool) -> None:
        with self._lock:
            due = self.machine.finish(call)
        if due:
            self._writer.put(answer, may_block=may_block)
        if self._bridge.draining:
            self._bridge.notify()

    def _abandon(self, correlation: int, event: type, error: errors.OrkiError) -> None:
        with self._lock:
            call = self.machine.abandon(correlation, event)
        if call is not None:
            self._writer.put(frames.encode_error(correlation, error), may_block=False)
            call.tell_cancelled()

    def _close(self) -> None:
        self._writer.close()
        with self._lock:
            self.machine.apply(machines.ConnectionLost)
            lost = self.machine.abandon_all(machines.ConnectionLost)
        for call in lost:
            call.tell_cancelled()
        self._closed(self)

    def tick(self, now: float) -> float:
        """Apply the timers that are due; return the time of the next tick. Does not block."""
        machine = self.machine
        again = self._watch_stream(now) if machine.reading else now + _CLOSE_AGAIN
        if machine.state is machines.BridgeConnectionState.CLOSING:
            self._writer.shut_down()  # A shutdown does nothing while another thread is writing.
        inline = machine.inline
        if inline is not None and inline.state is _INLINE:
            again = min(again, self._watch_inline(now, inline))
        for call in machine.calls.copy().values():
            if now >= call.deadline:
                limit = call.deadline - call.started
                error = errors.ToolDeadline(f"{call.tool.name} did not end within {limit:.3f} s")
                self._abandon(call.correlation, machines.CallDeadline, error)
            else:
                again = min(again, call.deadline)
        return again

    def was_busy(self) -> bool:
        """Return whether a handler ran on the reading thread since the last time."""
        inline = self.machine.inline
        busy = inline is not self._seen_inline
        self._seen_inline = inline
        return busy

    def _watch_stream(self, now: float) -> float:
        options, again = self._bridge.options, inf
        if self.machine.state is machines.BridgeConnectionState.HANDSHAKE:
            again = self._opened + options.handshake_timeout
            if now >= again:
                self.expel(machines.HelloDeadline, errors.HelloTimeout("no hello arrived in time"))
                return now + _CLOSE_AGAIN
        if begun := self._frame_begun:
            limit = begun + options.frame_timeout
            if now >= limit:
                self.expel(machines.FrameDeadline, errors.FrameMalformed("a frame was not finished in time"))
                return now + _CLOSE_AGAIN
            again = min(again, limit)
        return again

    def _watch_inline(self, now: float, call: Call) -> float:
        """Detach a call whose handler blocks the reading thread.

        The call's timeout starts when the monitor first sees the call, so quick calls do not read the clock.
        """
        if not call.deadline:
            call.start_clock(now, self._bridge.max_timeout_us)
        limit = min(call.started + BLOCKING_AFTER, call.deadline)
        if now < limit:
            return limit
        call.tool.detached = True
        if self._writer.waiting:
            self._writer.flush(may_block=False)
        if not self._bridge.acquire_thread():
            return now + BLOCKING_AFTER
        with self._lock:
            detached = self.machine.detach(call)
        if not detached:
            self._bridge.release_thread()
            return now + BLOCKING_AFTER
        try:
            self._bridge.pool.start(self.run)
        except RuntimeError:
            error = errors.Overloaded("the bridge has no thread left to read the connection")
            self.expel(machines.BridgeStopped, error)
        return now + BLOCKING_AFTER


def _event_of(frame: frames.Frame) -> type:
    if frame.flags & frames.FLAG_REPLY:
        return machines.ReplyReceived
    if not frame.correlation:
        return HelloFrame if frame.opcode == frames.OP_HELLO else machines.UnnumberedFrame
    return CancelFrame if frame.opcode == frames.OP_CANCEL else machines.CallReceived


def _malformed(tool: ToolHandler, error: Exception) -> errors.OrkiError:
    reason = error.message if isinstance(error, errors.OrkiError) else f"{type(error).__name__}: {error}"
    return errors.FrameMalformed(f"the request is no {tool.request.kind.__name__} of {tool.name}: {reason}")
