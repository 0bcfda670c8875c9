"""Handlers that block: a thread for each attempt."""

from __future__ import annotations

import contextvars
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from google.protobuf.message import Message

from orki_agent.catalog import Handler
from orki_agent.execution import Execution, HandlerContext
from orki_agent.hotpath._thread_pool import ThreadPool
from orki_agent.outcomes import decode
from orki_agent.surroundings import CURRENT_ATTEMPT, Offered, Surroundings
from orki_contract import EventStream, SyncToolChannel
from orki_contract.errors import Cancelled
from orki_contract.trace import use_span
from orki_control.session import Outcome

__all__ = ["SyncExecution", "SyncHandlerContext"]

C = TypeVar("C")
E = TypeVar("E", bound=Message)


class SyncExecution(Execution):
    """A handler in a thread. Python cannot stop a thread: a cancel is seen where the handler looks for it.

    Args:
        offered: What it is started with.
        handler: What runs.
        surroundings: The agent.
        on_end: Called in the handler's thread with the outcome.
        crew: Gives the thread.
        window: Progress that may be on its way.
    """

    def __init__(
        self,
        offered: Offered,
        handler: Handler,
        surroundings: Surroundings,
        on_end: Callable[[Outcome], None],
        crew: ThreadPool,
        window: int,
    ) -> None:
        super().__init__(offered, handler, surroundings, on_end)
        self._crew = crew
        self._credits = window
        self._changed = threading.Condition()
        self.directives: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()

    def start(self) -> None:
        """Begins at once, in a thread."""
        # The I/O thread runs in no attempt's context, so a plain copy carries nothing over.
        context = contextvars.copy_context()
        self._crew.start(lambda: context.run(self._work))

    def cancel(self) -> None:
        """Sets `cancelled`, and wakes the handler where it waits in its context."""
        self.cancelled = True
        self.directives.put(None)
        with self._changed:
            self._changed.notify_all()

    def direct(self, payload: bytes) -> None:
        """Hands over a directive."""
        self.directives.put(payload)

    def grant(self, count: int) -> None:
        """Opens the window again."""
        with self._changed:
            self._credits += count
            self._changed.notify_all()

    def take_credit(self) -> None:
        """Waits until progress may leave.

        Raises:
            Cancelled: Somebody asked for the attempt's end meanwhile.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._credits > 0 or self.cancelled)
            if self._credits < 1:
                raise Cancelled(f"{self.offered.attempt} was cancelled")
            self._credits -= 1

    # --- in the handler's thread ---

    def _work(self) -> None:
        CURRENT_ATTEMPT.set(self.offered.attempt)
        response: object = None
        error: BaseException | None = None
        try:
            with use_span(self.offered.span):
                response = self._call()
        except BaseException as raised:
            error = raised
        self.finish(response, error)

    def _call(self) -> Any:
        if self.cancelled:
            raise Cancelled("cancelled before it started")
        task = self.handler.task
        request = decode(task.request, self.offered.request, task.contract.full_name)
        return self.handler.call(request, SyncHandlerContext(self))


class SyncHandlerContext(HandlerContext):
    """What a sync handler gets; implements `orki_contract.SyncTaskContext`."""

    __slots__ = ()

    _execution: SyncExecution

    def progress(self, delta: Any) -> None:
        """Sends news to whoever watches; waits while too much of it is on its way.

        Raises:
            InvalidArgument: It is not the method's progress message.
            TooLarge: The orchestrator takes no message of that size.
            Cancelled: Somebody asked for the attempt's end while it waited.
        """
        attempt, payload = self._progress_payload(delta)
        self._execution.take_credit()
        self._execution.surroundings.send_progress(attempt, payload)

    def directives(self) -> Iterator[Any]:
        """Directives as they come; ends when the attempt does, or its end was asked for."""
        execution = self._execution
        directive = execution.handler.task.directive
        while (payload := execution.directives.get()) is not None:
            yield decode(directive, payload, execution.handler.task.contract.full_name)
        execution.directives.put(None)  # for whoever else iterates

    def publish(self, stream: EventStream[E, Any], event: E) -> None:
        """Publishes an event in the attempt's trace; returns once the server has it."""
        self._execution.surroundings.publish_blocking(stream, event, self.span)

    def tools(self, client: Callable[[SyncToolChannel], C]) -> C:
        """A sync client of tools over the hot path, such as the generated `SourceToolServiceSyncClient`."""
        return client(self._execution.surroundings.sync_tool_channel())

    def raise_if_cancelled(self) -> None:
        """Raises `Cancelled` once somebody has asked for the end of the attempt; call it in long loops."""
        if self._execution.cancelled:
            raise Cancelled(f"{self._execution.offered.attempt} was cancelled")
