"""What all kinds of executions share: the end of a handler, the credits of its progress, and its context."""

from __future__ import annotations

import contextlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, ClassVar, Final

from google.protobuf.message import DecodeError, Message

from orki.control.v1.attempt_pb2 import Failure
from orki.control.v1.session_pb2 import BudgetUpdate, SuspendedOutcome
from orki.events.v1.usage_orki import USAGE
from orki.events.v1.usage_pb2 import UsageEvent
from orki_agent._budget import BudgetMeter
from orki_agent._outcomes import decode, log_error, name_of, outcome_of_error, outcome_of_response, text_of
from orki_agent._services import AgentServices, Handler, Offered, place_of
from orki_contract import BudgetLeft
from orki_contract.errors import InvalidArgument, TooLarge
from orki_contract.trace import Span
from orki_control.session import DEFAULT_PROGRESS_BYTES, AttemptKey, Outcome

_log = logging.getLogger("orki.agent")

_MOST_TOKENS: Final = 2**64 - 1


class Execution(ABC):
    """A running handler. The I/O thread calls `cancel`, `direct` and `grant`, also while user code blocks.

    Attributes:
        offered: The input of the handler.
        handler: The handler.
        agent: The agent, for the handler's context.
        cancelled: Whether the attempt was cancelled.
        ended: Whether the handler has returned or raised.
        checkpoint: The task's last stored checkpoint, serialised; None without one.
        meter: What the attempt has used, and what is left of its budgets.
        ends_within: Seconds after `stop` in which a handler ends, if it does.
    """

    ends_within: ClassVar[float] = 0.25

    def __init__(
        self, offered: Offered, handler: Handler, agent: AgentServices, on_end: Callable[[Outcome], None]
    ) -> None:
        self.offered = offered
        self.handler = handler
        self.agent = agent
        self.cancelled = False
        self.ended = False
        self.checkpoint = offered.checkpoint
        self.meter = BudgetMeter(offered.budgets)
        self._on_end = on_end

    @abstractmethod
    def start(self) -> None:
        """Start the handler."""

    @abstractmethod
    def cancel(self) -> None:
        """Cancel the handler. A repeated call cancels again where that is possible."""

    def stop(self) -> None:
        """End a handler that does not end after its cancel, as far as that is possible."""
        self.cancel()

    @abstractmethod
    def direct(self, payload: bytes) -> None:
        """Deliver a directive."""

    def update_budgets(self, update: BudgetUpdate) -> None:
        """Take the state of the attempt's budgets."""
        self.meter.update(update)

    @abstractmethod
    def grant(self, count: int, size: int) -> None:
        """Return credits for progress that was stored: its number and its payload bytes."""

    def finish(self, response: object, error: BaseException | None) -> None:
        """Take the handler's response or exception. Call it once, in the handler's thread or loop."""
        self.ended = True
        handled: tuple[object, ...] = ()
        if error is None:
            outcome = outcome_of_response(self.handler, response)
        else:
            handled = self._handled()
            outcome = outcome_of_error(error, cancelled=self.cancelled, handled=handled)
        try:
            self._log_end(outcome, error, handled)
        finally:
            self._on_end(outcome)

    def _handled(self) -> tuple[object, ...]:
        """Return the messages that the handler had, whose sensitive values no error may show."""
        task, found = self.handler.task, []
        for kind, payload in ((task.request, self.offered.request), (task.checkpoint, self.checkpoint)):
            with contextlib.suppress(DecodeError):
                if payload is not None and issubclass(kind, Message):
                    found.append(kind.FromString(payload))
        return tuple(found)

    def _log_end(self, outcome: Outcome, error: BaseException | None, handled: tuple[object, ...]) -> None:
        # Only the log carries the traceback, and the place of a handler that returned something else.
        what = f"{self.offered.attempt} of {self.handler.name}"
        if error is None:
            if isinstance(outcome, Failure):
                _log.warning("%s failed: %s (%s)", what, outcome.message, place_of(self.handler.call))
        elif isinstance(outcome, SuspendedOutcome):
            why = "a budget is used up" if outcome.over_budget else outcome.question
            _log.info("%s is suspended: %s", what, why)
        elif self.cancelled:
            _log.info("%s ended after its cancel: %s: %s", what, name_of(type(error)), text_of(error, handled))
        else:
            log_error(_log, logging.WARNING, f"{what} failed", error, handled)


