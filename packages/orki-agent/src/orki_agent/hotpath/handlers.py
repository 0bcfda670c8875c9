"""The event loop on which a bridge's async handlers run, in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from contextvars import Context
from typing import Any

from orki_agent.hotpath.connection import Connection
from orki_agent.hotpath.frames import encode_error
from orki_agent.hotpath.served import Call, error_frame, reply_frame
from orki_contract.errors import ToolCancelled

__all__ = ["HandlerLoop"]


class HandlerLoop:
    """Runs each async call as a task; a cancelled call is a cancelled task."""

    def __init__(self, max_frame_bytes: int) -> None:
        self._max_frame_bytes = max_frame_bytes
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._run, name="orki-tools-async", daemon=True)
        self._thread.start()

    def start(self, connection: Connection, call: Call, request: Any, context: Context) -> None:
        """Runs the handler; its answer goes to `connection.finish`."""
        try:
            self._loop.call_soon_threadsafe(self._start, connection, call, request, context)
        except RuntimeError:
            answer = encode_error(call.correlation, ToolCancelled("the bridge stops"))
            connection.finish(call, answer, may_block=True)

    def close(self, seconds: float) -> bool:
        """Cancels what still runs and ends the loop; True when its thread has ended."""
        self._loop.call_soon_threadsafe(self._stop)
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            while self._tasks:
                self._loop.run_until_complete(asyncio.gather(*self._tasks, return_exceptions=True))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
        finally:
            asyncio.set_event_loop(None)
            self._loop.close()

    def _stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        self._loop.stop()

    def _start(self, connection: Connection, call: Call, request: Any, context: Context) -> None:
        task = self._loop.create_task(self._serve(connection, call, request), context=context)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        call.cancel = self._canceller(task)
        if call.cancelled:  # nobody could tell the task until now
            task.cancel()

    def _canceller(self, task: asyncio.Task[None]) -> Callable[[], None]:
        def cancel() -> None:
            # When the loop has ended, so has the task.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(task.cancel)

        return cancel

    async def _serve(self, connection: Connection, call: Call, request: Any) -> None:
        try:
            reply = await call.tool.handler(request, call)
        except BaseException as error:
            call.cancelled = call.cancelled or isinstance(error, asyncio.CancelledError)
            connection.finish(call, error_frame(call, error), may_block=False)
            return
        connection.finish(call, reply_frame(call, reply, self._max_frame_bytes), may_block=False)
