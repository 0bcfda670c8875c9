"""The orchestrator's end of one session: what was offered on this stream, to whom it belongs, and what was answered.

It owns the conversation, not the truth: which fence a task has, when a lease ends and what a result is worth is the
store's. Everything the store must learn leaves as an event; everything it decides comes back as a call.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from orki.control.v1 import session_pb2 as pb
from orki.control.v1.attempt_pb2 import Failure
from orki.errors.v1.errors_pb2 import Reason
from orki_contract.errors import LocalProtocolError, OrkiError, ProtocolVersion, RemoteProtocolError, TooLarge
from orki_control.attempt import ATTEMPT, AttemptKey, AttemptState, OfferWithdrawn
from orki_control.session.events import (
    AgentDraining,
    ArrivedProgress,
    ArrivedResult,
    CancelsAcknowledged,
    Decline,
    EventBatch,
    HeartbeatArrived,
    HelloArrived,
    OffersAccepted,
    OffersDeclined,
    OffersExpired,
    OrchestratorEvent,
    ProgressArrived,
    ReportsRefused,
    ResultsArrived,
    SessionEnded,
)
from orki_control.session.hello import check_hello, chosen_protocol
from orki_control.session.options import SILENT_INTERVALS, OrchestratorSessionOptions
from orki_control.session.outbox import OVERHEAD_BYTES, Outbox
from orki_control.session.states import (
    ORCHESTRATOR,
    Disconnected,
    OrchestratorState,
    SessionRefused,
)

__all__ = ["OrchestratorSession"]

_STALE: Final = "this session does not hold the attempt: it was withdrawn, has ended, or runs under a higher fence"
_OCCUPYING: Final = frozenset({AttemptState.OFFERED, AttemptState.RUNNING, AttemptState.CANCELLING})


class _Attempt:
    __slots__ = ("answer_by", "last_index", "sent", "state", "traceparent")

    def __init__(self, state: AttemptState, traceparent: str, answer_by: float | None) -> None:
        self.state = state
        self.traceparent = traceparent
        self.answer_by = answer_by
        self.last_index = 0


class OrchestratorSession:
    """One stream, from its hello to its end.

    The shell hands in what it read (`receive_batch`), writes what `messages_to_send` gives after every call, wakes the
    machine at `next_timer`, and tells it of the stream's end. `now` is a monotonic time in seconds.

    Attributes:
        state: Where the session stands.
        hello: The agent's hello; None before it came.
        session_epoch: Number of the session; 0 before the welcome.
    """

    def __init__(self, options: OrchestratorSessionOptions, now: float) -> None:
        self.state = OrchestratorState.AWAITING_HELLO
        self.hello: pb.Hello | None = None
        self.session_epoch = 0
        self._options = options
        self._outbox: Outbox[pb.OrchestratorMessage] = Outbox(options.bounds)
        self._attempts: dict[AttemptKey, _Attempt] = {}
        self._occupied = 0
        self._blocked = 0
        self._events = EventBatch()
        self._answers: list[tuple[float, AttemptKey]] = []
        self._heard_by = now + options.hello_timeout
        self._heartbeats = 0

    # --- what the shell may ask ---

    @property
    def free_slots(self) -> int:
        """Offers that may be made now; 0 unless the session is open."""
        if self.state is not OrchestratorState.OPEN or self.hello is None:
            return 0
        return max(0, self.hello.slots - self._occupied - self._blocked)

    @property
    def draining(self) -> bool:
        """Whether either side has said that nothing new may come."""
        return self.state in (OrchestratorState.DRAINING, OrchestratorState.AGENT_DRAINING)

    @property
    def attempts(self) -> dict[AttemptKey, AttemptState]:
        """Attempts that this session has something to say about."""
        return {key: attempt.state for key, attempt in self._attempts.items()}

    # --- what comes from the agent ---

    def receive_message(self, message: pb.AgentMessage, now: float) -> list[OrchestratorEvent]:
        """As `receive_batch`, for one message."""
        return self.receive_batch((message,), now)

    def receive_batch(self, messages: Iterable[pb.AgentMessage], now: float) -> list[OrchestratorEvent]:
        """Takes the messages of one gRPC message in their order.

        Returns:
            What they mean. A message of an unknown kind means nothing (law 16), and none does after the session's end.

        Raises:
            RemoteProtocolError: The agent broke a law. The session has ended and its last words wait to be sent; what
                the batch held before is lost with it, and comes again when the agent reconnects.
        """
        for message in messages:
            if self.state is OrchestratorState.ENDED:
                break
            kind = message.WhichOneof("body")
            if kind is None:
                continue
            try:
                _RECEIVE[kind](self, message, now)
            except RemoteProtocolError as error:
                self._refuse_session(error)
                self._events.finish()
                raise
        if self.hello is not None:
            self._heard_by = now + SILENT_INTERVALS * self._options.heartbeat_interval
        return self._events.finish()

    def connection_lost(self, now: float) -> list[OrchestratorEvent]:
        """The stream has ended, by whomever."""
        return self._end(Disconnected, "the stream ended", Reason.REASON_PEER_LOST)

    # --- what the store and the fleet decide ---

    def welcome(self, *, session_epoch: int, keep: Sequence[tuple[AttemptKey, str]] = (), now: float) -> None:
        """Opens the session.

        Args:
            session_epoch: Number of the session among the agent's.
            keep: Held attempts that remain the agent's own, each with the traceparent of its task's span.
            now: The time.

        Raises:
            LocalProtocolError: There is no hello to answer, or `keep` names what the hello does not hold.
        """
        hello = self.hello
        self._move(pb.Welcome)
        assert hello is not None
        held = {AttemptKey.of(each.attempt) for each in hello.held}
        for key, traceparent in keep:
            if key not in held:
                raise LocalProtocolError(f"welcome: the agent does not hold {key}")
            self._attempts[key] = _Attempt(AttemptState.RUNNING, traceparent, None)
        self._occupied = len(self._attempts)
        self.session_epoch = session_epoch
        self._heard_by = now + SILENT_INTERVALS * self._options.heartbeat_interval
        self._control(
            welcome=pb.Welcome(
                protocol=chosen_protocol(hello),
                orchestrator_id=self._options.orchestrator_id,
                session_epoch=session_epoch,
                keep=[key.ref() for key, _ in keep],
                heartbeat_interval_ms=round(self._options.heartbeat_interval * 1000),
                max_message_bytes=self._options.max_message_bytes,
                events_url=self._options.events_url,
            )
        )

    def refuse_session(self, error: OrkiError) -> None:
        """Refuses the session. Send what is left, then end the stream."""
        self._move(SessionRefused)
        self._control(refused=pb.Refused(failure=Failure(reason=error.reason, message=error.message)))

    def replace(self, successor_instance_id: str) -> list[OrchestratorEvent]:
        """Tells the agent that a newer instance has the session. Send what is left, then end the stream."""
        already = self.state is OrchestratorState.ENDED
        self._move(pb.Replaced)
        if already:
            return []
        self._control(replaced=pb.Replaced(successor_instance_id=successor_instance_id))
        return [self._ended(f"instance {successor_instance_id} has the session", Reason.REASON_REPLACED)]

    def offer(self, offer: pb.Offer, traceparent: str, now: float) -> None:
        """Hands out an attempt.

        Raises:
            LocalProtocolError: No slot is free, the session is not open, or the attempt was offered before.
            TooLarge: The agent takes no message of that size.
        """
        self._check(pb.Offer)
        key = AttemptKey.of(offer.attempt)
        if self.free_slots < 1:
            raise LocalProtocolError(f"offer: no slot is free for {key}")
        if key in self._attempts:
            raise LocalProtocolError(f"offer: {key} is on this session already")
        assert self.hello is not None
        size = len(offer.request) + OVERHEAD_BYTES
        if size > self.hello.max_message_bytes:
            raise TooLarge(
                f"{key}: the request has {len(offer.request)} bytes, and agent {self.hello.agent_id} takes messages of "
                f"{self.hello.max_message_bytes} bytes"
            )
        answer_by = now + offer.accept_timeout_ms / 1000
        self._attempts[key] = _Attempt(AttemptState.OFFERED, traceparent, answer_by)
        self._occupied += 1
        heapq.heappush(self._answers, (answer_by, key))
        self._outbox.put_work(
            key, pb.Offer, pb.OrchestratorMessage(traceparent=traceparent, offer=offer), len(offer.request)
        )

    def cancel(self, attempt: AttemptKey, *, grace_ms: int, message: str = "") -> bool:
        """Asks for an attempt's end, as often as wanted; False when this session does not hold it."""
        cancel = pb.Cancel(attempt=attempt.ref(), grace_ms=grace_ms, message=message)
        return self._tell(attempt, pb.Cancel, "cancel", cancel)

    def direct(self, attempt: AttemptKey, payload: bytes) -> bool:
        """Pushes a directive to a running attempt; False when this session does not hold it.

        Raises:
            LocalProtocolError: The attempt is not accepted yet.
            TooLarge: The agent takes no message of that size.
        """
        known = self._live(pb.Directive, attempt)
        if known is None or self.hello is None:
            return False
        if len(payload) + OVERHEAD_BYTES > self.hello.max_message_bytes:
            raise TooLarge(f"{attempt}: a directive of {len(payload)} bytes is more than the agent takes")
        self._step(attempt, known, pb.Directive, LocalProtocolError)
        directive = pb.Directive(attempt=attempt.ref(), payload=payload)
        message = pb.OrchestratorMessage(traceparent=known.traceparent, directive=directive)
        self._outbox.put_work(attempt, pb.Directive, message, len(payload))
        return True

    def acknowledge(self, attempt: AttemptKey) -> bool:
        """Tells the agent that its result is stored; False when this session does not hold the attempt."""
        return self._tell(
            attempt, pb.ResultAcknowledged, "result_acknowledged", pb.ResultAcknowledged(attempt=attempt.ref())
        )

    def refuse(self, attempt: AttemptKey, error: OrkiError) -> bool:
        """Tells the agent that the attempt is not its own (any more); False when this session does not hold it."""
        failure = Failure(reason=error.reason, message=error.message)
        return self._tell(attempt, pb.Refused, "refused", pb.Refused(failure=failure, attempt=attempt.ref()))

    def echo(self, number: int) -> None:
        """Answers a heartbeat: its leases are renewed, counted from when it was sent.

        Raises:
            LocalProtocolError: No such heartbeat came.
        """
        self._move(pb.HeartbeatEcho)
        if not 1 <= number <= self._heartbeats:
            raise LocalProtocolError(f"echo: heartbeat {number} never came (the last was {self._heartbeats})")
        if self.state is not OrchestratorState.ENDED:
            self._control(heartbeat_echo=pb.HeartbeatEcho(number=number))

    def drain(self, grace_ms: int) -> tuple[AttemptKey, ...]:
        """Says that the orchestrator stops soon.

        Returns:
            Offers that had not left yet; they are not on this session any more and never were on the wire.
        """
        live = self.state is not OrchestratorState.ENDED
        self._move(pb.OrchestratorDrain)
        if not live:
            return ()
        unsent = [key for key in self._outbox.waiting(pb.Offer) if key in self._attempts]
        for key in unsent:
            self._forget(key)
        self._control(drain=pb.OrchestratorDrain(grace_ms=grace_ms))
        return tuple(unsent)

    # --- what the shell does with its wire and its clock ---

    def messages_to_send(self) -> pb.ConnectResponse | None:
        """The next batch to write, or None. Call it until it gives None; what it gave is gone from here."""
        if not len(self._outbox):
            return None
        batch = self._outbox.take(self._wanted)
        return pb.ConnectResponse(messages=batch) if batch else None

    def next_timer(self) -> float | None:
        """When `handle_timer` is due, or None."""
        if self.state in (OrchestratorState.ENDED, OrchestratorState.JUDGING):
            return None
        answers = self._answers
        while answers and not self._awaits_answer(*answers[0]):
            heapq.heappop(answers)
        return min(self._heard_by, answers[0][0]) if answers else self._heard_by

    def handle_timer(self, now: float) -> list[OrchestratorEvent]:
        """Does what is due; harmless when nothing is."""
        due = self.next_timer()
        if due is None or now < due:
            return []
        if now >= self._heard_by:
            if self.state is OrchestratorState.AWAITING_HELLO:
                self._control(refused=_refusal(Reason.REASON_HELLO_TIMEOUT, "no hello came within the hello timeout"))
                return self._end(Disconnected, "no hello came in time", Reason.REASON_HELLO_TIMEOUT)
            return self._end(Disconnected, "the agent fell silent", Reason.REASON_PEER_LOST)
        while self._answers and self._answers[0][0] <= now:
            deadline, key = heapq.heappop(self._answers)
            if self._awaits_answer(deadline, key):
                attempt = self._attempts[key]
                self._step(key, attempt, OfferWithdrawn, LocalProtocolError)
                self._control_about(
                    attempt, refused=_refusal(Reason.REASON_OFFER_TIMEOUT, "the offer was not answered in time", key)
                )
                self._events.join(OffersExpired, key)
        return self._events.finish()

    # --- receivers, one for each kind of message ---

    def _hello(self, message: pb.AgentMessage, now: float) -> None:
        self._move(pb.Hello, RemoteProtocolError)
        hello = message.hello
        try:
            check_hello(hello)
        except ProtocolVersion as error:
            self.refuse_session(error)
            self._events.add(self._ended(error.message, error.reason))
            return
        self.hello = hello
        self._outbox.limit(hello.max_message_bytes)
        held = tuple((AttemptKey.of(each.attempt), each.has_result) for each in hello.held)
        self._events.add(HelloArrived(hello, held))

    def _accepted(self, message: pb.AgentMessage, now: float) -> None:
        key = self._report(pb.Accepted, message.accepted)
        if key is not None:
            self._attempts[key].answer_by = None
            self._events.join(OffersAccepted, key)

    def _declined(self, message: pb.AgentMessage, now: float) -> None:
        key = self._report(pb.Declined, message.declined)
        if key is not None:
            self._events.join(OffersDeclined, Decline(key, message.declined.failure))

    def _progress(self, message: pb.AgentMessage, now: float) -> None:
        progress = message.progress
        key = self._report(pb.Progress, progress)
        if key is None:
            return
        attempt = self._attempts[key]
        if progress.index <= attempt.last_index:
            raise RemoteProtocolError(f"{key}: progress {progress.index} came after progress {attempt.last_index}")
        attempt.last_index = progress.index
        self._events.join(ProgressArrived, ArrivedProgress(key, progress.index, progress.payload))

    def _result(self, message: pb.AgentMessage, now: float) -> None:
        result = message.result
        if result.WhichOneof("outcome") is None:
            raise RemoteProtocolError(f"{AttemptKey.of(result.attempt)}: a result without an outcome")
        key = self._report(pb.Result, result)
        if key is not None:
            self._events.join(ResultsArrived, ArrivedResult(key, result))

    def _cancel_acknowledged(self, message: pb.AgentMessage, now: float) -> None:
        self._move(pb.CancelAcknowledged, RemoteProtocolError)
        key = AttemptKey.of(message.cancel_acknowledged.attempt)
        attempt = self._attempts.get(key)
        # It may come behind the result, when the attempt is closed: then nobody waits for it.
        if attempt is not None:
            self._step(key, attempt, pb.CancelAcknowledged, RemoteProtocolError)
            self._events.join(CancelsAcknowledged, key)

    def _heartbeat(self, message: pb.AgentMessage, now: float) -> None:
        self._move(pb.Heartbeat, RemoteProtocolError)
        heartbeat = message.heartbeat
        if heartbeat.number != self._heartbeats + 1:
            raise RemoteProtocolError(f"heartbeat {heartbeat.number} came after heartbeat {self._heartbeats}")
        assert self.hello is not None
        self._heartbeats = heartbeat.number
        running = []
        for ref in heartbeat.running:
            key = AttemptKey.of(ref)
            if key in self._attempts:
                running.append(key)
            else:
                self._control(refused=_refusal(Reason.REASON_STALE_FENCE, _STALE, key))
                self._events.join(ReportsRefused, key)
        # Handlers that the agent gave up but could not stop: nobody's attempts, and yet slots that are taken.
        self._blocked = max(0, self.hello.slots - heartbeat.free_slots - len(heartbeat.running))
        self._events.add(
            HeartbeatArrived(
                heartbeat.number, tuple(running), heartbeat.free_slots, heartbeat.loop_lag_us, heartbeat.memory_bytes
            )
        )

    def _drain(self, message: pb.AgentMessage, now: float) -> None:
        self._move(pb.AgentDrain, RemoteProtocolError)
        self._events.add(AgentDraining())

    # --- inner moves ---

    def _report(self, kind: type, body: Any) -> AttemptKey | None:
        """Steps the attempt that a report is about; None, and a refusal, when it is not this session's."""
        self._move(kind, RemoteProtocolError)
        key = AttemptKey.of(body.attempt)
        attempt = self._attempts.get(key)
        if attempt is None:
            self._control(refused=_refusal(Reason.REASON_STALE_FENCE, _STALE, key))
            self._events.join(ReportsRefused, key)
            return None
        self._step(key, attempt, kind, RemoteProtocolError)
        return key

    def _step(self, key: AttemptKey, attempt: _Attempt, event: type, error: type[OrkiError]) -> None:
        occupied = attempt.state in _OCCUPYING
        try:
            attempt.state = ATTEMPT.next(attempt.state, event, error)
        except OrkiError as raised:
            raise error(f"{key}: {raised.message}") from None
        if attempt.state is AttemptState.CLOSED:
            del self._attempts[key]
        if occupied and attempt.state not in _OCCUPYING:
            self._occupied -= 1

    def _forget(self, key: AttemptKey) -> None:
        self._step(key, self._attempts[key], pb.Refused, LocalProtocolError)

    def _live(self, event: type, key: AttemptKey) -> _Attempt | None:
        self._check(event)
        return None if self.state is OrchestratorState.ENDED else self._attempts.get(key)

    def _tell(self, key: AttemptKey, event: type, field: str, body: object) -> bool:
        attempt = self._live(event, key)
        if attempt is None:
            return False
        self._step(key, attempt, event, LocalProtocolError)
        self._control_about(attempt, **{field: body})
        return True

    def _check(self, event: type) -> None:
        ORCHESTRATOR.next(self.state, event, LocalProtocolError)

    def _move(self, event: type, error: type[OrkiError] = LocalProtocolError) -> None:
        self.state = ORCHESTRATOR.next(self.state, event, error)

    def _end(self, event: type, cause: str, reason: Reason.ValueType) -> list[OrchestratorEvent]:
        already = self.state is OrchestratorState.ENDED
        self._move(event)
        return [] if already else [self._ended(cause, reason)]

    def _ended(self, cause: str, reason: Reason.ValueType) -> SessionEnded:
        states = self.attempts
        unanswered = tuple(key for key, attempt in self._attempts.items() if attempt.answer_by is not None)
        running = tuple(
            key for key, state in states.items() if state is not AttemptState.REPORTED and key not in set(unanswered)
        )
        return SessionEnded(cause, reason, unanswered, running)

    def _refuse_session(self, error: RemoteProtocolError) -> None:
        self._move(SessionRefused)
        self._control(refused=_refusal(error.reason, error.message))

    def _awaits_answer(self, deadline: float, key: AttemptKey) -> bool:
        attempt = self._attempts.get(key)
        return attempt is not None and attempt.state is AttemptState.OFFERED and attempt.answer_by == deadline

    def _wanted(self, key: AttemptKey, kind: type) -> bool:
        return self.state is not OrchestratorState.ENDED and key in self._attempts

    def _control(self, **body: Any) -> None:
        self._outbox.put_control(pb.OrchestratorMessage(**body))

    def _control_about(self, attempt: _Attempt, **body: Any) -> None:
        self._outbox.put_control(pb.OrchestratorMessage(traceparent=attempt.traceparent, **body))


def _refusal(reason: Reason.ValueType, message: str, key: AttemptKey | None = None) -> pb.Refused:
    failure = Failure(reason=reason, message=message)
    return pb.Refused(failure=failure, attempt=key.ref() if key else None)


_RECEIVE: Final[dict[str, Callable[[OrchestratorSession, pb.AgentMessage, float], None]]] = {
    "hello": OrchestratorSession._hello,
    "accepted": OrchestratorSession._accepted,
    "declined": OrchestratorSession._declined,
    "progress": OrchestratorSession._progress,
    "result": OrchestratorSession._result,
    "cancel_acknowledged": OrchestratorSession._cancel_acknowledged,
    "heartbeat": OrchestratorSession._heartbeat,
    "drain": OrchestratorSession._drain,
}
