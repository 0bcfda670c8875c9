"""Handlers of attempts: coroutines run on the user's loop, blocking handlers run in threads.

The I/O thread starts, cancels and directs an execution, also while user code blocks. The end of a handler becomes the
outcome of its attempt.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, ClassVar, Final, TypeVar

from google.protobuf.message import Message

from orki.control.v1.attempt_pb2 import Failure
from orki.events.v1.usage_orki import USAGE
from orki.events.v1.usage_pb2 import UsageEvent
from orki_agent._outcomes import decode, log_error, name_of, outcome_of_error, outcome_of_response, text_of
from orki_agent._services import CURRENT_ATTEMPT, AgentServices, Handler, Offered, place_of
from orki_agent._threads import Mailbox
from orki_agent.hotpath._thread_pool import ThreadPool
from orki_contract import EventStream, SyncToolChannel, TaskChannel, ToolChannel
from orki_contract.errors import Cancelled, HandlerFailed, InvalidArgument, TooLarge
from orki_contract.trace import Span, use_span
from orki_control.session import DEFAULT_PROGRESS_BYTES, AttemptKey, Outcome

C = TypeVar("C")
E = TypeVar("E", bound=Message)

_log = logging.getLogger("orki.agent")

_MOST_TOKENS: Final = 2**64 - 1


class Execution(ABC):
    """A running handler. The I/O thread calls `cancel`, `direct` and `grant`, also while user code blocks.

    Attributes:
        offered: The input of the handler.
        handler: The handler.
        agent: The agent, for the handler's context.
        cancelled: Whether the attempt was cancelled.
        ended: Whether the handler has returned or raised.
        ends_within: Seconds after `stop` in which a handler ends, if it does.
    """

    ends_within: ClassVar[float] = 0.25

    def __init__(
        self, offered: Offered, handler: Handler, agent: AgentServices, on_end: Callable[[Outcome], None]
    ) -> None:
        self.offered = offered
        self.handler = handler
        self.agent = agent
        self.cancelled = False
        self.ended = False
        self._on_end = on_end

    @abstractmethod
    def start(self) -> None:
        """Start the handler."""

    @abstractmethod
    def cancel(self) -> None:
        """Cancel the handler. A repeated call cancels again where that is possible."""

    def stop(self) -> None:
        """End a handler that does not end after its cancel, as far as that is possible."""
        self.cancel()

    @abstractmethod
    def direct(self, payload: bytes) -> None:
        """Deliver a directive."""

    @abstractmethod
    def grant(self, count: int, size: int) -> None:
        """Return credits for progress that was stored: its number and its payload bytes."""

    def finish(self, response: object, error: BaseException | None) -> None:
        """Take the handler's response or exception. Call it once, in the handler's thread or loop."""
        self.ended = True
        if error is None:
            outcome = outcome_of_response(self.handler, response)
        else:
            outcome = outcome_of_error(error, cancelled=self.cancelled)
        try:
            self._log_end(outcome, error)
        finally:
            self._on_end(outcome)

    def _log_end(self, outcome: Outcome, error: BaseException | None) -> None:
        # Only the log carries the traceback, and the place of a handler that returned something else.
        what = f"{self.offered.attempt} of {self.handler.name}"
        if error is None:
            if isinstance(outcome, Failure):
                _log.warning("%s failed: %s (%s)", what, outcome.message, place_of(self.handler.call))
        elif self.cancelled:
            _log.info("%s ended after its cancel: %s: %s", what, name_of(type(error)), text_of(error))
        else:
            log_error(_log, logging.WARNING, f"{what} failed", error)


class Credits:
    """The progress that a handler may send before some of it is stored, in count and payload bytes."""

    __slots__ = ("_count", "_size", "_window")

    def __init__(self, window: int, size: int = DEFAULT_PROGRESS_BYTES) -> None:
        self._window = window
        self._count = window
        self._size = size

    def take(self, size: int) -> bool:
        """Take the credits for one delta, if there are enough. A delta that is too large is sent alone."""
        if not self._count or (size > self._size and self._count < self._window):
            return False
        self._count -= 1
        self._size -= size
        return True

    def give(self, count: int, size: int) -> None:
        """Return credits."""
        self._count += count
        self._size += size


class HandlerContext:
    """The common part of async and sync contexts; see `orki_contract.TaskContext`."""

    __slots__ = ("_execution",)

    def __init__(self, execution: Execution) -> None:
        self._execution = execution

    @property
    def task_id(self) -> str:
        """The task id."""
        return self._execution.offered.attempt.task_id

    @property
    def attempt(self) -> int:
        """Number of the attempt, from 1."""
        return self._execution.offered.attempt.attempt

    @property
    def fence(self) -> int:
        """Number that rises with every attempt. Pass it to downstream stores, so that they refuse older writers."""
        return self._execution.offered.attempt.fence

    @property
    def span(self) -> Span:
        """The attempt's span."""
        return self._execution.offered.span

    @property
    def cancelled(self) -> bool:
        """Whether the attempt was cancelled."""
        return self._execution.cancelled

    def usage(
        self,
        *,
        model: str,
        input_tokens: int,
        output_tokens: int,
        provider: str = "",
        cached_tokens: int = 0,
        cost_micros: int = 0,
    ) -> None:
        """Record the use of a language model, with its cost in millionths of a US dollar. Never blocks on I/O.

        Raises:
            InvalidArgument: `model` is empty, or a number is negative or not an integer.
        """
        if not model:
            raise InvalidArgument("usage: model is empty; name the model that was used")
        counts = {
            "input_tokens": input_tokens,
            "output_tokens": output_tokens,
            "cached_tokens": cached_tokens,
            "cost_micros": cost_micros,
        }
        for name, value in counts.items():
            known: object = value
            if isinstance(known, bool) or not isinstance(known, int) or not 0 <= known <= _MOST_TOKENS:
                raise InvalidArgument(f"usage: {name} is {value!r}; it must be an integer of at least 0")
        attempt = self._execution.offered.attempt
        event = UsageEvent(
            agent_id=self._execution.agent.agent_id,
            task_id=attempt.task_id,
            attempt=attempt.attempt,
            provider=provider,
            model=model,
            **counts,
        )
        self._execution.agent.collect(USAGE, event, self.span)

    def _progress_payload(self, delta: Any) -> tuple[AttemptKey, bytes]:
        execution = self._execution
        expected = execution.handler.task.progress
        name = execution.handler.name
        if not isinstance(delta, expected) or not isinstance(delta, Message):
            declared = expected.__name__ if issubclass(expected, Message) else "no progress"
            raise InvalidArgument(f"{name} declares {declared} as its progress, not {type(delta).__name__}")
        payload = delta.SerializeToString()
        most = execution.agent.max_payload_bytes
        if len(payload) > most:
            raise TooLarge(f"{name}: a progress message has {len(payload)} bytes; the orchestrator accepts {most}")
        return execution.offered.attempt, payload


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
            try:
                return await self.handler.call(request, AsyncHandlerContext(self))
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
                response = self.handler.call(request, SyncHandlerContext(self))
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
