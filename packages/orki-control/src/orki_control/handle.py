"""The handle of one submitted task."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from google.protobuf.message import DecodeError, Message

from orki.control.v1.attempt_pb2 import Failure, TaskState
from orki.control.v1.task_pb2 import TaskSnapshot
from orki_contract import Task
from orki_contract.errors import Cancelled, InvalidResponse, OrkiError, Reason, WaitTimeout, error_for
from orki_contract.trace import Span, parse_traceparent
from orki_control.watch import TERMINAL_STATES

if TYPE_CHECKING:
    from orki_control.client import Client

__all__ = ["SubmittedTask", "error_of"]

R = TypeVar("R", bound=Message)
P = TypeVar("P")
D = TypeVar("D")


class SubmittedTask(Generic[R, P, D]):
    """A submitted task; implements `orki_contract.TaskHandle`.

    Attributes:
        snapshot: The task as it was when somebody last looked; it may have no more than its id.
    """

    __slots__ = ("_client", "_task", "snapshot")

    def __init__(self, client: Client, task: Task[Any, R, P, D], snapshot: TaskSnapshot) -> None:
        self._client = client
        self._task = task
        self.snapshot = snapshot

    def __repr__(self) -> str:
        return f"<{self._task.contract.full_name} task {self.task_id}>"

    @property
    def task_id(self) -> str:
        """The task."""
        return self.snapshot.task_id

    @property
    def span(self) -> Span | None:
        """The task's span, once somebody has looked."""
        return parse_traceparent(self.snapshot.traceparent)

    async def progress(self) -> AsyncIterator[P]:
        """The task's news, from its beginning, until it ends; those of all its attempts.

        While the orchestrator is away it waits, as `result` does without a limit; `asyncio.timeout` bounds it.
        """
        parse = self._task.progress
        async with aclosing(self._watch()) as news:
            async for each in news:
                if isinstance(each, bytes) and issubclass(parse, Message):
                    yield self._decoded(parse, each)

    async def result(self, timeout: float | None = None) -> R:
        """The response.

        The wait outlives lost connections: an orchestrator that restarts costs a moment. One that never comes back is
        waited for without end, unless there is a limit; the client's patience bounds calls, not this.

        Args:
            timeout: Longest wait in seconds; None for no limit. The task goes on after it.

        Raises:
            WaitTimeout: It took longer than `timeout`.
            OrkiError: The typed error for which the task failed or was cancelled.
        """
        if self.snapshot.state not in TERMINAL_STATES:
            try:
                async with asyncio.timeout(timeout), aclosing(self._watch()) as news:
                    async for _ in news:
                        pass
            except TimeoutError:
                raise WaitTimeout(
                    f"task {self.task_id} has not ended within {timeout} s; it goes on, and may be waited for again"
                ) from None
        if self.snapshot.state != TaskState.TASK_STATE_SUCCEEDED:
            raise error_of(self.snapshot)
        response: R = self._decoded(self._task.response, self.snapshot.response)
        return response

    async def cancel(self, message: str = "") -> None:
        """Asks for the task's end; harmless when it has ended."""
        self.snapshot = await self._client.cancel(self.task_id, message)

    async def direct(self, directive: D) -> None:
        """Sends a directive to the running attempt.

        Raises:
            NotDirectable: The task is not running.
        """
        assert isinstance(directive, Message)
        await self._client.direct(self.task_id, directive)

    async def _watch(self) -> AsyncGenerator[bytes | None, None]:
        """Payloads of progress, None for a snapshot, which is kept."""
        async with aclosing(self._client.watch(self.task_id)) as responses:
            async for response in responses:
                if response.WhichOneof("news") == "task":
                    self.snapshot = response.task
                    yield None
                elif response.WhichOneof("news") == "progress":
                    yield response.progress.payload

    def _decoded(self, message: type[Any], payload: bytes) -> Any:
        try:
            return message.FromString(payload)
        except DecodeError as error:
            raise InvalidResponse(
                f"task {self.task_id}: what came is no {message.__name__} ({error}); their contracts differ"
            ) from None


def error_of(task: TaskSnapshot) -> OrkiError:
    """The typed error that an unsuccessful task stands for."""
    failure: Failure = task.failure
    text = f"{failure.error_type}: {failure.message}" if failure.error_type else failure.message
    where = f"task {task.task_id} ({task.method}), attempt {task.attempt.attempt}: "
    if task.state == TaskState.TASK_STATE_CANCELLED and failure.reason == Reason.REASON_UNSPECIFIED:
        return Cancelled(where + (text or "it was cancelled"))
    return error_for(failure.reason, where + text)
