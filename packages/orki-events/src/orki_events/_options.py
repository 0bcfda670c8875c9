"""Settings of the event plane, validated once, and the report of a loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from orki_contract.errors import InvalidSetting
from orki_contract.model import Backoff


class GapKind(StrEnum):
    """How events were lost, or may have been."""

    TRIMMED_UNREAD = "trimmed_unread"
    """Entries were trimmed or deleted before the group had read them."""
    TRIMMED_WHILE_PENDING = "trimmed_while_pending"
    """Entries were trimmed or deleted after a consumer had read them and before it settled them."""
    ROLLED_BACK = "rolled_back"
    """The server lost entries that it had accepted, as by a restart with older files, a failover or a flush."""
    GROUP_RECREATED = "group_recreated"
    """The server lost the group, which was created again."""
    SEQUENCE_HOLE = "sequence_hole"
    """Numbers are missing in a producer's sequence: events were lost, or their publication failed."""
    PUBLISH_ABANDONED = "publish_abandoned"
    """Collected events could not be published in time."""
    LETTERS_DROPPED = "letters_dropped"
    """The retention of dead letters dropped some, whose events the group has lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """A reported loss of events.

    Attributes:
        kind: How they were lost.
        stream: Name of the stream.
        group: The group that missed events; empty if no group is concerned.
        count: Number of lost events; None if it is unknown.
        possible: Whether the count, or that anything was lost, is uncertain.
        message: A description for people.
        key: Redis key of the partition; empty if it is unknown.
        after: The lost entries have ids after this one, as far as it is known.
        until: The lost entries have ids up to this one, as far as it is known.
    """

    kind: GapKind
    stream: str
    group: str
    count: int | None
    possible: bool
    message: str
    key: str = ""
    after: str = ""
    until: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class EventOptions:
    """Settings of a connection to the event plane. Durations are in seconds.

    Attributes:
        connect_timeout: Time limit for opening a connection.
        answer_timeout: Time limit for a reply of the server; a blocking read adds `block_timeout`.
        block_timeout: Maximum time for which a read waits in the server for entries.
        publish_timeout: Maximum time for which an event waits for the server; then publishing it fails.
        batch_entries: Maximum number of entries in one pipeline.
        batch_bytes: Maximum size of one pipeline, unless a single entry is larger.
        linger: Time to collect more events before a pipeline is sent; 0 sends at once if the connection is idle.
        buffer_entries: Maximum number of events that wait to be sent or answered.
        buffer_bytes: Maximum size of the events that wait to be sent or answered.
        max_event_bytes: Maximum size of an event.
        drain_timeout: Maximum time for an orderly stop.
        dedupe_window: Number of event ids that a consumer remembers to skip repeated events; 0 for none.
        on_gap: Called with every loss, on the event loop; it must not raise.

    Raises:
        InvalidSetting: A value is out of its range.
    """

    connect_timeout: float = 5.0
    answer_timeout: float = 10.0
    block_timeout: float = 1.0
    publish_timeout: float = 30.0
    batch_entries: int = 500
    batch_bytes: int = 1 << 20
    linger: float = 0.0
    buffer_entries: int = 10_000
    buffer_bytes: int = 16 << 20
    max_event_bytes: int = 1 << 20
    drain_timeout: float = 10.0
    dedupe_window: int = 10_000
    on_gap: Callable[[Gap], None] | None = None

    def __post_init__(self) -> None:
        _require(self, "connect_timeout", 0.01, 600)
        _require(self, "answer_timeout", 0.01, 600)
        _require(self, "block_timeout", 0.001, 60)
        _require(self, "publish_timeout", 0.01, 86_400)
        _require(self, "batch_entries", 1, 10_000)
        _require(self, "batch_bytes", 1, 256 << 20)
        _require(self, "linger", 0, 10)
        _require(self, "buffer_entries", 1, 10_000_000)
        _require(self, "buffer_bytes", 1, 4 << 30)
        _require(self, "max_event_bytes", 1, 256 << 20)
        _require(self, "drain_timeout", 0, 3_600)
        _require(self, "dedupe_window", 0, 10_000_000)
        if self.on_gap is not None and not callable(self.on_gap):
            raise InvalidSetting(f"EventOptions.on_gap is {self.on_gap!r}; it must be callable or None")


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsumeOptions:
    """Settings of one consumer. Durations are in seconds.

    Attributes:
        prefetch: Maximum number of entries that are handled or queued; 0 derives it from the concurrency.
        prefetch_bytes: Maximum size of those entries. A read takes as many as fit by the size of the entries before.
        retry_entries: Maximum number of entries that wait for a retry in the consumer's memory. Further ones of an
            ordered partition keep it from reading on; others wait on the server, at most the acknowledgement deadline.
        retry_bytes: Maximum size of the entries that wait for a retry in the consumer's memory.
        backoff: Wait before a failed event is handled again.
        handler_timeout: Time limit of one call of the handler, which is then cancelled; 0 for no limit.
        hold_limit: Maximum time for which a held entry is renewed; afterwards, other consumers may claim it.
        sweep_interval: Time between two searches for entries that other consumers abandoned; 0 for a third of the
            group's acknowledgement deadline, at most 5 seconds.

    Raises:
        InvalidSetting: A value is out of its range.
    """

    prefetch: int = 0
    prefetch_bytes: int = 16 << 20
    retry_entries: int = 1_000
    retry_bytes: int = 16 << 20
    backoff: Backoff = field(default=Backoff(initial=0.5, maximum=30.0))
    handler_timeout: float = 0.0
    hold_limit: float = 3_600.0
    sweep_interval: float = 0.0

    def __post_init__(self) -> None:
        _require(self, "prefetch", 0, 100_000)
        _require(self, "prefetch_bytes", 1, 4 << 30)
        _require(self, "retry_entries", 0, 1_000_000)
        _require(self, "retry_bytes", 0, 4 << 30)
        _require(self, "handler_timeout", 0, 86_400)
        _require(self, "hold_limit", 0.01, 30 * 86_400)
        _require(self, "sweep_interval", 0, 3_600)
        if not isinstance(self.backoff, Backoff):
            raise InvalidSetting(f"ConsumeOptions.backoff is {self.backoff!r}; it must be a Backoff")


def for_durable(options: EventOptions) -> EventOptions:
    """Return options for events that wait for a disk or for replicas: more of them leave together."""
    size = max(options.batch_bytes, 8 << 20)
    return replace(options, batch_entries=max(options.batch_entries, 5_000), batch_bytes=size)


def _require(options: Any, name: str, lowest: float, highest: float) -> None:
    value = getattr(options, name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not lowest <= value <= highest:
        raise InvalidSetting(f"{type(options).__name__}.{name} is {value!r}; it must be from {lowest:g} to {highest:g}")
