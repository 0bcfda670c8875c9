"""The handle of one submitted task, and the watch that follows a task to its end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Final, Generic, Protocol, TypeVar

from google.protobuf.message import DecodeError, Message

from orki.control.v1.attempt_pb2 import AttemptRef, Failure, TaskState
from orki.control.v1.task_pb2 import ProgressPosition, TaskSnapshot, WatchRequest, WatchResponse
from orki_contract import ProgressGap, Task
from orki_contract.backoff import Jitter, JitterOptions
from orki_contract.errors import (
    Cancelled,
    InvalidArgument,
    InvalidResponse,
    OrchestratorUnavailable,
    OrkiError,
    Reason,
    WaitTimeout,
    error_for,
)
from orki_contract.trace import Span, parse_traceparent
from orki_control.submitter._requests import seen
from orki_control.transport import typed_error

if TYPE_CHECKING:
    from orki_control._links import Links

R = TypeVar("R", bound=Message)
P = TypeVar("P")
D = TypeVar("D")

_log = logging.getLogger("orki.control")

TERMINAL_STATES: Final = frozenset(
    {TaskState.TASK_STATE_SUCCEEDED, TaskState.TASK_STATE_FAILED, TaskState.TASK_STATE_CANCELLED}
)
"""States that a task never leaves."""


class TaskCalls(Protocol):
    """The calls that a handle makes; implemented by `Client`."""

    def watch(self, task_id: str, *, after: str = "") -> AsyncGenerator[WatchResponse, None]: ...
    async def wait_end(self, task_id: str) -> TaskSnapshot: ...
    async def cancel(self, task_id: str, message: str = "") -> TaskSnapshot: ...
    async def direct(self, task_id: str, directive: Message | bytes) -> AttemptRef: ...
    async def answer(self, task_id: str, answer: Message | bytes, *, suspension: int = 0) -> TaskSnapshot: ...


class SubmittedTask(Generic[R, P, D]):
    """A submitted task; implements `orki_contract.TaskHandle`.

    Attributes:
        snapshot: The task when it was last read. It may hold no more than the task id.
    """

    __slots__ = ("_calls", "_ended", "_task", "snapshot")

    def __init__(
        self,
        calls: TaskCalls,
        task: Task[Any, R, P, D],
        snapshot: TaskSnapshot,
        ended: asyncio.Future[Any] | None = None,
    ) -> None:
        """Create a handle.

        Args:
            calls: The client.
            task: The method.
            snapshot: What is known of the task.
            ended: Receives the terminal snapshot, if the task is watched already, or an error.
        """
        self._calls = calls
        self._task = task
        self._ended = ended
        self.snapshot = snapshot

    def __repr__(self) -> str:
        return f"<{self._task.contract.full_name} task {self.task_id}>"

    @property
    def task_id(self) -> str:
        """The task id."""
        return self.snapshot.task_id

    @property
    def span(self) -> Span | None:
        """The task's span; None before the task was read."""
        return parse_traceparent(self.snapshot.traceparent)

    async def progress(self, on_gap: Callable[[ProgressGap], object] | None = None) -> AsyncIterator[P]:
        """Yield the progress of all attempts, from the beginning until the task ends.

        While the orchestrator is unavailable this waits without a limit; use `asyncio.timeout` to bound it.

        Args:
            on_gap: Called in place of deltas that are missing, before the next delta. Without it, each gap is logged
                as a warning.
        """
        parse = self._task.progress
        async with aclosing(self._watch()) as found:
            async for news in found:
                if isinstance(news, ProgressGap):
                    (on_gap or self._warn)(news)
                elif news is not None and issubclass(parse, Message):
                    yield self._decoded(parse, news)

    def _warn(self, gap: ProgressGap) -> None:
        text = "task %s: progress %d to %d of attempt %d is missing"
        _log.warning(text, self.task_id, gap.first, gap.last, gap.attempt)

    async def result(self, timeout: float | None = None) -> R:
        """Wait for the task's end and return the response.

        The wait continues over lost connections, also while the orchestrator is unavailable. The client's `patience`
        does not bound it.

        Args:
            timeout: Maximum wait in seconds; None for no limit. The task goes on after a timeout.

        Raises:
            WaitTimeout: The task did not end within `timeout`.
            OrkiError: The typed error of a task that failed or was cancelled.
        """
        if self.snapshot.state not in TERMINAL_STATES:
            try:
                async with asyncio.timeout(timeout):
                    await self._wait_end()
            except TimeoutError:
                raise WaitTimeout(
                    f"task {self.task_id} did not end within {timeout} s; it goes on, and you can wait for it again"
                ) from None
        if self.snapshot.state != TaskState.TASK_STATE_SUCCEEDED:
            raise error_of(self.snapshot)
        response: R = self._decoded(self._task.response, self.snapshot.response)
        return response

    async def _wait_end(self) -> None:
        ended = self._ended
        if ended is not None:
            outcome = await asyncio.shield(ended)
            if isinstance(outcome, TaskSnapshot):
                self.snapshot = outcome
                return
            # The watch failed; another one either succeeds or tells why not.
            self._ended = None
        self.snapshot = await self._calls.wait_end(self.task_id)

    async def cancel(self, message: str = "") -> None:
        """Cancel the task; has no effect when it has ended."""
        self.snapshot = await self._calls.cancel(self.task_id, message)

    async def direct(self, directive: D) -> None:
        """Send a directive to the running attempt.

        Raises:
            NotDirectable: The task is not running.
        """
        assert isinstance(directive, Message)
        await self._calls.direct(self.task_id, directive)

    async def answer(self, answer: Message | bytes, *, suspension: int = 0) -> None:
        """Answer the suspended task, which goes on; see `Client.answer`.

        Raises:
            InvalidArgument: The answer is not the method's answer message.
            NotSuspended: The task is not suspended.
            AlreadyAnswered: It was answered before, with another answer.
        """
        expected = self._task.answer
        if not isinstance(answer, expected):
            method = self._task.contract.full_name
            raise InvalidArgument(f"{method} declares {expected.__name__} as its answer, not {type(answer).__name__}")
        self.snapshot = await self._calls.answer(self.task_id, answer, suspension=suspension)

    async def _watch(self) -> AsyncGenerator[bytes | ProgressGap | None, None]:
        """Yield payloads of progress, gaps, and None for each snapshot, which is stored."""
        async with aclosing(self._calls.watch(self.task_id)) as responses:
            async for response in responses:
                if response.WhichOneof("news") == "task":
                    self.snapshot = response.task
                    yield None
                elif response.WhichOneof("news") == "progress":
                    yield response.progress.payload
                elif response.WhichOneof("news") == "gap":
                    gap = response.gap
                    yield ProgressGap(gap.attempt, gap.first_index, gap.last_index)

    def _decoded(self, message: type[Any], payload: bytes) -> Any:
        try:
            return message.FromString(payload)
        except DecodeError as error:
            raise InvalidResponse(
                f"task {self.task_id}: the payload is not a {message.__name__} ({error}); the contracts differ"
            ) from None


