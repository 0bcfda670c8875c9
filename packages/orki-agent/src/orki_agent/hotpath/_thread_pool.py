"""Threads that are kept for the next job: a connection's reader, or a handler that blocks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Final

_KEEP_SECONDS: Final = 10.0


class ThreadPool:
    """Starts jobs at once, on a thread that rests or on a new one; who starts jobs bounds their number.

    The threads are daemons, so that a handler that never returns does not keep the process alive.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._threads: set[threading.Thread] = set()
        self._resting = 0
        self._closed = False

    def start(self, job: Callable[[], None]) -> None:
        """Runs `job`, which must not raise.

        Raises:
            RuntimeError: The system gives no further thread.
        """
        with self._lock:
            if self._resting:
                self._resting -= 1
                self._jobs.put(job)
                return
            thread = threading.Thread(target=self._work, args=(job,), name=self._name, daemon=True)
            self._threads.add(thread)
        try:
            thread.start()
        except RuntimeError:
            with self._lock:
                self._threads.discard(thread)
            raise

    def close(self, seconds: float) -> bool:
        """Stop idle threads and wait for the others; return whether all have ended."""
        deadline = time.monotonic() + seconds
        with self._lock:
            self._closed = True
            for _ in range(self._resting):
                self._jobs.put(None)
            self._resting = 0
            threads = list(self._threads)
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in threads)

    def _work(self, job: Callable[[], None] | None) -> None:
        while job is not None:
            job()
            job = self._rest()
        with self._lock:
            self._threads.discard(threading.current_thread())

    def _rest(self) -> Callable[[], None] | None:
        with self._lock:
            if self._closed:
                return None
            self._resting += 1
        try:
            return self._jobs.get(timeout=_KEEP_SECONDS)
        except Empty:
            with self._lock:
                if self._resting:
                    self._resting -= 1
                    return None
        # Somebody counted on this thread while it was about to go: the job is on its way.
        return self._jobs.get()
