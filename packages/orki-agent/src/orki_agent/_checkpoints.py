"""Checkpoints and suspensions: what a handler keeps for the next attempt of its task.

The I/O thread tells each handler that waits when its checkpoint is stored or refused.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Final

from google.protobuf.message import Message

from orki.control.v1.session_pb2 import SuspendedOutcome
from orki_agent._services import Handler, OnStored
from orki_contract.errors import InvalidArgument, OrkiError, StaleFence, TooLarge, error_for
from orki_contract.model import milliseconds
from orki_control.session import MAX_CHECKPOINT_BYTES, AgentSession, AttemptKey, StoredCheckpoint

_QUESTION_CHARACTERS: Final = 4_000


class Suspending(BaseException):
    """Ends an attempt whose task waits for an answer. `except Exception` does not catch it.

    Attributes:
        outcome: The outcome of the attempt.
    """

    def __init__(self, question: str, deadline: float) -> None:
        super().__init__(question)
        self.outcome = SuspendedOutcome(question=question, deadline_ms=milliseconds(deadline))


def suspending(question: object, deadline: object) -> Suspending:
    """Return the exception that suspends a task.

    Raises:
        InvalidArgument: The question is no text or too long, or the deadline is not a positive number of seconds.
    """
    if not isinstance(question, str) or len(question) > _QUESTION_CHARACTERS:
        raise InvalidArgument(f"suspend: the question must be a text of at most {_QUESTION_CHARACTERS} characters")
    if deadline is None:
        return Suspending(question, 0.0)
    if isinstance(deadline, bool) or not isinstance(deadline, int | float) or not 0.001 <= deadline < 1e10:
        raise InvalidArgument(f"suspend: the deadline is {deadline!r}; it must be a positive number of seconds")
    return Suspending(question, deadline)


def checkpoint_payload(handler: Handler, checkpoint: object) -> bytes:
    """Return a checkpoint as it is stored.

    Raises:
        InvalidArgument: It is not what the method declares.
        TooLarge: It is larger than `MAX_CHECKPOINT_BYTES`.
    """
    expected: type[Any] = handler.task.checkpoint
    if not isinstance(checkpoint, expected):
        text = f"{handler.name} declares {expected.__name__} as its checkpoint, not {type(checkpoint).__name__}"
        raise InvalidArgument(text)
    payload = checkpoint.SerializeToString() if isinstance(checkpoint, Message) else bytes(checkpoint)
    if len(payload) > MAX_CHECKPOINT_BYTES:
        raise TooLarge(f"{handler.name}: a checkpoint has {len(payload)} bytes; the maximum is {MAX_CHECKPOINT_BYTES}")
    return payload


def store_blocking(save: Callable[[AttemptKey, bytes, OnStored], None], attempt: AttemptKey, payload: bytes) -> None:
    """Call `save`, and block until it calls back; raise the error that it passes."""
    stored: Future[None] = Future()

    def settle(error: OrkiError | None) -> None:
        if error is None:
            stored.set_result(None)
        else:
            stored.set_exception(error)

    save(attempt, payload, settle)
    stored.result()


class CheckpointWaits:
    """The handlers that wait until their checkpoints are stored, by attempt. Belongs to the I/O thread."""

    def __init__(self, machine: AgentSession) -> None:
        self._machine = machine
        self._waits: dict[AttemptKey, list[tuple[int, OnStored]]] = {}

    def save(self, attempt: AttemptKey, payload: bytes, on_stored: OnStored) -> None:
        """Send a checkpoint."""
        try:
            number = self._machine.save_checkpoint(attempt, payload)
        except OrkiError as error:
            on_stored(error)
            return
        if number:
            self._waits.setdefault(attempt, []).append((number, on_stored))
        else:
            on_stored(not_held(attempt))

    def stored(self, checkpoint: StoredCheckpoint) -> None:
        """Tell the handlers whose checkpoints are stored or refused."""
        attempt, number, failure = checkpoint
        error = error_for(failure.reason, failure.message) if failure is not None else None
        waits = self._waits.pop(attempt, [])
        later = [wait for wait in waits if wait[0] > number]
        if later:
            self._waits[attempt] = later
        for each, on_stored in waits:
            if each <= number:
                on_stored(error)

    def give_up(self, attempt: AttemptKey) -> None:
        """Tell the handlers of an attempt that its checkpoints are not stored."""
        for _, on_stored in self._waits.pop(attempt, []):
            on_stored(not_held(attempt))


def not_held(attempt: AttemptKey) -> StaleFence:
    """Return the error of a checkpoint whose attempt is no longer held."""
    return StaleFence(f"{attempt} is no longer held, and its checkpoint was not stored")
