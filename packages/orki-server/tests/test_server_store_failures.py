"""Failures inside the store: commands that fail, damaged records, no memory. Each hurts only its own operation."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any, Self, TypeAlias

import pytest
from redis import Redis

from orki.control.v1.attempt_pb2 import TaskState
from orki.errors.v1.errors_pb2 import Reason
from orki_contract.errors import DamagedRecord, OrkiError, StoreFull
from orki_contract.model import Backoff, TaskMethod
from orki_contract.trace import new_span
from orki_control.session import AttemptKey
from orki_server._events import Outbox, _records, audit_event, task_event
from orki_server._explain import read_waits
from orki_server._fields import STATE_FIELDS, pack, unpack
from orki_server._keys import ShardKeys
from orki_server._store import operations, upkeep
from orki_server._store.batcher import _EVENT_KEYS, shard_script
from orki_server._store.mail import Mail, MailKind, post, queue_lengths, read_mail
from orki_server._store.operations import OfferedAttempt, Operation, Recipient, new_task_id
from orki_server._store.replies import ReportStatus
from orki_server._store.store import Store
from orki_server._store.tasks import TaskFilter, list_tasks
from orki_server.embedded import EmbeddedServer

METHOD = TaskMethod(service="acme.v1.WorkService", name="Do", request="q", response="r", backoff=Backoff(initial=0.001))
ATTEMPT = AttemptKey(new_task_id(0), 1, 20_000_000_000_000)
KEYS = ShardKeys(0)
Dump: TypeAlias = dict[bytes, Any]


def submit(*, key: str = "", shard: int = 0, method: TaskMethod = METHOD, request: bytes = b"q") -> Operation[Any]:
    return operations.submit(
        task_id=new_task_id(shard),
        method=method,
        request=request,
        digest="0" * 64,
        idempotency_key=key,
        span=new_span(),
        actor="t",
    )


async def take(store: Store, agent: str = "a1", slots: int = 1) -> list[OfferedAttempt]:
    recipient = Recipient(agent, f"{agent}-1", slots, (METHOD.full_name,))
    return list((await store.offer(operations.offer(0, 60.0, (recipient,)))).offers)


@pytest.fixture
async def store(redis_url: str) -> AsyncIterator[Store]:
    opened = Store(redis_url, shards=1)
    await opened.open()
    yield opened
    await opened.close()


@pytest.fixture
def redis(redis_url: str) -> AsyncIterator[Redis]:
    with Redis.from_url(redis_url) as connection:
        yield connection  # type: ignore[misc]


# --- a command that fails ---


def told(redis: Redis) -> list[bytes]:
    """Return the shard's events of tasks, and then its audit events, wherever they are."""
    found: dict[str, list[bytes]] = {}
    for name in ("tasks", "audit"):
        entries: Any = redis.xrange(f"orki:ev:{{{name}}}")
        found[name] = [fields[b"d"] for _, fields in entries]
    # redis-py's `xrange` keeps one of several equal fields.
    waiting: Any = redis.eval("return redis.call('XRANGE', KEYS[1], '-', '+')", 1, KEYS.outbox)
    for entry, fields in waiting:
        for record in _records(entry, fields):
            found["tasks"].append(task_event(record).SerializeToString())
            if record.kind in ("submitted", "cancel_requested", "directed"):
                found["audit"].append(audit_event(record).SerializeToString())
    return [*found["tasks"], b"", *found["audit"]]


def content(redis: Redis) -> Dump:
    """Return what the shard holds, without ids of stream entries, and without its clock."""
    found: Dump = {b"told": told(redis)}
    for name in redis.scan_iter(f"{KEYS.base}*", count=1000):
        kind: Any = redis.type(name)
        values: Any = {
            b"hash": redis.hgetall,
            b"string": redis.get,
            b"zset": lambda key: redis.zrange(key, 0, -1, withscores=True),
            b"stream": lambda key: [fields for _, fields in redis.xrange(key)],  # type: ignore[union-attr]
        }[kind](name)
        found[name] = (values, redis.pttl(name) > 0)  # type: ignore[operator]
    for name in ("clock", "outbox"):
        found.pop(f"{KEYS.base}{name}".encode(), None)
    return found


