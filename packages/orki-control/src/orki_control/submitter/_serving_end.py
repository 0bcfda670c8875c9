"""The orchestrator's end of one stream of a submitters' session."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, TypeAlias

from orki.control.v1 import submitter_pb2 as pb
from orki.control.v1.attempt_pb2 import AttemptRef, Failure, TaskState
from orki.control.v1.task_pb2 import CancelRequest, DirectRequest, TaskSnapshot, WatchResponse
from orki_contract.errors import InvalidArgument, OrkiError, Overloaded, RemoteProtocolError, TooLarge
from orki_control.submitter._options import OVERHEAD_BYTES, PROTOCOL_MAX, ServingOptions, check_hello
from orki_control.submitter._tables import SERVING, Disconnected, HelloTimeout, ServingState

_TERMINAL: Final = frozenset(
    {TaskState.TASK_STATE_SUCCEEDED, TaskState.TASK_STATE_FAILED, TaskState.TASK_STATE_CANCELLED}
)
_KINDS: Final = {
    "submit": pb.TaskSubmit,
    "watch": pb.TaskWatch,
    "unwatch": pb.TaskUnwatch,
    "cancel": CancelRequest,
    "direct": DirectRequest,
    "credit": pb.ProgressCredit,
    "ping": pb.SubmitterPing,
}


@dataclass(frozen=True, slots=True)
class SubmissionsArrived:
    """Submissions, each with the number of its request."""

    submissions: list[tuple[int, pb.TaskSubmit]]


@dataclass(frozen=True, slots=True)
class WatchArrived:
    """A watch was opened."""

    number: int
    watch: pb.TaskWatch


@dataclass(frozen=True, slots=True)
class WatchClosed:
    """The client ended a watch."""

    number: int


@dataclass(frozen=True, slots=True)
class CreditArrived:
    """The client permits further progress of a watch."""

    number: int


@dataclass(frozen=True, slots=True)
class CancelArrived:
    """The client requests the cancellation of a task."""

    number: int
    cancel: CancelRequest


@dataclass(frozen=True, slots=True)
class DirectiveArrived:
    """The client sends a directive."""

    number: int
    direct: DirectRequest


@dataclass(frozen=True, slots=True)
class SessionEnded:
    """The shell must end the stream."""

    error: OrkiError


ServingEvent: TypeAlias = (
    SubmissionsArrived | WatchArrived | WatchClosed | CreditArrived | CancelArrived | DirectiveArrived | SessionEnded
)


class ServingSession:
    """The orchestrator's end of one stream.

    The shell passes received messages to `receive_batch`, answers the requests, writes the batches of
    `messages_to_send`, calls `handle_timer` at `next_timer`, and calls `connection_lost` when the stream has ended.
    Answers and updates after the end of a request are dropped. The machine calls `on_change` when there are messages to
    send, or `on_later` if they may wait a moment for others.

    Attributes:
        state: State of the session.
        waiting_bytes: Size of the messages that wait to be sent.
        on_change: Called without arguments. It must not call the machine.
        on_later: As `on_change`; None to call that one instead.
    """

    def __init__(self, options: ServingOptions, now: float) -> None:
        self.state = ServingState.AWAITING_HELLO
        self.waiting_bytes = 0
        self.on_change: Callable[[], None] = _nothing
        self.on_later: Callable[[], None] | None = None
        self._options = options
        self._hello_due: float | None = now + options.hello_timeout
        self._client_bytes = 0
        self._number = 0
        self._unanswered: dict[int, int] = {}
        self._unanswered_bytes = 0
        self._watches: dict[int, int] = {}
        self._queue: deque[tuple[pb.SubmitterReply, int]] = deque()

    @property
    def watches(self) -> int:
        """Number of open watches."""
        return len(self._watches)

    def watching(self, number: int) -> bool:
        """Return whether a watch is open."""
        return number in self._watches

    def credit(self, number: int) -> int:
        """Return the number of progress messages that a watch may still receive."""
        return self._watches.get(number, 0)

    # --- Received messages. ---

    def receive_batch(self, messages: Iterable[pb.SubmitterMessage]) -> list[ServingEvent]:
        """Apply received messages.

        Raises:
            RemoteProtocolError: A message is illegal now. The shell ends the stream.
            ProtocolVersion: The two sides have no protocol version in common.
        """
        events: list[ServingEvent] = []
        submissions: list[tuple[int, pb.TaskSubmit]] = []
        for message in messages:
            kind = message.WhichOneof("body") or ""
            if self.state is ServingState.AWAITING_HELLO:
                self._hello(kind, message)
                continue
            known = _KINDS.get(kind)
            if known is None:
                if kind == "hello":
                    raise RemoteProtocolError(SERVING.illegal(self.state, pb.SubmitterHello))
                if message.request:
                    self._admit(message.request, 0, False)
                    self.fail(message.request, InvalidArgument("this orchestrator does not know the kind of request"))
                continue
            if known not in SERVING.rows[self.state]:
                continue
            if kind == "submit":
                submit = message.submit
                size = message.ByteSize()
                if self._admit(message.request, size, submit.watch != pb.WATCH_MODE_UNSPECIFIED, submit.credit):
                    submissions.append((message.request, submit))
                continue
            if submissions:
                # Messages are applied in order.
                events.append(SubmissionsArrived(submissions))
                submissions = []
            self._request(kind, message, events)
        if submissions:
            events.append(SubmissionsArrived(submissions))
        return events

    def connection_lost(self) -> None:
        """The stream has ended."""
        self.state = SERVING.next(self.state, Disconnected, RemoteProtocolError)
        self._unanswered.clear()
        self._watches.clear()
        self._queue.clear()
        self.waiting_bytes = 0

    def drain(self) -> None:
        """Tell the client that the orchestrator stops soon."""
        self.state = SERVING.next(self.state, pb.SubmitterDrain, RemoteProtocolError)
        if self.state is ServingState.DRAINING:
            self._put(pb.SubmitterReply(drain=pb.SubmitterDrain()), 0)

    # --- Answers. ---

    def accept(self, number: int, task: TaskSnapshot) -> None:
        """Accept a submission. Its watch, if any, begins, and the answer may wait for the first update."""
        if self._answered(number):
            self._answer(
                pb.SubmitterReply(request=number, accepted=task), len(task.response), later=number in self._watches
            )

    def cancelled(self, number: int, task: TaskSnapshot) -> None:
        """Answer a cancel."""
        if self._answered(number):
            self._answer(pb.SubmitterReply(request=number, cancelled=task), len(task.response))

    def directed(self, number: int, attempt: AttemptRef) -> None:
        """Answer a directive."""
        if self._answered(number):
            self._put(pb.SubmitterReply(request=number, directed=attempt), 0)

    def fail(self, number: int, error: OrkiError) -> None:
        """Answer a request, or end a watch, with a failure."""
        answered = self._answered(number)
        watched = self._watches.pop(number, None)
        if answered or watched is not None:
            self._refuse(number, error)

    def update(self, number: int, update: WatchResponse) -> bool:
        """Send an update of a watch. A terminal snapshot ends it.

        Returns:
            Whether the watch is still open.
        """
        credit = self._watches.get(number)
        if credit is None:
            return False
        if update.WhichOneof("news") == "task":
            task = update.task
            if task.state in _TERMINAL:
                del self._watches[number]
            size = len(task.response)
        else:
            self._watches[number] = credit - 1
            size = len(update.progress.payload)
        if size + OVERHEAD_BYTES > self._client_bytes and size + update.ByteSize() > self._client_bytes:
            self._watches.pop(number, None)
            self._refuse(number, self._too_large(size))
            return False
        self._put(pb.SubmitterReply(request=number, update=update), size)
        return number in self._watches

    def messages_to_send(self) -> pb.OpenResponse | None:
        """Return the next batch; None if there is nothing to send."""
        if not self._queue:
            return None
        bounds = self._options.bounds
        batch: list[pb.SubmitterReply] = []
        size = 0
        while self._queue and len(batch) < bounds.count:
            reply, weight = self._queue[0]
            if batch and size + weight > bounds.size:
                break
            self._queue.popleft()
            batch.append(reply)
            size += weight
        self.waiting_bytes -= size
        return pb.OpenResponse(messages=batch)

    # --- Timers. ---

    def next_timer(self) -> float | None:
        """Return the time at which `handle_timer` is due; None for no timer."""
        return self._hello_due

    def handle_timer(self, now: float) -> list[ServingEvent]:
        """Execute the timer if it is due."""
        if self._hello_due is None or now < self._hello_due or self.state is not ServingState.AWAITING_HELLO:
            return []
        self._hello_due = None
        self.state = SERVING.next(self.state, HelloTimeout, RemoteProtocolError)
        return [SessionEnded(RemoteProtocolError("the client sent no hello in time"))]

    # --- Parts. ---

    def _hello(self, kind: str, message: pb.SubmitterMessage) -> None:
        if kind != "hello":
            raise RemoteProtocolError(f"the first message is {kind or 'of an unknown kind'}, not a hello")
        check_hello(message.hello)
        self.state = SERVING.next(self.state, pb.SubmitterHello, RemoteProtocolError)
        self._hello_due = None
        self._client_bytes = message.hello.max_message_bytes
        options = self._options
        welcome = pb.SubmitterWelcome(
            protocol=min(message.hello.protocol_max, PROTOCOL_MAX),
            orchestrator_id=options.orchestrator_id,
            max_message_bytes=options.max_message_bytes,
            max_requests=options.max_requests,
            max_request_bytes=options.max_request_bytes,
            max_watches=options.max_watches,
            ping_interval_ms=round(options.ping_interval * 1000),
        )
        self._put(pb.SubmitterReply(welcome=welcome), 0)

    def _request(self, kind: str, message: pb.SubmitterMessage, events: list[ServingEvent]) -> None:
        number = message.request
        if kind == "ping":
            self._put(pb.SubmitterReply(pong=pb.SubmitterPong()), 0)
        elif kind == "unwatch":
            if self._watches.pop(number, None) is not None:
                events.append(WatchClosed(number))
        elif kind == "credit":
            if number in self._watches:
                self._watches[number] += message.credit.messages
                events.append(CreditArrived(number))
        elif kind == "watch":
            self._rise(number)
            if message.watch.mode not in (pb.WATCH_MODE_RESULT, pb.WATCH_MODE_STATES, pb.WATCH_MODE_ALL):
                self._refuse(number, InvalidArgument("mode: a watch needs a mode"))
            elif len(self._watches) >= self._options.max_watches:
                self._refuse(number, Overloaded(f"{self._options.max_watches} watches are open: end some first"))
            else:
                self._watches[number] = message.watch.credit
                events.append(WatchArrived(number, message.watch))
        elif kind == "cancel":
            if self._admit(number, message.ByteSize(), False):
                events.append(CancelArrived(number, message.cancel))
        elif self._admit(number, message.ByteSize(), False):
            events.append(DirectiveArrived(number, message.direct))

    def _rise(self, number: int) -> None:
        if number <= self._number:
            raise RemoteProtocolError(f"request {number} follows request {self._number}; numbers must rise")
        self._number = number

    def _admit(self, number: int, size: int, watch: bool, credit: int = 0) -> bool:
        """Count a request as unanswered, or refuse it beyond the bounds."""
        self._rise(number)
        options = self._options
        full = self._unanswered and (
            len(self._unanswered) >= options.max_requests or self._unanswered_bytes + size > options.max_request_bytes
        )
        if full or (watch and len(self._watches) >= options.max_watches):
            self._refuse(number, Overloaded("too many requests or watches: wait for answers"))
            return False
        self._unanswered[number] = size
        self._unanswered_bytes += size
        if watch:
            self._watches[number] = credit
        return True

    def _answered(self, number: int) -> bool:
        """Remove a request from the unanswered ones; return whether it was one."""
        size = self._unanswered.pop(number, None)
        self._unanswered_bytes -= size or 0
        return size is not None

    def _answer(self, reply: pb.SubmitterReply, payload_bytes: int, *, later: bool = False) -> None:
        """Send an outcome with a task, unless the client cannot take it."""
        if payload_bytes + OVERHEAD_BYTES > self._client_bytes and reply.ByteSize() > self._client_bytes:
            self._watches.pop(reply.request, None)
            self._refuse(reply.request, self._too_large(payload_bytes))
        else:
            self._put(reply, payload_bytes, later=later)

    def _too_large(self, size: int) -> TooLarge:
        return TooLarge(f"the task has a payload of {size} bytes; the client takes messages of {self._client_bytes}")

    def _refuse(self, number: int, error: OrkiError) -> None:
        failure = Failure(reason=error.reason, message=error.message)
        self._put(pb.SubmitterReply(request=number, failure=failure), 0)

    def _put(self, reply: pb.SubmitterReply, payload_bytes: int, *, later: bool = False) -> None:
        if self.state is ServingState.ENDED:
            return
        weight = OVERHEAD_BYTES + payload_bytes
        self._queue.append((reply, weight))
        self.waiting_bytes += weight
        ((later and self.on_later) or self.on_change)()


def _nothing() -> None:
    pass
