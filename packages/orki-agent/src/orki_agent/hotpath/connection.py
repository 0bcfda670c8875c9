"""One connection of a bridge: who reads it, which calls it carries, how answers leave it.

One thread at a time holds the reading role. It reads a frame, runs a quick sync handler on the spot (one system call
in, one out, no hand-over) and reads on. If the handler turns out to block, the keeper takes the reading role away from
that thread and gives it to another, so that the connection is read on; the first delivers its answer and is done.

What makes that safe without a lock for each call: `list.pop` and `dict.pop` take a thing exactly once. `_baton` holds
one item while a handler runs on the reading thread, and whoever pops it has the role. `calls` holds every unanswered
call, and whoever pops one answers it.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections import deque
from contextvars import Context
from functools import partial
from math import inf
from time import monotonic
from typing import Any, Final

from orki_agent.hotpath.desk import Desk
from orki_agent.hotpath.frames import (
    FLAG_REPLY,
    OP_CANCEL,
    Frame,
    FrameDecoder,
    encode_error,
)
from orki_agent.hotpath.greeting import HELLO_BYTES, greet
from orki_agent.hotpath.seam import NO_SIGNAL, set_timeout
from orki_agent.hotpath.served import Call, ServedTool, error_frame, reply_frame
from orki_agent.hotpath.traces import context_in, unpack_span
from orki_contract.errors import (
    Draining,
    FrameMalformed,
    HelloTimeout,
    OrkiError,
    Overloaded,
    RemoteProtocolError,
    ToolCancelled,
    ToolDeadline,
    TooManyCalls,
    UnknownOpcode,
)

__all__ = ["BLOCKING_SECONDS", "Connection"]

BLOCKING_SECONDS: Final = 0.002
"""A handler that ran this long on the reading thread is taken for one that blocks."""

_log = logging.getLogger("orki_agent.hotpath")


class Connection:
    """A connection from its acceptance to its end."""

    def __init__(self, sock: socket.socket, uid: int, desk: Desk) -> None:
        """Wraps an accepted socket; `run` reads it.

        Args:
            sock: Blocking; belongs to the connection from now on.
            uid: Who is at the other end.
            desk: What all connections of the bridge share.
        """
        self.uid = uid
        self.client = ""
        self.calls: dict[int, Call] = {}
        self.opened = monotonic()
        self._welcomed = False
        self._tools: dict[int, ServedTool] = {}  # none before the hello
        self._room = desk.options.max_calls
        self._desk = desk
        self._sock = sock
        self._receive = sock.recv_into
        self._send = sock.send
        self._decoder = FrameDecoder(min(desk.options.max_frame_bytes, HELLO_BYTES))
        self._baton: list[None] = []
        self._inline: Call | None = None
        self._seen_inline: Call | None = None
        self._begun = 0.0
        self._outbox: deque[bytes] = deque()
        self._writing = threading.Lock()
        self._closed = False
        self._expelled = False
        self._trace = b""
        self._span = unpack_span(bytes(28))
        self._context = context_in(None)
        set_timeout(sock, socket.SO_SNDTIMEO, desk.options.frame_seconds)

    # -- reading ------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Reads until the connection ends or the reading role goes elsewhere."""
        try:
            handed_over = self._read()
        except OrkiError as error:
            self._reply(encode_error(0, error), may_block=True)
        except OSError:
            pass  # The peer is gone; there is nobody to tell.
        except Exception:
            _log.exception("a connection of a tool bridge ended by a defect")
        else:
            if handed_over:
                return
        self._close()

    def _read(self) -> bool:
        """Reads frames; True when another thread has the role now, False at the stream's end."""
        decoder, receive = self._decoder, self._receive
        frame = decoder.next_frame()
        while True:
            while frame is None:
                if self._outbox:
                    self._flush(may_block=True)
                if decoder.filled or self._begun:
                    self._note_progress(decoder.filled > 0)
                count = receive(decoder.writable())
                if not count:
                    return False
                frame = decoder.next_frame(count)
            if not self._take(frame):
                return True
            frame = decoder.next_frame() if decoder.filled else None

    def _note_progress(self, begun: bool) -> None:
        """Starts or ends the clock of a frame that is here in part."""
        if not begun:
            self._begun = 0.0
        elif not self._begun:
            self._begun = monotonic()
            self._desk.poke()

    def _take(self, frame: Frame) -> bool:
        """Handles a frame; False when the reading role went elsewhere meanwhile."""
        flags, opcode, block_length, version, correlation, timeout_us, trace, body = frame
        calls = self.calls
        tool = self._tools.get(opcode)
        if tool is None or flags & FLAG_REPLY or not correlation or correlation in calls or len(calls) >= self._room:
            self._take_other(frame)
            return True
        try:
            request = tool.decode(body, block_length, version)
        except Exception as error:
            self._reply(encode_error(correlation, _malformed(tool, error)), may_block=True)
            return True
        if trace != self._trace:
            self._trace, self._span = trace, unpack_span(trace)
            self._context = context_in(self._span)
        desk = self._desk
        now = monotonic()
        if timeout_us > desk.longest_us:
            timeout_us = desk.longest_us
        deadline = now + (timeout_us * 1e-6 if timeout_us else tool.seconds)
        calls[correlation] = call = Call(self.client, tool, correlation, self._span, now, deadline)
        if tool.apart:
            if desk.asleep:
                desk.poke()
            if tool.is_async:
                desk.start_async(self, call, request, self._context.copy())
                return True
            if desk.detach():
                return self._run_apart(call, request)
        return self._run_here(call, request)

    def _run_here(self, call: Call, request: Any) -> bool:
        """Runs a handler on the reading thread; False when the role was taken away meanwhile."""
        baton = self._baton
        self._inline = call
        baton.append(None)
        # Only now: a keeper that looked before would see nothing to come back for, and sleep.
        if self._desk.asleep:
            self._desk.poke()
        answer = self._answer(self._context, call, request)
        try:
            baton.pop()
        except IndexError:
            self.finish(call, answer, may_block=True)
            self._desk.attach()
            return False
        if self.calls.pop(call.correlation, None) is not call:
            return True
        if self._decoder.filled:
            self._outbox.append(answer)  # more frames are here already: their answers leave together
        elif self._outbox or not self._writing.acquire(False):
            self._reply(answer, may_block=True)
        else:
            try:
                sent = self._send(answer, NO_SIGNAL)
                if sent != len(answer):
                    self._send_rest(memoryview(answer)[sent:])
            except OSError:
                self._shut_down()
            finally:
                self._writing.release()
        return True

    def _answer(self, context: Context, call: Call, request: Any) -> bytes:
        try:
            reply = context.copy().run(call.tool.handler, request, call)
        except BaseException as error:
            return error_frame(call, error)
        return reply_frame(call, reply, self._desk.options.max_frame_bytes)

    def _run_apart(self, call: Call, request: Any) -> bool:
        """Runs a handler that is known to block; False when another thread reads on."""
        desk, context = self._desk, self._context  # the next reader may replace the context
        if self._outbox:
            self._flush(may_block=True)
        try:
            desk.crew.start(self.run)
            handed_over = True
        except RuntimeError:
            handed_over = False  # no further thread: what comes next on this connection waits
        answer = self._answer(context, call, request)
        call.tool.ran_apart(monotonic() - call.started, BLOCKING_SECONDS / 4)
        self.finish(call, answer, may_block=True)
        desk.attach()
        return not handed_over

    def _take_other(self, frame: Frame) -> None:
        """Handles whatever is not simply a call.

        Raises:
            RemoteProtocolError, PeerRefused, FrameVersion, FrameMalformed: The connection cannot go on.
        """
        desk = self._desk
        flags, opcode, correlation = frame.flags, frame.opcode, frame.correlation
        if not self._welcomed:
            self.client, welcome = greet(frame, desk.token, desk.options)
            self._decoder.max_frame_bytes = desk.options.max_frame_bytes
            self._tools, self._welcomed = desk.tools, True
            self._reply(welcome, may_block=True)
        elif flags & FLAG_REPLY or not correlation:
            raise RemoteProtocolError(f"a client sent a frame (opcode {opcode:#06x}) that is neither call nor cancel")
        elif opcode == OP_CANCEL:
            self._end_call(correlation, ToolCancelled("the caller cancelled the call"))
        elif correlation in self.calls:
            raise RemoteProtocolError(f"call {correlation} was sent again before it was answered")
        else:
            self._reply(encode_error(correlation, self._refusal(opcode)), may_block=True)

    def _refusal(self, opcode: int) -> OrkiError:
        desk = self._desk
        if opcode not in desk.tools:
            return UnknownOpcode(f"opcode {opcode:#06x} is not served here; served are {desk.served}")
        if desk.draining:
            return Draining("the bridge is about to stop and takes no new calls")
        return TooManyCalls(f"{self._room} calls are in flight on this connection, the most that it carries")

    # -- answering ----------------------------------------------------------------------------------------------------

    def finish(self, call: Call, answer: bytes, *, may_block: bool) -> None:
        """Sends a call's answer unless it was answered before."""
        if self.calls.pop(call.correlation, None) is call:
            self._reply(answer, may_block=may_block)

    def _end_call(self, correlation: int, error: OrkiError) -> None:
        call = self.calls.pop(correlation, None)
        if call is not None:
            self._reply(encode_error(correlation, error), may_block=False)
            call.abandon()

    def _reply(self, answer: bytes, *, may_block: bool) -> None:
        self._outbox.append(answer)
        self._flush(may_block=may_block)

    def _flush(self, *, may_block: bool) -> None:
        """Sends what lies in the outbox; who finds another thread sending leaves it to that thread."""
        outbox, writing = self._outbox, self._writing
        while outbox and writing.acquire(False):
            try:
                if not self._send_out(may_block):
                    return
            finally:
                writing.release()

    def _send_out(self, may_block: bool) -> bool:
        """Sends what lies in the outbox; False when another thread goes on with it. Called with the lock held."""
        outbox = self._outbox
        answer = outbox.popleft() if len(outbox) == 1 else b"".join(outbox.popleft() for _ in range(len(outbox)))
        if self._closed:
            return True
        flags = NO_SIGNAL if may_block else NO_SIGNAL | socket.MSG_DONTWAIT
        try:
            sent = self._send(answer, flags)
        except BlockingIOError:
            if may_block:
                return self._shut_down()
            sent = 0
        except OSError:
            return self._shut_down()
        if sent == len(answer):
            return True
        if may_block:
            with contextlib.suppress(OSError):
                self._send_rest(memoryview(answer)[sent:])
                return True
            return self._shut_down()
        outbox.appendleft(answer[sent:])
        return self._leave_rest()

    def _send_rest(self, rest: memoryview) -> None:
        """Goes on with an answer that did not leave in one piece. The kernel waits `frame_seconds` for each piece.

        Raises:
            OSError: It did not leave in time, or the peer is gone.
        """
        deadline = monotonic() + self._desk.options.frame_seconds
        while rest:
            rest = rest[self._send(rest, NO_SIGNAL) :]
            if rest and monotonic() > deadline:
                raise TimeoutError

    def _leave_rest(self) -> bool:
        """Has a thread that may wait send the rest."""
        try:
            self._desk.crew.start(partial(self._flush, may_block=True))
        except RuntimeError:
            self._shut_down()
        return False

    # -- ending -------------------------------------------------------------------------------------------------------

    def _shut_down(self) -> bool:
        """Ends both directions, so that the reader wakes and closes. Called with the lock held; gives True.

        After part of a frame nothing else may follow, so what else waits to leave is dropped.
        """
        self._outbox.clear()
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        return True

    def _close(self) -> None:
        with self._writing:
            self._closed = True
            self._sock.close()
        for correlation in tuple(self.calls.copy()):
            call = self.calls.pop(correlation, None)
            if call is not None:
                call.abandon()
        self._desk.forget(self)

    def let_go(self) -> None:
        """Closes the descriptor and nothing else: what a forked child does with its parent's connections."""
        self._sock.close()

    # -- what the keeper does -----------------------------------------------------------------------------------------

    def tick(self, now: float) -> float:
        """Ends what is overdue; gives the time at which to look again. Never blocks."""
        options = self._desk.options
        again = inf
        if not self._welcomed:
            again = self._watch(now, self.opened + options.handshake_seconds, HelloTimeout, "no hello came")
        if begun := self._begun:
            again = min(
                again, self._watch(now, begun + options.frame_seconds, FrameMalformed, "a frame was not finished")
            )
        inline = self._inline
        if inline is not None and self._baton:
            blocking_at = inline.started + BLOCKING_SECONDS
            if now >= blocking_at:
                inline.tool.apart = True
                self._take_role()
            else:
                again = min(again, blocking_at)
        for call in self.calls.copy().values():
            if now >= call.deadline:
                seconds = call.deadline - call.started
                self._end_call(call.correlation, ToolDeadline(f"{call.tool.name} did not end within {seconds:.3f} s"))
            else:
                again = min(again, call.deadline)
        return again

    def was_busy(self) -> bool:
        """Whether the connection ran a handler on its reading thread since this was last asked."""
        inline = self._inline
        busy = inline is not self._seen_inline
        self._seen_inline = inline
        return busy

    def drain(self) -> None:
        """Takes no new calls from now on."""
        self._room = 0

    def end_calls(self, error: OrkiError) -> None:
        """Answers every call with the error."""
        for correlation in tuple(self.calls.copy()):
            self._end_call(correlation, error)

    def expel(self, error: OrkiError | None) -> None:
        """Ends the connection, with a word to the peer where one is given."""
        if error is not None and not self._expelled:
            self._expelled = True
            self._reply(encode_error(0, error), may_block=False)
        if self._writing.acquire(False):
            try:
                if not self._closed:
                    self._shut_down()
            finally:
                self._writing.release()

    def _watch(self, now: float, limit: float, error: type[OrkiError], what: str) -> float:
        if now < limit:
            return limit
        self.expel(error(f"{what} in time"))
        return now + 0.1

    def _take_role(self) -> None:
        """Gives the reading role to another thread, if the handler still runs and threads are left."""
        desk = self._desk
        if self._outbox:
            self._flush(may_block=False)
        if not desk.detach():
            return
        try:
            self._baton.pop()
        except IndexError:
            desk.attach()
            return
        try:
            desk.crew.start(self.run)
        except RuntimeError:
            self.expel(Overloaded("the bridge has no thread left to read the connection"))


def _malformed(tool: ServedTool, error: Exception) -> OrkiError:
    what = error.message if isinstance(error, OrkiError) else f"{type(error).__name__}: {error}"
    return FrameMalformed(f"the request is no {tool.request.kind.__name__} of {tool.name}: {what}")
