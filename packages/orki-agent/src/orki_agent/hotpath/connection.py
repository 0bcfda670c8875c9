"""One connection of a bridge: who reads it, which calls it carries, how answers leave it.

One thread at a time holds the reading role. It reads a frame, runs a quick sync handler on the spot (one system call
in, one out, no hand-over) and reads on. If the handler turns out to block, the keeper takes the reading role away from
that thread and gives it to another, so that the connection is read on; the first delivers its answer and is done.

What makes that safe without a lock for each call: `set.remove` and `dict.pop` take a thing exactly once. `_here` holds
the call whose handler runs on the reading thread; whoever takes it out has the role, and if that is the handler's
thread, the answer too. `calls` holds every other unanswered call, and whoever pops one answers it. `_elsewhere` holds
those whose answer may still be on its way: while it is empty, the reading thread is the only one that sends.
"""

from __future__ import annotations

import logging
import socket
from math import inf
from time import monotonic, sleep
from typing import Any, Final

from orki_agent.hotpath.desk import Desk
from orki_agent.hotpath.frames import (
    FLAG_REPLY,
    OP_CANCEL,
    Fields,
    Frame,
    FrameDecoder,
    encode_error,
)
from orki_agent.hotpath.greeting import HELLO_BYTES, greet
from orki_agent.hotpath.outbox import Outbox
from orki_agent.hotpath.served import Call, Origin, ServedTool, error_frame, reply_frame
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
    """A connection from its acceptance to its end.

    Attributes:
        uid: Who is at the other end.
        client: Name that it gave in its hello.
        calls: Calls that have no answer yet and do not run on the reading thread, by correlation.
    """

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
        self._opened = monotonic()
        self._welcomed = False
        self._tools: dict[int, ServedTool] = {}  # none before the hello
        self._room = desk.options.max_calls
        self._desk = desk
        self._sock = sock
        self._receive = sock.recv_into
        self._decoder = FrameDecoder(min(desk.options.max_frame_bytes, HELLO_BYTES))
        self._outbox = Outbox(sock, desk.crew, desk.options.frame_timeout)
        self._here: set[Call] = set()
        self._inline: Call | None = None
        self._seen_inline: Call | None = None
        self._elsewhere: set[Call] = set()
        self._begun = 0.0
        self._expelled = False
        self._trace = b""
        self._origin: Origin = ("", None)
        self._context = context_in(None)

    @property
    def in_use(self) -> bool:
        """Whether a call is in progress."""
        return bool(self.calls or self._here)

    # -- reading ------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Reads until the connection ends or the reading role goes elsewhere."""
        try:
            handed_over = self._read()
        except OrkiError as error:
            self._outbox.put(encode_error(0, error), may_block=True)
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
        decoder, receive, outbox = self._decoder, self._receive, self._outbox
        while True:
            fields = decoder.next_frame() if decoder.filled else None
            while fields is None:
                if outbox.busy:
                    outbox.flush(may_block=True)
                if decoder.filled and not self._begun:
                    self._begun = monotonic()
                    self._desk.poke()
                count = receive(decoder.writable())
                if not count:
                    return False
                fields = decoder.next_frame(count)
            if self._begun:
                self._begun = 0.0
            if not self._take(fields):
                return True

    def _take(self, fields: Fields) -> bool:
        """Handles a frame; False when the reading role went elsewhere meanwhile."""
        flags, opcode, block_length, version, correlation, timeout_us, trace, body = fields
        tool = self._tools.get(opcode)
        calls = self.calls
        if tool is None or flags & FLAG_REPLY or not correlation or correlation in calls or len(calls) >= self._room:
            self._take_other(Frame(*fields))
            return True
        try:
            request = tool.decode(body, block_length, version)
        except Exception as error:
            self._outbox.put(encode_error(correlation, _malformed(tool, error)), may_block=True)
            return True
        if trace != self._trace:
            span = unpack_span(trace)
            self._trace, self._origin, self._context = trace, (self.client, span), context_in(span)
        call = Call(self._origin, tool, correlation, timeout_us)
        if tool.apart:
            return self._run_apart(call, request)
        return self._run_here(call, request)

    def _run_here(self, call: Call, request: Any) -> bool:
        """Runs a handler on the reading thread; False when the role was taken away meanwhile."""
        here, desk, outbox = self._here, self._desk, self._outbox
        self._inline = call
        here.add(call)
        # Only now: a keeper that looked before would see nothing to come back for, and sleep.
        if desk.asleep:
            desk.poke()
        try:
            reply = self._context.copy().run(call.tool.handler, request, call)
        except BaseException as error:
            answer = error_frame(call, error)
        else:
            answer = reply_frame(call, reply, desk.options.max_frame_bytes)
        try:
            here.remove(call)
        except KeyError:
            while call not in self._elsewhere:
                sleep(0)  # the keeper holds the call in its hand and is about to put it there
            self.finish(call, answer, may_block=True)
            desk.attach()
            return False
        if self._decoder.filled:
            outbox.hold(answer)  # more frames are here already: their answers leave together
        elif outbox.busy or self._elsewhere:
            outbox.put(answer, may_block=True)
        else:
            outbox.send_alone(answer)
        return True

    def _run_apart(self, call: Call, request: Any) -> bool:
        """Runs a handler off the reading thread; False when this thread runs it and another reads on."""
        desk, context = self._desk, self._context.copy()
        if call.tool.is_async:
            self._enter(call)
            desk.start_async(self, call, request, context)
            return True
        if not desk.detach():
            return self._run_here(call, request)
        self._enter(call)
        if self._outbox.busy:
            self._outbox.flush(may_block=True)
        try:
            desk.crew.start(self.run)
            handed_over = True
        except RuntimeError:
            handed_over = False  # no further thread: what comes next on this connection waits
        try:
            reply = context.run(call.tool.handler, request, call)
        except BaseException as error:
            answer = error_frame(call, error)
        else:
            answer = reply_frame(call, reply, desk.options.max_frame_bytes)
        call.tool.ran_apart(monotonic() - call.started, BLOCKING_SECONDS / 4)
        self.finish(call, answer, may_block=True)
        desk.attach()
        return not handed_over

    def _enter(self, call: Call) -> None:
        """Puts a call among those that run elsewhere and have a deadline."""
        call.start_clock(monotonic(), self._desk.longest_us)
        self._elsewhere.add(call)
        self.calls[call.correlation] = call
        if self._desk.asleep:
            self._desk.poke()

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
            self._outbox.put(welcome, may_block=True)
        elif flags & FLAG_REPLY or not correlation:
            raise RemoteProtocolError(f"a client sent a frame (opcode {opcode:#06x}) that is neither call nor cancel")
        elif opcode == OP_CANCEL:
            self._end_call(correlation, ToolCancelled("the caller cancelled the call"))
        elif correlation in self.calls:
            raise RemoteProtocolError(f"call {correlation} was sent again before it was answered")
        else:
            self._outbox.put(encode_error(correlation, self._refusal(opcode)), may_block=True)

    def _refusal(self, opcode: int) -> OrkiError:
        desk = self._desk
        if opcode not in desk.tools:
            return UnknownOpcode(f"opcode {opcode:#06x} is not served here; served are {desk.served}")
        if desk.draining:
            return Draining("the bridge is about to stop and takes no new calls")
        return TooManyCalls(f"{self._room} calls are in flight on this connection, the most that it carries")

    # -- answering and ending -----------------------------------------------------------------------------------------

    def finish(self, call: Call, answer: bytes, *, may_block: bool) -> None:
        """Sends the answer of a call that ran elsewhere, unless it was answered before."""
        if self.calls.pop(call.correlation, None) is call:
            self._outbox.put(answer, may_block=may_block)
        self._elsewhere.discard(call)

    def end_calls(self, error: OrkiError) -> None:
        """Answers every call with the error."""
        for correlation in tuple(self.calls.copy()):
            self._end_call(correlation, error)
        if self._here and self._inline is not None:
            self._inline.abandon()

    def drain(self) -> None:
        """Takes no new calls from now on."""
        self._room = 0

    def expel(self, error: OrkiError | None) -> None:
        """Ends the connection, with a word to the peer where one is given."""
        if error is not None and not self._expelled:
            self._expelled = True
            self._outbox.put(encode_error(0, error), may_block=False)
        self._outbox.shut_down()

    def let_go(self) -> None:
        """Closes the descriptor and nothing else: what a forked child does with its parent's connections."""
        self._sock.close()

    def _end_call(self, correlation: int, error: OrkiError) -> None:
        call = self.calls.pop(correlation, None)
        if call is not None:
            self._outbox.put(encode_error(correlation, error), may_block=False)
            call.abandon()

    def _close(self) -> None:
        self._outbox.close()
        for correlation in tuple(self.calls.copy()):
            call = self.calls.pop(correlation, None)
            if call is not None:
                call.abandon()
        self._desk.forget(self)

    # -- what the keeper does -----------------------------------------------------------------------------------------

    def tick(self, now: float) -> float:
        """Ends what is overdue; gives the time at which to look again. Never blocks."""
        options = self._desk.options
        again = inf
        if not self._welcomed:
            again = self._watch(now, self._opened + options.handshake_timeout, HelloTimeout, "no hello came")
        if begun := self._begun:
            limit = begun + options.frame_timeout
            again = min(again, self._watch(now, limit, FrameMalformed, "a frame was not finished"))
        inline = self._inline
        if inline is not None and self._here:
            again = min(again, self._watch_inline(now, inline))
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

    def _watch(self, now: float, limit: float, error: type[OrkiError], what: str) -> float:
        if now < limit:
            return limit
        self.expel(error(f"{what} in time"))
        return now + 0.1

    def _watch_inline(self, now: float, call: Call) -> float:
        """Takes the reading role from a thread whose handler blocks.

        The clock of such a call starts when it is first seen here, so that quick calls need not look at one.
        """
        if not call.deadline:
            call.start_clock(now, self._desk.longest_us)
        limit = min(call.started + BLOCKING_SECONDS, call.deadline)
        if now < limit:
            return limit
        call.tool.apart = True
        if self._outbox.busy:
            self._outbox.flush(may_block=False)
        if self._desk.detach():
            self._take_role(call)
        return now + BLOCKING_SECONDS

    def _take_role(self, call: Call) -> None:
        """Gives the reading role to another thread, if the handler still runs."""
        try:
            self._here.remove(call)
        except KeyError:
            self._desk.attach()
            return
        self.calls[call.correlation] = call
        self._elsewhere.add(call)
        try:
            self._desk.crew.start(self.run)
        except RuntimeError:
            self.expel(Overloaded("the bridge has no thread left to read the connection"))


def _malformed(tool: ServedTool, error: Exception) -> OrkiError:
    what = error.message if isinstance(error, OrkiError) else f"{type(error).__name__}: {error}"
    return FrameMalformed(f"the request is no {tool.request.kind.__name__} of {tool.name}: {what}")
