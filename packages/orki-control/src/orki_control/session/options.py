"""Settings of the two ends of a session. Times are seconds, sizes bytes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from orki.control.v1.session_pb2 import ServedService
from orki_contract.errors import InvalidSetting

__all__ = [
    "AGENT_ID",
    "DEFAULT_MESSAGE_BYTES",
    "MAX_SLOTS",
    "PROTOCOL_MAX",
    "PROTOCOL_MIN",
    "SILENT_INTERVALS",
    "AgentSessionOptions",
    "BatchBounds",
    "OrchestratorSessionOptions",
]

PROTOCOL_MIN: Final = 1
"""Lowest version of the session's protocol spoken here."""
PROTOCOL_MAX: Final = 1
"""Highest version of the session's protocol spoken here."""
SILENT_INTERVALS: Final = 3
"""Heartbeat intervals without a word after which a peer counts as gone (law 13)."""
DEFAULT_MESSAGE_BYTES: Final = 4 * 1024 * 1024
"""gRPC's own default for the longest message."""
MAX_SLOTS: Final = 4096
"""Most attempts that one agent takes at once: they are all named in one heartbeat."""
AGENT_ID: Final = re.compile(r"[A-Za-z0-9_.-]{1,128}\Z")
"""What an agent may be called."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchBounds:
    """How much one gRPC message carries at the most; a single message may be longer than `size`.

    Attributes:
        count: Session messages.
        size: Their size, estimated.
    """

    count: int = 256
    size: int = 256 * 1024

    def __post_init__(self) -> None:
        if self.count < 1 or self.size < 1:
            raise InvalidSetting(f"a batch needs room for at least one message, not {self.count} of {self.size} bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentSessionOptions:
    """The agent's end.

    Attributes:
        agent_id: Name of the agent in the fleet.
        instance_id: This process; new at every start.
        services: What it serves.
        slots: Attempts that it takes at once.
        max_message_bytes: Longest gRPC message that it takes.
        hello_timeout: Longest wait for the welcome.
        bounds: Bounds of a batch.
    """

    agent_id: str
    instance_id: str
    services: tuple[ServedService, ...]
    slots: int = 4
    max_message_bytes: int = DEFAULT_MESSAGE_BYTES
    hello_timeout: float = 10.0
    bounds: BatchBounds = BatchBounds()

    def __post_init__(self) -> None:
        if not AGENT_ID.match(self.agent_id):
            raise InvalidSetting(
                f"agent_id {self.agent_id!r}: use 1 to 128 letters, digits, `-`, `_` or `.`, such as reviewer-1"
            )
        if not self.instance_id:
            raise InvalidSetting("instance_id is empty: give each process a new one")
        if not 1 <= self.slots <= MAX_SLOTS:
            raise InvalidSetting(f"slots {self.slots}: use a number from 1 to {MAX_SLOTS}")
        if self.max_message_bytes < 1024:
            raise InvalidSetting(f"max_message_bytes {self.max_message_bytes}: use at least 1024")
        if self.hello_timeout <= 0:
            raise InvalidSetting(f"hello_timeout {self.hello_timeout}: use more than 0 seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class OrchestratorSessionOptions:
    """The orchestrator's end.

    Attributes:
        orchestrator_id: Name of the orchestrator.
        heartbeat_interval: Time between an agent's heartbeats; a third of the shortest lease at the most.
        hello_timeout: Longest wait for the hello.
        max_message_bytes: Longest gRPC message that the orchestrator takes.
        events_url: Where agents find the event plane; empty when they must know by themselves.
        bounds: Bounds of a batch.
    """

    orchestrator_id: str
    heartbeat_interval: float = 2.0
    hello_timeout: float = 10.0
    max_message_bytes: int = DEFAULT_MESSAGE_BYTES
    events_url: str = ""
    bounds: BatchBounds = BatchBounds()

    def __post_init__(self) -> None:
        if not self.orchestrator_id:
            raise InvalidSetting("orchestrator_id is empty: give the orchestrator a name")
        if not 0.01 <= self.heartbeat_interval <= 3600:
            raise InvalidSetting(f"heartbeat_interval {self.heartbeat_interval}: use 0.01 to 3600 seconds")
        if self.hello_timeout <= 0:
            raise InvalidSetting(f"hello_timeout {self.hello_timeout}: use more than 0 seconds")
        if self.max_message_bytes < 1024:
            raise InvalidSetting(f"max_message_bytes {self.max_message_bytes}: use at least 1024")
