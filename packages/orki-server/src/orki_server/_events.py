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
from typing import Any, Final, TypeVar

from google.protobuf.message import Message

from orki.errors.v1.errors_pb2 import Reason
from orki.events.v1 import task_pb2 as pb
from orki.events.v1.agent_orki import AGENTS
from orki.events.v1.agent_pb2 import AgentConnected, AgentDisconnected, AgentEvent, AgentReplaced
from orki.events.v1.audit_orki import AUDIT
from orki.events.v1.audit_pb2 import AuditEvent
from orki.events.v1.task_orki import TASKS
from orki_contract import EventStream
from orki_contract.errors import OrkiError
from orki_contract.trace import Span
from orki_events import Events, Outgoing
from orki_server._session import AgentSession
from orki_server._store.queries import OutboxRecord
from orki_server._store.store import Store

_BATCH: Final = 250
"""Most records of a shard at once."""
_GATHER_S: Final = 0.01
"""How long records gather before they are read."""
_POLL_S: Final = 0.5
"""Longest time between two looks: another orchestrator may have left records behind."""
_AUDITED: Final = {"submitted": "submit", "cancel_requested": "cancel", "directed": "direct"}
_log = logging.getLogger("orki.server.drain")


class OutboxPublisher:
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

    async def _publish(self, records: list[OutboxRecord]) -> None:
        tasks, deeds = [], []
        for record in records:
            span = _span(record)
            tasks.append(Outgoing(task_event(record), span, event_id(record), record.time_us))
            if record.kind in _AUDITED:
                deeds.append(Outgoing(audit_event(record), span, event_id(record, "audit"), record.time_us))
        await self._events.publish_outgoing(TASKS, tasks)
        if deeds:
            await self._events.publish_outgoing(AUDIT, deeds)


def _span(record: OutboxRecord) -> Span:
    # The store's own traceparent: version, trace, span and flags lie where the standard puts them.
    _, trace_id, span_id, flags = record.traceparent.split("-")
    return Span(trace_id, span_id, record.parent_id, int(flags, 16))


def event_id(record: OutboxRecord, part: str = "task") -> bytes:
    """The identity of a record's event: the same record gives the same, whoever publishes it."""
    return hashlib.sha256(f"{part} {record.task_id}/{record.revision}".encode()).digest()[:16]


def task_event(record: OutboxRecord) -> pb.TaskEvent:
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


_KINDS: Final[dict[str, Callable[[OutboxRecord], Any]]] = {
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


def _reason(record: OutboxRecord) -> Reason.ValueType:
    return Reason.ValueType(record.reason)


def audit_event(record: OutboxRecord) -> AuditEvent:
    """The audit entry of a record that somebody asked for."""
    return AuditEvent(
        actor=record.actor,
        action=_AUDITED[record.kind],
        subject=record.task_id,
        outcome="accepted",
        detail=record.text if record.kind == "cancel_requested" else record.method,
    )


E = TypeVar("E", bound=Message)
_log = logging.getLogger("orki.server")


class AgentEvents:
    """Publishes what happened here."""

    def __init__(self, events: Events, orchestrator_id: str) -> None:
        self._events = events
        self._orchestrator_id = orchestrator_id

    def connected(self, session: AgentSession, resumed: int) -> None:
        """An agent was welcomed."""
        event = AgentConnected(
            orchestrator_id=self._orchestrator_id, session_epoch=session.epoch, resumed_attempts=resumed
        )
        self._agent(session, AgentEvent(connected=event))

    def disconnected(self, session: AgentSession) -> None:
        """An agent's stream was lost."""
        event = AgentDisconnected(
            orchestrator_id=self._orchestrator_id, session_epoch=session.epoch, cause=session.cause[:1000]
        )
        self._agent(session, AgentEvent(disconnected=event))

    def replaced(self, session: AgentSession, older_instance_id: str) -> None:
        """A newer instance, that of `session`, took the session from an older one."""
        event = AgentEvent(replaced=AgentReplaced(successor_instance_id=session.instance_id))
        event.agent_id, event.instance_id = session.agent_id, older_instance_id
        self._collect(AGENTS, event)

    def refused(self, actor: str, subject: str, error: OrkiError) -> None:
        """Somebody was refused something."""
        event = AuditEvent(
            actor=actor,
            action="refuse",
            subject=subject,
            outcome=Reason.Name(error.reason),
            detail=error.message[:1000],
        )
        self._collect(AUDIT, event)

    def _agent(self, session: AgentSession, event: AgentEvent) -> None:
        event.agent_id, event.instance_id = session.agent_id, session.instance_id
        self._collect(AGENTS, event)

    def _collect(self, stream: EventStream[E, Any], event: E) -> None:
        try:
            self._events.collect(stream, event)
        except OrkiError as error:
            _log.warning("an event for stream %s was not taken: %s", stream.contract.name, error.message)
