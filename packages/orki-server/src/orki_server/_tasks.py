"""TaskService: validates requests; submits, reads, watches, cancels and directs tasks."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn, TypeAlias, TypeVar

import grpc

from orki.control.v1 import task_pb2 as pb
from orki.control.v1.attempt_pb2 import Failure, TaskState
from orki.control.v1.task_pb2_grpc import TaskServiceServicer
from orki_contract.errors import (
    Draining,
    IdempotencyConflict,
    InvalidArgument,
    LocalProtocolError,
    NotDirectable,
    OrkiError,
    StoreUnavailable,
    TooLarge,
    UnknownTask,
)
from orki_contract.trace import new_span, parse_traceparent
from orki_control.session import AttemptKey
from orki_control.transport import abort
from orki_server._identity import Action, caller
from orki_server._registry import ContractRegistry, PayloadCheck
from orki_server._session import SessionRegistry
from orki_server._store import operations
from orki_server._store.lifecycle import TERMINAL
from orki_server._store.operations import failure_text, new_task_id, shard_of_key, submission_digest
from orki_server._store.store import Store
from orki_server._store.tasks import TaskFilter, list_tasks

Q = TypeVar("Q")
R = TypeVar("R")
S = TypeVar("S")
Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]

MAX_SUBMISSIONS: Final = 1000
"""Maximum number of submissions in one call."""
_DEFAULT_PAGE: Final = 100
_MAX_PAGE: Final = 1000
_KEY_BYTES: Final = 256
_MESSAGE: Final = 1000
_METHOD: Final = re.compile(r"[A-Za-z_][\w.]{0,500}/[A-Za-z_]\w{0,200}\Z", re.ASCII)
_AGENT_ID: Final = re.compile(r"[A-Za-z0-9_.-]{1,128}\Z")
_CURSOR: Final = re.compile(r"[0-9]{1,20}-[0-9]{1,20}\Z")
_PROGRESS: Final = 100
"""Maximum number of progress entries in one read."""
_SETTLE: Final = 0.005
"""Transitions come in bursts: one read serves those that follow within this time. An end is read at once."""
_POLL: Final = 1.0
"""Maximum time between two reads: another orchestrator may have changed the task."""
_log = logging.getLogger("orki.server.requests")


def typed(method: Callable[[S, Q, Context], Awaitable[R]]) -> Callable[[S, Q, Context], Awaitable[R]]:
    """Turn an OrkiError that a unary method raises into a status."""

    @functools.wraps(method)
    async def wrapped(self: S, request: Q, context: Context) -> R:
        try:
            return await method(self, request, context)
        except Exception as error:
            await _abort(context, method.__name__, error)

    return wrapped


def typed_stream(
    method: Callable[[S, Q, Context], AsyncIterator[R]],
) -> Callable[[S, Q, Context], AsyncIterator[R]]:
    """Turn an OrkiError that a streaming method raises into a status."""

    @functools.wraps(method)
    async def wrapped(self: S, request: Q, context: Context) -> AsyncIterator[R]:
        try:
            async for response in method(self, request, context):
                yield response
        except Exception as error:
            await _abort(context, method.__name__, error)

    return wrapped


async def _abort(context: Context, method: str, error: Exception) -> NoReturn:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if not isinstance(error, OrkiError):
        _log.error("%s failed: a defect", method, exc_info=error)
        error = LocalProtocolError(f"{method}: the orchestrator failed; see its log")
    await abort(context, error)


def actor_of(context: Context) -> str:
    """Return the caller's name for the audit."""
    return caller().name


def _readable(task: pb.TaskSnapshot) -> pb.TaskSnapshot:
    """Return a snapshot without the response if the caller may not read it."""
    if not caller().may(Action.READ, task.method):
        task.ClearField("response")
    return task


