"""Handlers of attempts: coroutines run on the user's loop, blocking handlers run in threads.

The I/O thread starts, cancels and directs an execution, also while user code blocks. The end of a handler becomes the
outcome of its attempt.
"""

from __future__ import annotations

import asyncio
import contextvars
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, NoReturn, TypeVar

from google.protobuf.message import Message

from orki_agent._checkpoints import checkpoint_payload, suspending
from orki_agent._execution import CURRENT_CONTEXT, Credits, Execution, HandlerContext
from orki_agent._outcomes import decode, text_of
from orki_agent._services import AgentServices, Handler, Offered
from orki_agent._threads import Mailbox
from orki_agent.hotpath._thread_pool import ThreadPool
from orki_contract import EventStream, SyncToolChannel, TaskChannel, ToolChannel
from orki_contract.errors import Cancelled, HandlerFailed, OrkiError
from orki_contract.trace import use_span
from orki_control import CURRENT_ATTEMPT
from orki_control.session import Outcome

C = TypeVar("C")
E = TypeVar("E", bound=Message)


class AsyncExecution(Execution):
    """A coroutine handler on the user's loop.

    Args:
        on_end: Called in the user's loop with the outcome.
        user: Mailbox of the user's loop.
        window: Maximum number of progress messages that are not stored.
    """

    def __init__(
        self,
        offered: Offered,
        handler: Handler,
        agent: AgentServices,
        on_end: Callable[[Outcome], None],
        user: Mailbox,
        window: int,
    ) -> None:
        super().__init__(offered, handler, agent, on_end)
        self._user = user
        self._task: asyncio.Task[Any] | None = None
        self.credits = Credits(window)
        self.credit_returned = asyncio.Event()
        self.directives: asyncio.Queue[bytes | None] = asyncio.Queue()

    def start(self) -> None:
        self._user.post(self._begin)

    def cancel(self) -> None:
        self.cancelled = True
        self._user.post(self._cancel_task)

    def direct(self, payload: bytes) -> None:
        self._user.post(self.directives.put_nowait, payload)

    def grant(self, count: int, size: int) -> None:
        self._user.post(self._granted, count, size)

    async def stored(self, payload: bytes) -> OrkiError | None:
        """Send a checkpoint and wait until it is stored, or for why it is not."""
        done: asyncio.Future[OrkiError | None] = asyncio.get_running_loop().create_future()

        def settle(error: OrkiError | None) -> None:
            if not done.done():
                done.set_result(error)

        self.agent.save_checkpoint(self.offered.attempt, payload, lambda error: self._user.post(settle, error))
        return await done

    # --- On the user's loop. ---

    def _begin(self) -> None:
        if self.cancelled:
            self.finish(None, Cancelled("cancelled before it started"))
            return
        context = contextvars.copy_context()
        context.run(CURRENT_ATTEMPT.set, self.offered.attempt)
        name = f"{self.handler.name} {self.offered.attempt.task_id}"
        self._task = asyncio.get_running_loop().create_task(self._run(), name=name, context=context)
        # A task that is cancelled before its first step never enters `_run`.
        self._task.add_done_callback(self._done)

    async def _run(self) -> Any:
        with use_span(self.offered.span):
            task = self.handler.task
            request = decode(task.request, self.offered.request, self.handler.name)
            context = AsyncHandlerContext(self)
            CURRENT_CONTEXT.set(context)
            try:
                return await self.handler.call(request, context)
            except (SystemExit, KeyboardInterrupt) as error:
                # asyncio would end the whole agent.
                raise HandlerFailed(f"the handler raised {type(error).__name__}: {text_of(error)}") from error

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

    def _granted(self, count: int, size: int) -> None:
        self.credits.give(count, size)
        self.credit_returned.set()


