"""The sending half of a bridge's connection."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections import deque
from functools import partial
from time import monotonic

from orki_agent.hotpath._platform import NO_SIGNAL, set_timeout
from orki_agent.hotpath._thread_pool import ThreadPool


class FrameWriter:
    """Writes whole frames from any thread, and ends the connection if the peer does not read.

    Attributes:
        waiting: Frames that have not been written.
    """

    def __init__(self, sock: socket.socket, pool: ThreadPool, frame_timeout: float) -> None:
        """Take over a blocking socket; the pool runs writes that have to wait until the peer reads.

        `frame_timeout` is the maximum time in seconds for which the peer may read nothing, or for one write.
        """
        self.waiting: deque[bytes] = deque()
        self._sock = sock
        self._send = sock.send
        self._pool = pool
        self._frame_timeout = frame_timeout
        self._writing = threading.Lock()
        set_timeout(sock, socket.SO_SNDTIMEO, frame_timeout)

    def put(self, frame: bytes, *, may_block: bool) -> None:
        """Write a frame; if that would block and `may_block` is False, another thread writes it."""
        self.waiting.append(frame)
        self.flush(may_block=may_block)

    def put_now(self, frame: bytes) -> None:
        """Write a frame with one system call unless another frame waits or is being written. May block."""
        writing = self._writing
        if self.waiting or not writing.acquire(False):
            self.put(frame, may_block=True)
            return
        try:
            sent = self._send(frame, NO_SIGNAL)
            if sent != len(frame):
                self._send_rest(memoryview(frame)[sent:])
        except OSError:
            self._shut_down()
        finally:
            writing.release()
        if self.waiting:
            self.flush(may_block=True)

    def flush(self, *, may_block: bool) -> None:
        """Write the frames that wait, or leave them to the thread that is already writing."""
        waiting, writing = self.waiting, self._writing
        while waiting and writing.acquire(False):
            try:
                if not self._write_waiting(may_block):
                    return
            finally:
                writing.release()

    def shut_down(self) -> None:
        """Shut down both directions, which wakes the reading thread. Does nothing while another thread is writing."""
        if self._writing.acquire(False):
            try:
                self._shut_down()
            finally:
                self._writing.release()

    def close(self) -> None:
        with self._writing:
            self.waiting.clear()
            self._sock.close()

    def _write_waiting(self, may_block: bool) -> bool:
        """Write all frames that wait now; return False if another thread continues. Call with the lock held."""
        waiting = self.waiting
        frames = waiting.popleft() if len(waiting) == 1 else b"".join(waiting.popleft() for _ in range(len(waiting)))
        try:
            sent = self._send(frames, NO_SIGNAL if may_block else NO_SIGNAL | socket.MSG_DONTWAIT)
            if sent == len(frames):
                return True
            if may_block:
                self._send_rest(memoryview(frames)[sent:])
                return True
        except BlockingIOError:
            if may_block:
                self._shut_down()
                return True
            sent = 0
        except OSError:
            self._shut_down()
            return True
        waiting.appendleft(frames[sent:])
        try:
            self._pool.start(partial(self.flush, may_block=True))
        except RuntimeError:
            self._shut_down()
        return False

    def _send_rest(self, rest: memoryview) -> None:
        """Write the rest of a frame; the kernel waits `frame_timeout` for each part.

        Raises:
            OSError: The rest was not written in time, or the peer has closed the connection.
        """
        deadline = monotonic() + self._frame_timeout
        while rest:
            rest = rest[self._send(rest, NO_SIGNAL) :]
            if rest and monotonic() > deadline:
                raise TimeoutError

    def _shut_down(self) -> None:
        # Part of a frame may have been written, so no other frame may follow.
        self.waiting.clear()
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
