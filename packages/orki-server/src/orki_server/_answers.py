"""The calls of TaskService about suspended tasks."""

from __future__ import annotations

from typing import Any

from orki.control.v1 import task_pb2 as pb
from orki.control.v1.task_pb2_grpc import TaskServiceServicer
from orki_contract.errors import AlreadyAnswered, NotSuspended, TaskEnded, TooLarge, UnknownTask
from orki_control.session import MAX_CHECKPOINT_BYTES
from orki_server._calls import Context, actor_of, readable, typed
from orki_server._identity import Action
from orki_server._registry import ContractRegistry, PayloadCheck
from orki_server._store.operations import shard_of
from orki_server._store.replies import TaskReply
from orki_server._store.store import Store
from orki_server._store.suspension import answer


class SuspendedTasks(TaskServiceServicer):
    """Answers suspended tasks; the part of the task servicer that needs no session."""

    _store: Store
    _registry: ContractRegistry
    _payloads: PayloadCheck
    _watchers: Any
    _on_queued: Any

    async def read(self, task_id: str, action: Action | None = None) -> pb.TaskSnapshot:
        raise NotImplementedError

    @typed
    async def Answer(self, request: pb.AnswerRequest, context: Context) -> pb.AnswerResponse:
        """Answer a suspended task, which is queued again. A repeated answer changes nothing."""
        size = len(request.payload)
        if size > MAX_CHECKPOINT_BYTES:
            raise TooLarge(f"payload: {size} bytes exceed the maximum of {MAX_CHECKPOINT_BYTES} for an answer")
        task = await self.read(request.task_id, Action.DIRECT)
        method = await self._registry.method(task.method)
        if method.answer:
            await self._payloads.answer(method, request.payload)
        operation = answer(task.task_id, request.suspension, request.payload, actor_of(context))
        _check(task.task_id, await self._store.apply(operation))
        self._watchers.changed(task.task_id, False)
        self._on_queued(shard_of(task.task_id), task.method)
        return pb.AnswerResponse(task=readable(await self.read(task.task_id)))


def _check(task_id: str, reply: TaskReply) -> None:
    match reply.status:
        case "unknown":
            raise UnknownTask(f"there is no task {task_id}")
        case "ended":
            raise TaskEnded(f"task {task_id} has ended, and takes no answer")
        case "answered":
            raise AlreadyAnswered(f"task {task_id} was answered before, with another answer")
        case "idle":
            raise NotSuspended(f"task {task_id} does not wait for this answer: it is not suspended, or no longer")