class AsyncHandlerContext(HandlerContext):
    """The context of a coroutine handler; implements `orki_contract.TaskContext`."""

    __slots__ = ()

    _execution: AsyncExecution

    async def progress(self, delta: Any) -> None:
        """Send progress. While too much is not stored, the contract's progress policy applies.

        Raises:
            InvalidArgument: `delta` is not the method's progress message.
            TooLarge: The orchestrator accepts no message of that size.
        """
        attempt, payload = self._progress_payload(delta)
        execution = self._execution
        while not execution.credits.take(len(payload)):
            execution.credit_returned.clear()
            await execution.credit_returned.wait()
        execution.agent.send_progress(attempt, payload)
        execution.meter.check()

    async def save_checkpoint(self, checkpoint: Any) -> None:
        """Save a checkpoint for the next attempt, in place of the last one. Returns after it is stored.

        Raises:
            InvalidArgument: It is not the method's checkpoint message; bytes if the method declares none.
            TooLarge: It is larger than 192 KiB.
            StoreFull: The orchestrator's store is out of memory.
            StaleFence: The agent no longer holds the attempt.
            ProtocolVersion: The orchestrator stores no checkpoints.
            BudgetUsedUp: A budget of the task is used up; the checkpoint is stored. Do not catch it.
        """
        execution = self._execution
        payload = checkpoint_payload(execution.handler, checkpoint)
        stored = await execution.stored(payload)
        if stored is not None:
            raise stored
        execution.checkpoint = payload
        execution.meter.check()

    async def suspend(self, question: str = "", *, deadline: float | None = None) -> NoReturn:
        """End this attempt until the task is answered. It raises an exception, which must not be caught.

        Args:
            question: What is asked, for people; at most 4,000 characters.
            deadline: Seconds after which the task goes on without an answer; None for no limit.

        Raises:
            InvalidArgument: The question is too long, or the deadline is not positive.
        """
        raise suspending(question, deadline)

    async def directives(self) -> AsyncIterator[Any]:
        """Yield directives as they arrive, until the attempt ends."""
        execution = self._execution
        directive = execution.handler.task.directive
        while not execution.ended:
            payload = await execution.directives.get()
            if payload is None:
                execution.directives.put_nowait(None)  # Other iterators must end as well.
                return
            yield decode(directive, payload, execution.handler.name)

    async def publish(self, stream: EventStream[E, Any], event: E) -> None:
        """Publish an event in the attempt's trace; return once the server has it."""
        await self._execution.agent.publish(stream, event, self.span)

    def tools(self, client: Callable[[ToolChannel], C]) -> C:
        """Return a client of tools over the hot path, such as the generated `SourceToolServiceClient`."""
        return client(self._execution.agent.tool_channel())

    @property
    def client(self) -> TaskChannel:
        """Channel for submitting further tasks in the same trace."""
        return self._execution.agent.task_channel()


class SyncExecution(Execution):
    """A blocking handler in a thread. Python cannot stop a thread, so a handler must look for its cancel.

    Args:
        on_end: Called in the handler's thread with the outcome.
        pool: Provides the thread.
        window: Maximum number of progress messages that are not stored.
    """

    def __init__(
        self,
        offered: Offered,
        handler: Handler,
        agent: AgentServices,
        on_end: Callable[[Outcome], None],
        pool: ThreadPool,
        window: int,
    ) -> None:
        super().__init__(offered, handler, agent, on_end)
        self._pool = pool
        self._credits = Credits(window)
        self._changed = threading.Condition()
        self.directives: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()

    def start(self) -> None:
        # The I/O thread runs in no attempt's context, so the copy carries nothing over.
        context = contextvars.copy_context()
        self._pool.start(lambda: context.run(self._work))

    def cancel(self) -> None:
        self.cancelled = True
        self.directives.put(None)
        with self._changed:
            self._changed.notify_all()

    def direct(self, payload: bytes) -> None:
        self.directives.put(payload)

    def grant(self, count: int, size: int) -> None:
        with self._changed:
            self._credits.give(count, size)
            self._changed.notify_all()

    def stored(self, payload: bytes) -> OrkiError | None:
        """Send a checkpoint and wait until it is stored, or for why it is not.

        Raises:
            Cancelled: The attempt was cancelled meanwhile.
        """
        outcomes: list[OrkiError | None] = []

        def settle(error: OrkiError | None) -> None:
            with self._changed:
                outcomes.append(error)
                self._changed.notify_all()

        self.agent.save_checkpoint(self.offered.attempt, payload, settle)
        with self._changed:
            while not outcomes:
                if self.cancelled:
                    raise Cancelled(f"{self.offered.attempt} was cancelled")
                self._changed.wait()
        return outcomes[0]

    def take_credit(self, size: int) -> None:
        """Wait until a delta of this size may be sent.

        Raises:
            Cancelled: The attempt was cancelled meanwhile.
        """
        with self._changed:
            while not self._credits.take(size):
                if self.cancelled:
                    raise Cancelled(f"{self.offered.attempt} was cancelled")
                self._changed.wait()

    def _work(self) -> None:
        CURRENT_ATTEMPT.set(self.offered.attempt)
        response: object = None
        error: BaseException | None = None
        try:
            with use_span(self.offered.span):
                if self.cancelled:
                    raise Cancelled("cancelled before it started")
                task = self.handler.task
                request = decode(task.request, self.offered.request, self.handler.name)
                context = SyncHandlerContext(self)
                CURRENT_CONTEXT.set(context)
                response = self.handler.call(request, context)
        except BaseException as raised:
            error = raised
        self.finish(response, error)


