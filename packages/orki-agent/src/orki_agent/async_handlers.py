"""Handlers that are coroutines: a task on the user's loop for each attempt."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

from google.protobuf.message import Message

from orki_agent.catalog import Handler
from orki_agent.crossing import Mailbox
from orki_agent.execution import Execution, HandlerContext
from orki_agent.outcomes import decode
from orki_agent.surroundings import CURRENT_ATTEMPT, Offered, Surroundings
from orki_contract import EventStream, TaskChannel, ToolChannel
from orki_contract.errors import Cancelled, HandlerFailed
from orki_contract.trace import use_span
from orki_control.session import Outcome

__all__ = ["AsyncExecution", "AsyncHandlerContext"]

C = TypeVar("C")
E = TypeVar("E", bound=Message)


class AsyncExecution(Execution):
    """A handler on the user's loop.

    Args:
        offered: What it is started with.
        handler: What runs.
        surroundings: The agent.
        on_end: Called in the user's loop with the outcome.
        user: Mailbox of the user's loop.
        window: Progress that may be on its way.
    """

    def __init__(
        self,
        offered: Offered,
        handler: Handler,
        surroundings: Surroundings,
        on_end: Callable[[Outcome], None],
        user: Mailbox,
        window: int,
    ) -> None:
        super().__init__(offered, handler, surroundings, on_end)
        self._user = user
        self._task: asyncio.Task[Any] | None = None
        self.credits = window
        self.room = asyncio.Event()
        self.directives: asyncio.Queue[bytes | None] = asyncio.Queue()

    def start(self) -> None:
        """Begins, soon, on the user's loop."""
        self._user.post(self._begin)

    def cancel(self) -> None:
        """Sets `cancelled` at once, and cancels the task as soon as the user's loop runs."""
        self.cancelled = True
        self._user.post(self._cancel_task)

    def direct(self, payload: bytes) -> None:
        """Hands over a directive, soon."""
        self._user.post(self.directives.put_nowait, payload)

    def grant(self, count: int) -> None:
        """Opens the window again."""
        self._user.post(self._granted, count)

    # --- on the user's loop ---

    def _begin(self) -> None:
        if self.cancelled:
            self.finish(None, Cancelled("cancelled before it started"))
            return
        context = contextvars.copy_context()
        context.run(CURRENT_ATTEMPT.set, self.offered.attempt)
        name = f"{self.handler.task.contract.full_name} {self.offered.attempt.task_id}"
        self._task = asyncio.get_running_loop().create_task(self._run(), name=name, context=context)
        # Not in `_run`: a task that is cancelled before its first step never gets there.
        self._task.add_done_callback(self._done)

    async def _run(self) -> Any:
        with use_span(self.offered.span):
            task = self.handler.task
            request = decode(task.request, self.offered.request, task.contract.full_name)
            try:
                return await self.handler.call(request, AsyncHandlerContext(self))
            except (SystemExit, KeyboardInterrupt) as error:
                # asyncio would end the whole agent with it.
                raise HandlerFailed(f"the handler raised {type(error).__name__}: {error}") from error

    def _done(self, task: asyncio.Task[Any]) -> None:
        self.directives.put_nowait(None)
        if task.cancelled():
            self.finish(None, asyncio.CancelledError())
        elif (error := task.exception()) is not None:
            self.finish(None, error)
        else:
            self.finish(task.result(), None)

    def _cancel_task(self) -> None:
        if self._task is not None:
            self._task.cancel("the attempt was cancelled")

    def _granted(self, count: int) -> None:
        self.credits += count
        self.room.set()


class AsyncHandlerContext(HandlerContext):
    """What an async handler gets; implements `orki_contract.TaskContext`."""

    __slots__ = ()

    _execution: AsyncExecution

    async def progress(self, delta: Any) -> None:
        """Sends news to whoever watches; waits while too much of it is on its way.

        Raises:
            InvalidArgument: It is not the method's progress message.
            TooLarge: The orchestrator takes no message of that size.
        """
        attempt, payload = self._progress_payload(delta)
        execution = self._execution
        while execution.credits < 1:
            execution.room.clear()
            await execution.room.wait()
        execution.credits -= 1
        execution.surroundings.send_progress(attempt, payload)

    async def directives(self) -> AsyncIterator[Any]:
        """Directives as they come; ends when the attempt does."""
        execution = self._execution
        directive = execution.handler.task.directive
        while not execution.ended:
            payload = await execution.directives.get()
            if payload is None:
                execution.directives.put_nowait(None)  # for whoever else iterates
                return
            yield decode(directive, payload, execution.handler.task.contract.full_name)

    async def publish(self, stream: EventStream[E, Any], event: E) -> None:
        """Publishes an event in the attempt's trace; returns once the server has it."""
        await self._execution.surroundings.publish(stream, event, self.span)

    def tools(self, client: Callable[[ToolChannel], C]) -> C:
        """A client of tools over the hot path, such as the generated `SourceToolServiceClient`."""
        return client(self._execution.surroundings.tool_channel())

    @property
    def client(self) -> TaskChannel:
        """For submitting further tasks, in the same trace."""
        return self._execution.surroundings.task_channel()
