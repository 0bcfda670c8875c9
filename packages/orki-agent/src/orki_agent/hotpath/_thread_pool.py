"""A pool of daemon threads without an upper limit."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Final

_KEEP_ALIVE: Final = 10.0


class ThreadPool:
    """Starts each job at once, on an idle thread or on a new one. The caller limits the number of jobs.

    The threads are daemons, so a handler that never returns does not keep the process alive.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._threads: set[threading.Thread] = set()
        self._idle = 0
        self._closed = False

    def start(self, job: Callable[[], None]) -> None:
        """Run `job`, which must not raise.

        Raises:
            RuntimeError: The system cannot start another thread.
        """
        with self._lock:
            if self._idle:
                self._idle -= 1
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

    def close(self, timeout: float) -> bool:
        """Stop idle threads and wait for the others; return whether all have ended."""
        deadline = time.monotonic() + timeout
        with self._lock:
            self._closed = True
            for _ in range(self._idle):
                self._jobs.put(None)
            self._idle = 0
            threads = list(self._threads)
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in threads)

    def _work(self, job: Callable[[], None] | None) -> None:
        while job is not None:
            job()
            job = self._next_job()
        with self._lock:
            self._threads.discard(threading.current_thread())

    def _next_job(self) -> Callable[[], None] | None:
        with self._lock:
            if self._closed:
                return None
            self._idle += 1
        try:
            return self._jobs.get(timeout=_KEEP_ALIVE)
        except Empty:
            with self._lock:
                if self._idle:
                    self._idle -= 1
                    return None
        # `start` counted on this thread just before the timeout: its job is in the queue.
        return self._jobs.get()
