"""Tasks that handlers submit, and what their failures mean for the handlers' own tasks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from functools import partial
from typing import Any, Final, Generic, TypeVar, Unpack

from google.protobuf.message import Message

from orki.control.v1.attempt_pb2 import TaskState
from orki_agent._threads import cross
from orki_contract import ProgressGap, SubmitSettings, Task, TaskHandle
from orki_contract.errors import ChildFailed, OrkiError
from orki_control import Client

Q = TypeVar("Q", bound=Message)
R = TypeVar("R", bound=Message)
P = TypeVar("P")
D = TypeVar("D")

_FAILED: Final = frozenset({TaskState.TASK_STATE_FAILED, TaskState.TASK_STATE_CANCELLED})
_END: Final = object()


class ChildTasks:
    """The `TaskChannel` of handlers. Its calls run on the I/O loop, and the caller's span goes along."""

    def __init__(self, client: Client, loop: asyncio.AbstractEventLoop) -> None:
        self._client = client
        self._loop = loop

    async def submit(
        self, task: Task[Q, R, P, D], request: Q, *, idempotency_key: str = "", **settings: Unpack[SubmitSettings]
    ) -> TaskHandle[R, P, D]:
        """Submit one task; see `orki_control.Client.submit`."""
        work = self._client.submit(task, request, idempotency_key=idempotency_key, **settings)
        handle = await cross(self._loop, work)
        return _ChildTask(handle, self._loop)

    async def submit_many(
        self,
        task: Task[Q, R, P, D],
        requests: list[Q],
        *,
        idempotency_keys: list[str] | None = None,
        **settings: Unpack[SubmitSettings],
    ) -> list[TaskHandle[R, P, D]]:
        """Submit many tasks; see `orki_control.Client.submit_many`."""
        work = self._client.submit_many(task, requests, idempotency_keys=idempotency_keys, **settings)
        return [_ChildTask(handle, self._loop) for handle in await cross(self._loop, work)]

    async def call(
        self,
        task: Task[Q, R, P, D],
        request: Q,
        *,
        idempotency_key: str = "",
        timeout: float | None = None,
        **settings: Unpack[SubmitSettings],
    ) -> R:
        """Submit one task and wait for its response.

        Raises:
            ChildFailed: The task failed or was cancelled.
            WaitTimeout: It did not end within `timeout` seconds.
        """
        handle = await self.submit(task, request, idempotency_key=idempotency_key, **settings)
        return await handle.result(timeout)


class _ChildTask(Generic[R, P, D]):
    """A `TaskHandle` of the I/O loop."""

    def __init__(self, handle: TaskHandle[R, P, D], loop: asyncio.AbstractEventLoop) -> None:
        self._handle = handle
        self._loop = loop

    @property
    def task_id(self) -> str:
        return self._handle.task_id

    async def progress(self, on_gap: Callable[[ProgressGap], object] | None = None) -> AsyncIterator[P]:
        loop = asyncio.get_running_loop()

        def forward(gap: ProgressGap) -> None:
            assert on_gap is not None
            loop.call_soon_threadsafe(partial(on_gap, gap))

        deltas = self._handle.progress(forward if on_gap else None)
        assert isinstance(deltas, AsyncGenerator)
        try:
            while (delta := await cross(self._loop, _next(deltas))) is not _END:
                yield delta
        finally:
            await cross(self._loop, deltas.aclose())

    async def result(self, timeout: float | None = None) -> R:
        """Wait for the response; see `orki_control.SubmittedTask.result`.

        Raises:
            ChildFailed: The task failed or was cancelled.
        """
        try:
            return await cross(self._loop, self._handle.result(timeout))
        except OrkiError as error:
            snapshot = getattr(self._handle, "snapshot", None)
            if snapshot is None or snapshot.state not in _FAILED:
                raise
            raise ChildFailed(error.message, self.task_id, error) from error

    async def cancel(self, message: str = "") -> None:
        await cross(self._loop, self._handle.cancel(message))

    async def direct(self, directive: D) -> None:
        await cross(self._loop, self._handle.direct(directive))

    async def answer(self, answer: Message | bytes, *, suspension: int = 0) -> None:
        await cross(self._loop, self._handle.answer(answer, suspension=suspension))


async def _next(deltas: AsyncIterator[Any]) -> Any:
    return await anext(deltas, _END)
