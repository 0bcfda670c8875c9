"""The reports of an agent about its attempts."""

from __future__ import annotations

from typing import Any, Final

from orki.control.v1 import session_pb2 as pb
from orki.control.v1.attempt_pb2 import Budget, Failure
from orki.errors.v1.errors_pb2 import Reason
from orki_contract import ProgressPolicy
from orki_contract.errors import LocalProtocolError, OrkiError, ProtocolVersion, TooLarge
from orki_control.session._chunks import Assemblies
from orki_control.session._options import (
    CHECKPOINT_PROTOCOL,
    DEFAULT_MESSAGE_BYTES,
    MAX_CHECKPOINT_BYTES,
    PROTOCOL_MAX,
    AgentSessionOptions,
    transfer_bytes,
)
from orki_control.session._progress import OVERHEAD_BYTES
from orki_control.session._queue import SendQueue
from orki_control.session._state import AttemptKey, AttemptTable, Heartbeats, HeldAttempt, Outcome, SessionMachine
from orki_control.session._tables import AGENT, ATTEMPT, AgentState, AttemptState

LIVE: Final = frozenset({AgentState.OPEN, AgentState.PEER_DRAINING, AgentState.DRAINING})
"""States with an established session."""


_QUICK: Final = 0.003
"""Maximum time of a quick handler. Its acceptance waits for its result, so that both are one step for the store."""
_TRUST: Final = 8
"""Number of attempts that were not quick after which acceptances do not wait."""


