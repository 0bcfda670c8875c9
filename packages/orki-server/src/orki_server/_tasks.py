"""TaskService: validates requests; submits, reads, watches, cancels and directs tasks."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

from orki.control.v1 import task_pb2 as pb
from orki.control.v1.attempt_pb2 import Failure, TaskState
from orki_contract.errors import (
    Draining,
    InvalidArgument,
    InvalidSetting,
    NotDirectable,
    OrkiError,
    StoreUnavailable,
    TooLarge,
    UnknownTask,
)
from orki_control.session import AttemptKey, bad_labels
from orki_server._answers import SuspendedTasks
from orki_server._budgets import BudgetCalls, Budgets
from orki_server._calls import Context, actor_of, readable, typed, typed_stream
from orki_server._demand import Demand
from orki_server._explain import Explainer, read_waits
from orki_server._gaps import GapFinder
from orki_server._identity import Action, caller
from orki_server._registry import ContractRegistry, PayloadCheck
from orki_server._relay import Relay
from orki_server._results import ResultWatches, TaskEnd
from orki_server._session import SessionRegistry
from orki_server._store import operations
from orki_server._store.budget import check_budget
from orki_server._store.lifecycle import TERMINAL
from orki_server._store.operations import failure_text
from orki_server._store.placement import check_placement
from orki_server._store.replies import TaskView
from orki_server._store.server import Durability
from orki_server._store.store import Store
from orki_server._store.tasks import TaskFilter, list_tasks
from orki_server._submissions import Pending, Submissions

MAX_SUBMISSIONS: Final = 1000
"""Maximum number of submissions in one call."""
_DEFAULT_PAGE: Final = 100
_MAX_PAGE: Final = 1000
_KEY_BYTES: Final = 256
MAX_MESSAGE: Final = 1000
_METHOD: Final = re.compile(r"[A-Za-z_][\w.]{0,500}/[A-Za-z_]\w{0,200}\Z", re.ASCII)
_AGENT_ID: Final = re.compile(r"[A-Za-z0-9_.-]{1,128}\Z")
_CURSOR: Final = re.compile(r"[0-9]{1,20}-[0-9]{1,20}\Z")
_PROGRESS: Final = 100
"""Maximum number of progress entries in one read."""
_BATCH_BYTES: Final = 64 * 1024
"""Maximum size of a batch of updates."""
_SETTLE: Final = 0.005
"""Transitions come in bursts: one read serves those that follow within this time. An end is read at once."""


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
        check_placement(submission, time.time_ns() // 1000)
        check_budget(submission)
        check_durability(submission)

    def cancel(self, request: pb.CancelRequest) -> None:
        if len(request.message) > MAX_MESSAGE:
            raise InvalidArgument(f"message: at most {MAX_MESSAGE} characters, not {len(request.message)}")

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
        if problem := bad_labels(request.labels):
            raise InvalidArgument(problem)
        which = TaskFilter(
            states=frozenset(request.states),
            method=request.method,
            agent_id=request.agent_id,
            labels=dict(request.labels),
        )
        return which, request.page_size or _DEFAULT_PAGE

    def _check_payload(self, field: str, payload: bytes) -> None:
        if len(payload) > self._max_payload_bytes:
            raise TooLarge(
                f"{field}: {len(payload)} bytes exceed the maximum of {self._max_payload_bytes}; "
                "store the payload externally and send a reference"
            )


def check_durability(submission: pb.Submission) -> None:
    """Raise InvalidArgument for a malformed durability."""
    try:
        Durability.parse(submission.durability or "memory")
    except InvalidSetting as error:
        raise InvalidArgument(error.message) from None


def _check_method(field: str, method: str) -> None:
    if not _METHOD.match(method):
        raise InvalidArgument(f"{field}: {method[:80]!r} does not have the form package.Service/Method")


@dataclass(slots=True, eq=False)
class _Watcher:
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class Watchers:
    """Follows tasks. Calls `on_record` when a task has changed, as the outbox has records then.

    `poll` returns the maximum time between two reads: other orchestrators may have changed the task.

    Attributes:
        results: The watches that only wait for the result.
    """

    def __init__(self, store: Store, on_record: Callable[[], None], poll: Callable[[], float]) -> None:
        self._store = store
        self._on_record = on_record
        self._poll = poll
        self._watchers: dict[str, set[_Watcher]] = {}
        self.results = ResultWatches(store, poll)

    def changed(self, task_id: str, ended: bool, end: TaskEnd | None = None) -> None:
        self._on_record()
        self.announced(task_id, ended, end)

    def announced(self, task_id: str, ended: bool, end: TaskEnd | None = None) -> None:
        """A task has changed, perhaps by another orchestrator, which publishes the records."""
        self.results.changed(task_id, ended, end)
        for watcher in self._watchers.get(task_id, ()):
            watcher.changed.set()
            if ended:
                watcher.ended.set()

    def all_changed(self) -> None:
        """Any task may have changed."""
        self.results.read_all()
        for watchers in self._watchers.values():
            for watcher in watchers:
                watcher.changed.set()

    async def follow(
        self, task_id: str, after: str, position: pb.ProgressPosition | None = None
    ) -> AsyncIterator[list[pb.WatchResponse]]:
        """Yield a task's snapshots and progress until its end, as lists of what is there together.

        A snapshot comes first and after every transition. The last message is the snapshot with the final state. For a
        task that has ended already, the progress comes before that snapshot, which is the only one.

        Args:
            task_id: The task.
            after: Cursor of the last progress that the caller has; empty for the beginning.
            position: Position of the last progress or gap that the caller has; None if it is unknown.

        Raises:
            UnknownTask: The task does not exist, or no longer.
            StoreUnavailable: The store is down at the first read; later reads wait for it.
        """
        revision = 0
        gaps = GapFinder(after, position)
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
                news = []
                if view.task.revision != revision and not ended:
                    news.append(pb.WatchResponse(task=view.task))
                revision = view.task.revision
                for stored in view.progress:
                    after = stored.cursor
                    news += [pb.WatchResponse(gap=gap) for gap in gaps.before(stored)]
                    if not stored.dropped:
                        progress = pb.WatchedProgress(
                            cursor=stored.cursor,
                            attempt=stored.attempt,
                            index=stored.index,
                            payload=stored.payload,
                            number=stored.number,
                        )
                        news.append(pb.WatchResponse(progress=progress))
                more = len(view.progress) == _PROGRESS
                if ended and not more:
                    news.append(pb.WatchResponse(task=view.task))
                if news:
                    yield news
                if more:
                    continue
                if ended:
                    return
                await _wait(watcher.changed, self._poll())
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


def _batches(news: list[pb.WatchResponse]) -> Iterator[list[pb.WatchResponse]]:
    """Divide updates into batches of bounded size. A large update is alone."""
    batch: list[pb.WatchResponse] = []
    size = 0
    for each in news:
        weight = each.ByteSize()
        if batch and size + weight > _BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(each)
        size += weight
    if batch:
        yield batch


async def _wait(event: asyncio.Event, timeout: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout):
            await event.wait()


class TaskServicer(SuspendedTasks, BudgetCalls):
    """Serves submitters.

    Attributes:
        draining: Whether new submissions are refused.
        submissions: Checks submissions; also those of sessions.
    """

    def __init__(
        self,
        store: Store,
        registry: ContractRegistry,
        payloads: PayloadCheck,
        sessions: SessionRegistry,
        watchers: Watchers,
        rules: RequestRules,
        demand: Demand,
        relay: Relay,
        explainer: Explainer,
        budgets: Budgets,
    ) -> None:
        self._budgets = budgets
        self._relay = relay
        self._explainer = explainer
        self._store = store
        self._registry = registry
        self._payloads = payloads
        self._sessions = sessions
        self._watchers = watchers
        self._rules = rules
        self._on_queued = demand.queued
        self.submissions = Submissions(store, registry, payloads, rules.submission, self._created, demand.expect)
        self.draining = False

    def _created(self, pending: Pending) -> None:
        self._watchers.changed(pending.task_id, False)
        if not pending.expected:
            self._on_queued(pending.shard, pending.submission.method)

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
            *(self.submit(each, actor) for each in request.submissions), return_exceptions=True
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

    async def submit(self, submission: pb.Submission, actor: str) -> pb.TaskSnapshot:
        """Submit one task."""
        if self.draining:
            raise Draining("this orchestrator is stopping; submit again in a moment")
        method = await self.submissions.check(submission)
        pending = self.submissions.pending(submission, method, actor)
        submitted = await self.submissions.store(pending)
        return self.submissions.accepted(pending, submitted) or readable(await self.read(submitted.task_id))

    @typed
    async def Get(self, request: pb.GetRequest, context: Context) -> pb.GetResponse:
        return pb.GetResponse(task=await self.read(request.task_id, Action.READ))

    @typed_stream
    async def Watch(self, request: pb.WatchRequest, context: Context) -> AsyncIterator[pb.WatchResponse]:
        """Follow a task to its end; see `Watchers.follow`."""
        self._rules.watch(request)
        position = request.position if request.HasField("position") else None
        async for news in self._watchers.follow(request.task_id, request.after, position):
            if not request.batched:
                for response in news:
                    yield response
                continue
            for batch in _batches(news):
                yield batch[0] if len(batch) == 1 else pb.WatchResponse(batch=pb.WatchBatch(updates=batch))

    def check_watch(self, request: pb.WatchRequest) -> None:
        """Check a watch of a session; raises InvalidArgument for a malformed cursor."""
        self._rules.watch(request)

    @typed
    async def Cancel(self, request: pb.CancelRequest, context: Context) -> pb.CancelResponse:
        return pb.CancelResponse(task=await self.cancel(request, actor_of(context)))

    async def cancel(self, request: pb.CancelRequest, actor: str) -> pb.TaskSnapshot:
        """Request a task's end. The request is stored before it is sent to the agent."""
        self._rules.cancel(request)
        message = failure_text(request.message)
        if caller().rules is not None:
            await self.read(request.task_id, Action.CANCEL)
        reply = await self._store.apply(operations.cancel(request.task_id, message, actor))
        if reply.status == "unknown":
            raise UnknownTask(f"there is no task {request.task_id}")
        # If the session is at another orchestrator, the store has sent it the cancel.
        session = self._sessions.get(reply.agent_id)
        if reply.status in ("requested", "repeated") and session is not None:
            session.machine.cancel(reply.attempt, grace_ms=round(reply.cancel_grace * 1000), message=message)
        if reply.status in ("requested", "done"):
            self._watchers.changed(request.task_id, reply.status == "done")
        return readable(await self.read(request.task_id))

    @typed
    async def Direct(self, request: pb.DirectRequest, context: Context) -> pb.DirectResponse:
        attempt = await self.direct(request, actor_of(context))
        return pb.DirectResponse(attempt=attempt.ref())

    async def direct(self, request: pb.DirectRequest, actor: str) -> AttemptKey:
        """Send a directive to a running task."""
        self._rules.direct(request)
        view = await self._view(request.task_id, Action.DIRECT)
        task = view.task
        method = await self._registry.method(task.method)
        if not method.directive:
            raise NotDirectable(f"{task.method} declares no directive")
        await self._payloads.directive(method, request.payload)
        if task.state != TaskState.TASK_STATE_RUNNING:
            state = TaskState.Name(task.state).removeprefix("TASK_STATE_").lower()
            raise NotDirectable(f"task {task.task_id} is {state}; a directive needs a running attempt")
        key = await self._relay.direct(view, request.payload, actor)
        self._watchers.changed(request.task_id, False)
        return key

    @typed
    async def List(self, request: pb.ListRequest, context: Context) -> pb.ListResponse:
        """Return a page of tasks, newest first and without responses."""
        which, page_size = self._rules.list(request)
        tasks, token = await list_tasks(self._store, which, page_size, request.page_token)
        tasks = [task for task in tasks if caller().may(Action.READ, task.method)]
        return pb.ListResponse(tasks=tasks, next_page_token=token)

    @typed
    async def Explain(self, request: pb.ExplainRequest, context: Context) -> pb.ExplainResponse:
        view, waits = await asyncio.gather(
            self._view(request.task_id, Action.READ), self._store.apply(read_waits(request.task_id))
        )
        if waits is None:
            raise UnknownTask(f"there is no task {request.task_id}")
        return await self._explainer.explain(view.task, waits)

    async def read(self, task_id: str, action: Action | None = None) -> pb.TaskSnapshot:
        """Read a task.

        Args:
            task_id: Its id.
            action: What the caller wants to do with the task; None if that was checked before.

        Raises:
            UnknownTask: The task does not exist, or the caller may not.
        """
        return (await self._view(task_id, action)).task

    async def _view(self, task_id: str, action: Action | None) -> TaskView:
        view = await self._store.apply(operations.read_task(task_id))
        if view is None:
            raise UnknownTask(f"there is no task {task_id}")
        if action is not None:
            caller().check_task(action, task_id, view.task.method)
        return view