class RequestRules:
    """Validates requests. Its methods raise InvalidArgument or TooLarge for an invalid field."""

    def __init__(self, max_payload_bytes: int) -> None:
        self._max_payload_bytes = max_payload_bytes

    def submission(self, submission: pb.Submission) -> None:
        _check_method("method", submission.method)
        caller().check_submit(submission.method)
        self._check_payload("request", submission.request)
        if len(submission.idempotency_key.encode()) > _KEY_BYTES:
            raise InvalidArgument(f"idempotency_key: at most {_KEY_BYTES} bytes; hash a longer key")

    def cancel(self, request: pb.CancelRequest) -> None:
        if len(request.message) > _MESSAGE:
            raise InvalidArgument(f"message: at most {_MESSAGE} characters, not {len(request.message)}")

    def direct(self, request: pb.DirectRequest) -> None:
        self._check_payload("payload", request.payload)

    def watch(self, request: pb.WatchRequest) -> None:
        if request.after and not _CURSOR.match(request.after):
            raise InvalidArgument(
                f"after: Watch did not return the cursor {request.after[:40]!r}; leave it empty to begin"
            )

    def list(self, request: pb.ListRequest) -> tuple[TaskFilter, int]:
        """Validate a list and return its filter and page size."""
        if request.page_size > _MAX_PAGE:
            raise InvalidArgument(
                f"page_size: from 1 to {_MAX_PAGE}, or 0 for {_DEFAULT_PAGE}; not {request.page_size}"
            )
        known = set(TaskState.values()) - {TaskState.TASK_STATE_UNSPECIFIED}
        if unknown := [state for state in request.states if state not in known]:
            raise InvalidArgument(f"states: {unknown[0]} is not a state of a task")
        if request.method:
            _check_method("method", request.method)
        if request.agent_id and not _AGENT_ID.match(request.agent_id):
            raise InvalidArgument(f"agent_id: {request.agent_id[:40]!r} is not a valid agent id")
        which = TaskFilter(states=frozenset(request.states), method=request.method, agent_id=request.agent_id)
        return which, request.page_size or _DEFAULT_PAGE

    def _check_payload(self, field: str, payload: bytes) -> None:
        if len(payload) > self._max_payload_bytes:
            raise TooLarge(
                f"{field}: {len(payload)} bytes exceed the maximum of {self._max_payload_bytes}; "
                "store the payload externally and send a reference"
            )


def _check_method(field: str, method: str) -> None:
    if not _METHOD.match(method):
        raise InvalidArgument(f"{field}: {method[:80]!r} does not have the form package.Service/Method")


@dataclass(slots=True, eq=False)
class _Watcher:
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class Watchers:
    """Follows tasks. Calls `on_record` when a task has changed, as the outbox has records then."""

    def __init__(self, store: Store, on_record: Callable[[], None]) -> None:
        self._store = store
        self._on_record = on_record
        self._watchers: dict[str, set[_Watcher]] = {}

    def changed(self, task_id: str, ended: bool) -> None:
        self._on_record()
        for watcher in self._watchers.get(task_id, ()):
            watcher.changed.set()
            if ended:
                watcher.ended.set()

    async def follow(self, task_id: str, after: str) -> AsyncIterator[pb.WatchResponse]:
        """Yield a task's snapshots and progress until its end.

        A snapshot comes first and after every transition. The last message is the snapshot with the final state. For a
        task that has ended already, the progress comes before that snapshot, which is the only one.

        Args:
            task_id: The task.
            after: Cursor of the last progress that the caller has; empty for the beginning.

        Raises:
            UnknownTask: The task does not exist, or no longer.
            StoreUnavailable: The store is down at the first read; later reads wait for it.
        """
        revision = 0
        with self._watch(task_id) as watcher:
            while True:
                watcher.changed.clear()
                try:
                    view = await self._store.apply(operations.read_task(task_id, _PROGRESS, after))
                except StoreUnavailable:
                    if not revision:
                        raise
                    await self._store.connection.up.wait()
                    continue
                if view is None:
                    raise UnknownTask(f"there is no task {task_id}")
                caller().check_task(Action.READ, task_id, view.task.method)
                ended = view.task.state in TERMINAL
                if view.task.revision != revision and not ended:
                    yield pb.WatchResponse(task=view.task)
                revision = view.task.revision
                for progress in view.progress:
                    after = progress.cursor
                    yield pb.WatchResponse(progress=progress)
                if len(view.progress) == _PROGRESS:
                    continue
                if ended:
                    yield pb.WatchResponse(task=view.task)
                    return
                await _wait(watcher.changed, _POLL)
                await _wait(watcher.ended, _SETTLE)

    @contextlib.contextmanager
    def _watch(self, task_id: str) -> Iterator[_Watcher]:
        watcher = _Watcher()
        self._watchers.setdefault(task_id, set()).add(watcher)
        try:
            yield watcher
        finally:
            others = self._watchers[task_id]
            others.discard(watcher)
            if not others:
                del self._watchers[task_id]


