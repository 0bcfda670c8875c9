"""The client's end of a submitters' session."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Final

from orki.control.v1 import submitter_pb2 as pb
from orki.control.v1.attempt_pb2 import TaskState
from orki.control.v1.task_pb2 import CancelRequest, DirectRequest, ProgressPosition, Submission
from orki_contract.errors import (
    LocalProtocolError,
    OrchestratorUnavailable,
    OrkiError,
    RemoteProtocolError,
    TooLarge,
    error_for,
)
from orki_control.submitter._options import (
    OVERHEAD_BYTES,
    PROTOCOL_MAX,
    PROTOCOL_MIN,
    SILENT_INTERVALS,
    ClientSessionOptions,
    check_welcome,
)
from orki_control.submitter._requests import (
    Answered,
    ClientEvent,
    Failed,
    OrchestratorDraining,
    Request,
    SessionLost,
    SessionOpened,
    Updated,
    request_of,
    seen,
)
from orki_control.submitter._tables import (
    CLIENT,
    REQUEST,
    ClientState,
    Connected,
    ConnectionLost,
    CreditGranted,
    Disconnected,
    HelloTimeout,
    PeerSilent,
    ReplyReceived,
    RequestAbandoned,
    RequestAnswered,
    RequestRefused,
    RequestSent,
    RequestState,
    Stopped,
    SubmissionAccepted,
    WatchEnded,
    WatchOpened,
    WatchUpdated,
)

_TERMINAL: Final = frozenset(
    {TaskState.TASK_STATE_SUCCEEDED, TaskState.TASK_STATE_FAILED, TaskState.TASK_STATE_CANCELLED}
)
_LIVE: Final = frozenset({ClientState.OPEN, ClientState.PEER_DRAINING})


class ClientSession:
    """The client's end. It outlives the streams.

    The shell opens a stream and calls `connection_made`. It passes received messages to `receive_batch`, writes the
    batches of `messages_to_send`, calls `handle_timer` at `next_timer`, and calls `connection_lost` when the stream has
    ended. `now` is a monotonic time in seconds. Whatever is called, the machine calls `on_change` when there may be
    messages to send or an earlier timer.

    Attributes:
        state: State of the session.
        orchestrator_id: Name of the orchestrator; empty before the first welcome.
        on_change: Called without arguments. It must not call the machine.
    """

    def __init__(self, options: ClientSessionOptions | None = None) -> None:
        self.state = ClientState.DISCONNECTED
        self.orchestrator_id = ""
        self.on_change: Callable[[], None] = _nothing
        self._options = options or ClientSessionOptions()
        self._welcome = pb.SubmitterWelcome()
        self._control: deque[pb.SubmitterMessage] = deque()
        self._urgent: deque[Request] = deque()
        self._waiting: deque[Request] = deque()
        self._sent: dict[int, Request] = {}
        self._deadlines: deque[Request] = deque()
        self._number = 0
        self._unanswered = self._unanswered_bytes = self._watches = 0
        self._hello_due: float | None = None
        self._heard_at = 0.0
        self._pings = 0

    @property
    def live(self) -> bool:
        """Whether the session is established."""
        return self.state in _LIVE

    @property
    def idle(self) -> bool:
        """Whether no request is open."""
        return not self._urgent and not self._waiting and not self._sent

    # --- Requests. ---

    def submit(
        self,
        submission: Submission,
        submission_id: bytes,
        *,
        watch: pb.WatchMode.ValueType = pb.WATCH_MODE_UNSPECIFIED,
        repeated: bool = False,
        deadline: float | None = None,
    ) -> Request:
        """Submit a task, and watch it from its acceptance if a mode is given.

        Args:
            submission: The task.
            submission_id: 16 bytes that no other submission has.
            watch: Mode of the watch; a mode with progress needs a watch of its own.
            repeated: Whether it may have been sent before.
            deadline: Time at which the client gives up.
        """
        body = pb.TaskSubmit(submission=submission, submission_id=submission_id, repeated=repeated, watch=watch)
        return self._add(request_of(pb.SubmitterMessage(submit=body), deadline, watch))

    def watch(
        self,
        task_id: str,
        mode: pb.WatchMode.ValueType,
        *,
        after: str = "",
        position: ProgressPosition | None = None,
        credit: int = 0,
    ) -> Request:
        """Watch a task to its end.

        Args:
            task_id: The task.
            mode: What the watch receives.
            after: Cursor of the last received progress or gap; empty for the beginning.
            position: Its position; None if it is unknown.
            credit: Number of progress messages that the orchestrator may send.
        """
        request = Request(
            _EMPTY, OVERHEAD_BYTES, task_id=task_id, after=after, position=position, mode=mode, credit=credit
        )
        return self._add(request)

    def cancel(self, request: CancelRequest, deadline: float | None = None) -> Request:
        """Request the cancellation of a task."""
        return self._add(request_of(pb.SubmitterMessage(cancel=request), deadline), urgent=True)

    def direct(self, request: DirectRequest, deadline: float | None = None) -> Request:
        """Send a directive. It is sent at most once (law 11)."""
        return self._add(request_of(pb.SubmitterMessage(direct=request), deadline), urgent=True)

    def grant(self, request: Request, messages: int) -> None:
        """Permit further progress of a watch; does nothing after its end."""
        if request.closed:
            return
        _step(request, CreditGranted)
        request.credit += messages
        if request.state is RequestState.WATCHING:
            credit = pb.ProgressCredit(messages=messages)
            self._put(pb.SubmitterMessage(request=request.number, credit=credit))

    def abandon(self, request: Request) -> None:
        """Give up a request; does nothing after its end. A submission may be accepted all the same."""
        if request.closed:
            return
        if request.mode and request.state is not RequestState.WAITING:
            self._put(pb.SubmitterMessage(request=request.number, unwatch=pb.TaskUnwatch()))
        self._close(request, RequestAbandoned)
        # Its room may be used by others.
        self.on_change()

    # --- The stream. ---

    def connection_made(self, now: float) -> None:
        """A stream was opened."""
        self._step(Connected)
        self._hello_due = now + self._options.hello_timeout
        hello = pb.SubmitterHello(
            protocol_min=PROTOCOL_MIN, protocol_max=PROTOCOL_MAX, max_message_bytes=self._options.max_message_bytes
        )
        self._put(pb.SubmitterMessage(hello=hello))

    def connection_lost(self, error: OrkiError) -> list[ClientEvent]:
        """The stream has ended. Requests wait for the next one; directives without an outcome fail."""
        self._step(Disconnected)
        return self._lost(error)

    def stop(self, error: OrkiError) -> list[ClientEvent]:
        """End the session. All requests fail with the error."""
        self._step(Stopped)
        requests = [*self._sent.values(), *self._urgent, *self._waiting]
        events: list[ClientEvent] = []
        for request in requests:
            if not request.closed:
                self._close(request, RequestAbandoned)
                events.append(Failed(request, error))
        self._urgent.clear()
        self._waiting.clear()
        self._control.clear()
        self.on_change()
        return events

    def give_up(self, error: OrkiError, *, until: float | None = None) -> list[ClientEvent]:
        """Fail requests that wait, after an attempt to connect has failed.

        Args:
            error: The cause.
            until: Only requests whose deadline is not after this time; None for all but sent submissions.
        """
        events: list[ClientEvent] = []
        for request in (*self._urgent, *self._waiting):
            if request.closed:
                continue
            if until is None:
                # Another protocol does not know the submission id, and would accept the submission a second time.
                chosen = request.attempts == 0 or not request.message.HasField("submit") or bool(request.task_id)
            else:
                chosen = request.deadline is not None and request.deadline <= until
            if chosen:
                self._close(request, RequestAbandoned)
                events.append(Failed(request, error))
        self._urgent = deque(each for each in self._urgent if not each.closed)
        self._waiting = deque(each for each in self._waiting if not each.closed)
        return events

    def receive_batch(self, messages: Iterable[pb.SubmitterReply], now: float) -> list[ClientEvent]:
        """Apply received messages.

        Raises:
            RemoteProtocolError: A message is illegal now. The shell ends the stream.
        """
        self._heard_at = now
        self._pings = 0
        events: list[ClientEvent] = []
        for reply in messages:
            kind = reply.WhichOneof("body")
            if kind == "update":
                self._step_remote(ReplyReceived)
                self._updated(reply, events)
            elif kind in ("accepted", "cancelled", "directed"):
                self._step_remote(ReplyReceived)
                self._answered(reply.request, getattr(reply, kind), events)
            elif kind == "failure":
                self._step_remote(ReplyReceived)
                if (request := self._request(reply.request)) is not None:
                    self._close(request, RequestRefused)
                    events.append(Failed(request, error_for(reply.failure.reason, reply.failure.message)))
            elif kind == "welcome":
                self._step_remote(pb.SubmitterWelcome)
                check_welcome(reply.welcome)
                self._welcome = reply.welcome
                self.orchestrator_id = reply.welcome.orchestrator_id
                self._hello_due = None
                events.append(SessionOpened())
                events += self._refuse_large()
            elif kind == "pong":
                self._step_remote(pb.SubmitterPong)
            elif kind == "drain":
                self._step_remote(pb.SubmitterDrain)
                events.append(OrchestratorDraining())
        if events:
            # Answers make room for requests that wait.
            self.on_change()
        return events

    def messages_to_send(self, now: float) -> pb.OpenRequest | None:
        """Return the next batch; None if there is nothing to send now."""
        bounds = self._options.bounds
        batch: list[pb.SubmitterMessage] = []
        while self._control and len(batch) < bounds.count:
            batch.append(self._control.popleft())
        if self.state in _LIVE and (self._urgent or self._waiting):
            if not self._sent:
                # Nothing was awaited until now, so the orchestrator had no reason to send anything.
                self._heard_at = now
            size = 0
            for queue in (self._urgent, self._waiting):
                while queue and len(batch) < bounds.count:
                    request = queue[0]
                    if not request.closed:
                        if not self._has_room(request) or (batch and size + request.size > bounds.size):
                            break
                        size += request.size
                        batch.append(self._send(request))
                    queue.popleft()
        return pb.OpenRequest(messages=batch) if batch else None

    # --- Timers. ---

    def next_timer(self) -> float | None:
        """Return the time at which `handle_timer` is due; None for no timer."""
        while self._deadlines and self._deadlines[0].closed:
            self._deadlines.popleft()
        due = [each for each in (self._hello_due, self._ping_due()) if each is not None]
        if self._deadlines and self._deadlines[0].deadline is not None:
            due.append(self._deadlines[0].deadline)
        return min(due, default=None)

    def handle_timer(self, now: float) -> list[ClientEvent]:
        """Execute the timers that are due."""
        events: list[ClientEvent] = []
        if self._hello_due is not None and now >= self._hello_due:
            self._step(HelloTimeout)
            events += self._silent("the orchestrator did not answer the hello")
        ping_due = self._ping_due()
        if ping_due is not None and now >= ping_due:
            if self._pings >= SILENT_INTERVALS:
                self._step(PeerSilent)
                events += self._silent(f"the orchestrator {self.orchestrator_id} answered no ping")
            else:
                self._pings += 1
                self._put(pb.SubmitterMessage(ping=pb.SubmitterPing()))
        while self._deadlines and (self._deadlines[0].closed or (self._deadlines[0].deadline or 0.0) <= now):
            request = self._deadlines.popleft()
            if not request.closed and request.state is not RequestState.WATCHING:
                self._close(request, RequestAbandoned)
                events.append(Failed(request, OrchestratorUnavailable("the orchestrator did not answer in time")))
        return events

    # --- Parts. ---

    def _ping_due(self) -> float | None:
        if self.state not in _LIVE or not self._sent:
            return None
        return self._heard_at + (self._pings + 1) * self._welcome.ping_interval_ms / 1000

    def _silent(self, text: str) -> list[ClientEvent]:
        error = OrchestratorUnavailable(text)
        return [*self._lost(error), SessionLost(error)]

    def _lost(self, error: OrkiError) -> list[ClientEvent]:
        events: list[ClientEvent] = []
        self._control.clear()
        self._hello_due = None
        self._pings = 0
        again: list[Request] = []
        sent = list(self._sent.values())
        self._sent.clear()
        self._unanswered = self._unanswered_bytes = self._watches = 0
        for request in sent:
            if request.message.WhichOneof("body") == "direct":
                _step(request, RequestAbandoned)
                events.append(Failed(request, OrchestratorUnavailable(f"no outcome of the directive: {error.message}")))
                continue
            _step(request, ConnectionLost)
            again.append(request)
        self._waiting.extendleft(reversed(again))
        self._number = 0
        return events

    def _refuse_large(self) -> list[ClientEvent]:
        """Fail waiting requests that are larger than the orchestrator's messages: they would end every stream."""
        events: list[ClientEvent] = []
        for request in (*self._urgent, *self._waiting):
            if not request.closed and request.size > self._welcome.max_message_bytes:
                self._close(request, RequestAbandoned)
                events.append(Failed(request, self._too_large(request)))
        return events

    def _too_large(self, request: Request) -> TooLarge:
        return TooLarge(
            f"the request has {request.size} bytes; the orchestrator takes at most {self._welcome.max_message_bytes}"
        )

    def _add(self, request: Request, *, urgent: bool = False) -> Request:
        if self.state is ClientState.ENDED:
            raise OrchestratorUnavailable("the client is closed")
        if self.state in _LIVE and request.size > self._welcome.max_message_bytes:
            raise self._too_large(request)
        if request.deadline is not None:
            self._deadlines.append(request)
        (self._urgent if urgent else self._waiting).append(request)
        self.on_change()
        return request

    def _put(self, message: pb.SubmitterMessage) -> None:
        self._control.append(message)
        self.on_change()

    def _has_room(self, request: Request) -> bool:
        welcome = self._welcome
        if request.mode and self._watches >= welcome.max_watches:
            return False
        if request.task_id:
            return True
        fits = self._unanswered_bytes + request.size <= welcome.max_request_bytes or not self._unanswered
        return fits and self._unanswered < welcome.max_requests

    def _send(self, request: Request) -> pb.SubmitterMessage:
        self._number += 1
        if request.task_id:
            # A watch, or a submission that was accepted on an earlier stream.
            body = pb.TaskWatch(
                task_id=request.task_id,
                after=request.after,
                position=request.position,
                mode=request.mode,
                credit=request.credit,
            )
            request.message = pb.SubmitterMessage(watch=body)
            _step(request, WatchOpened)
            self._watches += 1
        else:
            if request.attempts and request.message.HasField("submit"):
                request.message.submit.repeated = True
            _step(request, RequestSent)
            self._unanswered += 1
            self._unanswered_bytes += request.size
            self._watches += request.mode != pb.WATCH_MODE_UNSPECIFIED
        request.attempts += 1
        request.message.request = self._number
        self._sent[self._number] = request
        return request.message

    def _request(self, number: int) -> Request | None:
        request = self._sent.get(number)
        if request is None and not 1 <= number <= self._number:
            raise RemoteProtocolError(f"the orchestrator answered request {number}, which was not sent")
        return request

    def _answered(self, number: int, outcome: Any, events: list[ClientEvent]) -> None:
        request = self._request(number)
        if request is None:
            return
        if request.state is not RequestState.SENT:
            raise RemoteProtocolError(f"the orchestrator answered request {number} twice")
        if request.mode:
            _step(request, SubmissionAccepted)
            request.task_id = outcome.task_id
            self._unanswered -= 1
            self._unanswered_bytes -= request.size
            request.size = OVERHEAD_BYTES
        else:
            self._close(request, RequestAnswered)
        events.append(Answered(request, outcome))

    def _updated(self, reply: pb.SubmitterReply, events: list[ClientEvent]) -> None:
        request = self._request(reply.request)
        if request is None:
            return
        if request.state is not RequestState.WATCHING:
            raise RemoteProtocolError(f"the orchestrator sent an update of request {reply.request}, which is no watch")
        update = reply.update
        if update.WhichOneof("news") == "task" and update.task.state in _TERMINAL:
            self._close(request, WatchEnded)
        else:
            _step(request, WatchUpdated)
            if (found := seen(update)) is not None:
                request.after, request.position = found
                request.credit -= 1
        events.append(Updated(request, update))

    def _close(self, request: Request, event: type) -> None:
        before = request.state
        _step(request, event)
        if before is RequestState.WAITING:
            return
        del self._sent[request.number]
        if before is RequestState.SENT:
            self._unanswered -= 1
            self._unanswered_bytes -= request.size
        self._watches -= request.mode != pb.WATCH_MODE_UNSPECIFIED

    def _step(self, event: type) -> None:
        following = CLIENT.next(self.state, event, LocalProtocolError)
        if following is not self.state:
            self.state = following
            self.on_change()

    def _step_remote(self, event: type) -> None:
        following = CLIENT.rows[self.state].get(event)
        if following is None:
            raise RemoteProtocolError(CLIENT.illegal(self.state, event))
        self.state = following


_EMPTY: Final = pb.SubmitterMessage()


def _nothing() -> None:
    pass


def _step(request: Request, event: type) -> None:
    request.state = REQUEST.next(request.state, event, LocalProtocolError)