async def nothing(store: Store) -> AttemptKey:
    return ATTEMPT


async def queued(store: Store) -> AttemptKey:
    await store.apply(submit(key="k"))
    await store.apply(submit())
    return ATTEMPT


async def offered(store: Store) -> AttemptKey:
    await queued(store)
    return (await take(store))[0].attempt


async def running(store: Store) -> AttemptKey:
    attempt = await offered(store)
    await store.apply(operations.accept("a1", attempt))
    await store.apply(operations.report_progress("a1", attempt, 10, 1, b"p"))
    return attempt


async def cancelling(store: Store) -> AttemptKey:
    attempt = await running(store)
    await store.apply(operations.cancel(attempt.task_id, "", "t"))
    return attempt


async def ended(store: Store) -> AttemptKey:
    attempt = await running(store)
    await store.apply(operations.succeed("a1", attempt, b"r"))
    return attempt


async def waiting(store: Store) -> AttemptKey:
    attempt = await running(store)
    await store.apply(operations.fail("a1", attempt, Reason.REASON_HANDLER_FAILED, "m", "E", True))
    return attempt


async def elsewhere(store: Store) -> AttemptKey:
    """The agent has its session at another orchestrator."""
    await queued(store)
    other = Store(store.connection.address.url, shards=store.shards, caller="o2")
    await other.open()
    attempt = (await take(other))[0].attempt
    await other.apply(operations.accept("a1", attempt))
    await other.close()
    return attempt


async def mailed(store: Store) -> AttemptKey:
    """This orchestrator has mail."""
    attempt = await running(store)
    other = Store(store.connection.address.url, shards=store.shards, caller="test")
    await other.open()
    await other.apply(upkeep.sweep(0, 0))
    await other.close()
    await store.apply(post("test", Mail(kind=MailKind.CANCEL, attempt=attempt, agent_id="a1")))
    return attempt


TIMER = {offered: "offer_due", running: "lease_due", cancelling: "lease_due", ended: "forget_due", waiting: "retry_due"}
CASES: list[tuple[Callable[[Store], Awaitable[AttemptKey]], Callable[[AttemptKey], Operation[Any]]]] = [
    (nothing, lambda key: submit()),
    (queued, lambda key: submit(key="other", method=replace(METHOD, total_timeout=5.0))),
    (running, lambda key: operations.cancel(key.task_id, "m", "t")),
    (running, lambda key: operations.direct(key, 3, "t")),
    (running, lambda key: operations.read_task(key.task_id, 10)),
    (offered, lambda key: operations.accept("a1", key)),
    (offered, lambda key: operations.decline("a1", key, Reason.REASON_DRAINING, "m", True)),
    (offered, lambda key: operations.suspect("a1", key)),
    (offered, lambda key: operations.lose("a1", key, "m")),
    (offered, lambda key: operations.report_progress("a1", key, 10, 1, b"p")),
    (running, lambda key: operations.renew(0, "a1", (key,))),
    (offered, lambda key: operations.succeed("a1", key, b"r")),
    (running, lambda key: operations.succeed("a1", key, b"r")),
    (running, lambda key: operations.fail("a1", key, Reason.REASON_HANDLER_FAILED, "m", "E", True)),
    (running, lambda key: operations.fail("a1", key, Reason.REASON_HANDLER_FAILED, "m", "E", False)),
    (running, lambda key: operations.fail("a1", key, Reason.REASON_ABANDONED, "m", "E", True)),
    (cancelling, lambda key: operations.confirm_cancelled("a1", key, Reason.REASON_CANCELLED)),
    (cancelling, lambda key: operations.acknowledge_cancel("a1", key)),
    (offered, lambda key: operations.resume(0, "a1", (key,))),
    (queued, lambda key: operations.offer(0, 60.0, (Recipient("a2", "i2", 3, (METHOD.full_name,)),))),
    (running, lambda key: upkeep.raise_epoch(0, key.fence + 1)),
    *((prepare, lambda key: upkeep.sweep(0, 10)) for prepare in TIMER),
    (elsewhere, lambda key: operations.cancel(key.task_id, "m", "t")),
    (elsewhere, lambda key: post("o2", Mail(kind=MailKind.DIRECT, attempt=key, agent_id="a1", payload=b"p"))),
    (mailed, lambda key: read_mail(0)),
    (queued, lambda key: queue_lengths(0, [METHOD.full_name])),
    (running, lambda key: read_waits(key.task_id)),
]
IDS = [f"{prepare.__name__}-{build(ATTEMPT).op}-{number}" for number, (prepare, build) in enumerate(CASES)]


