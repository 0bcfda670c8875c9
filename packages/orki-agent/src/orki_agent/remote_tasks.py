"""`ctx.client`: the submitters' client on the I/O loop, for handlers on the user's loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, Final, Generic, TypeVar

from google.protobuf.message import Message

from orki_agent.crossing import cross
from orki_contract import Task, TaskHandle
from orki_control import Client

__all__ = ["RemoteTasks"]

Q = TypeVar("Q", bound=Message)
R = TypeVar("R", bound=Message)
P = TypeVar("P")
D = TypeVar("D")

_END: Final = object()


class RemoteTasks:
    """A `TaskChannel` whose calls are made on another loop. The caller's span goes along."""

    def __init__(self, client: Client, loop: asyncio.AbstractEventLoop) -> None:
        self._client = client
        self._loop = loop

    async def submit(self, task: Task[Q, R, P, D], request: Q, *, idempotency_key: str = "") -> TaskHandle[R, P, D]:
        """As `orki_control.Client.submit`."""
        handle = await cross(self._loop, self._client.submit(task, request, idempotency_key=idempotency_key))
        return _RemoteHandle(handle, self._loop)

    async def submit_many(
        self, task: Task[Q, R, P, D], requests: list[Q], *, idempotency_keys: list[str] | None = None
    ) -> list[TaskHandle[R, P, D]]:
        """As `orki_control.Client.submit_many`."""
        work = self._client.submit_many(task, requests, idempotency_keys=idempotency_keys)
        return [_RemoteHandle(handle, self._loop) for handle in await cross(self._loop, work)]


class _RemoteHandle(Generic[R, P, D]):
    """A `TaskHandle` of another loop."""

    def __init__(self, handle: TaskHandle[R, P, D], loop: asyncio.AbstractEventLoop) -> None:
        self._handle = handle
        self._loop = loop

    @property
    def task_id(self) -> str:
        return self._handle.task_id

    async def progress(self) -> AsyncIterator[P]:
        news = self._handle.progress()
        assert isinstance(news, AsyncGenerator)
        try:
            while (delta := await cross(self._loop, _next(news))) is not _END:
                yield delta
        finally:
            await cross(self._loop, news.aclose())

    async def result(self, timeout: float | None = None) -> R:
        return await cross(self._loop, self._handle.result(timeout))

    async def cancel(self, message: str = "") -> None:
        await cross(self._loop, self._handle.cancel(message))

    async def direct(self, directive: D) -> None:
        await cross(self._loop, self._handle.direct(directive))


async def _next(news: AsyncIterator[Any]) -> Any:
    return await anext(news, _END)
