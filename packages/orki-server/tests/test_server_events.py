"""Events of the orchestrator: every transition once, in nested spans; sessions of agents; audit entries."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto
from google.protobuf.message import Message
from redis import Redis

from orki.control.v1 import task_pb2 as pb
from orki.errors.v1.errors_pb2 import Reason
from orki.events.v1.agent_pb2 import AgentEvent
from orki.events.v1.audit_pb2 import AuditEvent
from orki.events.v1.envelope_pb2 import Envelope
from orki.events.v1.task_pb2 import TaskEvent
from orki_contract.model import TaskMethod
from orki_contract.trace import new_span, parse_traceparent
from orki_control import Client
from orki_control.session import ArrivedOffer
from orki_events import connect
from orki_server._events import _KINDS, Outbox, OutboxPublisher
from orki_server._orchestrator import Orchestrator
from orki_server._store import operations
from orki_server._store.operations import new_task_id
from orki_server._store.store import Store

DO = "servertests.v1.WorkService/Do"
Make = Callable[..., Any]


def read(redis_url: str, stream: str, kind: type[Message]) -> list[tuple[Envelope, Any]]:
    with Redis.from_url(redis_url) as redis:
        entries: Any = redis.xrange(f"orki:ev:{{{stream}}}")
    return [(Envelope.FromString(fields[b"e"]), kind.FromString(fields[b"d"])) for _, fields in entries]


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.02)


async def test_every_transition_is_published_in_its_span(
    redis_url: str, orchestrator: Orchestrator, stand_in: Make, work: Make
) -> None:
    async def handler(offer: ArrivedOffer) -> bytes:
        if offer.attempt.attempt == 1:
            await asyncio.sleep(0.1)
            await agent.cut()
            await asyncio.sleep(60)
        return b"response"

    contract = work(heartbeat_timeout={"nanos": 500_000_000}, retry_backoff={"initial": {"nanos": 1_000_000}})
    agent = stand_in(orchestrator.address, [contract], handler=handler)
    await agent.ready()
    submitter = new_span()
    async with Client(orchestrator.address) as client:
        submission = pb.Submission(
            method=DO, request=b"\n\x02ok", idempotency_key="k", traceparent=submitter.traceparent
        )
        (task,) = await client.submit_raw([submission])
        await agent.until(lambda: bool(agent.offers))
        await agent.close()
        heir = stand_in(orchestrator.address, [contract], agent_id="agent-2", handler=handler)
        heir_news = [each async for each in client.watch(task.task_id)]
    assert heir_news[-1].task.response == b"response"
    await eventually(lambda: any(e.HasField("succeeded") for _, e in read(redis_url, "tasks", TaskEvent)))
    published = read(redis_url, "tasks", TaskEvent)
    kinds = [event.WhichOneof("event") for _, event in published]
    assert kinds == ["submitted", "offered", "started", "attempt_ended", "offered", "started", "succeeded"]
    assert len({envelope.event_id for envelope, _ in published}) == 7
    assert [envelope.time_us for envelope, _ in published] == sorted(envelope.time_us for envelope, _ in published)
    # The submitter's span is above the task's, and the task's is above each attempt's.
    spans = [parse_traceparent(envelope.traceparent) for envelope, _ in published]
    assert {span.trace_id for span in spans if span} == {submitter.trace_id}
    of_task = parse_traceparent(task.traceparent)
    offers = [parse_traceparent(each.traceparent) for each in (*agent.offers, *heir.offers)]
    assert of_task is not None
    ids = [span.span_id for span in (of_task, *offers) if span]
    assert [span.span_id for span in spans if span] == [
        ids[0], ids[1], ids[1], ids[1], ids[2], ids[2], ids[0]
    ]  # fmt: skip
    parents = [envelope.parent_span_id for envelope, _ in published]
    assert parents == [submitter.span_id, *[ids[0]] * 5, submitter.span_id]
    ended = published[3][1]
    assert (ended.attempt_ended.reason, ended.attempt_ended.retried) == (Reason.REASON_LEASE_EXPIRED, True)
    assert published[0][1].submitted.request_bytes == 4
    assert [event.agent_id for _, event in published] == ["", *["agent-1"] * 3, *["agent-2"] * 3]


def _retyped(file: FileDescriptorProto) -> None:
    file.message_type[0].field[0].type = FieldDescriptorProto.TYPE_INT64


async def test_requests_of_submitters_and_refusals_are_audited(
    redis_url: str, orchestrator: Orchestrator, stand_in: Make, work: Make
) -> None:
    agent = stand_in(orchestrator.address, handler=None)
    await agent.ready()
    async with Client(orchestrator.address) as client:
        (task,) = await client.submit_raw([pb.Submission(method=DO, request=b"\n\x01q")])
        await client.cancel(task.task_id, "enough")
    refused = stand_in(orchestrator.address, [work(edit=_retyped)], agent_id="agent-2")
    await refused.until(lambda: refused.closed is not None)
    await eventually(lambda: len(read(redis_url, "audit", AuditEvent)) >= 3)
    audits = {event.action: event for _, event in read(redis_url, "audit", AuditEvent)}
    assert set(audits) == {"submit", "cancel", "refuse"}
    assert (audits["submit"].subject, audits["submit"].actor, audits["submit"].outcome) == (
        task.task_id,
        "anonymous",
        "accepted",
    )
    assert audits["cancel"].detail == "enough"
    assert (audits["refuse"].actor, audits["refuse"].outcome) == ("agent-2", "REASON_CONTRACT_MISMATCH")


async def test_sessions_of_agents_are_published(redis_url: str, orchestrator: Orchestrator, stand_in: Make) -> None:
    older = stand_in(orchestrator.address, instance_id="i1")
    await older.ready()
    newer = stand_in(orchestrator.address, instance_id="i2")
    await newer.ready()
    await newer.close()
    await eventually(lambda: len(read(redis_url, "agents", AgentEvent)) >= 4)
    lives = [(event.instance_id, event.WhichOneof("event")) for _, event in read(redis_url, "agents", AgentEvent)]
    assert lives == [("i1", "connected"), ("i1", "replaced"), ("i2", "connected"), ("i2", "disconnected")]
    replaced = read(redis_url, "agents", AgentEvent)[1][1]
    assert replaced.replaced.successor_instance_id == "i2"


async def test_a_crash_between_publishing_and_trimming_repeats_no_event(redis_url: str, store: Store) -> None:
    method = TaskMethod(service="s.v1.S", name="Do", request="q", response="r")
    for shard in range(3):
        submit = operations.submit(
            task_id=new_task_id(shard),
            method=method,
            request=b"q",
            digest="0" * 64,
            idempotency_key="",
            span=new_span(),
            actor="a",
        )
        await store.apply(submit)
    async with connect(redis_url) as events:
        publisher = OutboxPublisher(store, events)
        # Published, but not removed: the process was killed in between.
        await publisher._publish([record for shard in await Outbox(store).read(10) for record in shard])
        await publisher.publish_all()
    assert await Outbox(store).length() == 0
    published = Counter(envelope.event_id for envelope, _ in read(redis_url, "tasks", TaskEvent))
    assert list(published.values()) == [1, 1, 1]
    audits = Counter(envelope.event_id for envelope, _ in read(redis_url, "audit", AuditEvent))
    assert list(audits.values()) == [1, 1, 1]
    assert not set(published) & set(audits)


def test_every_kind_of_task_event_has_its_record() -> None:
    known = {field.name for field in TaskEvent.DESCRIPTOR.oneofs_by_name["event"].fields}
    assert set(_KINDS) == known