class Credits:
    """The progress that a handler may send before some of it is stored, in count and payload bytes."""

    __slots__ = ("_count", "_size", "_window")

    def __init__(self, window: int, size: int = DEFAULT_PROGRESS_BYTES) -> None:
        self._window = window
        self._count = window
        self._size = size

    def take(self, size: int) -> bool:
        """Take the credits for one delta, if there are enough. A delta that is too large is sent alone."""
        if not self._count or (size > self._size and self._count < self._window):
            return False
        self._count -= 1
        self._size -= size
        return True

    def give(self, count: int, size: int) -> None:
        """Return credits."""
        self._count += count
        self._size += size


class HandlerContext:
    """The common part of async and sync contexts; see `orki_contract.TaskContext`."""

    __slots__ = ("_execution",)

    def __init__(self, execution: Execution) -> None:
        self._execution = execution

    @property
    def task_id(self) -> str:
        """The task id."""
        return self._execution.offered.attempt.task_id

    @property
    def attempt(self) -> int:
        """Number of the attempt, from 1."""
        return self._execution.offered.attempt.attempt

    @property
    def fence(self) -> int:
        """Number that rises with every attempt. Pass it to downstream stores, so that they refuse older writers."""
        return self._execution.offered.attempt.fence

    @property
    def span(self) -> Span:
        """The attempt's span."""
        return self._execution.offered.span

    @property
    def cancelled(self) -> bool:
        """Whether the attempt was cancelled."""
        return self._execution.cancelled

    @property
    def checkpoint(self) -> Any:
        """The last checkpoint that an earlier attempt of the task, or this one, has stored; None without one."""
        execution = self._execution
        return _kept(execution.handler.task.checkpoint, execution.checkpoint, execution.handler.name)

    @property
    def answer(self) -> Any:
        """The answer to the last suspension of the task; None without one."""
        execution = self._execution
        return _kept(execution.handler.task.answer, execution.offered.answer, execution.handler.name)

    @property
    def answer_overdue(self) -> bool:
        """Whether the last suspension of the task ended without an answer, by its deadline."""
        return self._execution.offered.answer_overdue

    @property
    def budget(self) -> BudgetLeft:
        """What is left of the budgets that the task is charged to, as far as the agent knows."""
        return self._execution.meter.left

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
        """Record the use of a language model, with its cost in millionths of a US dollar. Never blocks on I/O.

        The use is charged to the task's budgets.

        Raises:
            InvalidArgument: `model` is empty, or a number is negative or not an integer.
            BudgetUsedUp: A budget is used up; the use was recorded. Do not catch it.
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
                raise InvalidArgument(f"usage: {name} is {value!r}; it must be an integer of at least 0")
        attempt = self._execution.offered.attempt
        event = UsageEvent(
            agent_id=self._execution.agent.agent_id,
            task_id=attempt.task_id,
            attempt=attempt.attempt,
            provider=provider,
            model=model,
            **counts,
        )
        execution = self._execution
        execution.agent.collect(USAGE, event, self.span)
        total = execution.meter.use(tokens=input_tokens + output_tokens, cost_micros=cost_micros)
        if total is not None:
            execution.agent.report_usage(attempt, total)
        execution.meter.check()

    def _progress_payload(self, delta: Any) -> tuple[AttemptKey, bytes]:
        execution = self._execution
        expected = execution.handler.task.progress
        name = execution.handler.name
        if not isinstance(delta, expected) or not isinstance(delta, Message):
            declared = expected.__name__ if issubclass(expected, Message) else "no progress"
            raise InvalidArgument(f"{name} declares {declared} as its progress, not {type(delta).__name__}")
        payload = delta.SerializeToString()
        most = execution.agent.max_payload_bytes
        if len(payload) > most:
            raise TooLarge(f"{name}: a progress message has {len(payload)} bytes; the orchestrator accepts {most}")
        return execution.offered.attempt, payload


CURRENT_CONTEXT: Final[ContextVar[HandlerContext | None]] = ContextVar("orki_context", default=None)
"""Context of the handler that runs in this task or thread."""


def _kept(kind: type[Any], payload: bytes | None, method: str) -> Any:
    """Return a checkpoint or an answer: a message, bytes if the method declares none, or None."""
    return payload if payload is None or kind is bytes else decode(kind, payload, method)
