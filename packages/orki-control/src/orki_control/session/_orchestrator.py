"""The orchestrator's end of one session: the attempts that were offered on one stream, and their answers.

The store decides about fences, leases and results. This machine returns an event for everything that the store must
know, and the store's decisions come back as calls.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from orki.control.v1 import session_pb2 as pb
from orki.control.v1.attempt_pb2 import Failure
from orki.errors.v1.errors_pb2 import Reason
from orki_contract.errors import LocalProtocolError, OrkiError, ProtocolVersion, RemoteProtocolError
from orki_control.session._assigned import STALE, Attempt, AttemptReports, refusal
from orki_control.session._events import (
    AgentDraining,
    HeartbeatArrived,
    HelloArrived,
    OffersExpired,
    OrchestratorEvent,
    ReportsRefused,
    SessionEnded,
)
from orki_control.session._options import (
    SILENT_INTERVALS,
    OrchestratorSessionOptions,
    check_hello,
    chosen_protocol,
    transfer_bytes,
)
from orki_control.session._queue import joined
from orki_control.session._state import AttemptKey, identity
from orki_control.session._tables import (
    AttemptState,
    Disconnected,
    HelloTimeout,
    OfferWithdrawn,
    OrchestratorState,
    PeerSilent,
    SessionRefused,
)


class OrchestratorSession(AttemptReports):
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
        super().__init__(options)
        self.session_epoch = 0
        self._options = options
        self._heard_by = now + options.hello_timeout
        self._heartbeats = 0
        self._idle_interval = 0.0

    # --- State. ---

    @property
    def draining(self) -> bool:
        """Whether either side drains."""
        return self.state in (OrchestratorState.DRAINING, OrchestratorState.AGENT_DRAINING)

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
            interval = self._options.heartbeat_interval
            if not self._attempts:
                interval = max(interval, self._idle_interval)
            self._heard_by = now + SILENT_INTERVALS * interval
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
            self._attempts[key] = Attempt(key.ref(), AttemptState.RUNNING, traceparent, None)
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
                max_transfer_bytes=transfer_bytes(self._options),
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

    def echo(self, number: int, idle_interval: float = 0.0) -> None:
        """Answer a heartbeat. The leases that it renewed count from the time it was sent.

        Args:
            number: Number of the heartbeat.
            idle_interval: Time between heartbeats of an agent without attempts, if it is longer than the interval.

        Raises:
            LocalProtocolError: No such heartbeat arrived.
        """
        self._move(pb.HeartbeatEcho)
        if not 1 <= number <= self._heartbeats:
            raise LocalProtocolError(f"echo: heartbeat {number} did not arrive (the last was {self._heartbeats})")
        if self.state is not OrchestratorState.ENDED:
            if idle_interval <= self._options.heartbeat_interval:
                idle_interval = 0.0
            self._idle_interval = idle_interval
            self._control(heartbeat_echo=pb.HeartbeatEcho(number=number, idle_interval_ms=round(idle_interval * 1000)))

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
        self._put_progress_acknowledgements()
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
                    refused=refusal(Reason.REASON_HELLO_TIMEOUT, "the hello did not arrive within the hello timeout")
                )
                return self._end(HelloTimeout, "the hello did not arrive in time", Reason.REASON_HELLO_TIMEOUT)
            return self._end(PeerSilent, "the agent fell silent", Reason.REASON_PEER_LOST)
        while self._answers and self._answers[0][0] <= now:
            deadline, key = heapq.heappop(self._answers)
            if self._awaits_answer(deadline, key):
                attempt = self._attempts[key]
                self._step(key, attempt, OfferWithdrawn, LocalProtocolError)
                self._control_about(
                    attempt, refused=refusal(Reason.REASON_OFFER_TIMEOUT, "the offer was not answered in time", key)
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
        self._queue.transfers.limit = hello.max_transfer_bytes if self.acknowledges else 0
        held = tuple((AttemptKey(*identity(each.attempt)), each.has_result) for each in hello.held)
        self._events.append(HelloArrived(hello, held))

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
                self._control(refused=refusal(Reason.REASON_STALE_FENCE, STALE, key))
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

    def _end(self, event: type, cause: str, reason: Reason.ValueType) -> list[OrchestratorEvent]:
        already = self.state is OrchestratorState.ENDED
        self._move(event)
        return [] if already else [self._ended(cause, reason)]

    def _ended(self, cause: str, reason: Reason.ValueType) -> SessionEnded:
        waiting = set(self._queue.waiting(pb.Offer))
        offered = [key for key, attempt in self._attempts.items() if attempt.answer_by is not None]
        running = tuple(
            key
            for key, attempt in self._attempts.items()
            if attempt.answer_by is None and attempt.state is not AttemptState.REPORTED
        )
        unanswered = tuple(key for key in offered if key not in waiting)
        return SessionEnded(cause, reason, unanswered, running, tuple(key for key in offered if key in waiting))

    def _refuse_session(self, error: RemoteProtocolError) -> None:
        self._move(SessionRefused)
        self._control(refused=refusal(error.reason, error.message))

    def _awaits_answer(self, deadline: float, key: AttemptKey) -> bool:
        attempt = self._attempts.get(key)
        return attempt is not None and attempt.state is AttemptState.OFFERED and attempt.answer_by == deadline

    def _finish(self) -> list[OrchestratorEvent]:
        events, self._events = self._events, []
        return joined(events) if events else events


_RECEIVE: Final[dict[str, Callable[[OrchestratorSession, pb.AgentMessage, float], None]]] = {
    "hello": OrchestratorSession._hello,
    "accepted": OrchestratorSession._accepted,
    "declined": OrchestratorSession._declined,
    "progress": OrchestratorSession._progress,
    "checkpoint": OrchestratorSession._checkpoint,
    "usage": OrchestratorSession._usage,
    "result": OrchestratorSession._result,
    "cancel_acknowledged": OrchestratorSession._cancel_acknowledged,
    "directive_acknowledged": OrchestratorSession._directive_acknowledged,
    "chunk": OrchestratorSession._chunk,
    "chunk_acknowledged": OrchestratorSession._chunk_acknowledged,
    "heartbeat": OrchestratorSession._heartbeat,
    "drain": OrchestratorSession._drain,
}
