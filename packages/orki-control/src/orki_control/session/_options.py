"""Settings of a session's two ends, and the checks of hello and welcome. Sizes are bytes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from orki.control.v1.session_pb2 import HeldAttempt, Hello, ServedService, Welcome
from orki_contract.errors import InvalidSetting, ProtocolVersion, RemoteProtocolError

PROTOCOL_MIN: Final = 1
"""Lowest supported version of the session protocol."""
PROTOCOL_MAX: Final = 3
"""Highest supported version of the session protocol."""
PROGRESS_PROTOCOL: Final = 2
"""Version that acknowledges progress and directives."""
CHECKPOINT_PROTOCOL: Final = 3
"""Version with checkpoints and suspensions."""
MAX_CHECKPOINT_BYTES: Final = 192 * 1024
"""Maximum size of a checkpoint and of an answer. Both travel with an offer, and a checkpoint is sent in one message."""
SILENT_INTERVALS: Final = 3
"""Number of silent heartbeat intervals after which a peer counts as lost (law 13)."""
DEFAULT_MESSAGE_BYTES: Final = 4 * 1024 * 1024
"""Maximum message size; gRPC's own default."""
DEFAULT_PROGRESS_BYTES: Final = 1024 * 1024
"""Maximum size of one attempt's progress that is not stored."""
MAX_SLOTS: Final = 4096
"""Maximum number of concurrent attempts of one agent. One heartbeat names all of them."""
AGENT_ID: Final = re.compile(r"[A-Za-z0-9_.-]{1,128}\Z")
"""Pattern of agent ids."""
KEY: Final = re.compile(r"[A-Za-z0-9_./:@-]{1,128}\Z")
"""Pattern of labels' names and values, and of the keys of limits and fairness."""
MAX_LABELS: Final = 64
"""Maximum number of labels of an agent."""
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}\Z")
_INSTANCE_ID_BYTES: Final = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchBounds:
    """Bounds of one gRPC message. A single session message may exceed `size`.

    Attributes:
        count: Maximum number of session messages.
        size: Maximum estimated size.
    """

    count: int = 256
    size: int = 256 * 1024

    def __post_init__(self) -> None:
        if self.count < 1 or self.size < 1:
            raise InvalidSetting(f"a batch needs room for at least one message, not {self.count} of {self.size} bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentSessionOptions:
    """Settings of the agent's end.

    Attributes:
        agent_id: Name of the agent in the fleet.
        instance_id: Id of this process; new at every start.
        services: Contracts of the services that it serves.
        slots: Maximum number of concurrent attempts.
        labels: Labels of the agent, by name.
        max_message_bytes: Maximum size of a received gRPC message, and of a payload in chunks.
        max_transfer_bytes: Maximum size of all payloads that arrive in chunks at a time; 0 for twice the above.
        hello_timeout: Maximum wait for the welcome in seconds.
        progress_window: Maximum number of deltas of one attempt that are kept until they are stored.
        progress_bytes: Maximum size of these deltas. A single larger one is kept alone.
        bounds: Bounds of a batch.
    """

    agent_id: str
    instance_id: str
    services: tuple[ServedService, ...]
    slots: int = 4
    labels: Mapping[str, str] = field(default_factory=dict)
    max_message_bytes: int = DEFAULT_MESSAGE_BYTES
    max_transfer_bytes: int = 0
    hello_timeout: float = 10.0
    progress_window: int = 64
    progress_bytes: int = DEFAULT_PROGRESS_BYTES
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
        if problem := bad_labels(self.labels):
            raise InvalidSetting(problem)
        if self.max_message_bytes < 1024:
            raise InvalidSetting(f"max_message_bytes {self.max_message_bytes}: use at least 1024")
        if self.progress_window < 1 or self.progress_bytes < 1:
            raise InvalidSetting(
                f"progress_window {self.progress_window} and progress_bytes {self.progress_bytes}: use at least 1"
            )
        if self.hello_timeout <= 0:
            raise InvalidSetting(f"hello_timeout {self.hello_timeout}: use more than 0 seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class OrchestratorSessionOptions:
    """Settings of the orchestrator's end.

    Attributes:
        orchestrator_id: Name of the orchestrator.
        heartbeat_interval: Seconds between an agent's heartbeats, at most a third of the shortest lease.
        hello_timeout: Maximum wait for the hello in seconds.
        max_message_bytes: Maximum size of a received gRPC message, and of a payload in chunks.
        max_transfer_bytes: Maximum size of all payloads that arrive in chunks at a time; 0 for twice the above.
        events_url: URL of the event plane for agents; empty when they have their own setting.
        bounds: Bounds of a batch.
    """

    orchestrator_id: str
    heartbeat_interval: float = 2.0
    hello_timeout: float = 10.0
    max_message_bytes: int = DEFAULT_MESSAGE_BYTES
    max_transfer_bytes: int = 0
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


def bad_labels(labels: Mapping[Any, Any], most: int = MAX_LABELS) -> str:
    """Return what is wrong with labels; empty if nothing is."""
    if len(labels) > most:
        return f"labels: at most {most}, not {len(labels)}"
    for name, value in labels.items():
        for text in (name, value):
            if not isinstance(text, str) or not KEY.match(text):
                return f"labels: {name!r}={value!r}: use 1 to 128 letters, digits or `_./:@-`, such as gpu=a100"
    return ""


def transfer_bytes(options: AgentSessionOptions | OrchestratorSessionOptions) -> int:
    """Return the maximum size of all payloads that arrive in chunks at a time."""
    return options.max_transfer_bytes or 2 * options.max_message_bytes


def build_hello(options: AgentSessionOptions, held: Iterable[HeldAttempt]) -> Hello:
    """Build the hello of an agent that holds some attempts."""
    return Hello(
        agent_id=options.agent_id,
        instance_id=options.instance_id,
        protocol_min=PROTOCOL_MIN,
        protocol_max=PROTOCOL_MAX,
        services=options.services,
        slots=options.slots,
        labels=options.labels,
        max_message_bytes=options.max_message_bytes,
        max_transfer_bytes=transfer_bytes(options),
        held=held,
    )


def check_hello(hello: Hello) -> None:
    """Check a hello without knowledge of the fleet.

    Raises:
        ProtocolVersion: The two sides have no protocol version in common.
        RemoteProtocolError: A field is missing, malformed or out of its range.
    """
    if not 1 <= hello.protocol_min <= hello.protocol_max:
        raise RemoteProtocolError(
            f"hello: {hello.protocol_min} to {hello.protocol_max} is not a range of protocol versions"
        )
    if hello.protocol_max < PROTOCOL_MIN or hello.protocol_min > PROTOCOL_MAX:
        raise ProtocolVersion(
            f"the agent speaks session protocol {hello.protocol_min} to {hello.protocol_max}, the orchestrator "
            f"{PROTOCOL_MIN} to {PROTOCOL_MAX}: upgrade the older of the two"
        )
    if not AGENT_ID.match(hello.agent_id):
        raise RemoteProtocolError(f"hello: agent_id {hello.agent_id[:160]!r} is not 1 to 128 of A-Z a-z 0-9 - _ .")
    if not hello.instance_id or len(hello.instance_id.encode()) > _INSTANCE_ID_BYTES:
        raise RemoteProtocolError(f"hello: instance_id is empty or longer than {_INSTANCE_ID_BYTES} bytes")
    if not 1 <= hello.slots <= MAX_SLOTS:
        raise RemoteProtocolError(f"hello: {hello.slots} slots are not 1 to {MAX_SLOTS}")
    if hello.max_message_bytes < 1024:
        raise RemoteProtocolError(f"hello: max_message_bytes {hello.max_message_bytes} is less than 1024")
    if problem := bad_labels(hello.labels):
        raise RemoteProtocolError(f"hello: {problem}")
    names = [served.service for served in hello.services]
    if len(set(names)) != len(names) or not all(names):
        raise RemoteProtocolError("hello: a service has no name or is listed twice")
    for served in hello.services:
        if not _DIGEST.match(served.digest):
            raise RemoteProtocolError(f"hello: {served.service} has no digest of the form sha256:<64 hex digits>")
    for held in hello.held:
        if not held.attempt.task_id or not held.attempt.fence:
            raise RemoteProtocolError("hello: a held attempt has no task or no fence")


def chosen_protocol(hello: Hello) -> int:
    """Return the highest version that both sides support."""
    return min(hello.protocol_max, PROTOCOL_MAX)


def check_welcome(welcome: Welcome) -> None:
    """Check a welcome.

    Raises:
        RemoteProtocolError: A field is missing or out of its range.
    """
    if not PROTOCOL_MIN <= welcome.protocol <= PROTOCOL_MAX:
        raise RemoteProtocolError(f"welcome: protocol {welcome.protocol} was not offered")
    if not welcome.heartbeat_interval_ms or welcome.max_message_bytes < 1024:
        raise RemoteProtocolError("welcome: no heartbeat interval, or messages of less than 1024 bytes")