def killing(number: int) -> str:
    """Return the script with a command that fails: the one with this number."""
    wrapped = f"""
      local real, calls = redis, 0
      local redis = setmetatable({{
        call = function(...)
          calls = calls + 1
          if calls == {number} then error({{ err = 'ERR killed' }}) end
          return real.call(...)
        end,
        pcall = function(...)
          calls = calls + 1
          if calls == {number} then return {{ err = 'ERR killed' }} end
          return real.pcall(...)
        end,
      }}, {{ __index = real }})
    """
    text = shard_script(60.0).text.replace("redis.call('TIME')", "({ '1', '0', redis.call('TIME') })")
    return wrapped + text.replace("return replies\n", "return { replies, calls }\n")


@pytest.mark.parametrize("limits", ["", "1000,1000"], ids=["outbox", "events"])
@pytest.mark.parametrize(("prepare", "build"), CASES, ids=IDS)
async def test_an_operation_that_fails_at_any_command_changes_nothing_or_is_complete(
    store: Store, redis: Redis, prepare: Any, build: Any, limits: str
) -> None:
    store.event_limits = (1000, 1000) if limits else None
    key = await prepare(store)
    operation = build(key)
    if operation.op == "sweep":
        change_state(redis, key.task_id, **{TIMER[prepare]: 1, "timer": 1, "host": "test"})
        redis.zadd(f"{KEYS.base}timers", {key.task_id: 1})
    names = list(redis.scan_iter("orki:*", count=1000))
    before = [(name, max(0, redis.pttl(name)), redis.dump(name)) for name in names]  # type: ignore[type-var]
    unchanged = content(redis)

    def apply(number: int) -> tuple[Any, int]:
        redis.delete(*redis.scan_iter("orki:*", count=1000), "none")
        for row in before:
            redis.restore(*row)  # type: ignore[arg-type]
        arguments = [operation.op, len(operation.arguments), *operation.arguments]
        keys = (KEYS.base, *_EVENT_KEYS)
        # The time until a new timer may follow the reply.
        (reply, *_), calls = redis.eval(killing(number), 3, *keys, "test", limits, *arguments)  # type: ignore[misc]
        return reply, calls

    reply, total = apply(0)
    assert reply[:1] != [b"error"]
    complete = content(redis)
    if operation.op not in ("read", "renew", "queue_lengths", "waits"):
        assert complete != unchanged
    for number in range(1, total + 1):
        reply, _ = apply(number)
        left = content(redis)
        assert left in (unchanged, complete), f"command {number} of {total} left a part"
        if left == unchanged and complete != unchanged:
            assert reply[0] == b"error", f"command {number} of {total}"


async def test_an_operation_that_fails_leaves_the_others_of_its_batch_alone(store: Store, redis: Redis) -> None:
    """The store's fence cannot rise any more: offers fail, and all else goes on."""
    redis.set(KEYS.fence, 10**18 - 1)
    results = await asyncio.gather(
        store.apply(submit()),
        store.offer(operations.offer(0, 60.0, (Recipient("a1", "i1", 4, (METHOD.full_name,)),))),
        store.apply(submit()),
        return_exceptions=True,
    )
    assert [type(each).__name__ for each in results] == ["Submitted", "DamagedRecord", "Submitted"]
    redis.delete(KEYS.fence)
    assert len(await take(store, slots=4)) == 2


# --- damaged records ---