class SyncHandlerContext(HandlerContext):
    """The context of a blocking handler; implements `orki_contract.SyncTaskContext`."""

    __slots__ = ()

    _execution: SyncExecution

    def progress(self, delta: Any) -> None:
        """Send progress. While too much is not stored, the contract's progress policy applies.

        Raises:
            InvalidArgument: `delta` is not the method's progress message.
            TooLarge: The orchestrator accepts no message of that size.
            Cancelled: The attempt was cancelled during the wait.
        """
        attempt, payload = self._progress_payload(delta)
        self._execution.take_credit(len(payload))
        self._execution.agent.send_progress(attempt, payload)
        self._execution.meter.check()

    def save_checkpoint(self, checkpoint: Any) -> None:
        """Save a checkpoint for the next attempt, in place of the last one. Returns after it is stored.

        Raises:
            InvalidArgument: It is not the method's checkpoint message; bytes if the method declares none.
            TooLarge: It is larger than 192 KiB.
            StoreFull: The orchestrator's store is out of memory.
            StaleFence: The agent no longer holds the attempt.
            ProtocolVersion: The orchestrator stores no checkpoints.
            BudgetUsedUp: A budget of the task is used up; the checkpoint is stored. Do not catch it.
            Cancelled: The attempt was cancelled during the wait.
        """
        execution = self._execution
        payload = checkpoint_payload(execution.handler, checkpoint)
        stored = execution.stored(payload)
        if stored is not None:
            raise stored
        execution.checkpoint = payload
        execution.meter.check()

    def suspend(self, question: str = "", *, deadline: float | None = None) -> NoReturn:
        """End this attempt until the task is answered. It raises an exception, which must not be caught.

        Args:
            question: What is asked, for people; at most 4,000 characters.
            deadline: Seconds after which the task goes on without an answer; None for no limit.

        Raises:
            InvalidArgument: The question is too long, or the deadline is not positive.
        """
        raise suspending(question, deadline)

    def directives(self) -> Iterator[Any]:
        """Yield directives as they arrive, until the attempt ends or is cancelled."""
        execution = self._execution
        directive = execution.handler.task.directive
        while (payload := execution.directives.get()) is not None:
            yield decode(directive, payload, execution.handler.name)
        execution.directives.put(None)  # Other iterators must end as well.

    def publish(self, stream: EventStream[E, Any], event: E) -> None:
        """Publish an event in the attempt's trace; return once the server has it."""
        self._execution.agent.publish_blocking(stream, event, self.span)

    def tools(self, client: Callable[[SyncToolChannel], C]) -> C:
        """Return a client of tools over the hot path, such as the generated `SourceToolServiceSyncClient`."""
        return client(self._execution.agent.sync_tool_channel())

    def raise_if_cancelled(self) -> None:
        """Raise `Cancelled` if the attempt was cancelled; call it in long loops."""
        if self._execution.cancelled:
            raise Cancelled(f"{self._execution.offered.attempt} was cancelled")