class AgentReports(SessionMachine):
    """The attempts of the agent's end and the reports about them.

    While handlers are quick, an acceptance waits for the first report of its attempt. `on_later` announces it, and the
    shell calls `send_acceptances` a moment later.
    """

    state: AgentState

    def __init__(self, options: AgentSessionOptions) -> None:
        super().__init__()
        self.state = AgentState.DISCONNECTED
        self._options = options
        self._queue: SendQueue[pb.AgentMessage] = SendQueue(
            options.bounds, self._changed, self._changed_later, lambda chunk: pb.AgentMessage(chunk=chunk)
        )
        self._attempts = AttemptTable(options.slots, self._changed)
        self._heartbeats = Heartbeats(self._changed)
        self._peer_bytes = DEFAULT_MESSAGE_BYTES
        self._protocol = PROTOCOL_MAX
        self._acceptances: dict[AttemptKey, pb.AgentMessage] = {}
        self._quick = _TRUST // 2
        self._assemblies = Assemblies(transfer_bytes(options))

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

    def unstored(self, attempt: AttemptKey) -> tuple[int, int]:
        """Return the number and the payload bytes of an attempt's progress that is not known to be stored.

        An orchestrator with protocol 1 acknowledges no progress; there, progress counts as stored when it is sent.
        """
        held = self._attempts.get(attempt)
        return (len(held.progress), held.progress.size) if held is not None else (0, 0)

    def accept(self, attempt: AttemptKey, now: float) -> bool:
        """Accept an offer; return False when it is no longer held, and then nothing may be started."""
        held = self._answerable(pb.Accepted, attempt)
        if held is None:
            return False
        self._step(attempt, held, pb.Accepted, LocalProtocolError)
        # The orchestrator counts the lease from the time it reads the answer, which is later.
        held.renewed_at = now
        self._attempts.lease_changed(held)
        self._heartbeats.hasten(now, self._attempts)
        message = pb.AgentMessage(traceparent=held.traceparent, accepted=pb.Accepted(attempt=held.ref))
        held.accepted_at = now
        if self._quick and self.on_later is not None:
            self._acceptances[attempt] = message
            self.on_later()
        else:
            self._queue.put_work(attempt, pb.Accepted, message)
        return True

    @property
    def delays(self) -> bool:
        """Whether acceptances wait for reports."""
        return bool(self._acceptances)

    def send_acceptances(self) -> None:
        """Send the acceptances that wait."""
        for attempt in list(self._acceptances):
            self._send_acceptance(attempt)

    def _send_acceptance(self, attempt: AttemptKey) -> None:
        if (message := self._acceptances.pop(attempt, None)) is not None:
            self._queue.put_work(attempt, pb.Accepted, message)

    def decline(self, attempt: AttemptKey, error: OrkiError) -> bool:
        """Decline an offer; return False when it is no longer held."""
        held = self._answerable(pb.Declined, attempt)
        if held is None:
            return False
        self._step(attempt, held, pb.Declined, LocalProtocolError)
        self._send_declined(attempt, held.traceparent, error.reason, error.message)
        return True

    def progress(self, attempt: AttemptKey, payload: bytes, policy: ProgressPolicy = ProgressPolicy.BLOCK) -> bool:
        """Take progress of a running attempt, also while there is no stream; return False when it is no longer held.

        It is kept until it is stored, in a window of bounded count and size.

        Raises:
            TooLarge: The orchestrator accepts no message of that size.
            Overloaded: The window is full, and the caller has not waited as the policy `BLOCK` requires.
            LocalProtocolError: The attempt was not accepted, or has a result.
        """
        held = self._attempts.get(attempt)
        if held is None:
            return False
        if len(payload) > self.max_payload_bytes:
            raise TooLarge(f"{attempt}: a progress of {len(payload)} bytes; the maximum is {self.max_payload_bytes}")
        if held.state is AttemptState.REPORTED:
            # The table's row is for a replay.
            raise LocalProtocolError(f"{attempt}: {ATTEMPT.illegal(held.state, pb.Progress)}")
        self._step(attempt, held, pb.Progress, LocalProtocolError)
        if held.progress.put(payload, policy) and self.state in LIVE:
            self._send_acceptance(attempt)
            self._queue.put_source(attempt, pb.Progress, held.progress)
        return True

    def save_checkpoint(self, attempt: AttemptKey, payload: bytes) -> int:
        """Take a checkpoint of a running attempt in place of an earlier one, also while there is no stream.

        It is kept until `CheckpointsStored` names its number or a higher one.

        Returns:
            Its number within the attempt, from 1; 0 when the attempt is no longer held.

        Raises:
            TooLarge: The checkpoint is larger than `MAX_CHECKPOINT_BYTES`.
            ProtocolVersion: The orchestrator stores no checkpoints.
            LocalProtocolError: The attempt was not accepted, or has a result.
        """
        held = self._attempts.get(attempt)
        if held is None:
            return 0
        if len(payload) > MAX_CHECKPOINT_BYTES:
            raise TooLarge(f"{attempt}: a checkpoint of {len(payload)} bytes; the maximum is {MAX_CHECKPOINT_BYTES}")
        self._check_protocol("checkpoints")
        self._step(attempt, held, pb.Checkpoint, LocalProtocolError)
        held.checkpoints += 1
        held.checkpoint = pb.Checkpoint(attempt=held.ref, number=held.checkpoints, payload=payload)
        if self.state in LIVE:
            self._send_checkpoint(attempt, held)
        return held.checkpoints

    def _check_protocol(self, what: str) -> None:
        if self._protocol < CHECKPOINT_PROTOCOL:
            raise ProtocolVersion(
                f"the orchestrator speaks session protocol {self._protocol}, without {what}: upgrade it"
            )

    def _send_checkpoint(self, key: AttemptKey, held: HeldAttempt) -> None:
        if held.checkpoint is not None:
            self._work(key, held, pb.Checkpoint, len(held.checkpoint.payload), checkpoint=held.checkpoint)

    def use(self, attempt: AttemptKey, total: Budget) -> None:
        """Report the usage of a running attempt in all. It is sent again after every reconnect, and with the result.

        Without budgets in its offer, or when the attempt is no longer held, this does nothing.
        """
        held = self._attempts.get(attempt)
        if held is None or held.usage is None or held.state is AttemptState.REPORTED:
            return
        self._step(attempt, held, pb.Usage, LocalProtocolError)
        held.usage.total = total
        if self.state in LIVE:
            self._send_usage(attempt, held)

    def _send_usage(self, key: AttemptKey, held: HeldAttempt) -> None:
        if held.usage is not None and held.usage.wait():
            self._send_acceptance(key)
            self._queue.put_source(key, pb.Usage, held.usage)

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
        is_quick = now - held.accepted_at < _QUICK
        self._quick = max(0, min(_TRUST, self._quick + (1 if is_quick else -1)))
        if still_running:
            self._attempts.block(attempt)
            if self.state in LIVE:
                self._send_heartbeat(now)  # It overtakes the result, so the slot is not offered again.
        held.result = pb.Result(attempt=held.ref)
        if isinstance(outcome, bytes):
            held.result.response = outcome
        elif isinstance(outcome, Failure):
            held.result.failure.CopyFrom(outcome)
        elif isinstance(outcome, pb.SuspendedOutcome):
            held.result.suspended.CopyFrom(outcome)
        else:
            held.result.cancelled.CopyFrom(outcome)
        held.result.progress = held.progress.index
        if self.state in LIVE:
            self._send_result(attempt, held)
        return True

    def release(self, attempt: AttemptKey) -> None:
        """Free the slot of a blocked handler that has ended."""
        if self._attempts.release(attempt):
            self._heartbeats.hurry()

    def set_load(self, *, loop_lag_us: int, memory_bytes: int) -> None:
        """Set the load that the next heartbeats report."""
        self._heartbeats.load = (loop_lag_us, memory_bytes)

    # --- Transitions. ---

    def _step(self, key: AttemptKey, held: HeldAttempt, event: type, error: type[OrkiError]) -> None:
        following = ATTEMPT.rows[held.state].get(event)
        if following is None:
            raise error(f"{key}: {ATTEMPT.illegal(held.state, event)}")
        self._attempts.change(key, held, following)

    def _send_heartbeat(self, now: float) -> None:
        self._control(heartbeat=self._heartbeats.send(now, self._attempts))

    def _send_result(self, key: AttemptKey, held: HeldAttempt) -> None:
        assert held.result is not None
        if held.result.HasField("suspended") and self._protocol < CHECKPOINT_PROTOCOL:
            # An older orchestrator gives the task to another attempt.
            text = f"the task cannot be suspended: the orchestrator speaks session protocol {self._protocol}"
            failure = Failure(reason=Reason.REASON_ABANDONED, message=text)
            held.result = pb.Result(attempt=held.ref, failure=failure, progress=held.result.progress)
        if held.usage is not None and held.usage.total is not None:
            held.result.usage.CopyFrom(held.usage.total)
        size = len(held.result.response)
        if size > self.max_payload_bytes:
            text = f"the response has {size} bytes; the orchestrator accepts {self.max_payload_bytes}"
            failure = Failure(reason=Reason.REASON_TOO_LARGE, message=text)
            held.result = pb.Result(
                attempt=held.ref, failure=failure, progress=held.result.progress, usage=_usage_of(held.result)
            )
            size = 0
        self._work(key, held, pb.Result, size, result=held.result)

    def _send_declined(self, key: AttemptKey, traceparent: str, reason: Reason.ValueType, text: str) -> None:
        declined = pb.Declined(attempt=key.ref(), failure=Failure(reason=reason, message=text))
        self._queue.put_work(key, pb.Declined, pb.AgentMessage(traceparent=traceparent, declined=declined))

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
        self._send_acceptance(key)
        message = pb.AgentMessage(traceparent=held.traceparent, **body)
        self._queue.put_work(key, kind, message, payload_bytes)


def _usage_of(result: pb.Result) -> Budget | None:
    return result.usage if result.HasField("usage") else None
