"""The agent's end of its session: one machine for the life of the process, over any number of streams.

It keeps attempts and results when a stream is lost, renews leases, stops attempts whose lease it cannot renew, and
acknowledges cancels at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

from orki.control.v1 import session_pb2 as pb
from orki.control.v1.attempt_pb2 import Failure
from orki.errors.v1.errors_pb2 import Reason
from orki_contract.errors import LocalProtocolError, OrkiError, RemoteProtocolError, Replaced, TooLarge, error_for
from orki_control.session import _events as events
from orki_control.session._options import DEFAULT_MESSAGE_BYTES, AgentSessionOptions, build_hello, check_welcome
from orki_control.session._state import (
    OVERHEAD_BYTES,
    AttemptKey,
    AttemptTable,
    Heartbeats,
    HeldAttempt,
    Outcome,
    SendQueue,
    SessionMachine,
    identity,
    joined,
)
from orki_control.session._tables import (
    AGENT,
    ATTEMPT,
    AgentState,
    AttemptState,
    Connected,
    Disconnected,
    Dropped,
    HelloTimeout,
    LeaseEnded,
    PeerSilent,
    SessionRefused,
    Stopped,
)

_LIVE: Final = frozenset({AgentState.OPEN, AgentState.PEER_DRAINING, AgentState.DRAINING})


class AgentSession(SessionMachine):
    """The agent's end.

    The shell opens a stream and calls `connection_made`. It passes received messages to `receive_batch`, calls
    `handle_timer` at `next_timer`, and calls `connection_lost` when the stream has ended. `now` is a monotonic time in
    seconds. Whatever is called, the machine calls `on_change` when there may be messages to send or an earlier timer.

    Attributes:
        state: State of the session.
        session_epoch: Number of the last established session; 0 before the first.
    """

    def __init__(self, options: AgentSessionOptions) -> None:
        super().__init__()
        self.state: AgentState = AgentState.DISCONNECTED
        self.session_epoch = 0
        self._options = options
        self._queue: SendQueue[pb.AgentMessage] = SendQueue(options.bounds, self._changed)
        self._attempts = AttemptTable(options.slots, self._changed)
        self._events: list[Any] = []
        self._peer_bytes = DEFAULT_MESSAGE_BYTES
        self._drain_wanted = False
        self._drained = False
        self._heartbeats = Heartbeats(self._changed)
        self._connected_at = 0.0

    # --- State. ---

    @property
    def attempts(self) -> dict[AttemptKey, AttemptState]:
        """States of the held attempts, including those whose result is not acknowledged yet."""
        return {key: held.state for key, held in self._attempts.items()}

    @property
    def free_slots(self) -> int:
        """Number of slots without an attempt and without a blocked handler."""
        return self._attempts.free_slots

    @property
    def max_payload_bytes(self) -> int:
        """Maximum payload size that the orchestrator accepts, as far as is known."""
        return self._peer_bytes - OVERHEAD_BYTES

    def backlog(self, attempt: AttemptKey) -> int:
        """Return the number of messages about an attempt that are not sent yet."""
        return self._queue.backlog(attempt)

    # --- The stream. ---

    def connection_made(self, now: float) -> None:
        """Start a new stream: the hello is the first message."""
        self._move(Connected)
        self._connected_at = now
        self._heartbeats.begin(now + self._options.hello_timeout)
        self._queue.clear_control()
        self._control(hello=build_hello(self._options, self._attempts.resumable()))

    def connection_lost(self, now: float, cause: str = "the stream ended") -> list[events.AgentEvent]:
        """Note that the stream has ended. Attempts go on, and leases continue (laws 8 and 14)."""
        self._lose(Disconnected, cause)
        return self._finish()

    def receive_batch(self, messages: Iterable[pb.OrchestratorMessage], now: float) -> list[events.AgentEvent]:
        """Take the messages of one gRPC message in their order.

        Returns:
            Events. Messages of unknown kinds are ignored (law 16), as is every message after the session's end.

        Raises:
            RemoteProtocolError: The orchestrator broke a law: end the stream, call `connection_lost`, and connect
                again. Earlier messages of the batch are lost; the next welcome synchronises both ends.
        """
        for message in messages:
            if self.state in (AgentState.DISCONNECTED, AgentState.ENDED):
                break
            kind = message.WhichOneof("body")
            if kind is None:
                continue
            try:
                _RECEIVE[kind](self, message, now)
            except RemoteProtocolError:
                self._events = []
                raise
        if self.state in _LIVE:
            self._heartbeats.silent_at = now + self._heartbeats.patience
        return self._finish()

    # --- Reports about attempts. ---

    def accept(self, attempt: AttemptKey, now: float) -> bool:
        """Accept an offer; return False when it is no longer held, and then nothing may be started."""
        held = self._answerable(pb.Accepted, attempt)
        if held is None:
            return False
        self._step(attempt, held, pb.Accepted, LocalProtocolError)
        # The orchestrator counts the lease from the time it reads the answer, which is later.
        held.renewed_at = now
        self._attempts.lease_changed(held)
        self._work(attempt, held, pb.Accepted, accepted=pb.Accepted(attempt=held.ref))
        return True

    def decline(self, attempt: AttemptKey, error: OrkiError) -> bool:
        """Decline an offer; return False when it is no longer held."""
        held = self._answerable(pb.Declined, attempt)
        if held is None:
            return False
        self._step(attempt, held, pb.Declined, LocalProtocolError)
        self._send_declined(attempt, held.traceparent, error.reason, error.message)
        return True

    def progress(self, attempt: AttemptKey, payload: bytes) -> bool:
        """Queue progress of a running attempt, also while there is no stream; return False when it is no longer held.

        Raises:
            TooLarge: The orchestrator accepts no message of that size.
            LocalProtocolError: The attempt was not accepted, or has a result.
        """
        held = self._attempts.get(attempt)
        if held is None:
            return False
        if len(payload) > self.max_payload_bytes:
            raise TooLarge(f"{attempt}: a progress of {len(payload)} bytes; the maximum is {self.max_payload_bytes}")
        self._step(attempt, held, pb.Progress, LocalProtocolError)
        held.index += 1
        progress = pb.Progress(attempt=held.ref, index=held.index, payload=payload)
        self._work(attempt, held, pb.Progress, len(payload), progress=progress)
        return True

    def report(
        self,
        attempt: AttemptKey,
        outcome: Outcome,
        now: float,
        *,
        still_running: bool = False,
    ) -> bool:
        """Report the end of an attempt. The result is kept and sent again after every reconnect until acknowledged.

        Args:
            attempt: The attempt.
            outcome: Its outcome. A response that is too large for the orchestrator becomes a TOO_LARGE failure.
            now: The time.
            still_running: Whether the handler still runs: its slot stays occupied until `release`.

        Returns:
            False when the attempt is no longer held, and its result is not needed.

        Raises:
            LocalProtocolError: The attempt was not accepted, or has a result.
        """
        held = self._attempts.get(attempt)
        if held is None:
            return False
        self._step(attempt, held, pb.Result, LocalProtocolError)
        if still_running:
            self._attempts.block(attempt)
            if self.state in _LIVE:
                self._send_heartbeat(now)  # It overtakes the result, so the slot is not offered again.
        held.result = pb.Result(attempt=held.ref)
        if isinstance(outcome, bytes):
            held.result.response = outcome
        elif isinstance(outcome, Failure):
            held.result.failure.CopyFrom(outcome)
        else:
            held.result.cancelled.CopyFrom(outcome)
        if self.state in _LIVE:
            self._send_result(attempt, held)
        return True

    def release(self, attempt: AttemptKey) -> None:
        """Free the slot of a blocked handler that has ended."""
        if self._attempts.release(attempt):
            self._heartbeats.hurry()

    def set_load(self, *, loop_lag_us: int, memory_bytes: int) -> None:
        """Set the load that the next heartbeats report."""
        self._heartbeats.load = (loop_lag_us, memory_bytes)

    def drain(self, now: float) -> list[events.AgentEvent]:
        """Accept no more offers. `DrainCompleted` follows when nothing is held any more."""
        if not self._drain_wanted:
            self._drain_wanted = True
            if self.state in _LIVE:
                self._send_drain()
        return self._finish()

    def stop(self) -> None:
        """End the session, whatever is held."""
        self._move(Stopped)

    # --- Messages to send, and timers. ---

    def messages_to_send(self) -> pb.ConnectRequest | None:
        """Remove and return the next batch to write; None when nothing waits."""
        if self.state in _LIVE:
            batch = self._queue.take(self._attempts, always=pb.Declined)
        elif self.state is AgentState.AWAITING_WELCOME:
            batch = self._queue.take_control()
        else:
            batch = []
        return pb.ConnectRequest(messages=batch) if batch else None

    def next_timer(self) -> float | None:
        """Return the time at which `handle_timer` is due, or None. Leases also continue without a stream."""
        if self.state is AgentState.ENDED:
            return None
        due = [] if self._attempts.leases_end_at is None else [self._attempts.leases_end_at]
        if self.state is not AgentState.DISCONNECTED:
            due.append(self._heartbeats.silent_at)
        if self.state in _LIVE:
            due.append(self._heartbeats.due_at)
        return min(due, default=None)

    def handle_timer(self, now: float) -> list[events.AgentEvent]:
        """Handle the timers that are due, if any."""
        if self.state is AgentState.ENDED:
            return []
        for key, held in self._attempts.leases_over(now):
            if held.state is not AttemptState.OFFERED:
                self._attempts.block(key)
            self._step(key, held, LeaseEnded, LocalProtocolError)
            self._events.append((events.LeasesLost, key))
        if self.state is not AgentState.DISCONNECTED and now >= self._heartbeats.silent_at:
            if self.state is AgentState.AWAITING_WELCOME:
                self._lose(HelloTimeout, "the welcome did not arrive in time")
            else:
                self._lose(PeerSilent, "the orchestrator fell silent")
        if self.state in _LIVE and now >= self._heartbeats.due_at:
            self._send_heartbeat(now)
        return self._finish()

    # --- Receivers, one for each kind of message. ---

    def _welcome(self, message: pb.OrchestratorMessage, now: float) -> None:
        self._move(pb.Welcome, RemoteProtocolError)
        welcome = message.welcome
        check_welcome(welcome)
        keep = {AttemptKey(*identity(ref)) for ref in welcome.keep}
        self.session_epoch = welcome.session_epoch
        self._heartbeats.set_interval(welcome.heartbeat_interval_ms / 1000, now)
        self._peer_bytes = welcome.max_message_bytes
        self._queue.limit(welcome.max_message_bytes)
        not_kept = Failure(reason=Reason.REASON_STALE_FENCE, message="the orchestrator did not keep the attempt")
        resumed = []
        for key, held in list(self._attempts.items()):
            if key in keep:
                resumed.append(key)
                held.renewed_at = max(held.renewed_at, self._connected_at)
                continue
            self._revoke(key, held, Dropped, not_kept)
        self._attempts.leases_changed()
        self._queue.keep_work(pb.Progress, keep)
        for key in resumed:
            held = self._attempts[key]
            if held.state is AttemptState.REPORTED:
                self._send_result(key, held)
        opened = events.SessionOpened(
            welcome.orchestrator_id, welcome.session_epoch, tuple(resumed), welcome.events_url
        )
        self._events.append(opened)
        if self._drain_wanted:
            self._send_drain()

    def _refused(self, message: pb.OrchestratorMessage, now: float) -> None:
        refused = message.refused
        if not refused.HasField("attempt"):
            self._session_refused(refused.failure)
            return
        self._move(pb.Refused, RemoteProtocolError)
        key = AttemptKey(*identity(refused.attempt))
        held = self._attempts.get(key)
        if held is not None:
            self._revoke(key, held, pb.Refused, refused.failure)

    def _session_refused(self, why: Failure) -> None:
        awaiting_welcome = self.state is AgentState.AWAITING_WELCOME
        self._move(SessionRefused, RemoteProtocolError)
        error = error_for(why.reason, why.message)
        # After a protocol violation a new stream may work, but a refused hello would be refused again.
        if error.retryable or not awaiting_welcome:
            self._cut()
            self._events.append(events.SessionLost(f"refused: {why.message}", silent=False))
        else:
            self._move(Stopped)
            self._events.append(events.SessionClosed(error, ""))

    def _offer(self, message: pb.OrchestratorMessage, now: float) -> None:
        self._move(pb.Offer, RemoteProtocolError)
        offer = message.offer
        key = AttemptKey(*identity(offer.attempt))
        if not key.task_id or not key.fence or not key.attempt or not offer.lease_ms:
            raise RemoteProtocolError(f"offer: {key} lacks a task, an attempt, a fence or a lease")
        held = HeldAttempt(offer.attempt, message.traceparent, offer.lease_ms / 1000, now)
        attempts = self._attempts
        if self.state is AgentState.DRAINING:
            self._send_declined(key, message.traceparent, Reason.REASON_DRAINING, "the agent drains")
        elif not attempts.add(key, held):
            text = "handlers of ended attempts still run and occupy the slots"
            self._send_declined(key, message.traceparent, Reason.REASON_OVERLOADED, text)
        elif attempts.was_cancelled(key):
            self._step(key, held, pb.Cancel, RemoteProtocolError)
            self.report(key, pb.CancelledOutcome(reason=Reason.REASON_CANCELLED), now)
        else:
            self._events.append((events.OffersArrived, events.ArrivedOffer(key, offer, message.traceparent)))

    def _cancel(self, message: pb.OrchestratorMessage, now: float) -> None:
        self._move(pb.Cancel, RemoteProtocolError)
        cancel = message.cancel
        key = AttemptKey(*identity(cancel.attempt))
        held = self._attempts.get(key)
        if held is None:
            self._attempts.remember_cancel(key)
        else:
            self._step(key, held, pb.Cancel, RemoteProtocolError)
            self._events.append((events.CancelsArrived, events.ArrivedCancel(key, cancel.grace_ms, cancel.message)))
        acknowledged = pb.CancelAcknowledged(attempt=cancel.attempt)
        self._queue.put_control(pb.AgentMessage(traceparent=message.traceparent, cancel_acknowledged=acknowledged))

    def _directive(self, message: pb.OrchestratorMessage, now: float) -> None:
        self._move(pb.Directive, RemoteProtocolError)
        directive = message.directive
        key = AttemptKey(*identity(directive.attempt))
        held = self._attempts.get(key)
        if held is not None:
            self._step(key, held, pb.Directive, RemoteProtocolError)
            self._events.append((events.DirectivesArrived, events.ArrivedDirective(key, directive.payload)))

    def _result_acknowledged(self, message: pb.OrchestratorMessage, now: float) -> None:
        self._move(pb.ResultAcknowledged, RemoteProtocolError)
        key = AttemptKey(*identity(message.result_acknowledged.attempt))
        held = self._attempts.get(key)
        if held is not None:
            self._step(key, held, pb.ResultAcknowledged, RemoteProtocolError)
            self._events.append((events.ResultsAcknowledged, key))

    def _heartbeat_echo(self, message: pb.OrchestratorMessage, now: float) -> None:
        self._move(pb.HeartbeatEcho, RemoteProtocolError)
        sent_at, renewed = self._heartbeats.answered(message.heartbeat_echo.number)
        for key in renewed:
            held = self._attempts.get(key)
            if held is not None:
                held.renewed_at = max(held.renewed_at, sent_at)
        self._attempts.leases_changed()

    def _drain(self, message: pb.OrchestratorMessage, now: float) -> None:
        self._move(pb.OrchestratorDrain, RemoteProtocolError)
        self._events.append(events.OrchestratorDraining(message.drain.grace_ms))

    def _replaced(self, message: pb.OrchestratorMessage, now: float) -> None:
        self._move(pb.Replaced, RemoteProtocolError)
        successor = message.replaced.successor_instance_id
        text = f"instance {successor} has replaced this instance of agent {self._options.agent_id}"
        text += ": give each running agent its own agent id"
        self._events.append(events.SessionClosed(Replaced(text), successor))

    # --- Transitions. ---

    def _step(self, key: AttemptKey, held: HeldAttempt, event: type, error: type[OrkiError]) -> None:
        following = ATTEMPT.rows[held.state].get(event)
        if following is None:
            raise error(f"{key}: {ATTEMPT.illegal(held.state, event)}")
        self._attempts.change(key, held, following)

    def _revoke(self, key: AttemptKey, held: HeldAttempt, event: type, why: Failure) -> None:
        running = held.state in (AttemptState.RUNNING, AttemptState.CANCELLING)
        self._step(key, held, event, RemoteProtocolError)
        if running:
            self._attempts.block(key)
        self._events.append((events.AttemptsRevoked, events.Revocation(key, why)))

    def _lose(self, event: type, cause: str) -> None:
        before = self.state
        self._move(event)
        if before not in (AgentState.DISCONNECTED, AgentState.ENDED):
            self._cut()
            self._events.append(events.SessionLost(cause, silent=event is not Disconnected))

    def _cut(self) -> None:
        """Drop what belonged to the stream. Progress waits for the next one; results stay with their attempts."""
        self._queue.clear_control()
        self._queue.keep_work(pb.Progress)
        for key, held in list(self._attempts.items()):
            if held.state is AttemptState.OFFERED:
                text = "the stream ended before the offer was answered"
                self._revoke(key, held, Dropped, Failure(reason=Reason.REASON_OFFER_TIMEOUT, message=text))

    def _send_heartbeat(self, now: float) -> None:
        self._control(heartbeat=self._heartbeats.send(now, self._attempts))

    def _send_result(self, key: AttemptKey, held: HeldAttempt) -> None:
        assert held.result is not None
        size = len(held.result.response)
        if size > self.max_payload_bytes:
            text = f"the response has {size} bytes; the orchestrator accepts {self.max_payload_bytes}"
            held.result = pb.Result(attempt=held.ref, failure=Failure(reason=Reason.REASON_TOO_LARGE, message=text))
            size = 0
        self._work(key, held, pb.Result, size, result=held.result)

    def _send_declined(self, key: AttemptKey, traceparent: str, reason: Reason.ValueType, text: str) -> None:
        declined = pb.Declined(attempt=key.ref(), failure=Failure(reason=reason, message=text))
        self._queue.put_work(key, pb.Declined, pb.AgentMessage(traceparent=traceparent, declined=declined))

    def _send_drain(self) -> None:
        self._move(pb.AgentDrain)
        self._control(drain=pb.AgentDrain())

    def _answerable(self, event: type, attempt: AttemptKey) -> HeldAttempt | None:
        """Return the attempt if its offer can be answered."""
        held = self._attempts.get(attempt)
        if held is None or held.state is AttemptState.REPORTED or self.state is AgentState.ENDED:
            return None
        if event not in AGENT.rows[self.state]:
            raise LocalProtocolError(AGENT.illegal(self.state, event))
        return held

    def _move(self, event: type, error: type[OrkiError] = LocalProtocolError) -> None:
        following = AGENT.rows[self.state].get(event)
        if following is None:
            raise error(AGENT.illegal(self.state, event))
        self._enter(following)

    def _control(self, **body: Any) -> None:
        self._queue.put_control(pb.AgentMessage(**body))

    def _work(self, key: AttemptKey, held: HeldAttempt, kind: type, payload_bytes: int = 0, **body: Any) -> None:
        message = pb.AgentMessage(traceparent=held.traceparent, **body)
        self._queue.put_work(key, kind, message, payload_bytes)

    def _finish(self) -> list[events.AgentEvent]:
        if self._drain_wanted and not self._drained and not len(self._attempts) and self.state is not AgentState.ENDED:
            self._drained = True
            self._events.append(events.DrainCompleted())
        found, self._events = self._events, []
        return joined(found) if found else found


_RECEIVE: Final[dict[str, Callable[[AgentSession, pb.OrchestratorMessage, float], None]]] = {
    "welcome": AgentSession._welcome,
    "refused": AgentSession._refused,
    "offer": AgentSession._offer,
    "cancel": AgentSession._cancel,
    "directive": AgentSession._directive,
    "result_acknowledged": AgentSession._result_acknowledged,
    "heartbeat_echo": AgentSession._heartbeat_echo,
    "drain": AgentSession._drain,
    "replaced": AgentSession._replaced,
}