async def _wait(event: asyncio.Event, timeout: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout):
            await event.wait()


class TaskServicer(TaskServiceServicer):
    """Serves submitters.

    It calls `on_queued` with a shard that has a queued task.

    Attributes:
        draining: Whether new submissions are refused.
    """

    def __init__(
        self,
        store: Store,
        registry: ContractRegistry,
        payloads: PayloadCheck,
        sessions: SessionRegistry,
        watchers: Watchers,
        rules: RequestRules,
        on_queued: Callable[[int], None],
    ) -> None:
        self._store = store
        self._registry = registry
        self._payloads = payloads
        self._sessions = sessions
        self._watchers = watchers
        self._rules = rules
        self._on_queued = on_queued
        self._numbers = itertools.count()
        self.draining = False

    @typed
    async def Submit(self, request: pb.SubmitRequest, context: Context) -> pb.SubmitResponse:
        """Submit tasks. Each has its own outcome; if the store takes none of them, the whole call fails."""
        if self.draining:
            raise Draining("this orchestrator is stopping; submit again in a moment")
        count = len(request.submissions)
        if not 1 <= count <= MAX_SUBMISSIONS:
            raise InvalidArgument(f"submissions: from 1 to {MAX_SUBMISSIONS} in one call, not {count}")
        actor = actor_of(context)
        results = await asyncio.gather(
            *(self._submit(each, actor) for each in request.submissions), return_exceptions=True
        )
        outcomes = []
        for each in results:
            if isinstance(each, pb.TaskSnapshot):
                outcomes.append(pb.SubmitOutcome(task=each))
            elif isinstance(each, OrkiError):
                outcomes.append(pb.SubmitOutcome(failure=Failure(reason=each.reason, message=each.message)))
            else:
                raise each
        unavailable = [each for each in results if isinstance(each, StoreUnavailable)]
        if len(unavailable) == count:
            raise unavailable[0]
        return pb.SubmitResponse(outcomes=outcomes)

    async def _submit(self, submission: pb.Submission, actor: str) -> pb.TaskSnapshot:
        self._rules.submission(submission)
        method = await self._registry.method(submission.method)
        await self._payloads.request(method, submission.request)
        contract = self._registry.leading(method.service)
        parent = parse_traceparent(submission.traceparent)
        span = parent.child() if parent else new_span()
        key = submission.idempotency_key
        shard = shard_of_key(key, self._store.shards) if key else next(self._numbers) % self._store.shards
        submitted = await self._store.apply(
            operations.submit(
                task_id=new_task_id(shard),
                method=method,
                request=submission.request,
                digest=submission_digest(submission.method, submission.request),
                idempotency_key=key,
                span=span,
                actor=actor,
                contract=contract,
            )
        )
        if submitted.status == "new":
            self._watchers.changed(submitted.task_id, False)
            self._on_queued(shard)
            # The snapshot of a new task is known without reading it.
            return pb.TaskSnapshot(
                task_id=submitted.task_id,
                method=submission.method,
                state=TaskState.TASK_STATE_QUEUED,
                submitted_us=submitted.submitted_us,
                traceparent=span.traceparent,
                revision=1,
            )
        if submitted.status == "conflict":
            raise IdempotencyConflict(
                f"idempotency_key {key[:64]!r} belongs to task {submitted.task_id}, which has another method or request"
            )
        return _readable(await self._read(submitted.task_id))

    @typed
    async def Get(self, request: pb.GetRequest, context: Context) -> pb.GetResponse:
        return pb.GetResponse(task=await self._read(request.task_id, Action.READ))

    @typed_stream
    async def Watch(self, request: pb.WatchRequest, context: Context) -> AsyncIterator[pb.WatchResponse]:
        """Follow a task to its end; see `Watchers.follow`."""
        self._rules.watch(request)
        async for response in self._watchers.follow(request.task_id, request.after):
            yield response

    @typed
    async def Cancel(self, request: pb.CancelRequest, context: Context) -> pb.CancelResponse:
        """Request a task's end. The request is stored before it is sent to the agent."""
        self._rules.cancel(request)
        message = failure_text(request.message)
        if caller().rules is not None:
            await self._read(request.task_id, Action.CANCEL)
        reply = await self._store.apply(operations.cancel(request.task_id, message, actor_of(context)))
        if reply.status == "unknown":
            raise UnknownTask(f"there is no task {request.task_id}")
        session = self._sessions.get(reply.agent_id)
        if reply.status in ("requested", "repeated") and session is not None:
            session.machine.cancel(reply.attempt, grace_ms=round(reply.cancel_grace * 1000), message=message)
        if reply.status in ("requested", "done"):
            self._watchers.changed(request.task_id, reply.status == "done")
        return pb.CancelResponse(task=_readable(await self._read(request.task_id)))

    @typed
    async def Direct(self, request: pb.DirectRequest, context: Context) -> pb.DirectResponse:
        """Send a directive to a running task, whose agent must have a session here."""
        self._rules.direct(request)
        task = await self._read(request.task_id, Action.DIRECT)
        method = await self._registry.method(task.method)
        if not method.directive:
            raise NotDirectable(f"{task.method} declares no directive")
        await self._payloads.directive(method, request.payload)
        session = self._sessions.get(task.agent_id)
        if task.state != TaskState.TASK_STATE_RUNNING or session is None:
            state = TaskState.Name(task.state).removeprefix("TASK_STATE_").lower()
            where = "" if session else f", and agent {task.agent_id!r} has no session here"
            raise NotDirectable(f"task {task.task_id} is {state}{where}; a directive needs a running attempt")
        # The agent may serve an older contract than the one that declares the directive.
        served = self._registry.methods_of(method.service, session.digests.get(method.service, ""))
        if any(each.full_name == task.method and not each.directive for each in served):
            raise NotDirectable(f"agent {task.agent_id} serves {task.method} by a contract that declares no directive")
        key = AttemptKey.of(task.attempt)
        reply = await self._store.apply(operations.direct(key, len(request.payload), actor_of(context)))
        if reply.status != "running":
            raise NotDirectable(f"task {task.task_id} no longer runs attempt {key.attempt}")
        try:
            sent = session.direct(key, request.payload)
        except LocalProtocolError:
            sent = False
        if not sent:
            raise NotDirectable(f"agent {task.agent_id} does not hold {key} now; try again in a moment")
        self._watchers.changed(request.task_id, False)
        return pb.DirectResponse(attempt=key.ref())

    @typed
    async def List(self, request: pb.ListRequest, context: Context) -> pb.ListResponse:
        """Return a page of tasks, newest first and without responses."""
        which, page_size = self._rules.list(request)
        tasks, token = await list_tasks(self._store, which, page_size, request.page_token)
        tasks = [task for task in tasks if caller().may(Action.READ, task.method)]
        return pb.ListResponse(tasks=tasks, next_page_token=token)

    async def _read(self, task_id: str, action: Action | None = None) -> pb.TaskSnapshot:
        """Read a task.

        Args:
            task_id: Its id.
            action: What the caller wants to do with the task; None if that was checked before.

        Raises:
            UnknownTask: The task does not exist, or the caller may not.
        """
        view = await self._store.apply(operations.read_task(task_id))
        if view is None:
            raise UnknownTask(f"there is no task {task_id}")
        if action is not None:
            caller().check_task(action, task_id, view.task.method)
        return view.task
