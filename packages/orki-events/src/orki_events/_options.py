"""Settings of the event plane, validated once, and the report of a gap."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from orki_contract.errors import InvalidSetting
from orki_contract.model import Backoff


class GapKind(StrEnum):
    """How events were, or may have been, lost."""

    GROUP_RECREATED = "group_recreated"
    TRIMMED_WHILE_PENDING = "trimmed_while_pending"
    PUBLISH_ABANDONED = "publish_abandoned"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """A loss that is told: nothing is lost in silence.

    Attributes:
        kind: How.
        stream: Name of the stream.
        group: The group that missed events; empty where no group is concerned.
        count: Events lost; None where it cannot be known.
        possible: Whether it is only possible that anything was lost.
        message: What happened, for people.
    """

    kind: GapKind
    stream: str
    group: str
    count: int | None
    possible: bool
    message: str


def _require(owner: Any, name: str, lowest: float, highest: float) -> None:
    value = getattr(owner, name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not lowest <= value <= highest:
        raise InvalidSetting(f"{type(owner).__name__}.{name} is {value!r}; it must be from {lowest:g} to {highest:g}")


@dataclass(frozen=True, slots=True, kw_only=True)
class EventOptions:
    """Settings of a connection to the event plane.

    Attributes:
        connect_timeout_s: Longest time for opening a connection.
        answer_timeout_s: Longest time that the server may take for an answer; a blocking read adds `block_ms`.
        block_ms: Longest time that a read waits in the server for entries.
        publish_timeout_s: Longest time that an event waits for the server; then publishing it fails.
        batch_entries: Most entries in one pipeline.
        batch_bytes: Most bytes in one pipeline, unless one entry alone is larger.
        linger_ms: Time to gather more before a pipeline leaves; 0 sends at once when the connection is idle.
        buffer_entries: Most events that wait to be sent or answered.
        buffer_bytes: Most bytes that wait to be sent or answered.
        max_event_bytes: Largest event.
        drain_timeout_s: Longest time for an orderly stop.
        dedupe_window: Event ids that a consumer remembers, so as to skip an event that it has seen; 0 for none.
        on_gap: Called with every loss, on the event loop; it must not raise.
    """

    connect_timeout_s: float = 5.0
    answer_timeout_s: float = 10.0
    block_ms: int = 1_000
    publish_timeout_s: float = 30.0
    batch_entries: int = 500
    batch_bytes: int = 1 << 20
    linger_ms: int = 0
    buffer_entries: int = 10_000
    buffer_bytes: int = 16 << 20
    max_event_bytes: int = 1 << 20
    drain_timeout_s: float = 10.0
    dedupe_window: int = 10_000
    on_gap: Callable[[Gap], None] | None = None

    def __post_init__(self) -> None:
        """Validates.

        Raises:
            InvalidSetting: A value is out of its range.
        """
        _require(self, "connect_timeout_s", 0.01, 600)
        _require(self, "answer_timeout_s", 0.01, 600)
        _require(self, "block_ms", 1, 60_000)
        _require(self, "publish_timeout_s", 0.01, 86_400)
        _require(self, "batch_entries", 1, 10_000)
        _require(self, "batch_bytes", 1, 256 << 20)
        _require(self, "linger_ms", 0, 10_000)
        _require(self, "buffer_entries", 1, 10_000_000)
        _require(self, "buffer_bytes", 1, 4 << 30)
        _require(self, "max_event_bytes", 1, 256 << 20)
        _require(self, "drain_timeout_s", 0, 3_600)
        _require(self, "dedupe_window", 0, 10_000_000)
        if self.on_gap is not None and not callable(self.on_gap):
            raise InvalidSetting(f"EventOptions.on_gap is {self.on_gap!r}; it must be callable or None")


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsumeOptions:
    """Settings of one consumer.

    Attributes:
        prefetch: Most entries that the consumer holds; 0 chooses one that suits the concurrency.
        backoff: Wait before a failed event is handled again.
        handler_timeout_s: Longest time of one call of a handler, which is then cancelled; 0 for no limit.
        hold_limit_s: Longest time that an entry in hand is renewed; after it, others may claim it.
        sweep_interval_s: Time between two looks for entries that others left behind; 0 chooses a third of the
            group's acknowledgement deadline, at most 5 seconds.
    """

    prefetch: int = 0
    backoff: Backoff = field(default=Backoff(initial_ms=500, maximum_ms=30_000))
    handler_timeout_s: float = 0.0
    hold_limit_s: float = 3_600.0
    sweep_interval_s: float = 0.0

    def __post_init__(self) -> None:
        """Validates.

        Raises:
            InvalidSetting: A value is out of its range.
        """
        _require(self, "prefetch", 0, 100_000)
        _require(self, "handler_timeout_s", 0, 86_400)
        _require(self, "hold_limit_s", 0.01, 30 * 86_400)
        _require(self, "sweep_interval_s", 0, 3_600)
        if not isinstance(self.backoff, Backoff):
            raise InvalidSetting(f"ConsumeOptions.backoff is {self.backoff!r}; it must be a Backoff")
