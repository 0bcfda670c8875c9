"""The agent's end of its session: one machine for the life of the process, over as many streams as it takes.

It holds attempts and results across cuts, renews leases, stops work whose lease it cannot renew, and answers a cancel
before anybody else has heard of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

from orki.control.v1 import session_pb2 as pb
from orki.control.v1.attempt_pb2 import Failure
from orki.errors.v1.errors_pb2 import Reason
from orki_contract.errors import LocalProtocolError, OrkiError, RemoteProtocolError, Replaced, TooLarge, error_for
from orki_control.attempt import ATTEMPT, AttemptKey, AttemptState, Dropped, LeaseEnded
from orki_control.session.events import (
    AgentEvent,
    ArrivedCancel,
    ArrivedDirective,
    ArrivedOffer,
    AttemptsRevoked,
    CancelsArrived,
    DirectivesArrived,
    DrainCompleted,
    EventBatch,
    LeasesLost,
    OffersArrived,
    OrchestratorDraining,
    ResultsAcknowledged,
    Revocation,
    SessionClosed,
    SessionLost,
    SessionOpened,
)
from orki_control.session.hello import build_hello, check_welcome
from orki_control.session.holdings import Holding, Holdings
from orki_control.session.options import DEFAULT_MESSAGE_BYTES, AgentSessionOptions
from orki_control.session.outbox import OVERHEAD_BYTES, Outbox
from orki_control.session.outcomes import Outcome, failure, result
from orki_control.session.pulse import Pulse
from orki_control.session.states import AGENT, AgentState, Connected, Disconnected, SessionRefused, Stopped

__all__ = ["AgentSession"]

_LIVE: Final = frozenset({AgentState.OPEN, AgentState.PEER_DRAINING, AgentState.DRAINING})


class AgentSession:
    """The agent's end.

    The shell dials, calls `connection_made`, hands in what it reads, writes what `messages_to_send` gives after every
    call, wakes the machine at `next_timer`, and tells it when the stream has ended. `now` is monotonic, in seconds.

    Attributes:
        state: Where the session stands.
        session_epoch: Number of the last session that was opened; 0 before the first.
    """

    def __init__(self, options: AgentSessionOptions) -> None:
        self.state = AgentState.DISCONNECTED
        self.session_epoch = 0
        self._options = options
        self._outbox: Outbox[pb.AgentMessage] = Outbox(options.bounds)
        self._holdings = Holdings(options.slots)
        self._events = EventBatch()
        self._peer_bytes = DEFAULT_MESSAGE_BYTES
        self._drain_wanted = False
        self._drained = False
        self._pulse = Pulse()
        self._vitals = (0, 0)
        self._dialled_at = 0.0

    # --- what the shell may ask ---

    @property
    def attempts(self) -> dict[AttemptKey, AttemptState]:
        """Attempts that we hold, results that are not acknowledged yet among them."""
        return {key: holding.state for key, holding in self._holdings.items()}

    @property
    def free_slots(self) -> int:
        """Slots without an attempt and without a handler that was given up but still runs."""
        return self._holdings.free_slots

    @property
    def max_payload_bytes(self) -> int:
        """Longest payload that the orchestrator takes, as far as we know."""
        return self._peer_bytes - OVERHEAD_BYTES

    def backlog(self, attempt: AttemptKey) -> int:
        """Messages about the attempt that have not left yet; a handler that tells much should wait for them."""
        return self._outbox.backlog(attempt)

    # --- the stream ---

    def connection_made(self, now: float) -> None:
        """A new stream is there: the hello goes first."""
        self._move(Connected)
        options = self._options
        self._dialled_at = now
        self._pulse.begin(now + options.hello_timeout)
        self._outbox.clear_control()
        held = [
            pb.HeldAttempt(attempt=key.ref(), has_result=holding.state is AttemptState.REPORTED)
            for key, holding in self._holdings.items()
        ]
        self._control(hello=build_hello(options, held))

    def connection_lost(self, now: float, cause: str = "the stream ended") -> list[AgentEvent]:
        """The stream has ended, by whomever: work goes on, leases run (laws 8 and 14)."""
        self._lose(cause, silent=False)
        return self._finish()

    def receive_message(self, message: pb.OrchestratorMessage, now: float) -> list[AgentEvent]:
        """As `receive_batch`, for one message."""
        return self.receive_batch((message,), now)

    def receive_batch(self, messages: Iterable[pb.OrchestratorMessage], now: float) -> list[AgentEvent]:
        """Takes the messages of one gRPC message in their order.

        Returns:
            What they mean. A message of an unknown kind means nothing (law 16), and none does once the session is over.

        Raises:
            RemoteProtocolError: The orchestrator broke a law: end the stream, call `connection_lost`, and dial again.
                What the batch held before is lost with it; the next welcome settles it.
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
                self._events.finish()
                raise
        if self.state in _LIVE:
            self._pulse.heard(now)
        return self._finish()

    # --- what the runtime does with its attempts ---

    def accept(self, attempt: AttemptKey, now: float) -> bool:
        """Takes an offer; False when it is not ours any more, and then nothing may be started."""
        holding = self._holdings.get(attempt)
        if holding is None or holding.state is AttemptState.REPORTED or self.state is AgentState.ENDED:
            return False
        self._check(pb.Accepted)
        self._step(attempt, holding, pb.Accepted, LocalProtocolError)
        # The orchestrator counts the lease from when it reads the answer, which is later than this.
        holding.renewed_at = now
        self._holdings.lease_changed(holding)
        self._work(attempt, holding, pb.Accepted, accepted=pb.Accepted(attempt=attempt.ref()))
        return True

    def decline(self, attempt: AttemptKey, error: OrkiError) -> bool:
        """Gives an offer back; False when it is not ours any more."""
        holding = self._holdings.get(attempt)
        if holding is None or holding.state is AttemptState.REPORTED or self.state is AgentState.ENDED:
            return False
        self._check(pb.Declined)
        self._step(attempt, holding, pb.Declined, LocalProtocolError)
        self._say_declined(attempt, holding.traceparent, error.reason, error.message)
        return True

    def progress(self, attempt: AttemptKey, payload: bytes) -> bool:
        """Queues news of a running attempt, over cuts too; False when it is not ours any more.

        Raises:
            TooLarge: The orchestrator takes no message of that size.
            LocalProtocolError: The attempt was not accepted, or has its result already.
        """
        holding = self._holdings.get(attempt)
        if holding is None:
            return False
        if len(payload) > self.max_payload_bytes:
            raise TooLarge(f"{attempt}: a progress of {len(payload)} bytes; at most {self.max_payload_bytes} are taken")
        self._step(attempt, holding, pb.Progress, LocalProtocolError)
        holding.index += 1
        progress = pb.Progress(attempt=attempt.ref(), index=holding.index, payload=payload)
        self._work(attempt, holding, pb.Progress, len(payload), progress=progress)
        return True

    def report(
        self,
        attempt: AttemptKey,
        outcome: Outcome,
        now: float,
        *,
        still_running: bool = False,
    ) -> bool:
        """Ends an attempt; the result is kept, and sent after every reconnect, until it is acknowledged.

        Args:
            attempt: The attempt.
            outcome: What came of it. A response that the orchestrator cannot take becomes a failure with TOO_LARGE.
            now: The time.
            still_running: The handler was given up but has not ended: its slot stays taken until `release`.

        Returns:
            False when the attempt is not ours any more; nobody wants its result.

        Raises:
            LocalProtocolError: The attempt was not accepted, or has its result already.
        """
        holding = self._holdings.get(attempt)
        if holding is None:
            return False
        self._step(attempt, holding, pb.Result, LocalProtocolError)
        if still_running:
            self._holdings.block(attempt)
            if self.state in _LIVE:
                self._beat(now)  # overtakes the result, so that the slot is not offered to anybody
        holding.result = result(attempt, outcome)
        if self.state in _LIVE:
            self._send_result(attempt, holding)
        return True

    def release(self, attempt: AttemptKey) -> None:
        """A handler that was given up, or whose attempt was revoked, has ended at last: its slot is free."""
        if self._holdings.release(attempt):
            self._pulse.hurry()

    def set_vitals(self, *, loop_lag_us: int, memory_bytes: int) -> None:
        """What the next heartbeats say about the process."""
        self._vitals = (loop_lag_us, memory_bytes)

    def drain(self, now: float) -> list[AgentEvent]:
        """Takes no more offers, over cuts too. `DrainCompleted` comes when nothing is held any more."""
        if not self._drain_wanted:
            self._drain_wanted = True
            if self.state in _LIVE:
                self._say_drain()
        return self._finish()

    def stop(self) -> None:
        """The process is done with the session, whatever is held."""
        self._move(Stopped)

    # --- what the shell does with its wire and its clock ---

    def messages_to_send(self) -> pb.ConnectRequest | None:
        """The next batch to write, or None. Call it until it gives None; what it gave is gone from here."""
        if self.state in _LIVE:
            batch = self._outbox.take(self._wanted)
        elif self.state is AgentState.GREETING:
            batch = self._outbox.take_control()
        else:
            batch = []
        return pb.ConnectRequest(messages=batch) if batch else None

    def next_timer(self) -> float | None:
        """When `handle_timer` is due, or None. Leases run without a stream, too."""
        if self.state is AgentState.ENDED:
            return None
        due = [] if self._holdings.leases_end_at is None else [self._holdings.leases_end_at]
        if self.state is not AgentState.DISCONNECTED:
            due.append(self._pulse.silent_at)
        if self.state in _LIVE:
            due.append(self._pulse.beat_at)
        return min(due, default=None)

    def handle_timer(self, now: float) -> list[AgentEvent]:
        """Does what is due; harmless when nothing is."""
        if self.state is AgentState.ENDED:
            return []
        for key, holding in self._holdings.leases_over(now):
            if holding.state is not AttemptState.OFFERED:
                self._holdings.block(key)
            self._step(key, holding, LeaseEnded, LocalProtocolError)
            self._events.join(LeasesLost, key)
        if self.state is not AgentState.DISCONNECTED and now >= self._pulse.silent_at:
            greeting = self.state is AgentState.GREETING
            self._lose("no welcome came in time" if greeting else "the orchestrator fell silent", silent=True)
        if self.state in _LIVE and now >= self._pulse.beat_at:
            self._beat(now)
        return self._finish()

    # --- receivers, one for each kind of message ---

    def _welcome(self, message: pb.OrchestratorMessage, now: float) -> None:
        self._move(pb.Welcome, RemoteProtocolError)
        welcome = message.welcome
        check_welcome(welcome)
        keep = {AttemptKey.of(ref) for ref in welcome.keep}
        self.session_epoch = welcome.session_epoch
        self._pulse.set_interval(welcome.heartbeat_interval_ms / 1000, now)
        self._peer_bytes = welcome.max_message_bytes
        self._outbox.limit(welcome.max_message_bytes)
        resumed = []
        for key, holding in list(self._holdings.items()):
            if key in keep:
                resumed.append(key)
                holding.renewed_at = max(holding.renewed_at, self._dialled_at)
                continue
            self._revoke(key, holding, Dropped, failure(Reason.REASON_STALE_FENCE, "the orchestrator did not keep it"))
        self._holdings.leases_changed()
        self._outbox.keep_work(lambda key, kind: kind is pb.Progress and key in keep)
        for key in resumed:
            holding = self._holdings[key]
            if holding.state is AttemptState.REPORTED:
                self._send_result(key, holding)
        self._events.add(
            SessionOpened(welcome.orchestrator_id, welcome.session_epoch, tuple(resumed), welcome.events_url)
        )
        if self._drain_wanted:
            self._say_drain()

    def _refused(self, message: pb.OrchestratorMessage, now: float) -> None:
        refused = message.refused
        if not refused.HasField("attempt"):
            self._session_refused(refused.failure)
            return
        self._move(pb.Refused, RemoteProtocolError)
        key = AttemptKey.of(refused.attempt)
        holding = self._holdings.get(key)
        if holding is not None:
            self._revoke(key, holding, pb.Refused, refused.failure)

    def _session_refused(self, why: Failure) -> None:
        greeting = self.state is AgentState.GREETING
        self._move(SessionRefused, RemoteProtocolError)
        error = error_for(why.reason, why.message)
        # A live session that broke a law begins anew; a hello that does would break it again.
        if error.retryable or not greeting:
            self._cut()
            self._events.add(SessionLost(f"refused: {why.message}", silent=False))
        else:
            self._move(Stopped)
            self._events.add(SessionClosed(error, ""))

    def _offer(self, message: pb.OrchestratorMessage, now: float) -> None:
        self._move(pb.Offer, RemoteProtocolError)
        offer = message.offer
        key = AttemptKey.of(offer.attempt)
        if not key.task_id or not key.fence or not key.attempt or not offer.lease_ms:
            raise RemoteProtocolError(f"offer: {key} lacks a task, an attempt, a fence or a lease")
        holding = Holding(AttemptState.OFFERED, message.traceparent, offer.lease_ms / 1000, now)
        holdings = self._holdings
        if self.state is AgentState.DRAINING:
            self._say_declined(key, message.traceparent, Reason.REASON_DRAINING, "the agent drains")
        elif not holdings.add(key, holding):
            text = "handlers that were given up still run and take the slots"
            self._say_declined(key, message.traceparent, Reason.REASON_OVERLOADED, text)
        elif holdings.was_cancelled(key):
            self._step(key, holding, pb.Cancel, RemoteProtocolError)
            self.report(key, pb.CancelledOutcome(reason=Reason.REASON_CANCELLED), now)
        else:
            self._events.join(OffersArrived, ArrivedOffer(key, offer, message.traceparent))

    def _cancel(self, message: pb.OrchestratorMessage, now: float) -> None:
        self._move(pb.Cancel, RemoteProtocolError)
        cancel = message.cancel
        key = AttemptKey.of(cancel.attempt)
        holding = self._holdings.get(key)
        if holding is None:
            self._holdings.remember_cancel(key)
        else:
            self._step(key, holding, pb.Cancel, RemoteProtocolError)
            self._events.join(CancelsArrived, ArrivedCancel(key, cancel.grace_ms, cancel.message))
        acknowledged = pb.CancelAcknowledged(attempt=cancel.attempt)
        self._outbox.put_control(pb.AgentMessage(traceparent=message.traceparent, cancel_acknowledged=acknowledged))

    def _directive(self, message: pb.OrchestratorMessage, now: float) -> None:
        self._move(pb.Directive, RemoteProtocolError)
        directive = message.directive
        key = AttemptKey.of(directive.attempt)
        holding = self._holdings.get(key)
        if holding is not None:
            self._step(key, holding, pb.Directive, RemoteProtocolError)
            self._events.join(DirectivesArrived, ArrivedDirective(key, directive.payload))

    def _result_acknowledged(self, message: pb.OrchestratorMessage, now: float) -> None:
        self._move(pb.ResultAcknowledged, RemoteProtocolError)
        key = AttemptKey.of(message.result_acknowledged.attempt)
        holding = self._holdings.get(key)
        if holding is not None:
            self._step(key, holding, pb.ResultAcknowledged, RemoteProtocolError)
            self._events.join(ResultsAcknowledged, key)

    def _heartbeat_echo(self, message: pb.OrchestratorMessage, now: float) -> None:
        self._move(pb.HeartbeatEcho, RemoteProtocolError)
        sent_at, renewed = self._pulse.echoed(message.heartbeat_echo.number)
        for key in renewed:
            holding = self._holdings.get(key)
            if holding is not None:
                holding.renewed_at = max(holding.renewed_at, sent_at)
        self._holdings.leases_changed()

    def _drain(self, message: pb.OrchestratorMessage, now: float) -> None:
        self._move(pb.OrchestratorDrain, RemoteProtocolError)
        self._events.add(OrchestratorDraining(message.drain.grace_ms))

    def _replaced(self, message: pb.OrchestratorMessage, now: float) -> None:
        self._move(pb.Replaced, RemoteProtocolError)
        successor = message.replaced.successor_instance_id
        text = f"instance {successor} has taken the session of agent {self._options.agent_id}"
        text += ": give each running agent an agent id of its own"
        self._events.add(SessionClosed(Replaced(text), successor))

    # --- inner moves ---

    def _step(self, key: AttemptKey, holding: Holding, event: type, error: type[OrkiError]) -> None:
        try:
            following = ATTEMPT.next(holding.state, event, error)
        except OrkiError as raised:
            raise error(f"{key}: {raised.message}") from None
        self._holdings.change(key, holding, following)

    def _revoke(self, key: AttemptKey, holding: Holding, event: type, why: Failure) -> None:
        running = holding.state in (AttemptState.RUNNING, AttemptState.CANCELLING)
        self._step(key, holding, event, RemoteProtocolError)
        if running:
            self._holdings.block(key)
        self._events.join(AttemptsRevoked, Revocation(key, why))

    def _lose(self, cause: str, *, silent: bool) -> None:
        before = self.state
        self._move(Disconnected)
        if before not in (AgentState.DISCONNECTED, AgentState.ENDED):
            self._cut()
            self._events.add(SessionLost(cause, silent))

    def _cut(self) -> None:
        """Forgets what belonged to the stream. Progress waits for the next one, results are with their attempts."""
        self._outbox.clear_control()
        self._outbox.keep_work(lambda key, kind: kind is pb.Progress)
        for key, holding in list(self._holdings.items()):
            if holding.state is AttemptState.OFFERED:
                text = "the stream ended before the offer was answered"
                self._revoke(key, holding, Dropped, failure(Reason.REASON_OFFER_TIMEOUT, text))

    def _beat(self, now: float) -> None:
        running = self._holdings.renewable()
        number = self._pulse.beat(now, running, self._holdings.shortest_lease)
        lag, memory = self._vitals
        self._control(
            heartbeat=pb.Heartbeat(
                number=number,
                running=[key.ref() for key in running],
                free_slots=self._holdings.free_slots,
                loop_lag_us=lag,
                memory_bytes=memory,
            )
        )

    def _send_result(self, key: AttemptKey, holding: Holding) -> None:
        assert holding.result is not None
        size = len(holding.result.response)
        if size > self.max_payload_bytes:
            text = f"the response has {size} bytes; the orchestrator takes {self.max_payload_bytes}"
            holding.result = result(key, failure(Reason.REASON_TOO_LARGE, text))
            size = 0
        self._work(key, holding, pb.Result, size, result=holding.result)

    def _say_declined(self, key: AttemptKey, traceparent: str, reason: Reason.ValueType, text: str) -> None:
        declined = pb.Declined(attempt=key.ref(), failure=failure(reason, text))
        self._outbox.put_work(key, pb.Declined, pb.AgentMessage(traceparent=traceparent, declined=declined))

    def _say_drain(self) -> None:
        self._move(pb.AgentDrain)
        self._control(drain=pb.AgentDrain())

    def _wanted(self, key: AttemptKey, kind: type) -> bool:
        return kind is pb.Declined or key in self._holdings

    def _check(self, event: type) -> None:
        AGENT.next(self.state, event, LocalProtocolError)

    def _move(self, event: type, error: type[OrkiError] = LocalProtocolError) -> None:
        self.state = AGENT.next(self.state, event, error)

    def _control(self, **body: Any) -> None:
        self._outbox.put_control(pb.AgentMessage(**body))

    def _work(self, key: AttemptKey, holding: Holding, kind: type, payload_bytes: int = 0, **body: Any) -> None:
        message = pb.AgentMessage(traceparent=holding.traceparent, **body)
        self._outbox.put_work(key, kind, message, payload_bytes)

    def _finish(self) -> list[AgentEvent]:
        if self._drain_wanted and not self._drained and not len(self._holdings) and self.state is not AgentState.ENDED:
            self._drained = True
            self._events.add(DrainCompleted())
        return self._events.finish()


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
