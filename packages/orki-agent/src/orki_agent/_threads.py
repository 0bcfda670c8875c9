"""Calls between the user's event loop and the I/O thread.

The I/O thread runs the process's only grpc.aio event loop: grpc.aio works well with one loop in a process, and a
heartbeat must not wait for user code.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import resource
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, Final, TypeVar

from orki_contract.errors import OrchestratorUnavailable

T = TypeVar("T")

_log = logging.getLogger("orki.agent")

_PROBE_INTERVAL: Final = 0.1
_REMEMBERED_LAGS: Final = 30
_STATM: Final = "/proc/self/statm"
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")


class Mailbox:
    """Calls from any thread into one event loop, in their order. Many calls cost one wake-up."""

    __slots__ = ("_awake", "_calls", "_loop")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._calls: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self._awake = False

    def post(self, call: Callable[..., object], *arguments: Any) -> None:
        """Schedule a call in the loop. Calls to a closed loop are dropped."""
        self._calls.append((call, arguments))
        # Two threads may both find the flag unset, which only wakes the loop twice. The flag is reset before the calls
        # are taken, so no call is left behind.
        if not self._awake:
            self._awake = True
            try:
                self._loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:
                if not self._loop.is_closed():
                    raise

    def _deliver(self) -> None:
        self._awake = False
        for _ in range(len(self._calls)):
            call, arguments = self._calls.popleft()
            try:
                call(*arguments)
            except Exception:
                _log.exception("a call into %s failed: this is a defect", self._loop)
        if self._calls and not self._awake:
            self._awake = True
            self._loop.call_soon(self._deliver)


async def in_thread(work: Callable[[], T]) -> T:
    """Run blocking work in a thread of its own, without the loop's executor."""
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, name="orki-close", daemon=True).start()
    return await asyncio.wrap_future(done)


def send(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, T]) -> Future[T]:
    """Run a coroutine in another thread's loop, with the caller's context variables.

    Raises:
        OrchestratorUnavailable: The loop has ended, and with it the agent's session.
    """
    try:
        return asyncio.run_coroutine_threadsafe(work, loop)
    except RuntimeError as error:
        work.close()
        raise OrchestratorUnavailable(f"the agent has stopped ({error})") from None


async def cross(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, T]) -> T:
    """Await a coroutine in another thread's loop; a cancellation here cancels it there.

    Raises:
        OrchestratorUnavailable: The loop has ended, and with it the agent's session.
    """
    return await asyncio.wrap_future(send(loop, work))


class IoThread:
    """A thread with an event loop that runs one coroutine to its end.

    Args:
        main: Creates the coroutine; called in the thread.

    Attributes:
        done: Completes when the coroutine ends, with its exception if it raised one.
        mailbox: Calls into the loop; None before the thread has started.
    """

    def __init__(self, main: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self.done: Future[None] = Future()
        self.mailbox: Mailbox | None = None
        self._main = main
        self._started: Future[asyncio.AbstractEventLoop] = Future()
        self._thread = threading.Thread(target=self._run, name="orki-io", daemon=True)

    def start(self) -> None:
        """Start the thread and return once its loop runs."""
        self._thread.start()
        self._started.result()

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The thread's event loop."""
        return self._started.result()

    def join(self, timeout: float) -> bool:
        """Wait for the thread's end; return whether it ended within `timeout` seconds."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            asyncio.run(self._guarded())
        except BaseException as error:
            if not self._started.done():
                self._started.set_exception(error)
            self.done.set_exception(error)
        else:
            self.done.set_result(None)

    async def _guarded(self) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(_handle_exception)
        self.mailbox = Mailbox(loop)
        self._started.set_result(loop)
        await self._main()


def _handle_exception(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    # If another loop of the process uses grpc.aio too, each event wakes both loops, and one finds nothing to read.
    if isinstance(context.get("exception"), BlockingIOError) and "_handle_events" in str(context.get("message", "")):
        return
    loop.default_exception_handler(context)


class LoopProbe:
    """Measures the lag of an event loop. The lag can be read from another thread, also while the loop is blocked."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lags: deque[float] = deque(maxlen=_REMEMBERED_LAGS)
        self._due = math.inf
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Start measuring; call it in the loop."""
        self._due = time.monotonic() + _PROBE_INTERVAL
        self._timer = self._loop.call_later(_PROBE_INTERVAL, self._tick)

    def stop(self) -> None:
        """Stop measuring; call it in the loop."""
        if self._timer is not None:
            self._timer.cancel()

    def worst_lag_us(self) -> int:
        """Return the worst lag of the last seconds in microseconds. An overdue tick counts with its lag so far."""
        worst = max(time.monotonic() - self._due, 0.0, *tuple(self._lags))
        return round(worst * 1_000_000)

    def _tick(self) -> None:
        now = time.monotonic()
        self._lags.append(now - self._due)
        self._due = now + _PROBE_INTERVAL
        self._timer = self._loop.call_later(_PROBE_INTERVAL, self._tick)


def resident_bytes() -> int:
    """Return the resident memory of this process; its peak where the system does not report the current value."""
    try:
        with open(_STATM, "rb") as statm:
            return int(statm.read().split()[1]) * _PAGE
    except (OSError, IndexError, ValueError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
