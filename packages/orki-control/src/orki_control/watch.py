"""Following one task to its end, over as many connections as it takes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Final

import grpc

from orki.control.v1.attempt_pb2 import TaskState
from orki.control.v1.task_pb2 import WatchRequest, WatchResponse
from orki_contract.backoff import Jitter, JitterOptions
from orki_contract.errors import OrchestratorUnavailable, OrkiError
from orki_control.statuses import typed_errors

if TYPE_CHECKING:
    from orki.control.v1.task_pb2_grpc import TaskServiceStub

__all__ = ["TERMINAL_STATES", "watch_task"]

_log = logging.getLogger(__name__)

TERMINAL_STATES: Final = frozenset(
    {TaskState.TASK_STATE_SUCCEEDED, TaskState.TASK_STATE_FAILED, TaskState.TASK_STATE_CANCELLED}
)
"""States that a task does not leave."""


async def watch_task(
    stub: TaskServiceStub, target: str, task_id: str, *, after: str, backoff: JitterOptions
) -> AsyncGenerator[WatchResponse, None]:
    """Snapshots and progress of a task; the last one is a terminal snapshot.

    A stream that ends before that, cleanly or not, is a lost connection: it is opened again behind the last progress
    that was seen, without an end to the tries.

    Raises:
        UnknownTask: There is none of that id.
    """
    jitter = Jitter(backoff)
    loop = asyncio.get_running_loop()
    while True:
        opened_at = loop.time()
        wait = 0.0
        call = stub.Watch(WatchRequest(task_id=task_id, after=after))
        try:
            with typed_errors(target):
                while True:
                    news = await call.read()
                    if news is grpc.aio.EOF:
                        raise OrchestratorUnavailable(f"{target}: the watch of task {task_id} ended before the task")
                    assert isinstance(news, WatchResponse)
                    if news.WhichOneof("news") == "progress":
                        after = news.progress.cursor
                    yield news
                    if news.WhichOneof("news") == "task" and news.task.state in TERMINAL_STATES:
                        return
        except OrkiError as error:
            if not error.retryable:
                raise
            wait = jitter.failed(loop.time() - opened_at)
            _log.info("watching task %s: %s; trying again in %.2f s", task_id, error.message, wait)
        finally:
            # A call that is merely dropped is never ended.
            call.cancel()
        await asyncio.sleep(wait)
