"""The sending half of a bridge's connection: answers leave whole, in order, and a peer that does not read is let go."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections import deque
from functools import partial
from time import monotonic

from orki_agent.hotpath._thread_pool import ThreadPool
from orki_agent.hotpath.seam import NO_SIGNAL, set_timeout

__all__ = ["Outbox"]


class Outbox:
    """Answers on their way out, put in by any thread.

    Attributes:
        busy: Whether an answer waits here or is just leaving.
    """

    def __init__(self, sock: socket.socket, crew: ThreadPool, frame_timeout: float) -> None:
        """Wraps the connection's socket; it is closed by `close`.

        Args:
            sock: Blocking.
            crew: For what has to wait until the peer reads.
            frame_timeout: Longest time in which a peer takes nothing, or not the whole of an answer.
        """
        self.busy = False
        self._sock = sock
        self._send = sock.send
        self._crew = crew
        self._frame_seconds = frame_timeout
        self._answers: deque[bytes] = deque()
        self._writing = threading.Lock()
        self._closed = False
        set_timeout(sock, socket.SO_SNDTIMEO, frame_timeout)

    def put(self, answer: bytes, *, may_block: bool) -> None:
        """Sends an answer; where it would block and must not, another thread sends it."""
        self.hold(answer)
        self.flush(may_block=may_block)

    def hold(self, answer: bytes) -> None:
        """Keeps an answer until the next `flush`, so that several leave together."""
        # In this order, and in `flush` the other way round: the flag is never false while an answer waits.
        self._answers.append(answer)
        self.busy = True

    def flush(self, *, may_block: bool) -> None:
        """Sends what waits; who finds another thread sending leaves it to that thread."""
        answers, writing = self._answers, self._writing
        while answers and writing.acquire(False):
            try:
                if not self._send_out(may_block):
                    return
                self.busy = False
                if answers:
                    self.busy = True
            finally:
                writing.release()

    def send_alone(self, answer: bytes) -> None:
        """Sends an answer at once. Only for a thread that knows that no other has one, and that `busy` is false."""
        try:
            sent = self._send(answer, NO_SIGNAL)
            if sent != len(answer):
                self._send_rest(memoryview(answer)[sent:])
        except OSError:
            self._shut_down()

    def shut_down(self) -> None:
        """Ends both directions, so that the connection's reader wakes; not while another thread is sending."""
        if self._writing.acquire(False):
            try:
                self._shut_down()
            finally:
                self._writing.release()

    def close(self) -> None:
        """Closes the socket."""
        with self._writing:
            self._closed = True
            self._answers.clear()
            self._sock.close()

    def _send_out(self, may_block: bool) -> bool:
        """Sends all that waits now; False when another thread goes on with it. Called with the lock held."""
        answers = self._answers
        answer = answers.popleft() if len(answers) == 1 else b"".join(answers.popleft() for _ in range(len(answers)))
        if self._closed:
            return True
        try:
            sent = self._send(answer, NO_SIGNAL if may_block else NO_SIGNAL | socket.MSG_DONTWAIT)
            if sent == len(answer):
                return True
            if may_block:
                self._send_rest(memoryview(answer)[sent:])
                return True
        except BlockingIOError:
            if may_block:
                self._shut_down()
                return True
            sent = 0
        except OSError:
            self._shut_down()
            return True
        answers.appendleft(answer[sent:])
        try:
            self._crew.start(partial(self.flush, may_block=True))
        except RuntimeError:
            self._shut_down()
        return False

    def _send_rest(self, rest: memoryview) -> None:
        """Goes on with an answer that did not leave in one piece; the kernel waits `frame_timeout` for each piece.

        Raises:
            OSError: It did not leave in time, or the peer is gone.
        """
        deadline = monotonic() + self._frame_seconds
        while rest:
            rest = rest[self._send(rest, NO_SIGNAL) :]
            if rest and monotonic() > deadline:
                raise TimeoutError

    def _shut_down(self) -> None:
        # After part of a frame nothing else may follow.
        self._answers.clear()
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
