"""The agent's connection to the event plane. A failing event plane never fails a task.

Events that are collected before the URL of the event plane is known wait, up to a bound. Events that cannot be
published are counted, and logged from time to time.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from typing import Any, Final, TypeVar

from google.protobuf.message import Message

from orki_contract import EventStream
from orki_contract.errors import EventsUnavailable, OrkiError
from orki_contract.trace import Span
from orki_events import EventOptions, Events, connect

E = TypeVar("E", bound=Message)

_log = logging.getLogger("orki.agent.events")
_WAITING: Final = 4096
_LOG_EVERY: Final = 10.0
_OPTIONS: Final = EventOptions(drain_timeout=5.0)


class AgentEvents:
    """A connection to the event plane whose URL may become known later. Belongs to the I/O loop.

    Args:
        producer: Name of this process and its run.
        url: URL of the event plane; empty for the one that the orchestrator sends.

    Attributes:
        lost: Number of events that could not be published, by stream.
    """

    def __init__(self, producer: str, url: str = "") -> None:
        self.lost: Counter[str] = Counter()
        self._producer = producer
        self._own_url = url
        self._events: Events | None = None
        self._waiting: deque[tuple[EventStream[Any, Any], Message, Span, int]] = deque()
        self._known = asyncio.Event()
        self._logged_at = 0.0

    async def open(self, url: str) -> None:
        """Connect to the agent's own URL, or else to `url`; repeated calls have no effect."""
        if self._known.is_set():
            return
        chosen = self._own_url or url
        if chosen:
            try:
                self._events = await connect(chosen, producer=self._producer, options=_OPTIONS).__aenter__()
            except OrkiError as error:
                _log.error("no events: %s", error.message)
        if self._events is None:
            _log.info("no event plane is configured: events are dropped")
        self._known.set()
        while self._waiting:
            self._collect(*self._waiting.popleft())

    def collect(self, stream: EventStream[E, Any], event: E, span: Span) -> None:
        """Publish soon; never raises. The event carries the time of this call."""
        time_us = time.time_ns() // 1_000
        if not self._known.is_set():
            self._waiting.append((stream, event, span, time_us))
            if len(self._waiting) > _WAITING:
                self._count(self._waiting.popleft()[0].contract.name, "the URL of the event plane is not known yet")
        else:
            self._collect(stream, event, span, time_us)

    def _collect(self, stream: EventStream[Any, Any], event: Message, span: Span, time_us: int) -> None:
        if self._events is None:
            self.lost[stream.contract.name] += 1
            return
        try:
            self._events.collect(stream, event, span=span, time_us=time_us)
        except OrkiError as error:
            self._count(stream.contract.name, error.message)

    async def publish(self, stream: EventStream[E, Any], event: E, span: Span) -> None:
        """Publish and return once the server has the event.

        Raises:
            EventsUnavailable: No event plane is configured.
            OrkiError: The errors of `orki_events.Events.publish`.
        """
        await self._known.wait()
        if self._events is None:
            raise EventsUnavailable(
                f'stream "{stream.contract.name}": neither the orchestrator nor --events gives the event plane\'s URL'
            )
        await self._events.publish(stream, event, span=span)

    async def close(self) -> None:
        """Send the remaining events, for a bounded time."""
        if not self._known.is_set() and self._own_url:
            await self.open("")
        if self._events is None:
            return
        await self._events.close()
        self._events = None

    def _count(self, stream: str, why: str) -> None:
        self.lost[stream] += 1
        now = time.monotonic()
        if now - self._logged_at >= _LOG_EVERY:
            self._logged_at = now
            _log.warning("%d events were not published; the last one, of stream %s: %s", self.lost.total(), stream, why)
