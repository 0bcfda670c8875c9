"""Crossing between threads: calls into a loop, joined into few wake-ups, and awaiting what another loop does."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from orki_contract.errors import OrchestratorUnavailable

__all__ = ["Mailbox", "cross", "in_thread", "send"]

T = TypeVar("T")

_log = logging.getLogger("orki.agent")


class Mailbox:
    """Calls from any thread into one loop, in their order. Many calls cost one wake-up."""

    __slots__ = ("_awake", "_calls", "_loop")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._calls: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self._awake = False

    def post(self, call: Callable[..., object], *arguments: Any) -> None:
        """Has `call` made in the loop, soon. Once the loop is closed nothing is made any more."""
        self._calls.append((call, arguments))
        # Two threads may both find it asleep: then it is woken twice, which is harmless. It is set back before the
        # calls are taken out, so none is left behind.
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
                _log.exception("a call into %s failed: a defect", self._loop)
        if self._calls and not self._awake:
            self._awake = True
            self._loop.call_soon(self._deliver)


async def in_thread(work: Callable[[], T]) -> T:
    """Awaits blocking work in a thread of its own, which leaves nothing behind in the loop's executor."""
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, name="orki-close", daemon=True).start()
    return await asyncio.wrap_future(done)


def send(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, T]) -> Future[T]:
    """Has another thread's loop do something. Context variables go along.

    Raises:
        OrchestratorUnavailable: The loop has ended, and with it the agent's session.
    """
    try:
        return asyncio.run_coroutine_threadsafe(work, loop)
    except RuntimeError as error:
        work.close()
        raise OrchestratorUnavailable(f"the agent has stopped ({error})") from None


async def cross(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, T]) -> T:
    """Awaits what another thread's loop does; a cancellation here cancels it there.

    Raises:
        OrchestratorUnavailable: As `send`.
    """
    return await asyncio.wrap_future(send(loop, work))
