"""The outbox is drained: records of transitions become events.

A record is removed once its events are on the event plane. A crash in between publishes them again, under the same
event ids, which are made of task and revision; readers drop what they have seen.

How spans nest: the submitter's span holds the task's span, that one span for each attempt, and the handler's own spans
lie below their attempt's. The events `offered`, `started` and `attempt_ended` lie in the attempt's span, all others in
the task's. The attempt's span id is made of task and attempt, so that everybody who needs it can make it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import random
from collections.abc import Callable
from typing import Any, Final

from orki.errors.v1.errors_pb2 import Reason
from orki.events.v1 import task_pb2 as pb
from orki.events.v1.audit_orki import AUDIT
from orki.events.v1.audit_pb2 import AuditEvent
from orki.events.v1.task_orki import TASKS
from orki_contract.errors import OrkiError
from orki_contract.trace import Span
from orki_events import Events, Outgoing
from orki_server.store import Record, Store

__all__ = ["OutboxDrain", "audit_event", "event_id", "task_event"]

_BATCH: Final = 250
"""Most records of a shard at once."""
_GATHER_S: Final = 0.01
"""How long records gather before they are read."""
_POLL_S: Final = 0.5
"""Longest time between two looks: another orchestrator may have left records behind."""
_AUDITED: Final = {"submitted": "submit", "cancel_requested": "cancel", "directed": "direct"}
_log = logging.getLogger("orki.server.drain")


class OutboxDrain:
    """Drains the outboxes of all shards."""

    def __init__(self, store: Store, events: Events) -> None:
        self._store = store
        self._events = events
        self._wake = asyncio.Event()
        self.published = 0

    def wake(self) -> None:
        """There are records."""
        self._wake.set()

    async def run(self) -> None:
        """Drains until it is cancelled."""
        failures = 0
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_POLL_S):
                    await self._wake.wait()
            await asyncio.sleep(_GATHER_S)
            await self._store.wait_up()
            try:
                await self.empty()
                failures = 0
            except OrkiError as error:
                failures += 1
                _log.warning("events of tasks are late: %s", error.message)
                await asyncio.sleep(random.uniform(0, min(0.05 * 2.0 ** min(failures, 10), 2.0)))

    async def empty(self) -> None:
        """Drains what is there now.

        Raises:
            OrkiError: Store or event plane are away; nothing is lost.
        """
        while True:
            self._wake.clear()
            shards = await self._store.outbox.read(_BATCH)
            records = [record for shard in shards for record in shard]
            if not records:
                return
            await self._publish(records)
            await self._store.outbox.trim(shards)
            self.published += len(records)
            if all(len(shard) < _BATCH for shard in shards):
                return

    async def _publish(self, records: list[Record]) -> None:
        tasks, deeds = [], []
        for record in records:
            span = _span(record)
            tasks.append(Outgoing(task_event(record), span, event_id(record), record.time_us))
            if record.kind in _AUDITED:
                deeds.append(Outgoing(audit_event(record), span, event_id(record, "audit"), record.time_us))
        await self._events.publish_outgoing(TASKS, tasks)
        if deeds:
            await self._events.publish_outgoing(AUDIT, deeds)


def _span(record: Record) -> Span:
    # The store's own traceparent: version, trace, span and flags lie where the standard puts them.
    _, trace_id, span_id, flags = record.traceparent.split("-")
    return Span(trace_id, span_id, record.parent_id, int(flags, 16))


def event_id(record: Record, part: str = "task") -> bytes:
    """The identity of a record's event: the same record gives the same, whoever publishes it."""
    return hashlib.sha256(f"{part} {record.task_id}/{record.revision}".encode()).digest()[:16]


def task_event(record: Record) -> pb.TaskEvent:
    """The event that a record stands for."""
    return pb.TaskEvent(
        task_id=record.task_id,
        method=record.method,
        attempt=record.attempt,
        fence=record.fence,
        agent_id=record.agent_id,
        instance_id=record.instance_id,
        **{record.kind: _KINDS[record.kind](record)},
    )


_KINDS: Final[dict[str, Callable[[Record], Any]]] = {
    "submitted": lambda record: pb.TaskSubmitted(request_bytes=record.number, idempotency_key=record.text),
    "offered": lambda record: pb.TaskOffered(),
    "started": lambda record: pb.TaskStarted(),
    "attempt_ended": lambda record: pb.TaskAttemptEnded(
        reason=_reason(record), message=record.text, retried=True, backoff_ms=record.number
    ),
    "cancel_requested": lambda record: pb.TaskCancelRequested(message=record.text),
    "cancel_acknowledged": lambda record: pb.TaskCancelAcknowledged(),
    "directed": lambda record: pb.TaskDirected(directive_bytes=record.number),
    "succeeded": lambda record: pb.TaskSucceeded(response_bytes=record.number),
    "failed": lambda record: pb.TaskFailed(reason=_reason(record), message=record.text),
    "cancelled": lambda record: pb.TaskCancelled(reason=_reason(record)),
}


def _reason(record: Record) -> Reason.ValueType:
    return Reason.ValueType(record.reason)


def audit_event(record: Record) -> AuditEvent:
    """The audit entry of a record that somebody asked for."""
    return AuditEvent(
        actor=record.actor,
        action=_AUDITED[record.kind],
        subject=record.task_id,
        outcome="accepted",
        detail=record.text if record.kind == "cancel_requested" else record.method,
    )
