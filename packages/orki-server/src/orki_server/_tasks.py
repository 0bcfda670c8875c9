"""TaskService: what submitters ask."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

from orki.control.v1 import task_pb2 as pb
from orki.control.v1.attempt_pb2 import Failure, TaskState
from orki.control.v1.task_pb2 import WatchResponse
from orki.control.v1.task_pb2_grpc import TaskServiceServicer
from orki_contract.errors import (
    Draining,
    IdempotencyConflict,
    InvalidArgument,
    LocalProtocolError,
    NotDirectable,
    OrkiError,
    StoreUnavailable,
    UnknownTask,
)
from orki_contract.trace import new_span, parse_traceparent
from orki_control.session import AttemptKey
from orki_server._registry import ContractRegistry, PayloadCheck
from orki_server._requests import MOST_SUBMISSIONS, Context, RequestRules, actor_of, typed, typed_stream
from orki_server._session import SessionRegistry
from orki_server._sessions import failure_text
from orki_server._store.fleet import submission_digest
from orki_server._store.ids import new_task_id, shard_of_key
from orki_server._store.operations import Cancel, Direct, Submit, Submitted
from orki_server._store.queries import TERMINAL, ReadTask
from orki_server._store.store import Store

_GONE: Final = "there is no task {}"


class TaskServicer(TaskServiceServicer):
    """Serves submitters.

    Args:
        store: Where tasks are.
        registry: Which methods there are.
        roster: Who runs them.
        watchers: Follow tasks.
        rules: Check requests.
        queued: Called with a shard that has a queued task.
        moved: Called with a task that changed, and whether it ended.
    """

    def __init__(  # one parameter for each neighbour
        self,
        store: Store,
        registry: ContractRegistry,
        roster: SessionRegistry,
        watchers: Watchers,
        rules: RequestRules,
        queued: Callable[[int], None],
        moved: Callable[[str, bool], None],
    ) -> None:
        self._store = store
        self._registry = registry
        self._roster = roster
        self._watchers = watchers
        self._rules = rules
        self._payloads = PayloadCheck(store, registry)
        self._queued = queued
        self._moved = moved
        self._numbers = itertools.count()
        self.draining = False

    @typed
    async def Submit(self, request: pb.SubmitRequest, context: Context) -> pb.SubmitResponse:
        """Each submission is judged by itself; when the store takes none of them, the call fails as a whole."""
        if self.draining:
            raise Draining("this orchestrator stops; submit again in a moment")
        count = len(request.submissions)
        if not 1 <= count <= MOST_SUBMISSIONS:
            raise InvalidArgument(f"submissions: from 1 to {MOST_SUBMISSIONS} in one call, not {count}")
        actor = actor_of(context)
        settled = await asyncio.gather(
            *(self._submit(each, actor) for each in request.submissions), return_exceptions=True
        )
        outcomes = []
        for each in settled:
            if isinstance(each, pb.TaskSnapshot):
                outcomes.append(pb.SubmitOutcome(task=each))
            elif isinstance(each, OrkiError):
                outcomes.append(pb.SubmitOutcome(failure=Failure(reason=each.reason, message=each.message)))
            else:
                raise each
        away = [each for each in settled if isinstance(each, StoreUnavailable)]
        if len(away) == count:
            raise away[0]
        return pb.SubmitResponse(outcomes=outcomes)

    async def _submit(self, submission: pb.Submission, actor: str) -> pb.TaskSnapshot:
        self._rules.submission(submission)
        method = await self._registry.method(submission.method)
        await self._payloads.request(method, submission.request)
        key = submission.idempotency_key
        shard = shard_of_key(key, self._store.shards) if key else next(self._numbers) % self._store.shards
        above = parse_traceparent(submission.traceparent)
        span = above.child() if above else new_span()
        submitted = await self._store.apply(
            Submit(
                task_id=new_task_id(shard),
                method=method,
                request=submission.request,
                digest=submission_digest(submission.method, submission.request),
                idempotency_key=key,
                span=span,
                actor=actor,
                contract=self._registry.leading(method.service),
            )
        )
        if submitted.word == "new":
            self._queued(shard)
            self._moved(submitted.task_id, False)
            return _fresh(submitted, submission.method, span.traceparent)
        if submitted.word == "conflict":
            raise IdempotencyConflict(
                f"idempotency_key {key[:64]!r} belongs to task {submitted.task_id}, which has another method or request"
            )
        return await self._look(submitted.task_id)

    @typed
    async def Get(self, request: pb.GetRequest, context: Context) -> pb.GetResponse:
        """The task as it is now."""
        return pb.GetResponse(task=await self._look(self._rules.task_id(request.task_id)))

    @typed_stream
    async def Watch(self, request: pb.WatchRequest, context: Context) -> AsyncIterator[pb.WatchResponse]:
        """Follows a task to its end; see `Watchers.follow`."""
        self._rules.watch(request)
        async for news in self._watchers.follow(request.task_id, request.after):
            yield news

    @typed
    async def Cancel(self, request: pb.CancelRequest, context: Context) -> pb.CancelResponse:
        """Asks for a task's end: noted in the store first, so that it outlives us, then told to the agent."""
        self._rules.cancel(request)
        words = failure_text(request.message)
        asked = await self._store.apply(Cancel(request.task_id, words, actor_of(context)))
        if asked.word == "unknown":
            raise UnknownTask(_GONE.format(request.task_id))
        session = self._roster.get(asked.agent_id)
        if asked.word in ("asked", "again") and session is not None:
            session.machine.cancel(asked.attempt, grace_ms=asked.grace_ms, message=words)
            session.changed()
        if asked.word in ("asked", "done"):
            self._moved(request.task_id, asked.word == "done")
        return pb.CancelResponse(task=await self._look(request.task_id))

    @typed
    async def Direct(self, request: pb.DirectRequest, context: Context) -> pb.DirectResponse:
        """Sends a directive to a running task, whose agent must have a session here."""
        self._rules.direct(request)
        task = await self._look(request.task_id)
        method = await self._registry.method(task.method)
        if not method.directive:
            raise NotDirectable(f"{task.method} declares no directive")
        await self._payloads.directive(method, request.payload)
        session = self._roster.get(task.agent_id)
        if task.state != TaskState.TASK_STATE_RUNNING or session is None:
            state = TaskState.Name(task.state).removeprefix("TASK_STATE_").lower()
            where = "" if session else f", and agent {task.agent_id!r} has no session here now"
            raise NotDirectable(f"task {task.task_id} is {state}{where}; a directive needs a running attempt")
        # The agent may serve an older contract than the one that declares the directive.
        served = self._registry.methods_of(method.service, session.digests.get(method.service, ""))
        if any(each.full_name == task.method and not each.directive for each in served):
            raise NotDirectable(f"agent {task.agent_id} serves {task.method} by a contract that declares no directive")
        key = AttemptKey.of(task.attempt)
        asked = await self._store.apply(Direct(key, len(request.payload), actor_of(context)))
        if asked.word != "running":
            raise NotDirectable(f"task {task.task_id} does not run attempt {key.attempt} any more")
        try:
            passed = session.direct(key, request.payload)
        except LocalProtocolError:
            passed = False
        if not passed:
            raise NotDirectable(f"agent {task.agent_id} does not hold {key} now; ask again in a moment")
        self._moved(request.task_id, False)
        return pb.DirectResponse(attempt=key.ref())

    @typed
    async def List(self, request: pb.ListRequest, context: Context) -> pb.ListResponse:
        """A page of tasks, newest first, without their responses: `Get` has those."""
        which, page_size = self._rules.list(request)
        tasks, token = await self._store.page(which, page_size, request.page_token)
        return pb.ListResponse(tasks=tasks, next_page_token=token)

    async def _look(self, task_id: str) -> pb.TaskSnapshot:
        seen = await self._store.apply(ReadTask(task_id))
        if seen is None:
            raise UnknownTask(_GONE.format(task_id))
        return seen.task


