"""The agent's way to the event plane: events may fail, tasks must not fail for it.

What is collected before the plane's address is known waits, within a bound. What cannot be published is counted, and
logged once in a while.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from typing import Any, Final, Protocol, TypeVar

from google.protobuf.message import Message

from orki_contract import EventStream
from orki_contract.errors import EventsUnavailable, OrkiError
from orki_contract.trace import Span
from orki_events import EventOptions, Events, connect

__all__ = ["EventPort", "NoEvents", "PlaneEvents"]

E = TypeVar("E", bound=Message)

_log = logging.getLogger("orki.agent.events")
_WAITING: Final = 4096
_SAY_EVERY: Final = 10.0
_OPTIONS: Final = EventOptions(drain_timeout=5.0)


class EventPort(Protocol):
    """Where events go. Everything is called on the I/O loop."""

    async def open(self, url: str) -> None:
        """The plane's address is known; empty where there is none. Further calls change nothing."""

    def collect(self, stream: EventStream[E, Any], event: E, span: Span) -> None:
        """Publishes soon; never raises."""

    async def publish(self, stream: EventStream[E, Any], event: E, span: Span) -> None:
        """Publishes; returns once the server has it. Raises typed errors."""

    async def close(self) -> None:
        """Sends what is left, for a bounded time."""


class NoEvents:
    """No event plane: what is collected is dropped."""

    async def open(self, url: str) -> None:
        """Nothing to open."""

    def collect(self, stream: EventStream[E, Any], event: E, span: Span) -> None:
        """Drops it."""

    async def publish(self, stream: EventStream[E, Any], event: E, span: Span) -> None:
        """Always raises.

        Raises:
            EventsUnavailable: There is no event plane.
        """
        raise EventsUnavailable(
            f'stream "{stream.contract.name}": neither the orchestrator nor --events says where the event plane is'
        )

    async def close(self) -> None:
        """Nothing to close."""


class PlaneEvents:
    """The event plane behind a URL that may become known later.

    Args:
        producer: Name of this process and its run.
        url: Where the plane is; empty: where the orchestrator says.

    Attributes:
        lost: Events that could not be published, by stream.
    """

    def __init__(self, producer: str, url: str = "") -> None:
        self.lost: Counter[str] = Counter()
        self._producer = producer
        self._own_url = url
        self._events: Events | None = None
        self._port: NoEvents | None = None
        self._waiting: deque[tuple[EventStream[Any, Any], Message, Span, int]] = deque()
        self._known = asyncio.Event()
        self._said_at = 0.0

    async def open(self, url: str) -> None:
        """Connects, to our own address if we have one; further calls change nothing."""
        if self._known.is_set():
            return
        chosen = self._own_url or url
        if chosen:
            try:
                self._events = await connect(chosen, producer=self._producer, options=_OPTIONS).__aenter__()
            except OrkiError as error:
                _log.error("no events: %s", error.message)
        if self._events is None:
            self._port = NoEvents()
            _log.info("there is no event plane: events are dropped")
        self._known.set()
        while self._waiting:
            self._collect(*self._waiting.popleft())

    def collect(self, stream: EventStream[E, Any], event: E, span: Span) -> None:
        """Publishes soon; never raises. The event has the time of this call, however long it waits here."""
        time_us = time.time_ns() // 1_000
        if not self._known.is_set():
            self._waiting.append((stream, event, span, time_us))
            if len(self._waiting) > _WAITING:
                self._count(self._waiting.popleft()[0].contract.name, "the event plane is not known yet")
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
        """Publishes; returns once the server has it.

        Raises:
            OrkiError: As those of `orki_events.Events.publish`; EventsUnavailable where there is no event plane.
        """
        await self._known.wait()
        if self._events is None:
            assert self._port is not None
            await self._port.publish(stream, event, span)
        else:
            await self._events.publish(stream, event, span=span)

    async def close(self) -> None:
        """Sends what is left, for a bounded time."""
        if not self._known.is_set() and self._own_url:
            await self.open("")
        if self._events is None:
            return
        await self._events.close()
        self._events = None
        self._port = NoEvents()

    def _count(self, stream: str, why: str) -> None:
        self.lost[stream] += 1
        now = time.monotonic()
        if now - self._said_at >= _SAY_EVERY:
            self._said_at = now
            _log.warning("%d events were not published, now one of stream %s: %s", self.lost.total(), stream, why)
