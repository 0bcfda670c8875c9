"""Events of the orchestrator: every transition once, in nested spans; sessions of agents; audit entries."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto
from google.protobuf.message import Message
from redis import Redis

from orki.control.v1 import task_pb2 as pb
from orki.errors.v1.errors_pb2 import Reason
from orki.events.v1.agent_pb2 import AgentEvent
from orki.events.v1.audit_orki import AUDIT
from orki.events.v1.audit_pb2 import AuditEvent
from orki.events.v1.envelope_pb2 import Envelope
from orki.events.v1.task_orki import TASKS
from orki.events.v1.task_pb2 import TaskEvent
from orki_contract.model import TaskMethod
from orki_contract.trace import new_span, parse_traceparent
from orki_control import Client
from orki_control.session import ArrivedOffer
from orki_events import connect
from orki_server._events import _KINDS, Outbox, OutboxPublisher, OutboxRecord, audit_event, task_event
from orki_server._keys import ShardKeys
from orki_server._orchestrator import Orchestrator
from orki_server._store import operations, upkeep
from orki_server._store.operations import new_task_id
from orki_server._store.store import Store
from orki_server.embedded import EmbeddedServer

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


# --- events that the scripts write ---

METHOD = TaskMethod(service="s.v1.S", name="Do", request="q", response="r", max_attempts=3)


def record(kind: str, **fields: Any) -> OutboxRecord:
    values: dict[str, Any] = {
        "entry": "",
        "task_id": new_task_id(0),
        "revision": 3,
        "kind": kind,
        "method": METHOD.full_name,
        "attempt": 1,
        "fence": 19_388_071_421_781,
        "agent_id": "agent-1",
        "instance_id": "1f0c",
        "traceparent": new_span().traceparent,
        "parent_id": "0123456789abcdef",
        "time_us": 1_795_885_377_362_977,
        "reason": 0,
        "text": "",
        "number": 0,
        "actor": "",
    }
    return OutboxRecord(**(values | fields))


RECORDS = [
    record("submitted", attempt=0, fence=0, agent_id="", instance_id="", parent_id="", number=5, actor="me"),
    record("submitted", number=300, text="schlüssel" * 100, actor="spiffe://acme/ns/é"),
    *(record(kind, actor="x") for kind in _KINDS),
    *(
        record("attempt_ended", reason=2, text="m" * 20_000, number=number, attempt=number % 2**32)
        for number in (1, 127, 128, 16_383, 16_384, 2**32, 2**53 - 1)
    ),
    *(record("failed", fence=fence, reason=301) for fence in (1, 2**44 - 1, 10**15 - 1, 10**15, 2**53 + 1, 10**18 - 1)),
]


def packed(each: OutboxRecord) -> bytes:
    return "\x1f".join(map(str, each[1:])).encode()


async def test_the_scripts_write_the_same_events_as_the_publisher(redis_url: str) -> None:
    store = Store(redis_url, shards=1)
    await store.open()
    store.event_limits = (1000, 1000)
    with Redis.from_url(redis_url) as redis:
        for each in RECORDS:
            redis.xadd(ShardKeys(0).outbox, {"r": packed(each)})
        assert await store.apply(upkeep.empty_outbox(0)) == ("other", 0)
        await store.apply(upkeep.drain(0))
        assert await store.apply(upkeep.empty_outbox(0)) == ("moved", 0)
        assert await store.apply(upkeep.empty_outbox(0)) == ("empty", 0)
        assert redis.xlen(ShardKeys(0).outbox) == 0
    published = read(redis_url, "tasks", TaskEvent)
    assert [event for _, event in published] == [task_event(each) for each in RECORDS]
    audited = [each for each in RECORDS if each.kind in ("submitted", "cancel_requested", "directed")]
    audits = read(redis_url, "audit", AuditEvent)
    assert [event for _, event in audits] == [audit_event(each) for each in audited]
    for envelopes, records in (([e for e, _ in published], RECORDS), ([e for e, _ in audits], audited)):
        assert [e.sequence for e in envelopes] == list(range(1, len(records) + 1))
        assert [(e.traceparent, e.parent_span_id, e.time_us) for e in envelopes] == [
            (each.traceparent, each.parent_id, each.time_us) for each in records
        ]
    ids = [envelope.event_id for envelope, _ in published + audits]
    assert len(set(ids)) == len(ids)
    assert {len(each) for each in ids} == {16}
    assert len({envelope.producer for envelope, _ in published + audits}) == 1
    await store.close()


async def run_tasks(store: Store, count: int) -> list[str]:
    """Submit tasks, run them and end them. Returns their ids."""
    span = new_span()
    for _ in range(count):
        submission = operations.submit(
            task_id=new_task_id(0),
            method=METHOD,
            request=b"q",
            digest="0" * 64,
            idempotency_key="",
            span=span,
            actor="a",
        )
        await store.apply(submission)
    recipient = operations.Recipient("a1", "i1", count, (METHOD.full_name,))
    attempts = [each.attempt for each in (await store.offer(operations.offer(0, 60.0, (recipient,)))).offers]
    for each in attempts:
        await store.apply(operations.accept("a1", each))
        await store.apply(operations.succeed("a1", each, b"r"))
    return [each.task_id for each in attempts]


def lives(redis_url: str) -> dict[str, list[str]]:
    """Return the kinds of the published events of each task, in their order."""
    found: dict[str, list[str]] = {}
    for _, event in read(redis_url, "tasks", TaskEvent):
        found.setdefault(event.task_id, []).append(event.WhichOneof("event"))
    return found


LIFE = ["submitted", "offered", "started", "succeeded"]


async def test_a_transition_writes_its_event_at_once(redis_url: str, store: Store) -> None:
    store.event_limits = (1000, 1000)
    tasks = await run_tasks(store, 20)
    assert lives(redis_url) == dict.fromkeys(tasks, LIFE)
    assert await Outbox(store).length() == 0
    async with connect(redis_url) as events:
        ledger = await events.ledger(TASKS)
    assert (ledger.published, ledger.missing, ledger.repeated) == (80, 0, 0)


async def test_scripts_keep_the_retention_of_the_streams(redis_url: str, store: Store) -> None:
    store.event_limits = (100, 200)
    for _ in range(10):
        await run_tasks(store, 100)
    assert len(read(redis_url, "tasks", TaskEvent)) < 300
    assert 200 <= len(read(redis_url, "audit", AuditEvent)) < 400


@pytest.mark.parametrize("name", ["tasks", "audit"])
async def test_a_foreign_key_in_place_of_a_stream_delays_events_and_nothing_else(
    redis_url: str, store: Store, name: str
) -> None:
    key = f"orki:ev:{{{name}}}"
    async with connect(redis_url) as events:
        publisher = OutboxPublisher(store, events, same_server=True)
        await publisher.maintain()
        before = await run_tasks(store, 3)
        kept = dict(lives(redis_url))
        with Redis.from_url(redis_url) as redis:
            redis.rename(key, "orki:kept")
            redis.set(key, "x")
            later = await run_tasks(store, 3)
            if name == "audit":
                assert lives(redis_url) == kept
            await store.apply(upkeep.drain(0))
            assert (await store.apply(upkeep.empty_outbox(0)))[0] == "stuck"
            redis.rename("orki:kept", key)
        # While the outbox has records, new ones follow them.
        last = await run_tasks(store, 3)
        assert await Outbox(store).length() > 0
        await publisher.publish_all()
        assert await Outbox(store).length() == 0
        newest = await run_tasks(store, 3)
        assert await Outbox(store).length() == 0
        ledgers = [await events.ledger(stream) for stream in (TASKS, AUDIT)]
    tasks = [*before, *later, *last, *newest]
    assert lives(redis_url) == dict.fromkeys(tasks, LIFE)
    assert [event.subject for _, event in read(redis_url, "audit", AuditEvent)] == tasks
    assert [(each.published, each.missing, each.repeated) for each in ledgers] == [(48, 0, 0), (12, 0, 0)]


async def test_what_another_orchestrator_left_in_the_outbox_is_published_once(redis_url: str, store: Store) -> None:
    before = await run_tasks(store, 3)
    async with connect(redis_url) as events:
        publisher = OutboxPublisher(store, events, same_server=True)
        # It was killed between publishing and removing.
        await publisher._publish([each for shard in await Outbox(store).read(2) for each in shard])
        await publisher.maintain()
        later = await run_tasks(store, 3)
        await publisher.publish_all()
        newest = await run_tasks(store, 3)
    assert lives(redis_url) == dict.fromkeys([*before, *later, *newest], LIFE)
    assert await Outbox(store).length() == 0


async def test_events_of_another_server_are_drained_to_it(
    redis_url: str, options: Make, launch: Make, stand_in: Make
) -> None:
    with EmbeddedServer() as server:
        orchestrator = await launch(options(redis_url, events_url=server.url))
        await stand_in(orchestrator.address).ready()
        async with Client(orchestrator.address) as client:
            (task,) = await client.submit_raw([pb.Submission(method=DO, request=b"\n\x01q")])
            async for _ in client.watch(task.task_id):
                pass
        await eventually(lambda: lives(server.url) == {task.task_id: LIFE})
        assert lives(redis_url) == {}
        await orchestrator.stop()
        assert len(read(server.url, "audit", AuditEvent)) == 1


async def test_an_orchestrator_lets_the_scripts_write_events(
    redis_url: str, orchestrator: Orchestrator, stand_in: Make
) -> None:
    await stand_in(orchestrator.address).ready()
    async with Client(orchestrator.address) as client:
        (task,) = await client.submit_raw([pb.Submission(method=DO, request=b"\n\x01q")])
        async for _ in client.watch(task.task_id):
            pass
    # The task has just ended.
    assert lives(redis_url) == {task.task_id: LIFE}
    with Redis.from_url(redis_url) as redis:
        assert not list(redis.scan_iter("*:outbox"))
