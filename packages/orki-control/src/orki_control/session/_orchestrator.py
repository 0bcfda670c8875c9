"""The orchestrator's end of one session: the attempts that were offered on one stream, and their answers.

The store decides about fences, leases and results. This machine returns an event for everything that the store must
know, and the store's decisions come back as calls.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from orki.control.v1 import session_pb2 as pb
from orki.control.v1.attempt_pb2 import AttemptRef, Failure
from orki.errors.v1.errors_pb2 import Reason
from orki_contract.errors import LocalProtocolError, OrkiError, ProtocolVersion, RemoteProtocolError, TooLarge
from orki_control.session._events import (
    AgentDraining,
    ArrivedProgress,
    ArrivedResult,
    CancelsAcknowledged,
    Decline,
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
from orki_control.session._options import SILENT_INTERVALS, OrchestratorSessionOptions, check_hello, chosen_protocol
from orki_control.session._state import (
    OCCUPYING,
    OVERHEAD_BYTES,
    AttemptKey,
    SendQueue,
    SessionMachine,
    identity,
    joined,
)
from orki_control.session._tables import (
    ATTEMPT,
    ORCHESTRATOR,
    AttemptState,
    Disconnected,
    HelloTimeout,
    OfferWithdrawn,
    OrchestratorState,
    PeerSilent,
    SessionRefused,
)

_STALE: Final = "this session does not hold the attempt: it was withdrawn, has ended, or runs under a higher fence"


class _Attempt:
    __slots__ = ("answer_by", "last_index", "ref", "state", "traceparent")

    def __init__(self, ref: AttemptRef, state: AttemptState, traceparent: str, answer_by: float | None) -> None:
        self.ref = ref
        self.state = state
        self.traceparent = traceparent
        self.answer_by = answer_by
        self.last_index = 0


class OrchestratorSession(SessionMachine):
    """One stream, from its hello to its end.

    The shell passes received messages to `receive_batch`, calls `handle_timer` at `next_timer`, and calls
    `connection_lost` when the stream has ended. `now` is a monotonic time in seconds. Whatever is called, the machine
    calls `on_change` when there may be messages to send or an earlier timer.

    Attributes:
        state: State of the session.
        hello: The agent's hello; None before it arrives.
        session_epoch: Number of the session; 0 before the welcome.
    """

    def __init__(self, options: OrchestratorSessionOptions, now: float) -> None:
        super().__init__()
        self.state: OrchestratorState = OrchestratorState.AWAITING_HELLO
        self.hello: pb.Hello | None = None
        self.session_epoch = 0
        self._options = options
        self._queue: SendQueue[pb.OrchestratorMessage] = SendQueue(options.bounds, self._changed)
        self._attempts: dict[AttemptKey, _Attempt] = {}
        self._occupied = 0
        self._blocked = 0
        self._events: list[Any] = []
        self._answers: list[tuple[float, AttemptKey]] = []
        self._heard_by = now + options.hello_timeout
        self._heartbeats = 0

    # --- State. ---

    @property
    def free_slots(self) -> int:
        """Number of offers that may be made now; 0 unless the session is open."""
        if self.state is not OrchestratorState.OPEN or self.hello is None:
            return 0
        return max(0, self.hello.slots - self._occupied - self._blocked)

    @property
    def draining(self) -> bool:
        """Whether either side drains."""
        return self.state in (OrchestratorState.DRAINING, OrchestratorState.AGENT_DRAINING)

    @property
    def attempts(self) -> dict[AttemptKey, AttemptState]:
        """States of the attempts on this session."""
        return {key: attempt.state for key, attempt in self._attempts.items()}

    # --- Messages of the agent. ---

    def receive_batch(self, messages: Iterable[pb.AgentMessage], now: float) -> list[OrchestratorEvent]:
        """Take the messages of one gRPC message in their order.

        Returns:
            Events. Messages of unknown kinds are ignored (law 16), as is every message after the session's end.

        Raises:
            RemoteProtocolError: The agent broke a law. The session has ended, and its refusal waits to be sent. Earlier
                messages of the batch are lost; the agent sends them again when it reconnects.
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
                self._events = []
                raise
        if self.hello is not None:
            self._heard_by = now + SILENT_INTERVALS * self._options.heartbeat_interval
        return self._finish()

    def connection_lost(self, now: float) -> list[OrchestratorEvent]:
        """Note that the stream has ended."""
        return self._end(Disconnected, "the stream ended", Reason.REASON_PEER_LOST)

    # --- Decisions of the store and the fleet. ---

    def welcome(self, *, session_epoch: int, keep: Sequence[tuple[AttemptKey, str]] = (), now: float) -> None:
        """Establish the session.

        Args:
            session_epoch: Number of the session among those of the agent.
            keep: Held attempts that the agent keeps, each with the traceparent of its task's span.
            now: The time.

        Raises:
            LocalProtocolError: There is no hello to answer, or `keep` names an attempt that the hello does not list.
        """
        hello = self.hello
        self._move(pb.Welcome)
        assert hello is not None
        held = {AttemptKey(*identity(each.attempt)) for each in hello.held}
        for key, traceparent in keep:
            if key not in held:
                raise LocalProtocolError(f"welcome: the agent does not hold {key}")
            self._attempts[key] = _Attempt(key.ref(), AttemptState.RUNNING, traceparent, None)
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
        """Refuse the session. Send the remaining messages, then end the stream."""
        self._move(SessionRefused)
        self._control(refused=pb.Refused(failure=Failure(reason=error.reason, message=error.message)))

    def replace(self, successor_instance_id: str) -> list[OrchestratorEvent]:
        """Tell the agent that a newer instance replaces it. Send the remaining messages, then end the stream."""
        already = self.state is OrchestratorState.ENDED
        self._move(pb.Replaced)
        if already:
            return []
        self._control(replaced=pb.Replaced(successor_instance_id=successor_instance_id))
        return [self._ended(f"instance {successor_instance_id} has the session", Reason.REASON_REPLACED)]

    def offer(self, offer: pb.Offer, traceparent: str, now: float) -> None:
        """Offer an attempt.

        Raises:
            LocalProtocolError: No slot is free, the session is not open, or the attempt was offered before.
            TooLarge: The agent accepts no message of that size.
        """
        self._check(pb.Offer)
        key = AttemptKey(*identity(offer.attempt))
        if self.free_slots < 1:
            raise LocalProtocolError(f"offer: no slot is free for {key}")
        if key in self._attempts:
            raise LocalProtocolError(f"offer: {key} is on this session already")
        assert self.hello is not None
        size = len(offer.request) + OVERHEAD_BYTES
        if size > self.hello.max_message_bytes:
            raise TooLarge(
                f"{key}: the request has {len(offer.request)} bytes, and agent {self.hello.agent_id} accepts messages "
                f"of at most {self.hello.max_message_bytes} bytes"
            )
        answer_by = now + offer.accept_timeout_ms / 1000
        self._attempts[key] = _Attempt(offer.attempt, AttemptState.OFFERED, traceparent, answer_by)
        self._occupied += 1
        heapq.heappush(self._answers, (answer_by, key))
        self._queue.put_work(
            key, pb.Offer, pb.OrchestratorMessage(traceparent=traceparent, offer=offer), len(offer.request)
        )

    def cancel(self, attempt: AttemptKey, *, grace_ms: int, message: str = "") -> bool:
        """Cancel an attempt, also repeatedly; return False when this session does not hold it."""
        return self._notify(attempt, "cancel", pb.Cancel(grace_ms=grace_ms, message=message))

    def direct(self, attempt: AttemptKey, payload: bytes) -> bool:
        """Send a directive to a running attempt; return False when this session does not hold it.

        Raises:
            LocalProtocolError: The attempt is not accepted yet.
            TooLarge: The agent accepts no message of that size.
        """
        known = self._live(pb.Directive, attempt)
        if known is None or self.hello is None:
            return False
        if len(payload) + OVERHEAD_BYTES > self.hello.max_message_bytes:
            raise TooLarge(f"{attempt}: a directive of {len(payload)} bytes exceeds the agent's limit")
        self._step(attempt, known, pb.Directive, LocalProtocolError)
        directive = pb.Directive(attempt=known.ref, payload=payload)
        message = pb.OrchestratorMessage(traceparent=known.traceparent, directive=directive)
        self._queue.put_work(attempt, pb.Directive, message, len(payload))
        return True

    def acknowledge(self, attempt: AttemptKey) -> bool:
        """Acknowledge a stored result; return False when this session does not hold the attempt."""
        return self._notify(attempt, "result_acknowledged", pb.ResultAcknowledged())

    def refuse(self, attempt: AttemptKey, error: OrkiError) -> bool:
        """Tell the agent that it no longer holds an attempt; return False when this session does not hold it."""
        failure = Failure(reason=error.reason, message=error.message)
        return self._notify(attempt, "refused", pb.Refused(failure=failure))

    def echo(self, number: int) -> None:
        """Answer a heartbeat. The leases that it renewed count from the time it was sent.

        Raises:
            LocalProtocolError: No such heartbeat arrived.
        """
        self._move(pb.HeartbeatEcho)
        if not 1 <= number <= self._heartbeats:
            raise LocalProtocolError(f"echo: heartbeat {number} did not arrive (the last was {self._heartbeats})")
        if self.state is not OrchestratorState.ENDED:
            self._control(heartbeat_echo=pb.HeartbeatEcho(number=number))

    def drain(self, grace_ms: int) -> tuple[AttemptKey, ...]:
        """Tell the agent that the orchestrator stops soon.

        Returns:
            Offers that were not sent yet; they are removed from this session.
        """
        live = self.state is not OrchestratorState.ENDED
        self._move(pb.OrchestratorDrain)
        if not live:
            return ()
        unsent = [key for key in self._queue.waiting(pb.Offer) if key in self._attempts]
        for key in unsent:
            self._forget(key)
        self._control(drain=pb.OrchestratorDrain(grace_ms=grace_ms))
        return tuple(unsent)

    # --- Messages to send, and timers. ---

    def messages_to_send(self) -> pb.ConnectResponse | None:
        """Remove and return the next batch to write; None when nothing waits."""
        if not len(self._queue):
            return None
        batch = self._queue.take(() if self.state is OrchestratorState.ENDED else self._attempts)
        return pb.ConnectResponse(messages=batch) if batch else None

    def next_timer(self) -> float | None:
        """Return the time at which `handle_timer` is due, or None."""
        if self.state in (OrchestratorState.ENDED, OrchestratorState.CHECKING_HELLO):
            return None
        answers = self._answers
        while answers and not self._awaits_answer(*answers[0]):
            heapq.heappop(answers)
        return min(self._heard_by, answers[0][0]) if answers else self._heard_by

    def handle_timer(self, now: float) -> list[OrchestratorEvent]:
        """Handle the timers that are due, if any."""
        due = self.next_timer()
        if due is None or now < due:
            return []
        if now >= self._heard_by:
            if self.state is OrchestratorState.AWAITING_HELLO:
                self._control(
                    refused=_refusal(Reason.REASON_HELLO_TIMEOUT, "the hello did not arrive within the hello timeout")
                )
                return self._end(HelloTimeout, "the hello did not arrive in time", Reason.REASON_HELLO_TIMEOUT)
            return self._end(PeerSilent, "the agent fell silent", Reason.REASON_PEER_LOST)
        while self._answers and self._answers[0][0] <= now:
            deadline, key = heapq.heappop(self._answers)
            if self._awaits_answer(deadline, key):
                attempt = self._attempts[key]
                self._step(key, attempt, OfferWithdrawn, LocalProtocolError)
                self._control_about(
                    attempt, refused=_refusal(Reason.REASON_OFFER_TIMEOUT, "the offer was not answered in time", key)
                )
                self._events.append((OffersExpired, key))
        return self._finish()

    # --- Receivers, one for each kind of message. ---

    def _hello(self, message: pb.AgentMessage, now: float) -> None:
        self._move(pb.Hello, RemoteProtocolError)
        hello = message.hello
        try:
            check_hello(hello)
        except ProtocolVersion as error:
            self.refuse_session(error)
            self._events.append(self._ended(error.message, error.reason))
            return
        self.hello = hello
        self._queue.limit(hello.max_message_bytes)
        held = tuple((AttemptKey(*identity(each.attempt)), each.has_result) for each in hello.held)
        self._events.append(HelloArrived(hello, held))

    def _accepted(self, message: pb.AgentMessage, now: float) -> None:
        key = self._report(pb.Accepted, message.accepted)
        if key is not None:
            self._attempts[key].answer_by = None
            self._events.append((OffersAccepted, key))

    def _declined(self, message: pb.AgentMessage, now: float) -> None:
        key = self._report(pb.Declined, message.declined)
        if key is not None:
            self._events.append((OffersDeclined, Decline(key, message.declined.failure)))

    def _progress(self, message: pb.AgentMessage, now: float) -> None:
        progress = message.progress
        key = self._report(pb.Progress, progress)
        if key is None:
            return
        attempt = self._attempts[key]
        if progress.index <= attempt.last_index:
            raise RemoteProtocolError(f"{key}: progress {progress.index} came after progress {attempt.last_index}")
        attempt.last_index = progress.index
        self._events.append((ProgressArrived, ArrivedProgress(key, progress.index, progress.payload)))

    def _result(self, message: pb.AgentMessage, now: float) -> None:
        result = message.result
        if result.WhichOneof("outcome") is None:
            raise RemoteProtocolError(f"{AttemptKey(*identity(result.attempt))}: a result without an outcome")
        key = self._report(pb.Result, result)
        if key is not None:
            self._events.append((ResultsArrived, ArrivedResult(key, result)))

    def _cancel_acknowledged(self, message: pb.AgentMessage, now: float) -> None:
        self._move(pb.CancelAcknowledged, RemoteProtocolError)
        key = AttemptKey(*identity(message.cancel_acknowledged.attempt))
        attempt = self._attempts.get(key)
        # It may arrive after the result, when the attempt is closed.
        if attempt is not None:
            self._step(key, attempt, pb.CancelAcknowledged, RemoteProtocolError)
            self._events.append((CancelsAcknowledged, key))

    def _heartbeat(self, message: pb.AgentMessage, now: float) -> None:
        self._move(pb.Heartbeat, RemoteProtocolError)
        heartbeat = message.heartbeat
        if heartbeat.number != self._heartbeats + 1:
            raise RemoteProtocolError(f"heartbeat {heartbeat.number} came after heartbeat {self._heartbeats}")
        assert self.hello is not None
        self._heartbeats = heartbeat.number
        running = []
        for ref in heartbeat.running:
            key = AttemptKey(*identity(ref))
            if key in self._attempts:
                running.append(key)
            else:
                self._control(refused=_refusal(Reason.REASON_STALE_FENCE, _STALE, key))
                self._events.append((ReportsRefused, key))
        # Handlers that outlive their attempts occupy slots.
        self._blocked = max(0, self.hello.slots - heartbeat.free_slots - len(heartbeat.running))
        self._events.append(
            HeartbeatArrived(
                heartbeat.number, tuple(running), heartbeat.free_slots, heartbeat.loop_lag_us, heartbeat.memory_bytes
            )
        )

    def _drain(self, message: pb.AgentMessage, now: float) -> None:
        self._move(pb.AgentDrain, RemoteProtocolError)
        self._events.append(AgentDraining())

    # --- Transitions. ---

    def _report(self, kind: type, body: Any) -> AttemptKey | None:
        """Step the attempt of a report; refuse the report and return None when this session does not hold it."""
        self._move(kind, RemoteProtocolError)
        key = AttemptKey(*identity(body.attempt))
        attempt = self._attempts.get(key)
        if attempt is None:
            self._control(refused=_refusal(Reason.REASON_STALE_FENCE, _STALE, key))
            self._events.append((ReportsRefused, key))
            return None
        self._step(key, attempt, kind, RemoteProtocolError)
        return key

    def _step(self, key: AttemptKey, attempt: _Attempt, event: type, error: type[OrkiError]) -> None:
        occupied = attempt.state in OCCUPYING
        following = ATTEMPT.rows[attempt.state].get(event)
        if following is None:
            raise error(f"{key}: {ATTEMPT.illegal(attempt.state, event)}")
        attempt.state = following
        if attempt.state is AttemptState.CLOSED:
            del self._attempts[key]
        if occupied and attempt.state not in OCCUPYING:
            self._occupied -= 1

    def _forget(self, key: AttemptKey) -> None:
        self._step(key, self._attempts[key], pb.Refused, LocalProtocolError)

    def _live(self, event: type, key: AttemptKey) -> _Attempt | None:
        self._check(event)
        return None if self.state is OrchestratorState.ENDED else self._attempts.get(key)

    def _notify(self, key: AttemptKey, field: str, body: pb.Cancel | pb.ResultAcknowledged | pb.Refused) -> bool:
        attempt = self._live(type(body), key)
        if attempt is None:
            return False
        self._step(key, attempt, type(body), LocalProtocolError)
        body.attempt.CopyFrom(attempt.ref)
        self._control_about(attempt, **{field: body})
        return True

    def _check(self, event: type) -> None:
        if event not in ORCHESTRATOR.rows[self.state]:
            raise LocalProtocolError(ORCHESTRATOR.illegal(self.state, event))

    def _move(self, event: type, error: type[OrkiError] = LocalProtocolError) -> None:
        following = ORCHESTRATOR.rows[self.state].get(event)
        if following is None:
            raise error(ORCHESTRATOR.illegal(self.state, event))
        self._enter(following)

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

    def _finish(self) -> list[OrchestratorEvent]:
        events, self._events = self._events, []
        return joined(events) if events else events

    def _control(self, **body: Any) -> None:
        self._queue.put_control(pb.OrchestratorMessage(**body))

    def _control_about(self, attempt: _Attempt, **body: Any) -> None:
        self._queue.put_control(pb.OrchestratorMessage(traceparent=attempt.traceparent, **body))


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
