"""The agent's end of its session: one machine for the life of the process, over any number of streams.

It keeps attempts and results when a stream is lost, renews leases, stops attempts whose lease it cannot renew, and
acknowledges cancels at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

from google.protobuf.message import DecodeError

from orki.control.v1 import session_pb2 as pb
from orki.control.v1.attempt_pb2 import Failure
from orki.errors.v1.errors_pb2 import Reason
from orki_contract.errors import (
    LocalProtocolError,
    ProtocolVersion,
    RemoteProtocolError,
    Replaced,
    TooLarge,
    error_for,
)
from orki_control.session import _events as events
from orki_control.session._options import (
    PROGRESS_PROTOCOL,
    AgentSessionOptions,
    build_hello,
    check_welcome,
)
from orki_control.session._progress import ProgressWindow
from orki_control.session._queue import joined
from orki_control.session._reports import LIVE, AgentReports
from orki_control.session._state import (
    AttemptKey,
    HeldAttempt,
    UsageTotal,
    identity,
)
from orki_control.session._tables import (
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


class AgentSession(AgentReports):
    """The agent's end.

    The shell opens a stream and calls `connection_made`. It passes received messages to `receive_batch`, calls
    `handle_timer` at `next_timer`, and calls `connection_lost` when the stream has ended. `now` is a monotonic time in
    seconds. Whatever is called, the machine calls `on_change` when there may be messages to send or an earlier timer.

    Attributes:
        state: State of the session.
        session_epoch: Number of the last established session; 0 before the first.
    """

    def __init__(self, options: AgentSessionOptions) -> None:
        super().__init__(options)
        self.session_epoch = 0
        self._events: list[Any] = []
        self._acknowledged = True
        self._drain_wanted = False
        self._drained = False
        self._connected_at = 0.0

    # --- The stream. ---

    def connection_made(self, now: float) -> None:
        """Start a new stream: the hello is the first message."""
        self._move(Connected)
        self._connected_at = now
        self._heartbeats.begin(now + self._options.hello_timeout)
        self._queue.clear()
        self._acceptances.clear()
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
        if self.state in LIVE:
            self._heartbeats.silent_at = now + self._heartbeats.patience(self._attempts)
        return self._finish()

    def drain(self, now: float) -> list[events.AgentEvent]:
        """Accept no more offers. `DrainCompleted` follows when nothing is held any more."""
        if not self._drain_wanted:
            self._drain_wanted = True
            if self.state in LIVE:
                self._send_drain()
        return self._finish()

    def stop(self) -> None:
        """End the session, whatever is held."""
        self._move(Stopped)

    # --- Messages to send, and timers. ---

    def messages_to_send(self) -> pb.ConnectRequest | None:
        """Remove and return the next batch to write; None when nothing waits."""
        if self.state in LIVE:
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
        if self.state in LIVE:
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
        if self.state in LIVE and now >= self._heartbeats.due_at:
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
        self._protocol = welcome.protocol
        self._acknowledged = welcome.protocol >= PROGRESS_PROTOCOL
        self._queue.limit(welcome.max_message_bytes)
        self._queue.transfers.limit = welcome.max_transfer_bytes if self._acknowledged else 0
        not_kept = Failure(reason=Reason.REASON_STALE_FENCE, message="the orchestrator did not keep the attempt")
        resumed = []
        for key, held in list(self._attempts.items()):
            if key in keep:
                resumed.append(key)
                held.renewed_at = max(held.renewed_at, self._connected_at)
                continue
            self._revoke(key, held, Dropped, not_kept)
        self._attempts.leases_changed()
        for key in resumed:
            held = self._attempts[key]
            held.progress.acknowledged = self._acknowledged
            self._queue.put_source(key, pb.Progress, held.progress, held.progress.rewind())
            self._repeat_checkpoint(key, held)
            if held.usage is not None and held.state is not AttemptState.REPORTED:
                held.usage.rewind()
                self._send_usage(key, held)
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
        options = self._options
        window = ProgressWindow(
            offer.attempt, message.traceparent, options.progress_window, options.progress_bytes, self._acknowledged
        )
        held = HeldAttempt(offer.attempt, message.traceparent, offer.lease_ms / 1000, now, window, offer.proof)
        if offer.budgets:
            held.usage = UsageTotal(offer.attempt, message.traceparent)
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
        delivered = held is not None and held.state is not AttemptState.REPORTED
        if held is not None:
            self._step(key, held, pb.Directive, RemoteProtocolError)
            self._events.append((events.DirectivesArrived, events.ArrivedDirective(key, directive.payload)))
        if directive.number:
            answer = pb.DirectiveAcknowledged(attempt=directive.attempt, number=directive.number, delivered=delivered)
            self._queue.put_control(pb.AgentMessage(traceparent=message.traceparent, directive_acknowledged=answer))

    def _result_acknowledged(self, message: pb.OrchestratorMessage, now: float) -> None:
        self._move(pb.ResultAcknowledged, RemoteProtocolError)
        key = AttemptKey(*identity(message.result_acknowledged.attempt))
        held = self._attempts.get(key)
        if held is not None:
            self._step(key, held, pb.ResultAcknowledged, RemoteProtocolError)
            self._events.append((events.ResultsAcknowledged, key))

    def _progress_acknowledged(self, message: pb.OrchestratorMessage, now: float) -> None:
        self._move(pb.ProgressAcknowledged, RemoteProtocolError)
        acknowledged = message.progress_acknowledged
        key = AttemptKey(*identity(acknowledged.attempt))
        held = self._attempts.get(key)
        if held is None:
            return
        self._step(key, held, pb.ProgressAcknowledged, RemoteProtocolError)
        if acknowledged.replay:
            places = held.progress.replay_after(acknowledged.index)
            self._queue.put_source(key, pb.Progress, held.progress, places)
        else:
            held.progress.acknowledge(acknowledged.index)
        self._events.append((events.ProgressAcknowledged, key))

    def _repeat_checkpoint(self, key: AttemptKey, held: HeldAttempt) -> None:
        try:
            self._check_protocol("checkpoints")
        except ProtocolVersion as error:
            if held.checkpoint is not None:
                failure = Failure(reason=error.reason, message=error.message)
                self._checkpoint_stored(key, held, held.checkpoint.number, failure)
        else:
            self._send_checkpoint(key, held)

    def _checkpoint_acknowledged(self, message: pb.OrchestratorMessage, now: float) -> None:
        self._move(pb.CheckpointAcknowledged, RemoteProtocolError)
        stored = message.checkpoint_acknowledged
        key = AttemptKey(*identity(stored.attempt))
        held = self._attempts.get(key)
        if held is None:
            return
        self._step(key, held, pb.CheckpointAcknowledged, RemoteProtocolError)
        if stored.number > held.checkpoints:
            raise RemoteProtocolError(f"{key}: checkpoint {stored.number} is acknowledged before it was sent")
        self._checkpoint_stored(key, held, stored.number, stored.failure if stored.HasField("failure") else None)

    def _checkpoint_stored(self, key: AttemptKey, held: HeldAttempt, number: int, failure: Failure | None) -> None:
        if held.checkpoint is not None and held.checkpoint.number <= number:
            held.checkpoint = None
        self._events.append((events.CheckpointsStored, events.StoredCheckpoint(key, number, failure)))

    def _budget_update(self, message: pb.OrchestratorMessage, now: float) -> None:
        self._move(pb.BudgetUpdate, RemoteProtocolError)
        update = message.budget_update
        key = AttemptKey(*identity(update.attempt))
        held = self._attempts.get(key)
        if held is not None:
            self._step(key, held, pb.BudgetUpdate, RemoteProtocolError)
            self._events.append((events.BudgetsChanged, events.ArrivedBudgets(key, update)))

    def _chunk(self, message: pb.OrchestratorMessage, now: float) -> None:
        self._move(pb.Chunk, RemoteProtocolError)
        try:
            received, whole = self._assemblies.receive(message.chunk)
            offered = pb.OrchestratorMessage.FromString(whole) if whole is not None else None
        except (DecodeError, TooLarge) as error:
            raise RemoteProtocolError(f"an offer in chunks: {error}") from None
        if received:
            answer = pb.ChunkAcknowledged(transfer=message.chunk.transfer, received=received)
            self._control(chunk_acknowledged=answer)
        if offered is not None:
            if not offered.HasField("offer"):
                raise RemoteProtocolError("chunks of a message that is not an offer")
            self._offer(offered, now)

    def _chunk_acknowledged(self, message: pb.OrchestratorMessage, now: float) -> None:
        self._move(pb.ChunkAcknowledged, RemoteProtocolError)
        self._queue.chunks_arrived(message.chunk_acknowledged)

    def _heartbeat_echo(self, message: pb.OrchestratorMessage, now: float) -> None:
        self._move(pb.HeartbeatEcho, RemoteProtocolError)
        echo = message.heartbeat_echo
        sent_at, renewed = self._heartbeats.answered(echo.number)
        self._heartbeats.idle_interval = echo.idle_interval_ms / 1000
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
        """Drop what belonged to the stream. Progress and results stay with their attempts."""
        self._queue.clear()
        self._assemblies.clear()
        for key, held in list(self._attempts.items()):
            if held.state is AttemptState.OFFERED:
                text = "the stream ended before the offer was answered"
                self._revoke(key, held, Dropped, Failure(reason=Reason.REASON_OFFER_TIMEOUT, message=text))

    def _send_drain(self) -> None:
        self._move(pb.AgentDrain)
        self._control(drain=pb.AgentDrain())

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
    "progress_acknowledged": AgentSession._progress_acknowledged,
    "checkpoint_acknowledged": AgentSession._checkpoint_acknowledged,
    "budget_update": AgentSession._budget_update,
    "chunk": AgentSession._chunk,
    "chunk_acknowledged": AgentSession._chunk_acknowledged,
    "heartbeat_echo": AgentSession._heartbeat_echo,
    "drain": AgentSession._drain,
    "replaced": AgentSession._replaced,
}