def _fresh(submitted: Submitted, method: str, traceparent: str) -> pb.TaskSnapshot:
    """A new task, without another look at the store."""
    return pb.TaskSnapshot(
        task_id=submitted.task_id,
        method=method,
        state=TaskState.TASK_STATE_QUEUED,
        submitted_us=submitted.submitted_us,
        traceparent=traceparent,
        revision=1,
    )


_PAGE: Final = 100
"""Most entries of progress in one look."""
_SETTLE_S: Final = 0.005
"""Transitions come in bursts: one look serves those that follow each other this closely. An end is seen at once."""
_POLL_S: Final = 1.0
"""Longest time between two looks: the transition may have been another orchestrator's."""


@dataclass(slots=True, eq=False)
class _Watcher:
    news: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class Watchers:
    """Those who follow tasks."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._watchers: dict[str, set[_Watcher]] = {}

    def moved(self, task_id: str, ended: bool) -> None:
        """The task has changed, or has news."""
        for watcher in self._watchers.get(task_id, ()):
            watcher.news.set()
            if ended:
                watcher.ended.set()

    async def follow(self, task_id: str, after: str) -> AsyncIterator[WatchResponse]:
        """News of a task until its end.

        A snapshot comes first, and at every transition; the last message is the one with the terminal state. Of a task
        that has ended already, the progress comes before that message, which is then the only snapshot.

        Args:
            task_id: The task.
            after: Cursor of the last progress that was seen; "" for the beginning.

        Raises:
            UnknownTask: There is none of that id, or it was forgotten.
            StoreUnavailable: The store is away at the first look; at later ones, it is waited for.
        """
        revision = 0
        with self._watch(task_id) as watcher:
            while True:
                watcher.news.clear()
                try:
                    seen = await self._store.apply(ReadTask(task_id, _PAGE, after))
                except StoreUnavailable:
                    if not revision:
                        raise
                    await self._store.wait_up()
                    continue
                if seen is None:
                    raise UnknownTask(f"there is no task {task_id}")
                ended = seen.task.state in TERMINAL
                if seen.task.revision != revision and not ended:
                    yield WatchResponse(task=seen.task)
                revision = seen.task.revision
                for progress in seen.progress:
                    after = progress.cursor
                    yield WatchResponse(progress=progress)
                if len(seen.progress) == _PAGE:
                    continue
                if ended:
                    yield WatchResponse(task=seen.task)
                    return
                await _wait(watcher.news, _POLL_S)
                await _wait(watcher.ended, _SETTLE_S)

    @contextlib.contextmanager
    def _watch(self, task_id: str) -> Iterator[_Watcher]:
        watcher = _Watcher()
        self._watchers.setdefault(task_id, set()).add(watcher)
        try:
            yield watcher
        finally:
            left = self._watchers[task_id]
            left.discard(watcher)
            if not left:
                del self._watchers[task_id]


async def _wait(event: asyncio.Event, seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
