"""The I/O thread: one event loop beside the user's, and the only one of the process that speaks gRPC.

grpc.aio serves one loop for each process well; a heartbeat must not wait for user code. Both ask for this thread.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any

from orki_agent.crossing import Mailbox

__all__ = ["IoThread"]

_log = logging.getLogger("orki.agent")


class IoThread:
    """A thread with an event loop that runs one coroutine to its end.

    Args:
        main: Makes the coroutine; called in the thread.

    Attributes:
        done: The coroutine's end; its error, if it had one.
        mailbox: Calls into its loop; None before it has started.
    """

    def __init__(self, main: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self.done: Future[None] = Future()
        self.mailbox: Mailbox | None = None
        self._main = main
        self._started: Future[asyncio.AbstractEventLoop] = Future()
        self._thread = threading.Thread(target=self._run, name="orki-io", daemon=True)

    def start(self) -> None:
        """Starts the thread; returns once its loop runs."""
        self._thread.start()
        self._started.result()

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """Its loop."""
        return self._started.result()

    def join(self, timeout: float) -> bool:
        """Waits for the thread's end; whether it came."""
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
    # Where another loop of the process speaks grpc.aio too, each event wakes both, and one finds nothing to read.
    if isinstance(context.get("exception"), BlockingIOError) and "_handle_events" in str(context.get("message", "")):
        return
    loop.default_exception_handler(context)
