"""Publishes events: tasks' transitions, agents' sessions, and refusals.

If the event plane is on the store's server, the store's scripts write the event of a transition together with the task.
Otherwise they write a record to the outbox, and one orchestrator at a time publishes the outbox of a shard. A record is
removed once its events are published. After a crash in between, the next publisher looks for them in the stream first.
Event ids consist of task and revision, so that readers can ignore an event that comes twice nevertheless. Events of
agents are only collected in memory: the fleet's table shows the same.

Spans nest as follows: the submitter's span contains the task's span, which contains one span for each attempt, which
contains the handler's spans. `offered`, `started` and `attempt_ended` belong to the attempt's span, all other events to
the task's. The id of an attempt's span is derived from task and attempt.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
from collections.abc import Callable, Collection, Iterator
from typing import Any, Final, NamedTuple, TypeVar

from google.protobuf.message import Message

from orki.errors.v1.errors_pb2 import Reason
from orki.events.v1 import task_pb2 as pb
from orki.events.v1.agent_orki import AGENTS
from orki.events.v1.agent_pb2 import AgentConnected, AgentDisconnected, AgentEvent, AgentReplaced
from orki.events.v1.audit_orki import AUDIT
from orki.events.v1.audit_pb2 import AuditEvent
from orki.events.v1.task_orki import TASKS
from orki_contract import EventStream
from orki_contract.backoff import Jitter, JitterOptions
from orki_contract.errors import DamagedRecord, OrkiError
from orki_contract.trace import Span
from orki_events import Events, Outgoing
from orki_events.entries import format_cursor, stream_keys
from orki_server._fields import RECORD_FIELDS
from orki_server._keys import ShardKeys
from orki_server._session import AgentSession
from orki_server._store.operations import shard_of
from orki_server._store.store import Store
from orki_server._store.upkeep import drain, empty_outbox

E = TypeVar("E", bound=Message)

_BATCH: Final = 32
"""Maximum number of entries read from a shard at once. Each has the records of one batch of operations."""
_COLLECT: Final = 0.01
"""Time for which records are collected before they are read."""
_POLL: Final = 0.2
"""Maximum time between two reads: another orchestrator may have written records."""
_MAINTAIN: Final = 2.0
"""Time between two looks at the streams whose events the scripts write, and at their outboxes."""
_CLOCK_SLACK: Final = 10_000
"""Maximum difference between the clocks of the store and the event server (ms)."""
_RETRIES: Final = JitterOptions(initial=0.1, maximum=2.0)
_AUDITED: Final = {"submitted": "submit", "cancel_requested": "cancel", "directed": "direct", "resumed": "answer"}
_log = logging.getLogger("orki.server.events")


class OutboxRecord(NamedTuple):
    """One transition of one task; `orki_server._fields.RECORD_FIELDS` describes the fields after the first.

    Attributes:
        entry: Id of the entry in the outbox.
    """

    entry: str
    task_id: str
    revision: int
    kind: str
    method: str
    attempt: int
    fence: int
    agent_id: str
    instance_id: str
    traceparent: str
    parent_id: str
    time_us: int
    reason: int
    text: str
    number: int
    actor: str


def _text(value: bytes) -> str:
    return value.decode(errors="replace")


_INTEGERS: Final = {"revision", "attempt", "fence", "time_us", "reason", "number"}
_DECODERS: Final[list[Callable[[bytes], Any]]] = [int if name in _INTEGERS else _text for name in RECORD_FIELDS]


def _records(entry: bytes, fields: list[bytes]) -> Iterator[OutboxRecord]:
    """Yield the records of an entry, which the transitions of one batch wrote."""
    for packed in fields[1::2]:
        try:
            values = [decode(value) for decode, value in zip(_DECODERS, packed.split(b"\x1f"), strict=True)]
        except ValueError:
            _log.error("a record of outbox entry %s is damaged and is left out", entry.decode())
        else:
            yield OutboxRecord(entry.decode(), *values)


class Outbox:
    """The outboxes of all shards. All methods raise StoreUnavailable while the store is down."""

    def __init__(self, store: Store) -> None:
        self._connection = store.connection
        self._keys = [ShardKeys(shard).outbox for shard in range(store.shards)]
        self._last: list[str] = []
        self._damaged: set[int] = set()

    async def read(self, limit: int, shards: Collection[int] | None = None) -> list[list[OutboxRecord]]:
        """Return the records of the oldest entries of each shard, or of these, at most `limit` entries of each."""
        wanted = range(len(self._keys)) if shards is None else shards
        replies: list[Any] = [[] for _ in self._keys]
        commands = [("XRANGE", self._keys[shard], "-", "+", "COUNT", limit) for shard in wanted]
        for shard, reply in zip(wanted, await self._connection.replies(commands) if commands else (), strict=True):
            if not isinstance(reply, OrkiError):
                replies[shard] = reply
            elif shard not in self._damaged:
                self._damaged.add(shard)
                _log.error("the outbox of shard %d cannot be read; its events are missing: %s", shard, reply.message)
        self._last = [reply[-1][0].decode() if reply else "" for reply in replies]
        return [[record for entry, fields in reply for record in _records(entry, fields)] for reply in replies]

    async def trim(self) -> None:
        """Remove what was read last. Another orchestrator may have published and removed the same records."""
        commands = [
            ("XTRIM", key, "MINID", "=", _next_id(last))
            for key, last in zip(self._keys, self._last, strict=True)
            if last
        ]
        if commands:
            await self._connection.calls(commands)

    async def length(self) -> int:
        return sum(await self._connection.calls([("XLEN", key) for key in self._keys]))


def _next_id(entry: str) -> str:
    milliseconds, _, number = entry.partition("-")
    return f"{milliseconds}-{int(number) + 1}"


class OutboxPublisher:
    """Publishes the outboxes of all shards, or lets the scripts write events, if the event plane is on their server.

    Attributes:
        outbox: The outboxes.
        wake: Set when they have records.
        published: Number of published records.
    """

    def __init__(self, store: Store, events: Events, *, same_server: bool = False) -> None:
        """Create the publisher.

        Args:
            store: The store.
            events: The event plane.
            same_server: Whether both are on one server.
        """
        self.outbox = Outbox(store)
        self.wake = asyncio.Event()
        self.published = 0
        # Shards whose outbox has no records that this process, or another one, may have published.
        self._checked: set[int] = set()
        self._store = store
        self._events = events
        self._same_server = same_server

    async def run(self) -> None:
        jitter = Jitter(_RETRIES)
        while True:
            if self._store.event_limits:
                await asyncio.sleep(_MAINTAIN)
            else:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_POLL):
                        await self.wake.wait()
                await asyncio.sleep(_COLLECT)
            await self._store.connection.up.wait()
            try:
                await self.maintain()
                await self.publish_all()
                jitter.reset()
            except OrkiError as error:
                _log.warning("events of tasks are delayed: %s", error.message)
                await asyncio.sleep(jitter.failed())

    async def maintain(self) -> None:
        """Let the scripts write events, if they can and the streams are ready for them.

        Raises:
            OrkiError: The streams cannot be prepared. Transitions go to the outbox.
        """
        if not self._same_server:
            return
        # The keys of a stream are not on the slots of the store's shards.
        if b"cluster_enabled:1" in await self._store.connection.call("INFO", "cluster"):
            self._same_server = False
            return
        try:
            limits = [(await self._events.maintain(stream)).max_entries for stream in (TASKS, AUDIT)]
        except OrkiError:
            self._store.event_limits = None
            raise
        self._store.event_limits = (limits[0], limits[1])

    async def publish_all(self) -> None:
        """Publish and remove all records of the outboxes that no other orchestrator publishes.

        Raises:
            OrkiError: The store or the event plane is down; no record is lost.
        """
        while True:
            self.wake.clear()
            if self._store.event_limits and not await self.outbox.length():
                return
            claimed = await self._claim()
            if self._store.event_limits:
                await self._empty(claimed & self._checked)
                claimed -= self._checked
                if not claimed:
                    return
            shards = await self.outbox.read(_BATCH, claimed)
            records = [record for shard in shards for record in shard]
            await self._publish_once(records, claimed)
            await self.outbox.trim()
            self._checked |= claimed
            self.published += len(records)
            if all(len(shard) < _BATCH for shard in shards) and not self._store.event_limits:
                return

    async def _empty(self, shards: Collection[int]) -> None:
        """Let the scripts write what is left in outboxes of which nothing was published before."""
        left = set(shards)
        while left:
            outcomes = await asyncio.gather(
                *(self._store.apply(empty_outbox(shard)) for shard in left), return_exceptions=True
            )
            for shard, outcome in zip(tuple(left), outcomes, strict=True):
                if isinstance(outcome, BaseException) and not isinstance(outcome, DamagedRecord):
                    raise outcome
                status, damaged = ("stuck", 0) if isinstance(outcome, BaseException) else outcome
                if damaged:
                    _log.error("%d records in the outbox of shard %d are damaged and are left out", damaged, shard)
                if status == "stuck":
                    _log.warning("events of shard %d are delayed: their stream or the outbox is damaged", shard)
                if status != "moved":
                    left.discard(shard)

    async def _claim(self) -> set[int]:
        """Claim the outboxes, and return the shards of those that this process publishes now."""
        claims = await asyncio.gather(
            *(self._store.apply(drain(shard)) for shard in range(self._store.shards)), return_exceptions=True
        )
        # A claim that failed may have shown that another orchestrator publishes, or that this one took over.
        self._checked -= {shard for shard, claim in enumerate(claims) if claim != "kept"}
        for claim in claims:
            if isinstance(claim, BaseException) and not isinstance(claim, DamagedRecord):
                raise claim
        return {shard for shard, claim in enumerate(claims) if claim in ("kept", "taken")}

    async def release(self) -> None:
        """Let another orchestrator publish at once."""
        await asyncio.gather(*(self._store.apply(drain(shard, release=True)) for shard in range(self._store.shards)))

    async def _publish_once(self, records: list[OutboxRecord], claimed: set[int]) -> None:
        """Publish records, except those that were published before by an orchestrator that did not remove them."""
        unchecked = claimed - self._checked
        done = set()
        doubtful = [record for record in records if shard_of(record.task_id) in unchecked]
        if doubtful:
            done = await self._published_since(min(record.time_us for record in doubtful))
        # After an error, also one of the trim that follows, it is unknown which of them were published.
        self._checked -= claimed
        if new := [record for record in records if event_id(record) not in done]:
            await self._publish(new)

    async def _published_since(self, time_us: int) -> set[bytes]:
        """Return the ids of the events of tasks since a time."""
        position = f"{max(0, time_us // 1000 - _CLOCK_SLACK)}-0"
        cursor = format_cursor([position] * len(stream_keys(TASKS.contract)))
        entries = self._events.tail(TASKS, after=cursor, follow=False)
        return {entry.event_id async for entry in entries}

    async def _publish(self, records: list[OutboxRecord]) -> None:
        tasks, audits = [], []
        for record in records:
            _, trace_id, span_id, flags = record.traceparent.split("-")
            span = Span(trace_id, span_id, record.parent_id, int(flags, 16))
            tasks.append(Outgoing(task_event(record), span, event_id(record), record.time_us))
            if record.kind in _AUDITED and (record.actor or record.kind != "resumed"):
                audits.append(Outgoing(audit_event(record), span, event_id(record, "audit"), record.time_us))
        # The tasks' events are looked for after a crash, so they come last.
        if audits:
            await self._events.publish_outgoing(AUDIT, audits)
        await self._events.publish_outgoing(TASKS, tasks)


def event_id(record: OutboxRecord, part: str = "task") -> bytes:
    """Return the id of a record's event, the same for every publisher."""
    return hashlib.sha256(f"{part} {record.task_id}/{record.revision}".encode()).digest()[:16]