async def watch_task(
    links: Links, task_id: str, *, after: str, backoff: JitterOptions, position: ProgressPosition | None = None
) -> AsyncGenerator[WatchResponse, None]:
    """Yield snapshots and progress of a task; the last one is a terminal snapshot.

    A stream that ends earlier, cleanly or not, is a lost connection. The watch is opened again at the next address and
    after the last progress that was received, without a maximum number of tries.

    Raises:
        UnknownTask: No task has this id.
    """
    import grpc

    jitter: Jitter | None = None
    loop = asyncio.get_running_loop()
    while True:
        opened_at = loop.time()
        wait = 0.0
        with await links.current() as link:
            call = link.tasks.Watch(WatchRequest(task_id=task_id, after=after, position=position, batched=True))
            try:
                while True:
                    response = await call.read()
                    if response is grpc.aio.EOF:
                        raise OrchestratorUnavailable(f"{link.peer}: the watch of task {task_id} ended before the task")
                    assert isinstance(response, WatchResponse)
                    for update in response.batch.updates if response.HasField("batch") else (response,):
                        after, position = seen(update) or (after, position)
                        yield update
                        if update.HasField("task") and update.task.state in TERMINAL_STATES:
                            return
            except Exception as raised:
                error = typed_error(raised, str(link.peer))
                if not error.retryable:
                    raise error from None
                links.failed(link)
                jitter = jitter or Jitter(backoff)
                wait = jitter.failed(loop.time() - opened_at)
                _log.info("watching task %s: %s; trying again in %.2f s", task_id, error.message, wait)
            finally:
                # grpc.aio never ends a call that is only dropped.
                call.cancel()
        await asyncio.sleep(wait)


def error_of(task: TaskSnapshot) -> OrkiError:
    """Return the typed error of a task that failed or was cancelled."""
    failure: Failure = task.failure
    text = f"{failure.error_type}: {failure.message}" if failure.error_type else failure.message
    where = f"task {task.task_id} ({task.method}), attempt {task.attempt.attempt}: "
    if task.state == TaskState.TASK_STATE_CANCELLED and failure.reason == Reason.REASON_UNSPECIFIED:
        return Cancelled(where + (text or "the task was cancelled"))
    return error_for(failure.reason, where + text)