def change_state(redis: Redis, task_id: str, **fields: Any) -> None:
    packed: Any = redis.hget(KEYS.task(task_id), "state")
    redis.hset(KEYS.task(task_id), "state", pack({**unpack(STATE_FIELDS, packed), **fields}))


def wrong_type(redis: Redis, task_id: str) -> None:
    redis.delete(KEYS.task(task_id))
    redis.rpush(KEYS.task(task_id), "x")


def set_field(name: str, value: str | bytes) -> Callable[[Redis, str], None]:
    return lambda redis, task_id: redis.hset(KEYS.task(task_id), name, value)  # type: ignore[return-value]


def number(name: str, value: str) -> Callable[[Redis, str], None]:
    def damage(redis: Redis, task_id: str) -> None:
        packed: Any = redis.hget(KEYS.task(task_id), "state")
        parts = packed.split(b"\x1f")
        parts[list(STATE_FIELDS).index(name)] = value.encode()
        redis.hset(KEYS.task(task_id), "state", b"\x1f".join(parts))

    return damage


DAMAGES = {
    "wrong type": wrong_type,
    "no state": lambda redis, task_id: redis.hdel(KEYS.task(task_id), "state"),
    "no spec": lambda redis, task_id: redis.hdel(KEYS.task(task_id), "spec"),
    "empty state": set_field("state", ""),
    "bytes": set_field("state", b"\xff\xfe" * 40),
    "foreign spec": set_field("spec", "a\x1fb"),
    "unknown state": number("state", "DREAMING"),
    "number": number("attempt", "many"),
    "negative": number("revision", "-1"),
    "nan": number("lease_due", "nan"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
async def test_a_damaged_task_is_a_typed_error_and_others_go_on(
    store: Store, redis: Redis, damage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    bad = (await store.apply(submit())).task_id
    good = [(await store.apply(submit())).task_id for _ in range(3)]
    damage(redis, bad)
    redis.zadd(f"{KEYS.base}timers", {bad: 1})
    reports = [
        operations.read_task(bad),
        operations.cancel(bad, "", "t"),
        operations.accept("a1", AttemptKey(bad, 1, 1)),
        operations.succeed("a1", AttemptKey(bad, 1, 1), b""),
    ]
    results = await asyncio.gather(
        *(store.apply(each) for each in reports), store.apply(operations.read_task(good[0])), return_exceptions=True
    )
    assert [type(each) for each in results[:-1]] == [DamagedRecord] * len(reports)
    assert results[-1].task.task_id == good[0]  # type: ignore[union-attr]
    assert store.damaged == len(reports)
    assert (await store.apply(operations.renew(0, "a1", (AttemptKey(bad, 1, 1),)))).stale == (AttemptKey(bad, 1, 1),)
    listed, _ = await list_tasks(store, TaskFilter(), 10, "")
    assert {task.task_id for task in listed} == {bad, *good}
    (shown,) = [task for task in listed if task.task_id == bad]
    assert shown.failure.reason == Reason.REASON_DAMAGED_RECORD
    listed, _ = await list_tasks(store, TaskFilter(states=frozenset({TaskState.TASK_STATE_QUEUED})), 10, "")
    assert {task.task_id for task in listed} == set(good)
    assigned = await store.offer(operations.offer(0, 60.0, (Recipient("a1", "i1", 9, (METHOD.full_name,)),)))
    assert [each.attempt.task_id for each in assigned.offers] == good
    swept = await store.apply(upkeep.sweep(0, 10))
    assert assigned.damaged + swept.damaged in ((bad,), (bad, bad))
    # It is reported once, and kept for an operator.
    again = await store.apply(upkeep.sweep(0, 10))
    assert again.damaged == ()
    assert redis.zrange(f"{KEYS.base}damaged", 0, -1) == [bad.encode()]
    assert store.up


@pytest.mark.parametrize("name", ["timers", "index", "open", "outbox", "fence", "clock", "queue"])
async def test_a_damaged_key_of_a_shard_is_a_typed_error_and_other_shards_go_on(
    redis_url: str, redis: Redis, name: str
) -> None:
    store = Store(redis_url, shards=2)
    await store.open()
    suffix = f"queue:{METHOD.full_name}" if name == "queue" else name
    key = f"{KEYS.base}{suffix}"
    attempt = (await store.apply(submit())).task_id
    await take(store)
    redis.delete(key)
    redis.sadd(key, "x")
    before = content_without(redis, key)
    operations_ = [
        submit(),
        operations.cancel(attempt, "", "t"),
        upkeep.sweep(0, 10),
        operations.read_task(attempt),
        operations.offer(0, 60.0, (Recipient("a1", "i1", 1, (METHOD.full_name,)),)),
    ]
    for operation in operations_:
        try:
            await store.apply(operation)
        except DamagedRecord:
            assert content_without(redis, key) == before
        before = content_without(redis, key)
    assert (await store.apply(submit(shard=1))).status == "new"
    if name == "index":
        with pytest.raises(DamagedRecord):
            await list_tasks(store, TaskFilter(), 10, "")
    assert store.up
    await store.close()


def content_without(redis: Redis, key: str) -> Dump:
    names = [
        name for name in redis.scan_iter("orki:{o0}*", count=1000) if name not in (key.encode(), b"orki:{o0}:clock")
    ]
    return {name: redis.dump(name) for name in names}


async def test_a_reply_that_cannot_be_decoded_does_not_end_the_batches(store: Store) -> None:
    def decode(reply: list[bytes]) -> None:
        raise ValueError("x")

    damaged = replace(upkeep.sweep(0, 1), outcome=decode)  # type: ignore[arg-type]
    with pytest.raises(DamagedRecord):
        await store.apply(damaged)

    def defect(reply: list[bytes]) -> None:
        raise ZeroDivisionError

    with pytest.raises(OrkiError):
        await store.apply(replace(damaged, outcome=defect))
    assert (await store.apply(submit())).status == "new"


async def test_a_defect_in_a_listener_does_not_end_the_probe(valkey: EmbeddedServer, store: Store) -> None:
    heard = []

    def listener(up: bool) -> None:
        heard.append(up)
        raise RuntimeError("a defect")

    async def check() -> None:
        if len(checks) < 2:
            checks.append(1)
            raise RuntimeError("a defect")

    checks: list[int] = []
    store.connection.on_change(listener)
    store.connection.on_recovery(check)
    store.connection.failed(store.connection.address.unavailable("a test"))
    async with asyncio.timeout(10):
        await store.connection.up.wait()
    await asyncio.sleep(0)
    assert heard == [False, True]
    assert len(checks) == 2


async def test_a_damaged_outbox_record_is_left_out(
    store: Store, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    redis.xadd(KEYS.outbox, {"r": b"\xff"})
    await store.apply(submit())
    outbox = Outbox(store)
    with caplog.at_level(logging.ERROR):
        (records,) = await outbox.read(10)
    assert [record.kind for record in records] == ["submitted"]
    assert "is damaged and is left out" in caplog.text
    await outbox.trim()
    assert redis.xlen(KEYS.outbox) == 0


# --- no memory ---


async def test_out_of_memory_what_frees_memory_goes_on(store: Store, redis: Redis) -> None:
    for count in range(150):
        await store.apply(submit(request=b"x" * 1000, key=f"{count}"))
    before = await take(store, slots=10)
    for each in before[:5]:
        await store.apply(operations.accept("a1", each.attempt))
    redis.config_set("maxmemory", 1_000_000)
    try:
        with pytest.raises(StoreFull):
            await store.apply(submit())
        with pytest.raises(StoreFull):
            await store.apply(operations.report_progress("a1", before[0].attempt, 10, 1, b"p" * 1000))
        await store.apply(operations.decline("a1", before[9].attempt, Reason.REASON_DRAINING, "", True))
        await store.apply(operations.cancel(before[8].attempt.task_id, "", "t"))
        attempts = [each.attempt for each in before[:9]]
        while offers := await take(store, slots=50):
            attempts += [each.attempt for each in offers]
        for attempt in attempts:
            assert (await store.apply(operations.succeed("a1", attempt, b"r"))).status is ReportStatus.ACCEPTED
        await store.apply(upkeep.sweep(0, 10))
        assert store.up
        listed, _ = await list_tasks(store, TaskFilter(), 200, "")
        assert [task.state for task in listed] == [TaskState.TASK_STATE_SUCCEEDED] * 150
    finally:
        redis.config_set("maxmemory", 0)
    assert (await store.apply(submit())).status == "new"


async def test_an_orchestrator_opens_a_full_store(store: Store, redis: Redis, redis_url: str) -> None:
    redis.config_set("maxmemory", 1_000_000)
    try:
        other = Store(redis_url, shards=1)
        await other.open()
        store.connection.failed(store.connection.address.unavailable("a test"))
        async with asyncio.timeout(10):
            await store.connection.up.wait()
        await other.close()
    finally:
        redis.config_set("maxmemory", 0)


# --- lists ---


@pytest.mark.parametrize(("count", "page"), [(400, 50), (400, 1), (2000, 100)])
async def test_every_page_size_lists_all_tasks_also_of_one_instant(
    store: Store, redis: Redis, count: int, page: int
) -> None:
    submitted = await asyncio.gather(*(store.apply(submit()) for _ in range(count)))
    for each in submitted:
        redis.zadd(KEYS.index, {each.task_id: 1_700_000_000_000_000})
    found: list[str] = []
    token = ""
    while True:
        tasks, token = await list_tasks(store, TaskFilter(), page, token)
        found += [task.task_id for task in tasks]
        if not token:
            break
    assert sorted(found) == sorted(each.task_id for each in submitted)


# --- a slow link ---


class SlowLink:
    """Forwards connections to a port; each carries at most `rate` bytes a second in each direction."""

    def __init__(self, target: int, rate: int) -> None:
        self._target, self._rate = target, rate
        self.sent = 0
        self._pumps: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.url = f"redis://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/0"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        for source, sink in ((reader, far_writer), (far_reader, writer)):
            self._pumps.add(asyncio.create_task(self._pump(source, sink, counted=source is reader)))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, counted: bool) -> None:
        try:
            while chunk := await reader.read(1 << 16):
                if len(chunk) > 4096:
                    await asyncio.sleep(len(chunk) / self._rate)
                self.sent += len(chunk) if counted else 0
                writer.write(chunk)
                await writer.drain()
        finally:
            writer.close()


@pytest.mark.timeout(120)
async def test_a_large_result_on_a_slow_link_is_sent_once_and_delays_nothing(valkey: EmbeddedServer) -> None:
    """64 MiB at 10 MB/s take longer than the time limit of an ordinary exchange."""
    with Redis.from_url(valkey.url) as redis:
        redis.flushall()
    port = int(valkey.url.rpartition(":")[2].partition("/")[0])
    async with SlowLink(port, 10_000_000) as link:
        store = Store(link.url, shards=1)
        await store.open()
        changes: list[bool] = []
        store.connection.on_change(changes.append)
        await store.apply(submit())
        (offered,) = await take(store)
        response = bytes(64 << 20)
        large = store.apply(operations.succeed("a1", offered.attempt, response))
        longest = await probe_while(store, large)
        assert (await large).status is ReportStatus.ACCEPTED
        assert link.sent < 1.2 * len(response)
        reading = store.apply(operations.read_task(offered.attempt.task_id))
        longest = max(longest, await probe_while(store, reading))
        view = await reading
        assert view is not None
        assert view.task.response == response
        assert longest < 1.0
        assert changes == []
        await store.close()


async def probe_while(store: Store, large: asyncio.Future[Any]) -> float:
    """Submit small tasks until a large operation has ended. Returns how long the slowest took."""
    loop = asyncio.get_running_loop()
    began, longest = loop.time(), 0.0
    while not large.done():
        asked = loop.time()
        await store.apply(submit())
        longest = max(longest, loop.time() - asked)
        await asyncio.sleep(0.05)
    assert loop.time() - began > 5.0
    return longest
