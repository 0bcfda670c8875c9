"""What a handler's context needs of the agent around it: one seam, so that a handler can also run without an agent."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, Final, NamedTuple, Protocol, TypeVar

from google.protobuf.message import Message

from orki_contract import EventStream, SyncToolChannel, TaskChannel, ToolChannel
from orki_contract.trace import Span
from orki_control.session import AttemptKey

__all__ = ["CURRENT_ATTEMPT", "Offered", "Surroundings"]

E = TypeVar("E", bound=Message)


class Offered(NamedTuple):
    """What a handler is started with.

    Attributes:
        attempt: The attempt.
        request: The request, serialised.
        span: The attempt's span.
    """

    attempt: AttemptKey
    request: bytes
    span: Span


CURRENT_ATTEMPT: Final[ContextVar[AttemptKey | None]] = ContextVar("orki_attempt", default=None)
"""The attempt whose handler runs here; records of tool calls are filed under it."""


class Surroundings(Protocol):
    """The agent as its handlers' contexts see it. Every method may be called from any thread and none blocks, unless it
    says so."""

    @property
    def agent_id(self) -> str:
        """The agent's name in the fleet."""
        ...

    @property
    def max_payload_bytes(self) -> int:
        """Longest payload that the orchestrator takes."""
        ...

    def send_progress(self, attempt: AttemptKey, payload: bytes) -> None:
        """Queues progress; the execution's window opens again when it has left."""

    def collect(self, stream: EventStream[E, Any], event: E, span: Span) -> None:
        """Publishes soon; what goes wrong is counted and logged."""

    async def publish(self, stream: EventStream[E, Any], event: E, span: Span) -> None:
        """Publishes; returns once the server has it. For the user's loop."""

    def publish_blocking(self, stream: EventStream[E, Any], event: E, span: Span) -> None:
        """As `publish`, blocking the calling thread."""

    def tool_channel(self) -> ToolChannel:
        """The channel of async tool calls, of the user's loop."""
        ...

    def sync_tool_channel(self) -> SyncToolChannel:
        """The channel of blocking tool calls."""
        ...

    def task_channel(self) -> TaskChannel:
        """For submitting tasks, from the user's loop."""
        ...
