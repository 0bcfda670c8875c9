"""One attempt while its handler runs: what the I/O thread may ask of it, and what every context knows."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Final

from google.protobuf.message import Message

from orki.events.v1.usage_orki import USAGE
from orki.events.v1.usage_pb2 import UsageEvent
from orki_agent.catalog import Handler
from orki_agent.outcomes import outcome_of_error, outcome_of_response
from orki_agent.surroundings import Offered, Surroundings
from orki_contract.errors import InvalidArgument, TooLarge
from orki_contract.trace import Span
from orki_control.session import AttemptKey, Outcome

__all__ = ["Execution", "HandlerContext"]

_log = logging.getLogger("orki.agent")
_MOST_TOKENS: Final = 2**64 - 1


class Execution(ABC):
    """A handler at work. `cancel`, `direct` and `grant` come from the I/O thread, also while user code blocks.

    Attributes:
        offered: What it was started with.
        handler: What runs.
        cancelled: Whether somebody asked for its end.
        ended: Whether the handler has returned or raised.
    """

    def __init__(
        self, offered: Offered, handler: Handler, surroundings: Surroundings, on_end: Callable[[Outcome], None]
    ) -> None:
        self.offered = offered
        self.handler = handler
        self.surroundings = surroundings
        self.cancelled = False
        self.ended = False
        self._on_end = on_end

    @abstractmethod
    def start(self) -> None:
        """Begins."""

    @abstractmethod
    def cancel(self) -> None:
        """Asks for the handler's end; asking again asks harder where that is possible."""

    @abstractmethod
    def direct(self, payload: bytes) -> None:
        """Hands over a directive."""

    @abstractmethod
    def grant(self, count: int) -> None:
        """So much progress has left."""

    def finish(self, response: object, error: BaseException | None) -> None:
        """The handler has returned, or raised `error`. Call it in the attempt's own thread or loop, once."""
        self.ended = True
        if error is None:
            self._on_end(outcome_of_response(self.handler.task, response))
            return
        outcome = outcome_of_error(error, cancelled=self.cancelled)
        # The exception stays: its traceback is the author's only hint.
        name = self.handler.task.contract.full_name
        if self.cancelled:
            _log.info("%s of %s ended after its cancel: %r", self.offered.attempt, name, error)
        else:
            trace = (type(error), error, error.__traceback__)
            _log.warning("%s of %s failed", self.offered.attempt, name, exc_info=trace)
        self._on_end(outcome)


class HandlerContext:
    """What async and sync contexts have alike; see `orki_contract.TaskContext`."""

    __slots__ = ("_execution",)

    def __init__(self, execution: Execution) -> None:
        self._execution = execution

    @property
    def task_id(self) -> str:
        """The task."""
        return self._execution.offered.attempt.task_id

    @property
    def attempt(self) -> int:
        """Number of the attempt, from 1."""
        return self._execution.offered.attempt.attempt

    @property
    def fence(self) -> int:
        """Rises with every attempt, never repeats: hand it to stores downstream, so that they refuse older writers."""
        return self._execution.offered.attempt.fence

    @property
    def span(self) -> Span:
        """The attempt's span."""
        return self._execution.offered.span

    @property
    def cancelled(self) -> bool:
        """Whether somebody asked for the end of the attempt."""
        return self._execution.cancelled

    def usage(
        self,
        *,
        model: str,
        input_tokens: int,
        output_tokens: int,
        provider: str = "",
        cached_tokens: int = 0,
        cost_micros: int = 0,
    ) -> None:
        """Records the use of a language model; cost in millionths of a US dollar. Never blocks on I/O.

        Raises:
            InvalidArgument: No model is named, or a number is negative or no integer.
        """
        if not model:
            raise InvalidArgument("usage: model is empty; name the model that was used")
        counts = {
            "input_tokens": input_tokens,
            "output_tokens": output_tokens,
            "cached_tokens": cached_tokens,
            "cost_micros": cost_micros,
        }
        for name, value in counts.items():
            known: object = value
            if isinstance(known, bool) or not isinstance(known, int) or not 0 <= known <= _MOST_TOKENS:
                raise InvalidArgument(f"usage: {name} is {value!r}; it must be an integer, 0 or more")
        attempt = self._execution.offered.attempt
        event = UsageEvent(
            agent_id=self._execution.surroundings.agent_id,
            task_id=attempt.task_id,
            attempt=attempt.attempt,
            provider=provider,
            model=model,
            **counts,
        )
        self._execution.surroundings.collect(USAGE, event, self.span)

    def _progress_payload(self, delta: Any) -> tuple[AttemptKey, bytes]:
        execution = self._execution
        expected = execution.handler.task.progress
        name = execution.handler.task.contract.full_name
        if not isinstance(delta, expected) or not isinstance(delta, Message):
            declared = expected.__name__ if issubclass(expected, Message) else "no progress"
            raise InvalidArgument(f"{name} declares {declared} as its progress, not {type(delta).__name__}")
        payload = delta.SerializeToString()
        most = execution.surroundings.max_payload_bytes
        if len(payload) > most:
            raise TooLarge(f"{name}: a progress of {len(payload)} bytes; the orchestrator takes {most}")
        return execution.offered.attempt, payload
