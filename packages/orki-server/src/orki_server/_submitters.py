"""SubmitterService: the sessions of submitters.

Requests do not wait for each other: operations are enqueued as they arrive, and each reply calls back into the machine
of the session. Replies that arrive together leave in one message. Only watches for more than the result, cancels and
directives have asyncio tasks.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeAlias

import grpc

from orki.control.v1 import submitter_pb2 as pb
from orki.control.v1.submitter_pb2_grpc import SubmitterServiceServicer
from orki.control.v1.task_pb2 import TaskSnapshot, WatchRequest, WatchResponse
from orki_contract.errors import Draining, LocalProtocolError, OrkiError, Overloaded
from orki_control.submitter import (
    CancelArrived,
    CreditArrived,
    DirectiveArrived,
    ServingEvent,
    ServingOptions,
    ServingSession,
    ServingState,
    SessionEnded,
    SubmissionsArrived,
    WatchArrived,
    WatchClosed,
)
from orki_control.transport import LaterCall, abort
from orki_server._calls import readable
from orki_server._identity import Action, caller
from orki_server._requests import Undecodable
from orki_server._results import ResultWatches, Sink
from orki_server._sessions import HELLOS_PER_CONNECTION
from orki_server._store.lifecycle import TERMINAL
from orki_server._store.operations import Submitted
from orki_server._store.store import Store
from orki_server._submissions import Pending, Submissions
from orki_server._tasks import TaskServicer, Watchers

StreamContext: TypeAlias = grpc.aio.ServicerContext[pb.OpenRequest, pb.OpenResponse]

_LATER: Final = 0.01
"""Maximum time for which the answer to a submission waits for the result, if the client watches for that."""
_FLUSH_TIMEOUT: Final = 2.0
"""Maximum time for writing the remaining messages when a stream ends."""
_WRITE_TIMEOUT: Final = 20.0
"""Maximum time for one write: a client that does not read must not fill the memory."""
_BACKLOG_BYTES: Final = 16 << 20
"""Size of unsent messages above which results stay in the store, and progress waits."""
_LATE_RESULTS: Final = 16
"""Number of results that are read at a time once the client has read the others."""
_END_TIMEOUT: Final = 3.0
"""Maximum wait for the streams to end."""
_log = logging.getLogger("orki.server.requests")


@dataclass(frozen=True, slots=True)
class Services:
    """What the sessions use.

    Attributes:
        store: The store.
        tasks: Cancels and directs tasks.
        submissions: Checks submissions.
        watchers: Follows tasks.
        results: Watches for results.
    """

    store: Store
    tasks: TaskServicer
    submissions: Submissions
    watchers: Watchers
    results: ResultWatches


class SubmitterStream:
    """One stream of one client.

    Attributes:
        machine: The session's state machine.
        peer: The connection.
        error: The client's fault that ended the stream, if there was one.
    """

    def __init__(self, options: ServingOptions, services: Services, peer: str) -> None:
        self.error: OrkiError | None = None
        # Results arrive in the context of another call.
        self._caller = caller()
        self.machine = ServingSession(options, time.monotonic())
        self._services = services
        self._actor = self._caller.name
        self.peer = peer
        self._loop = asyncio.get_running_loop()
        self._over = asyncio.Event()
        self._writable = asyncio.Event()
        self._room = asyncio.Event()
        self._credits: dict[int, asyncio.Event] = {}
        self._follows: dict[int, asyncio.Task[None]] = {}
        self._results: dict[int, tuple[str, Sink]] = {}
        self._late: deque[tuple[int, str]] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._later = LaterCall(self._loop, _LATER, self._writable.set)
        self.machine.on_change = self._writable.set
        self.machine.on_later = self._later.request

    def end(self, cause: str) -> None:
        """End the stream after the remaining messages are written."""
        if not self._over.is_set():
            _log.debug("a submitter's session ends: %s", cause)
        self._over.set()
        self._writable.set()

    async def run(self, context: StreamContext) -> None:
        """Serve the stream to its end."""
        reader = asyncio.create_task(self._read(context), name="orki submitter reader")
        writer = asyncio.create_task(self._write(context), name="orki submitter writer")
        due = self.machine.next_timer()
        timer = None if due is None else self._loop.call_at(due, self._timer_fired)
        try:
            await self._over.wait()
            self._writable.set()
            await asyncio.wait([writer], timeout=_FLUSH_TIMEOUT)
        finally:
            self._over.set()
            self._later.cancel()
            if timer is not None:
                timer.cancel()
            waits = [reader, writer, *self._tasks]
            for each in waits:
                each.cancel()
            await asyncio.gather(*waits, return_exceptions=True)
            for task_id, sink in self._results.values():
                self._services.results.remove(task_id, sink)
            self.machine.connection_lost()

    async def _read(self, context: StreamContext) -> None:
        try:
            while not self._over.is_set():
                request: Any = await context.read()
                if request is grpc.aio.EOF:
                    self.end("the client ended the stream")
                    return
                if isinstance(request, Undecodable):
                    raise request.error
                for event in self.machine.receive_batch(request.messages):
                    self._handle(event)
        except (grpc.RpcError, grpc.aio.BaseError) as error:
            self.end(f"the stream broke: {error}")
        except OrkiError as error:
            _log.warning("a client violated the submitters' protocol: %s", error.message)
            self.error = error
            self.end(error.message)
        except asyncio.CancelledError:
            raise
        except Exception:
            _log.exception("a defect while the messages of a client were handled")
            self.end("a defect of the orchestrator")

    async def _write(self, context: StreamContext) -> None:
        try:
            while True:
                batch = self.machine.messages_to_send()
                if batch is None:
                    if self._over.is_set():
                        return
                    self._writable.clear()
                    await self._writable.wait()
                    continue
                self._later.cancel()
                timeout = self._loop.call_later(_WRITE_TIMEOUT, self._write_timed_out)
                try:
                    await context.write(batch)
                finally:
                    timeout.cancel()
                self._room.set()
                if self._late and self.machine.waiting_bytes < _BACKLOG_BYTES // 2:
                    self._read_late()
        except (grpc.RpcError, grpc.aio.BaseError) as error:
            self.end(f"the stream broke: {error}")

    def _write_timed_out(self) -> None:
        _log.warning("a client has not read for %g s; its stream is ended", _WRITE_TIMEOUT)
        self._over.set()

    def _timer_fired(self) -> None:
        for event in self.machine.handle_timer(time.monotonic()):
            self._handle(event)

    def _handle(self, event: ServingEvent) -> None:
        match event:
            case SubmissionsArrived(submissions):
                for number, submit in submissions:
                    self._submit(number, submit)
            case WatchArrived(number, watch):
                self._watch(number, watch)
            case WatchClosed(number):
                self._unwatch(number)
            case CreditArrived(number):
                if (credit := self._credits.get(number)) is not None:
                    credit.set()
            case CancelArrived(number, cancel):
                self._start(number, self._cancel(number, cancel))
            case DirectiveArrived(number, direct):
                self._start(number, self._direct(number, direct))
            case SessionEnded(error):
                self.error = error
                self.end(error.message)

    # --- Submissions. ---

    def _submit(self, number: int, submit: pb.TaskSubmit) -> None:
        try:
            if self._services.tasks.draining:
                raise Draining("this orchestrator is stopping; submit again in a moment")
            method = self._services.submissions.check_cached(submit.submission)
            if method is None:
                self._start(number, self._submit_unknown(number, submit))
                return
            pending = self._services.submissions.pending(submit.submission, method, self._actor, submit.submission_id)
            stored = self._services.submissions.send(pending)
        except OrkiError as error:
            self.machine.fail(number, error)
            return
        stored.add_done_callback(partial(self._stored, number, submit, pending))

    async def _submit_unknown(self, number: int, submit: pb.TaskSubmit) -> None:
        """Submit after a read of the contract."""
        submissions = self._services.submissions
        method = await submissions.check(submit.submission)
        pending = submissions.pending(submit.submission, method, self._actor, submit.submission_id)
        self._accepted(number, submit, pending, await submissions.store(pending))

    def _stored(self, number: int, submit: pb.TaskSubmit, pending: Pending, stored: asyncio.Future[Any]) -> None:
        if stored.cancelled():
            return
        try:
            self._accepted(number, submit, pending, stored.result())
        except Exception as error:
            self._failed(number, error)

    def _accepted(self, number: int, submit: pb.TaskSubmit, pending: Pending, submitted: Submitted) -> None:
        task = self._services.submissions.accepted(pending, submitted)
        if task is None or submit.repeated:
            # The task exists already, and may be in any state.
            self._start(number, self._accept_found(number, submit, submitted.task_id))
            return
        self._services.results.submitted(task)
        self._accept(number, submit, task)

    async def _accept_found(self, number: int, submit: pb.TaskSubmit, task_id: str) -> None:
        self._accept(number, submit, readable(await self._services.tasks.read(task_id)))

    def _accept(self, number: int, submit: pb.TaskSubmit, task: TaskSnapshot) -> None:
        self.machine.accept(number, task)
        if not self.machine.watching(number):
            return
        try:
            self._caller.check_task(Action.READ, task.task_id, task.method)
        except OrkiError as error:
            self.machine.fail(number, error)
            return
        if task.state in TERMINAL:
            self.machine.update(number, WatchResponse(task=task))
        elif submit.watch == pb.WATCH_MODE_RESULT:
            self._watch_result(number, task.task_id)
        else:
            watch = pb.TaskWatch(task_id=task.task_id, mode=submit.watch)
            self._watch(number, watch)

    # --- Watches. ---

    def _watch(self, number: int, watch: pb.TaskWatch) -> None:
        if watch.mode == pb.WATCH_MODE_RESULT:
            if self._caller.rules is None:
                self._watch_result(number, watch.task_id)
            else:
                self._start(number, self._watch_readable(number, watch.task_id))
            return
        self._credits[number] = asyncio.Event()
        task = self._start(number, self._follow(number, watch))
        self._follows[number] = task

    async def _watch_readable(self, number: int, task_id: str) -> None:
        """Watch for a result after a read, as only the store knows whether the caller may read the task."""
        await self._services.tasks.read(task_id, Action.READ)
        if self.machine.watching(number):
            self._watch_result(number, task_id)

    def _watch_result(self, number: int, task_id: str) -> None:
        sink = partial(self._result, number, task_id)
        self._results[number] = (task_id, sink)
        self._services.results.add(task_id, sink)

    def _result(self, number: int, task_id: str, outcome: TaskSnapshot | OrkiError) -> None:
        self._results.pop(number, None)
        if isinstance(outcome, OrkiError):
            self.machine.fail(number, outcome)
        elif self.machine.waiting_bytes > _BACKLOG_BYTES:
            self._late.append((number, task_id))
        else:
            self.machine.update(number, WatchResponse(task=outcome))

    def _read_late(self) -> None:
        for _ in range(min(len(self._late), _LATE_RESULTS)):
            number, task_id = self._late.popleft()
            if self.machine.watching(number):
                self._watch_result(number, task_id)

    def _unwatch(self, number: int) -> None:
        if (result := self._results.pop(number, None)) is not None:
            self._services.results.remove(*result)
        if (task := self._follows.get(number)) is not None:
            task.cancel()

    async def _follow(self, number: int, watch: pb.TaskWatch) -> None:
        """Send snapshots, and progress as far as the client granted credit."""
        machine, progress = self.machine, watch.mode == pb.WATCH_MODE_ALL
        self._services.tasks.check_watch(WatchRequest(task_id=watch.task_id, after=watch.after))
        position = watch.position if watch.HasField("position") else None
        try:
            async for news in self._services.watchers.follow(watch.task_id, watch.after, position):
                for update in news:
                    if update.WhichOneof("news") != "task":
                        if not progress:
                            continue
                        await self._credit(number)
                    while machine.waiting_bytes > _BACKLOG_BYTES:
                        self._room.clear()
                        await self._room.wait()
                    if not machine.update(number, update):
                        return
        finally:
            self._follows.pop(number, None)
            self._credits.pop(number, None)

    async def _credit(self, number: int) -> None:
        granted = self._credits[number]
        while self.machine.credit(number) <= 0:
            granted.clear()
            await granted.wait()

    # --- Cancels and directives. ---

    async def _cancel(self, number: int, request: Any) -> None:
        self.machine.cancelled(number, await self._services.tasks.cancel(request, self._actor))

    async def _direct(self, number: int, request: Any) -> None:
        attempt = await self._services.tasks.direct(request, self._actor)
        self.machine.directed(number, attempt.ref())

    def _start(self, number: int, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work, name="orki submitter request")
        self._tasks.add(task)
        task.add_done_callback(partial(self._finished, number))
        return task

    def _finished(self, number: int, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failed(number, error)

    def _failed(self, number: int, error: BaseException) -> None:
        if not isinstance(error, OrkiError):
            _log.error("a request failed: a defect", exc_info=error)
            error = LocalProtocolError("the orchestrator failed; see its log")
        self.machine.fail(number, error)


class SubmitterServicer(SubmitterServiceServicer):
    """Serves the sessions of submitters."""

    def __init__(self, options: ServingOptions, services: Services, max_sessions: int) -> None:
        self._options = options
        self._services = services
        self._max_sessions = max_sessions
        self._open: set[SubmitterStream] = set()

    async def Open(  # type: ignore[override]  # the stub's context is grpc's and grpc.aio's at once
        self, request_iterator: AsyncIterator[pb.OpenRequest], context: StreamContext
    ) -> None:
        if self._services.tasks.draining:
            await abort(context, Draining("this orchestrator is stopping; connect again in a moment"))
        if len(self._open) >= self._max_sessions:
            await abort(context, Overloaded(f"{self._max_sessions} submitters have a session; try again later"))
        peer = context.peer()
        silent = sum(each.peer == peer and each.machine.state is ServingState.AWAITING_HELLO for each in self._open)
        if silent >= HELLOS_PER_CONNECTION:
            await abort(context, Overloaded(f"{HELLOS_PER_CONNECTION} streams of this connection await their hello"))
        stream = SubmitterStream(self._options, self._services, peer)
        self._open.add(stream)
        try:
            await stream.run(context)
        finally:
            self._open.discard(stream)
        if stream.error is not None:
            await abort(context, stream.error)

    def drain(self) -> None:
        """Tell all clients that the orchestrator stops soon."""
        for stream in self._open:
            if stream.machine.state is not ServingState.ENDED:
                stream.machine.drain()

    async def end_all(self, cause: str) -> None:
        """End all streams after their messages are written."""
        for stream in list(self._open):
            stream.end(cause)
        deadline = time.monotonic() + _END_TIMEOUT
        while self._open and time.monotonic() < deadline:  # noqa: ASYNC110 - streams end one by one
            await asyncio.sleep(0.01)
