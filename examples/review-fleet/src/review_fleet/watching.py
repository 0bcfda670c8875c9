"""Watches the event streams of the demo: latencies of the planes, and the course of each task."""

from __future__ import annotations

import time
from collections import defaultdict

from orki.events.v1.task_orki import TASKS, TaskEvent
from orki.events.v1.tool_orki import TOOLS
from orki_events import Events

__all__ = ["Watching"]


class Watching:
    """Follows the streams of tasks and tools with plain cursors, so that no group has to wait for it.

    Attributes:
        latency_ms: For each plane what was observed: `control`, from an offer to the start of its handler; `events`,
            from an event's happening to its arrival here; `hotpath`, from a tool call to its reply.
        fences: Fences under which each task was started, in their order.
    """

    def __init__(self, events: Events) -> None:
        self._events = events
        self.latency_ms: dict[str, list[float]] = {"control": [], "events": [], "hotpath": []}
        self.fences: dict[str, list[int]] = defaultdict(list)
        self._offered: dict[int, int] = {}

    async def tasks(self) -> None:
        """Follows the tasks until it is cancelled."""
        async for entry in self._events.tail(TASKS, after="earliest"):
            self.latency_ms["events"].append(time.time() * 1000 - entry.envelope.time_us / 1000)
            self._task(entry.event, entry.envelope.time_us)

    async def tools(self) -> None:
        """Follows the tool calls until it is cancelled."""
        async for entry in self._events.tail(TOOLS, after="earliest"):
            self.latency_ms["hotpath"].append(entry.event.duration_ns / 1_000_000)

    def _task(self, event: TaskEvent, time_us: int) -> None:
        kind = event.WhichOneof("event")
        if kind == "offered":
            self._offered[event.fence] = time_us
        elif kind == "started":
            self.fences[event.task_id].append(event.fence)
            if (offered := self._offered.pop(event.fence, None)) is not None:
                self.latency_ms["control"].append((time_us - offered) / 1000)
