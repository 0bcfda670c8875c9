"""The client's shell of the submitters' session: one gRPC stream, opened when needed and again when lost."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, Final, TypeAlias

from orki.control.v1 import submitter_pb2 as pb
from orki.control.v1.attempt_pb2 import AttemptRef
from orki.control.v1.task_pb2 import (
    CancelRequest,
    DirectRequest,
    ProgressPosition,
    Submission,
    TaskSnapshot,
    WatchResponse,
)
from orki_contract.backoff import Jitter, JitterOptions
from orki_contract.errors import OrchestratorUnavailable, OrkiError, PeerRefused, ProtocolVersion, RemoteProtocolError
from orki_control._links import Links
from orki_control.submitter import (
    Answered,
    ClientEvent,
    ClientSession,
    ClientSessionOptions,
    Failed,
    Request,
    SessionLost,
    SessionOpened,
    Updated,
)
from orki_control.submitter._requests import seen
from orki_control.transport import typed_error

_CREDIT: Final = 256
"""Progress messages of one watch that may be under way."""
_UNSUPPORTED: Final = 30.0
"""Time after which an orchestrator that did not know the session is asked again."""
_log = logging.getLogger("orki.control")

Outcome: TypeAlias = TaskSnapshot | AttemptRef | OrkiError


class SessionUnsupported(ProtocolVersion):
    """The orchestrator is older and serves no sessions of submitters. The request was not sent."""


class Ticket:
    """A request whose outcome arrives in a future; `ended` gets the terminal snapshot if it has a watch."""

    __slots__ = ("answer", "ended", "request")

    def __init__(self, loop: asyncio.AbstractEventLoop, watched: bool) -> None:
        self.request: Request | None = None
        self.answer: asyncio.Future[Outcome] = loop.create_future()
        self.ended: asyncio.Future[Outcome] | None = loop.create_future() if watched else None

    def answered(self, outcome: Outcome) -> None:
        _resolve(self.answer, outcome)

    def updated(self, update: WatchResponse) -> None:
        if self.ended is not None:
            _resolve(self.ended, update.task)

    def failed(self, error: OrkiError) -> None:
        _resolve(self.answer, error)
        if self.ended is not None:
            _resolve(self.ended, error)


class _Updates:
    """The updates of one watch."""

    __slots__ = ("arrived", "error", "waiting")

    def __init__(self) -> None:
        self.arrived = asyncio.Event()
        self.waiting: deque[WatchResponse] = deque()
        self.error: OrkiError | None = None

    def updated(self, update: WatchResponse) -> None:
        self.waiting.append(update)
        self.arrived.set()

    def failed(self, error: OrkiError) -> None:
        self.error = error
        self.arrived.set()


class SubmitterSession:
    """One client's session. It belongs to the event loop in which it was created.

    Attributes:
        target: The orchestrators, for messages; the one of the current stream, once there was one.
    """

    def __init__(
        self,
        target: str,
        links: Links,
        *,
        patience: float,
        call_timeout: float,
        max_message_bytes: int,
        backoff: JitterOptions,
    ) -> None:
        """Create the session without opening it.

        Args:
            target: The orchestrators, for messages.
            links: The channels. After a loss the next address is used.
            patience: How long a request waits while the orchestrator is unavailable.
            call_timeout: Maximum wait for an outcome after that.
            max_message_bytes: Maximum size of a received message.
            backoff: Waits between two streams.
        """
        self.target = target
        self._links = links
        self._patience = patience
        self._call_timeout = call_timeout
        self._loop = asyncio.get_running_loop()
        self._machine = ClientSession(
            ClientSessionOptions(max_message_bytes=max_message_bytes, hello_timeout=call_timeout)
        )
        self._machine.on_change = self._changed
        self._backoff = backoff
        self._jitter = Jitter(backoff)
        self._writable = asyncio.Event()
        self._needed = asyncio.Event()
        self._over = asyncio.Event()
        self._cause: list[OrkiError] = []
        self._silent = False
        self._ask_again_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._due: float | None = None
        self._refreshing = False
        self._closed = False
        self._task: asyncio.Task[None] | None = None

    @property
    def supported(self) -> bool:
        """Whether to use the session: the orchestrator serves it, or may serve it."""
        return self._machine.live or self._loop.time() >= self._ask_again_at

    # --- Requests. ---

    def submit(self, submission: Submission, submission_id: bytes, *, watched: bool, repeated: bool) -> Ticket:
        """Submit a task; with `watched`, its end arrives as well."""
        ticket = Ticket(self._loop, watched)
        mode = pb.WATCH_MODE_RESULT if watched else pb.WATCH_MODE_UNSPECIFIED
        ticket.request = self._machine.submit(
            submission, submission_id, watch=mode, repeated=repeated, deadline=self._deadline()
        )
        ticket.request.context = ticket
        return ticket

    async def submit_all(
        self, submissions: Sequence[Submission], *, watched: bool
    ) -> list[tuple[TaskSnapshot | OrkiError, Ticket]]:
        """Submit tasks. What is refused only for now is submitted again while `patience` allows.

        Raises:
            SessionUnsupported: The orchestrator serves no sessions; nothing was submitted.
        """
        give_up_at = self._loop.time() + self._patience
        ids = [new_submission_id() for _ in submissions]
        tickets: list[Ticket] = []
        jitter = Jitter(self._backoff)
        again: Sequence[int] = range(len(submissions))
        accepted = False
        try:
            for submission, number in zip(submissions, ids, strict=True):
                tickets.append(self.submit(submission, number, watched=watched, repeated=False))
            while True:
                for position in again:
                    await tickets[position].answer
                again = [position for position in again if _refused_for_now(tickets[position].answer.result())]
                wait = jitter.failed() if again else 0.0
                if not again or self._loop.time() + wait >= give_up_at:
                    break
                await asyncio.sleep(wait)
                for position in again:
                    tickets[position] = self.submit(
                        submissions[position], ids[position], watched=watched, repeated=True
                    )
            accepted = True
        finally:
            if not accepted:
                self.abandon(tickets)
        found: list[tuple[TaskSnapshot | OrkiError, Ticket]] = []
        for ticket in tickets:
            outcome = ticket.answer.result()
            assert not isinstance(outcome, AttemptRef)
            found.append((outcome, ticket))
        if found and all(isinstance(outcome, SessionUnsupported) for outcome, _ in found):
            raise SessionUnsupported(f"{self.target} serves no sessions of submitters")
        return found

    async def wait_end(self, task_id: str) -> TaskSnapshot:
        """Wait for the terminal snapshot of a task.

        Raises:
            SessionUnsupported: The orchestrator serves no sessions.
            OrkiError: The watch failed for good, or the client was closed.
        """
        jitter = Jitter(self._backoff)
        while True:
            ticket = Ticket(self._loop, True)
            assert ticket.ended is not None
            ticket.request = self._machine.watch(task_id, pb.WATCH_MODE_RESULT)
            ticket.request.context = ticket
            try:
                outcome = await ticket.ended
            finally:
                self.abandon([ticket])
            if isinstance(outcome, TaskSnapshot):
                return outcome
            assert isinstance(outcome, OrkiError)
            if not outcome.retryable or self._closed:
                raise outcome
            await asyncio.sleep(jitter.failed())

    async def follow(self, task_id: str, after: str) -> AsyncGenerator[WatchResponse, None]:
        """Yield snapshots, progress and gaps of a task; the terminal snapshot is the last. Raises as `wait_end`."""
        jitter = Jitter(self._backoff)
        position: ProgressPosition | None = None
        while True:
            try:
                async with aclosing(self._updates(task_id, after, position)) as updates:
                    async for update in updates:
                        after, position = seen(update) or (after, position)
                        yield update
                return
            except OrkiError as error:
                if not error.retryable or self._closed:
                    raise
            await asyncio.sleep(jitter.failed())

    async def _updates(
        self, task_id: str, after: str, position: ProgressPosition | None
    ) -> AsyncGenerator[WatchResponse, None]:
        watch = _Updates()
        request = self._machine.watch(task_id, pb.WATCH_MODE_ALL, after=after, position=position, credit=_CREDIT)
        request.context = watch
        used = 0
        try:
            while True:
                while watch.waiting:
                    update = watch.waiting.popleft()
                    used += update.WhichOneof("news") != "task"
                    if used >= _CREDIT // 2:
                        self._machine.grant(request, used)
                        used = 0
                    yield update
                if watch.error is not None:
                    raise watch.error
                if request.closed:
                    return
                watch.arrived.clear()
                await watch.arrived.wait()
        finally:
            self._machine.abandon(request)

    async def cancel(self, request: CancelRequest) -> TaskSnapshot:
        """Cancel a task; repeat it, as long as `patience` allows, while it is refused for a cause that passes."""
        give_up_at = self._loop.time() + self._patience
        jitter = Jitter(self._backoff)
        while True:
            try:
                outcome = await self._outcome(self._machine.cancel(request, self._deadline()))
                assert isinstance(outcome, TaskSnapshot)
                return outcome
            except OrkiError as error:
                wait = jitter.failed()
                if not _refused_for_now(error) or self._loop.time() + wait >= give_up_at:
                    raise
            await asyncio.sleep(wait)

    async def direct(self, request: DirectRequest) -> AttemptRef:
        """Send a directive. It is not repeated."""
        outcome = await self._outcome(self._machine.direct(request, self._deadline()))
        assert isinstance(outcome, AttemptRef)
        return outcome

    def abandon(self, tickets: Sequence[Ticket]) -> None:
        """Give up requests that have no outcome yet."""
        for ticket in tickets:
            if ticket.request is not None:
                self._machine.abandon(ticket.request)

    async def _outcome(self, request: Request) -> TaskSnapshot | AttemptRef:
        ticket = Ticket(self._loop, False)
        ticket.request, request.context = request, ticket
        try:
            outcome = await ticket.answer
        finally:
            self._machine.abandon(request)
        if isinstance(outcome, OrkiError):
            raise outcome
        return outcome

    def _deadline(self) -> float:
        return self._loop.time() + self._patience + self._call_timeout

    # --- The stream. ---

    async def close(self) -> None:
        """End the session; open requests fail."""
        self._closed = True
        self._deliver(self._machine.stop(OrchestratorUnavailable(f"the client of {self.target} was closed")))
        self._over.set()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._timer is not None:
            self._timer.cancel()

    def _changed(self) -> None:
        if self._closed:
            return
        self._writable.set()
        self._needed.set()
        if self._task is None:
            self._task = self._loop.create_task(self._run(), name="orki submitter session")
            self._task.add_done_callback(self._ended)
        if not self._refreshing:
            self._refreshing = True
            self._loop.call_soon(self._refresh)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (defect := task.exception()) is not None:
            _log.critical("the session with %s failed: a defect", self.target, exc_info=defect)
            self._closed = True
            self._deliver(self._machine.stop(OrkiError(f"the session with {self.target} failed; see the log")))

    def _refresh(self) -> None:
        """Arm the machine's timer."""
        self._refreshing = False
        due = self._machine.next_timer()
        if due == self._due:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._due = due
        self._timer = None if due is None else self._loop.call_at(due, self._timer_fired)

    def _timer_fired(self) -> None:
        self._due = self._timer = None
        self._deliver(self._machine.handle_timer(self._loop.time()))
        self._changed()

    async def _run(self) -> None:
        while True:
            if self._machine.idle:
                self._needed.clear()
                await self._needed.wait()
                continue
            opened_at = self._loop.time()
            error = await self._connection()
            wait = self._jitter.failed(self._loop.time() - opened_at)
            now = self._loop.time()
            if isinstance(error, SessionUnsupported):
                self._ask_again_at = now + _UNSUPPORTED
                self._deliver(self._machine.give_up(error))
            elif isinstance(error, PeerRefused):
                self._deliver(self._machine.give_up(error))
            else:
                _log.info("the session with %s was lost: %s; trying again in %.2f s", self.target, error.message, wait)
            if self._jitter.failures >= self._links.count:
                # Each address has failed.
                self._deliver(self._machine.give_up(error, until=now + wait + self._call_timeout))
            await asyncio.sleep(wait)

    async def _connection(self) -> OrkiError:
        """Serve one stream to its end; return the cause."""
        with await self._links.current() as link:
            self.target = str(link.peer)
            self._over.clear()
            self._cause.clear()
            self._silent = False
            call = link.submitters.Open()
            self._machine.connection_made(self._loop.time())
            reader = self._loop.create_task(self._read(call), name="orki submitter reader")
            writer = self._loop.create_task(self._write(call), name="orki submitter writer")
            try:
                await self._over.wait()
            finally:
                # grpc.aio never ends a call that is only dropped.
                call.cancel()
                reader.cancel()
                writer.cancel()
                await asyncio.gather(reader, writer, return_exceptions=True)
            if not isinstance(self._cause[0], SessionUnsupported):
                self._links.failed(link, silent=self._silent)
        self._deliver(self._machine.connection_lost(self._cause[0]))
        return self._cause[0]

    def _lost(self, error: OrkiError) -> None:
        self._cause.append(error)
        self._over.set()

    async def _read(self, call: Any) -> None:
        import grpc

        machine = self._machine
        try:
            while True:
                batch = await call.read()
                if batch is grpc.aio.EOF:
                    self._lost(OrchestratorUnavailable(f"{self.target} ended the session"))
                    return
                self._deliver(machine.receive_batch(batch.messages, self._loop.time()))
        except RemoteProtocolError as error:
            _log.error("%s violated the submitters' protocol: %s", self.target, error.message)
            self._lost(OrchestratorUnavailable(f"{self.target}: {error.message}"))
        except asyncio.CancelledError:
            # grpc.aio raises this also when the peer or a proxy cancels the call, which is a lost connection.
            self._lost(OrchestratorUnavailable(f"{self.target}: the stream was cancelled"))
            raise
        except Exception as raised:
            self._lost(self._typed(raised))

    async def _write(self, call: Any) -> None:
        try:
            while True:
                batch = self._machine.messages_to_send(self._loop.time())
                if batch is None:
                    self._writable.clear()
                    await self._writable.wait()
                    continue
                await call.write(batch)
        except Exception as raised:
            # The reader gets the status of the stream, which says more.
            await asyncio.sleep(0.1)
            self._lost(self._typed(raised))

    def _typed(self, raised: Exception) -> OrkiError:
        if isinstance(raised, asyncio.InvalidStateError):
            return OrchestratorUnavailable(f"{self.target}: the stream ended")
        try:
            error = typed_error(raised, self.target)
        except Exception:
            _log.exception("a defect of the session with %s", self.target)
            return OrchestratorUnavailable(f"the session with {self.target} failed; see the log")
        if isinstance(error, ProtocolVersion) and not self._machine.live:
            return SessionUnsupported(error.message)
        if not error.retryable and not isinstance(error, PeerRefused):
            # A refusal of the session, such as too many of them, concerns requests only when their time is over.
            return OrchestratorUnavailable(error.message)
        return error

    def _deliver(self, events: Sequence[ClientEvent]) -> None:
        for event in events:
            match event:
                case Answered(request, outcome):
                    request.context.answered(outcome)
                case Updated(request, update):
                    request.context.updated(update)
                case Failed(request, error):
                    request.context.failed(error)
                case SessionOpened():
                    self._ask_again_at = 0.0
                case SessionLost(error):
                    self._silent = True
                    self._lost(error)


def new_submission_id() -> bytes:
    """Return 16 bytes: milliseconds since the Unix epoch, then random bytes."""
    return (time.time_ns() // 1_000_000).to_bytes(6) + os.urandom(10)


def _resolve(future: asyncio.Future[Outcome], outcome: Outcome) -> None:
    if not future.done():
        future.set_result(outcome)


def _refused_for_now(outcome: Outcome) -> bool:
    """Return whether a request was refused for a cause that passes."""
    return (
        isinstance(outcome, OrkiError)
        and outcome.retryable
        # The session itself has repeated these for as long as `patience` allows.
        and not isinstance(outcome, OrchestratorUnavailable)
    )