def task_event(record: OutboxRecord) -> pb.TaskEvent:
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
    "suspended": lambda record: pb.TaskSuspended(question=record.text, deadline_ms=record.number),
    "resumed": lambda record: pb.TaskResumed(answer_bytes=record.number, message=record.text),
    "succeeded": lambda record: pb.TaskSucceeded(response_bytes=record.number),
    "failed": lambda record: pb.TaskFailed(reason=_reason(record), message=record.text),
    "cancelled": lambda record: pb.TaskCancelled(reason=_reason(record)),
}


def _reason(record: OutboxRecord) -> Reason.ValueType:
    return Reason.ValueType(record.reason)


def audit_event(record: OutboxRecord) -> AuditEvent:
    """Return the audit entry of a record that a submitter caused."""
    return AuditEvent(
        actor=record.actor,
        action=_AUDITED[record.kind],
        subject=record.task_id,
        outcome="accepted",
        detail=record.text if record.kind == "cancel_requested" else record.method,
    )


class AgentEvents:
    """Publishes events of agents' sessions, and refusals."""

    def __init__(self, events: Events, orchestrator_id: str) -> None:
        self._events = events
        self._orchestrator_id = orchestrator_id

    def connected(self, session: AgentSession, resumed: int) -> None:
        event = AgentConnected(
            orchestrator_id=self._orchestrator_id, session_epoch=session.epoch, resumed_attempts=resumed
        )
        self._agent(session, AgentEvent(connected=event))

    def disconnected(self, session: AgentSession) -> None:
        event = AgentDisconnected(
            orchestrator_id=self._orchestrator_id, session_epoch=session.epoch, cause=session.cause[:1000]
        )
        self._agent(session, AgentEvent(disconnected=event))

    def replaced(self, session: AgentSession, older_instance_id: str) -> None:
        """The instance of `session` replaced an older one."""
        event = AgentEvent(replaced=AgentReplaced(successor_instance_id=session.instance_id))
        event.agent_id, event.instance_id = session.agent_id, older_instance_id
        self._collect(AGENTS, event)

    def refused(self, actor: str, subject: str, error: OrkiError) -> None:
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
            _log.warning("an event for stream %s was not accepted: %s", stream.contract.name, error.message)
