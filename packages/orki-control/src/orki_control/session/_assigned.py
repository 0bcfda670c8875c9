"""The attempts on one session at the orchestrator: what is sent about them, and what the agent reports."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any, Final

from google.protobuf.message import DecodeError

from orki.control.v1 import session_pb2 as pb
from orki.control.v1.attempt_pb2 import AttemptRef, Budget, BudgetBalance, Failure
from orki.errors.v1.errors_pb2 import Reason
from orki_contract.errors import LocalProtocolError, OrkiError, RemoteProtocolError, TooLarge
from orki_control.session._chunks import CHUNKED_ABOVE, Assemblies
from orki_control.session._events import (
    ArrivedCheckpoint,
    ArrivedProgress,
    ArrivedResult,
    ArrivedUsage,
    CancelsAcknowledged,
    CheckpointsArrived,
    Decline,
    DirectiveAnswer,
    DirectivesAcknowledged,
    OffersAccepted,
    OffersDeclined,
    ProgressArrived,
    ReportsRefused,
    ResultsArrived,
    UsageArrived,
)
from orki_control.session._options import (
    CHECKPOINT_PROTOCOL,
    MAX_CHECKPOINT_BYTES,
    PROGRESS_PROTOCOL,
    OrchestratorSessionOptions,
    chosen_protocol,
    transfer_bytes,
)
from orki_control.session._progress import OVERHEAD_BYTES
from orki_control.session._queue import SendQueue
from orki_control.session._state import OCCUPYING, AttemptKey, SessionMachine, identity
from orki_control.session._tables import ATTEMPT, ORCHESTRATOR, AttemptState, OrchestratorState

_SLOWEST_LINK: Final = 1024 * 1024
"""Bytes in a second that a link carries at least."""
STALE: Final = "this session does not hold the attempt: it was withdrawn, has ended, or runs under a higher fence"


class Attempt:
    """One attempt at the orchestrator."""

    __slots__ = (
        *("answer_by", "checkpoint", "directives", "last_index", "ref", "replays", "state", "stored"),
        "traceparent",
    )

    def __init__(self, ref: AttemptRef, state: AttemptState, traceparent: str, answer_by: float | None) -> None:
        self.ref = ref
        self.state = state
        self.traceparent = traceparent
        self.answer_by = answer_by
        self.last_index: int | None = None  # Unknown until the first progress on this session.
        self.replays = False
        self.stored = 0
        self.directives = 0
        self.checkpoint = 0


class AttemptReports(SessionMachine):
    """The attempts of the orchestrator's end.

    Attributes:
        hello: The agent's hello; None before it arrives.
    """

    state: OrchestratorState

    def __init__(self, options: OrchestratorSessionOptions) -> None:
        super().__init__()
        self.state = OrchestratorState.AWAITING_HELLO
        self.hello: pb.Hello | None = None
        self._queue: SendQueue[pb.OrchestratorMessage] = SendQueue(
            options.bounds, self._changed, self._changed_later, lambda chunk: pb.OrchestratorMessage(chunk=chunk)
        )
        self._assemblies = Assemblies(transfer_bytes(options))
        self._attempts: dict[AttemptKey, Attempt] = {}
        self._stored: dict[AttemptKey, int] = {}
        self._occupied = 0
        self._blocked = 0
        self._events: list[Any] = []
        self._answers: list[tuple[float, AttemptKey]] = []

    @property
    def acknowledges(self) -> bool:
        """Whether both sides acknowledge progress and directives: protocol 2."""
        return self.hello is not None and chosen_protocol(self.hello) >= PROGRESS_PROTOCOL

    @property
    def free_slots(self) -> int:
        """Number of offers that may be made now; 0 unless the session is open."""
        if self.state is not OrchestratorState.OPEN or self.hello is None:
            return 0
        return max(0, self.hello.slots - self._occupied - self._blocked)

    @property
    def attempts(self) -> dict[AttemptKey, AttemptState]:
        """States of the attempts on this session."""
        return {key: attempt.state for key, attempt in self._attempts.items()}

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
        if chosen_protocol(self.hello) < CHECKPOINT_PROTOCOL:
            offer.ClearField("checkpoint")
            offer.ClearField("answer")
            offer.ClearField("answer_overdue")
        payload_bytes = len(offer.request) + len(offer.checkpoint) + len(offer.answer)
        size = payload_bytes + OVERHEAD_BYTES
        answer_by = now + offer.accept_timeout_ms / 1000
        if size > CHUNKED_ABOVE:
            answer_by += size / _SLOWEST_LINK  # It takes its time to arrive.
        self._attempts[key] = Attempt(offer.attempt, AttemptState.OFFERED, traceparent, answer_by)
        self._occupied += 1
        heapq.heappush(self._answers, (answer_by, key))
        self._queue.put_work(key, pb.Offer, pb.OrchestratorMessage(traceparent=traceparent, offer=offer), payload_bytes)

    def cancel(self, attempt: AttemptKey, *, grace_ms: int, message: str = "") -> bool:
        """Cancel an attempt, also repeatedly; return False when this session does not hold it."""
        return self._notify(attempt, "cancel", pb.Cancel(grace_ms=grace_ms, message=message))

    def direct(self, attempt: AttemptKey, payload: bytes) -> int:
        """Send a directive to a running attempt.

        Returns:
            Its number on this session and attempt, which `DirectivesAcknowledged` names if the session `acknowledges`;
            0 when this session does not hold the attempt.

        Raises:
            LocalProtocolError: The attempt is not accepted yet.
            TooLarge: The agent accepts no message of that size.
        """
        known = self._live(pb.Directive, attempt)
        if known is None or self.hello is None:
            return 0
        if len(payload) + OVERHEAD_BYTES > self.hello.max_message_bytes:
            raise TooLarge(f"{attempt}: a directive of {len(payload)} bytes exceeds the agent's limit")
        self._step(attempt, known, pb.Directive, LocalProtocolError)
        known.directives += 1
        number = known.directives if self.acknowledges else 0
        directive = pb.Directive(attempt=known.ref, payload=payload, number=number)
        message = pb.OrchestratorMessage(traceparent=known.traceparent, directive=directive)
        self._queue.put_work(attempt, pb.Directive, message, len(payload))
        return known.directives

    def acknowledge(self, attempt: AttemptKey) -> bool:
        """Acknowledge a stored result; return False when this session does not hold the attempt."""
        # The agent only forgets the result, so the message leaves with the next one.
        return self._notify(attempt, "result_acknowledged", pb.ResultAcknowledged(), later=True)

    def refuse(self, attempt: AttemptKey, error: OrkiError) -> bool:
        """Tell the agent that it no longer holds an attempt; return False when this session does not hold it."""
        failure = Failure(reason=error.reason, message=error.message)
        return self._notify(attempt, "refused", pb.Refused(failure=failure))

    def acknowledge_progress(self, attempt: AttemptKey, index: int) -> None:
        """Acknowledge all progress of an attempt up to an index. It has no effect on an agent with protocol 1."""
        known = self._live(pb.ProgressAcknowledged, attempt)
        if known is not None and self.acknowledges:
            self._stored[attempt] = known.stored = max(index, known.stored)
            if known.replays:
                # The agent may learn this before it replays, and begin after it.
                known.last_index = max(known.stored, known.last_index or 0)
            self._changed()

    def replay_progress(self, attempt: AttemptKey, index: int | None = None) -> None:
        """Ask for all progress of an attempt after an index, as the store lacks some of it.

        Progress that was sent before the agent learns this is ignored when it arrives. Without an index, the agent
        sends all that is not acknowledged.
        """
        known = self._live(pb.ProgressAcknowledged, attempt)
        if known is None or not self.acknowledges:
            return
        self._stored.pop(attempt, None)
        index = known.stored if index is None else index
        known.last_index, known.replays = index, True
        self._acknowledge_progress(attempt, known, index, replay=True)

    def acknowledge_checkpoint(self, attempt: AttemptKey, number: int, error: OrkiError | None = None) -> None:
        """Acknowledge a stored checkpoint of an attempt, or refuse it with an error."""
        known = self._live(pb.CheckpointAcknowledged, attempt)
        if known is not None:
            self._step(attempt, known, pb.CheckpointAcknowledged, LocalProtocolError)
            failure = Failure(reason=error.reason, message=error.message) if error is not None else None
            acknowledged = pb.CheckpointAcknowledged(attempt=known.ref, number=number, failure=failure)
            self._control_about(known, checkpoint_acknowledged=acknowledged)

    def update_budgets(self, attempt: AttemptKey, budgets: Sequence[BudgetBalance], charged: Budget) -> None:
        """Tell the agent what is left of the budgets of a running attempt."""
        known = self._live(pb.BudgetUpdate, attempt)
        if known is not None and known.state is not AttemptState.OFFERED:
            self._step(attempt, known, pb.BudgetUpdate, LocalProtocolError)
            update = pb.BudgetUpdate(attempt=known.ref, budgets=budgets, charged=charged)
            self._control_about(known, budget_update=update)

    # --- Receivers, one for each kind of report. ---

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
        index, missing, last = progress.index, progress.missing, attempt.last_index
        if not self.acknowledges:
            if index <= (last or 0):
                raise RemoteProtocolError(f"{key}: progress {index} came after progress {last}")
            missing = index - 1  # This agent does not know what it lost; the store does.
        elif missing >= index:
            raise RemoteProtocolError(f"{key}: progress {index} cannot follow {missing} missing deltas")
        elif last is not None and index <= last:
            return
        elif last is not None and index - missing > last + 1:
            if attempt.replays:
                return
            raise RemoteProtocolError(f"{key}: progress {index} came after progress {last}, {missing} are missing")
        attempt.last_index, attempt.replays = index, False
        arrived = ArrivedProgress(key, index, progress.payload, missing)
        self._events.append((ProgressArrived, arrived))

    def _checkpoint(self, message: pb.AgentMessage, now: float) -> None:
        checkpoint = message.checkpoint
        key = self._report(pb.Checkpoint, checkpoint)
        if key is None:
            return
        attempt = self._attempts[key]
        if checkpoint.number <= attempt.checkpoint:
            raise RemoteProtocolError(f"{key}: checkpoint {checkpoint.number} came after {attempt.checkpoint}")
        attempt.checkpoint = checkpoint.number
        size = len(checkpoint.payload)
        if size > MAX_CHECKPOINT_BYTES:
            error = TooLarge(f"{key}: a checkpoint of {size} bytes; the maximum is {MAX_CHECKPOINT_BYTES}")
            self.acknowledge_checkpoint(key, checkpoint.number, error)
            return
        arrived = ArrivedCheckpoint(key, checkpoint.number, checkpoint.payload)
        self._events.append((CheckpointsArrived, arrived))

    def _usage(self, message: pb.AgentMessage, now: float) -> None:
        key = self._report(pb.Usage, message.usage)
        if key is not None:
            self._events.append((UsageArrived, ArrivedUsage(key, message.usage.total)))

    def _result(self, message: pb.AgentMessage, now: float) -> None:
        result = message.result
        if result.WhichOneof("outcome") is None:
            raise RemoteProtocolError(f"{AttemptKey(*identity(result.attempt))}: a result without an outcome")
        key = self._report(pb.Result, result)
        if key is not None:
            self._events.append((ResultsArrived, ArrivedResult(key, result)))

    def _chunk(self, message: pb.AgentMessage, now: float) -> None:
        self._move(pb.Chunk, RemoteProtocolError)
        chunk = message.chunk
        try:
            received, whole = self._assemblies.receive(chunk)
            reported = pb.AgentMessage.FromString(whole) if whole is not None else None
        except DecodeError as error:
            raise RemoteProtocolError(f"a result in chunks: {error}") from None
        except TooLarge as error:
            self._control(refused=refusal(error.reason, error.message, AttemptKey(*identity(chunk.attempt))))
            return
        if received:
            self._control(chunk_acknowledged=pb.ChunkAcknowledged(transfer=chunk.transfer, received=received))
        if reported is not None:
            if not reported.HasField("result"):
                raise RemoteProtocolError("chunks of a message that is not a result")
            self._result(reported, now)

    def _chunk_acknowledged(self, message: pb.AgentMessage, now: float) -> None:
        self._move(pb.ChunkAcknowledged, RemoteProtocolError)
        self._queue.chunks_arrived(message.chunk_acknowledged)

    def _cancel_acknowledged(self, message: pb.AgentMessage, now: float) -> None:
        self._move(pb.CancelAcknowledged, RemoteProtocolError)
        key = AttemptKey(*identity(message.cancel_acknowledged.attempt))
        attempt = self._attempts.get(key)
        # It may arrive after the result, when the attempt is closed.
        if attempt is not None:
            self._step(key, attempt, pb.CancelAcknowledged, RemoteProtocolError)
            self._events.append((CancelsAcknowledged, key))

    def _directive_acknowledged(self, message: pb.AgentMessage, now: float) -> None:
        self._move(pb.DirectiveAcknowledged, RemoteProtocolError)
        answer = message.directive_acknowledged
        key = AttemptKey(*identity(answer.attempt))
        attempt = self._attempts.get(key)
        # It may arrive after the result, when the attempt is closed.
        if attempt is not None:
            self._step(key, attempt, pb.DirectiveAcknowledged, RemoteProtocolError)
            if not 1 <= answer.number <= attempt.directives:
                raise RemoteProtocolError(f"{key}: directive {answer.number} was not sent")
        self._events.append((DirectivesAcknowledged, DirectiveAnswer(key, answer.number, answer.delivered)))

    # --- Transitions. ---

    def _report(self, kind: type, body: Any) -> AttemptKey | None:
        """Step the attempt of a report; refuse the report and return None when this session does not hold it."""
        self._move(kind, RemoteProtocolError)
        key = AttemptKey(*identity(body.attempt))
        attempt = self._attempts.get(key)
        if attempt is None:
            self._control(refused=refusal(Reason.REASON_STALE_FENCE, STALE, key))
            self._events.append((ReportsRefused, key))
            return None
        self._step(key, attempt, kind, RemoteProtocolError)
        return key

    def _step(self, key: AttemptKey, attempt: Attempt, event: type, error: type[OrkiError]) -> None:
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

    def _live(self, event: type, key: AttemptKey) -> Attempt | None:
        self._check(event)
        return None if self.state is OrchestratorState.ENDED else self._attempts.get(key)

    def _notify(
        self,
        key: AttemptKey,
        field: str,
        body: pb.Cancel | pb.ResultAcknowledged | pb.Refused,
        *,
        later: bool = False,
    ) -> bool:
        attempt = self._live(type(body), key)
        if attempt is None:
            return False
        self._step(key, attempt, type(body), LocalProtocolError)
        body.attempt.CopyFrom(attempt.ref)
        self._control_about(attempt, later, **{field: body})
        return True

    def _check(self, event: type) -> None:
        if event not in ORCHESTRATOR.rows[self.state]:
            raise LocalProtocolError(ORCHESTRATOR.illegal(self.state, event))

    def _move(self, event: type, error: type[OrkiError] = LocalProtocolError) -> None:
        following = ORCHESTRATOR.rows[self.state].get(event)
        if following is None:
            raise error(ORCHESTRATOR.illegal(self.state, event))
        self._enter(following)

    def _control(self, **body: Any) -> None:
        self._queue.put_control(pb.OrchestratorMessage(**body))

    def _control_about(self, attempt: Attempt, later: bool = False, /, **body: Any) -> None:
        self._queue.put_control(pb.OrchestratorMessage(traceparent=attempt.traceparent, **body), later=later)

    def _acknowledge_progress(self, key: AttemptKey, attempt: Attempt, index: int, replay: bool = False) -> None:
        acknowledged = pb.ProgressAcknowledged(attempt=attempt.ref, index=index, replay=replay)
        self._control_about(attempt, progress_acknowledged=acknowledged)

    def _put_progress_acknowledgements(self) -> None:
        """Add one acknowledgement for each attempt whose progress was stored since the last batch."""
        stored, self._stored = self._stored, {}
        for key, index in stored.items():
            attempt = self._attempts.get(key)
            if attempt is not None:
                self._acknowledge_progress(key, attempt, index)


def refusal(reason: Reason.ValueType, message: str, key: AttemptKey | None = None) -> pb.Refused:
    """Return the refusal of one report, or of the session."""
    failure = Failure(reason=reason, message=message)
    return pb.Refused(failure=failure, attempt=key.ref() if key else None)
