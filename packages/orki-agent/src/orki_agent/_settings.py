"""Settings of a running agent. Durations are seconds."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from orki_contract.backoff import JitterOptions
from orki_contract.errors import InvalidSetting
from orki_control.credentials import Credentials
from orki_control.session import AGENT_ID, DEFAULT_MESSAGE_BYTES, MAX_SLOTS, bad_labels
from orki_control.transport import check_targets

_BACKOFF: Final = JitterOptions()
_NO_CREDENTIALS: Final = Credentials()
_TOKEN_BYTES: Final = 32


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class ToolsAt:
    """A tool bridge outside this process.

    Attributes:
        path: Path of its socket.
        token: Its secret, 32 bytes.
    """

    path: str
    token: bytes

    def __post_init__(self) -> None:
        if not self.path:
            raise InvalidSetting("the path of the tool bridge's socket is empty")
        if len(self.token) != _TOKEN_BYTES:
            raise InvalidSetting(f"the tool bridge's token has {len(self.token)} bytes, it must have {_TOKEN_BYTES}")

    def __repr__(self) -> str:
        return f"ToolsAt(path={self.path!r})"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """Settings of one run of an agent.

    Attributes:
        orchestrator: `HOST:PORT`; several separated by commas. After a loss the agent uses the next one.
        agent_id: Name in the fleet; unique among running agents.
        slots: Maximum number of concurrent attempts.
        labels: Labels of the agent, by name. It gets the tasks that ask for some of them, or for none.
        events_url: URL of the event plane; empty for the one that the orchestrator sends.
        tools: A tool bridge outside this process; None for the agent's own tools.
        insecure: Whether plaintext may leave this host.
        credentials: Own identity, and the trusted orchestrators; by default, none and plaintext.
        drain_grace: Seconds that running attempts may go on while the agent drains. Then they are given back.
        progress_window: Maximum number of progress messages of one attempt that are not stored, before the contract's
            progress policy applies.
        switch_interval: Python's thread switch interval while the agent runs, so that a busy handler does not delay
            the session; 0 keeps the interpreter's setting.
        max_message_bytes: Maximum gRPC message size in either direction.
        backoff: Waits between connections.
    """

    orchestrator: str
    agent_id: str
    slots: int = 4
    labels: Mapping[str, str] = field(default_factory=dict)
    events_url: str = ""
    tools: ToolsAt | None = None
    insecure: bool = False
    credentials: Credentials = _NO_CREDENTIALS
    drain_grace: float = 30.0
    progress_window: int = 64
    switch_interval: float = 0.0005
    max_message_bytes: int = DEFAULT_MESSAGE_BYTES
    backoff: JitterOptions = _BACKOFF

    def __post_init__(self) -> None:
        check_targets(self.orchestrator, insecure=self.insecure, credentials=self.credentials)
        if not AGENT_ID.match(self.agent_id):
            raise InvalidSetting(
                f"agent id {self.agent_id!r}: use 1 to 128 letters, digits, `-`, `_` or `.`, such as reviewer-1"
            )
        if not 1 <= self.slots <= MAX_SLOTS:
            raise InvalidSetting(f"slots {self.slots}: use a number from 1 to {MAX_SLOTS}")
        if problem := bad_labels(self.labels):
            raise InvalidSetting(problem)
        if self.events_url:
            from orki_events.connection import parse_address  # an agent without a URL of its own starts without it

            parse_address(self.events_url)
        if not 0 <= self.drain_grace <= 86_400:
            raise InvalidSetting(f"drain_grace {self.drain_grace}: use 0 to 86400 seconds")
        if not 1 <= self.progress_window <= 65_536:
            raise InvalidSetting(f"progress_window {self.progress_window}: use 1 to 65536")
        if not 0 <= self.switch_interval <= 1:
            raise InvalidSetting(f"switch_interval {self.switch_interval}: use 0 to 1 seconds")
        if self.max_message_bytes < 1024:
            raise InvalidSetting(f"max_message_bytes {self.max_message_bytes}: use at least 1024")


def default_agent_id(kind: str) -> str:
    """Return an id that no other running process of the fleet has: kind, host name and process id."""
    host = re.sub(r"[^A-Za-z0-9-]+", "-", socket.gethostname()).strip("-")[:40]
    return "-".join(part for part in (kind, host, str(os.getpid())) if part)
