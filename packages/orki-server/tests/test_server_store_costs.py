"""What each transition costs in Redis: commands and log, as docs/keys.md states them."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from orki.errors.v1.errors_pb2 import Reason
from orki_contract.model import Backoff, TaskMethod
from orki_contract.trace import new_span
from orki_control.session import AttemptKey
from orki_server._store import operations, upkeep
from orki_server._store.operations import Operation, Recipient, new_task_id
from orki_server._store.store import Store
from orki_server.embedded import EmbeddedOptions, EmbeddedServer

PAGE = Path(__file__).parents[3] / "docs" / "keys.md"
METHOD = TaskMethod(service="acme.v1.WorkService", name="Do", request="q", response="r", backoff=Backoff(initial=0.001))
AGENT, BATCH = "agent-1", 50
MEMORY = 1_500
"""Maximum bytes of a finished task without payload."""


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[Redis]:
    """A server that logs every write."""
    options = EmbeddedOptions(directory=tmp_path, append_only=True)
    with EmbeddedServer(options) as server, Redis.from_url(server.url) as connection:
        yield connection


@pytest.fixture
async def store(redis: Redis) -> AsyncIterator[Store]:
    values = redis.connection_pool.connection_kwargs
    opened = Store(f"redis://{values['host']}:{values['port']}/0", shards=1)
    await opened.open()
    opened.event_limits = (100_000, 100_000)
    yield opened
    await opened.close()


def submit() -> Operation[Any]:
    return operations.submit(
        task_id=new_task_id(0),
        method=METHOD,
        request=b"",
        digest="0" * 64,
        idempotency_key="",
        span=new_span(),
        actor="tester",
        contract="sha256:" + "0" * 64,
    )


def costs(redis: Redis) -> tuple[int, int]:
    """Return the commands that scripts have called, and the size of the log."""
    commands: Any = redis.info("commandstats")
    log: Any = redis.info("persistence")
    others = ("eval", "evalsha", "info", "script", "client", "hello", "auth", "config", "xtrim")
    called = {name.removeprefix("cmdstat_"): row["calls"] for name, row in commands.items()}
    return sum(calls for name, calls in called.items() if name.partition("|")[0] not in others), log["aof_current_size"]


async def measured(store: Store, redis: Redis, *batches: list[Operation[Any]]) -> tuple[int, int, list[Any]]:
    """Apply operations in one batch. Returns commands, bytes of the log, and the outcomes."""
    commands, log = costs(redis)
    outcomes = await asyncio.gather(*(store.apply(each) for batch in batches for each in batch))
    after, log_after = costs(redis)
    return after - commands, log_after - log, outcomes


async def run(store: Store, redis: Redis, count: int) -> dict[str, tuple[int, int]]:
    """Bring `count` tasks through their life, each step in one batch. Returns commands and bytes of each step."""
    found: dict[str, tuple[int, int]] = {}

    async def step(name: str, *batches: list[Operation[Any]]) -> list[Any]:
        commands, log, outcomes = await measured(store, redis, *batches)
        found[name] = (commands, log)
        return outcomes

    async def offered(name: str) -> list[AttemptKey]:
        recipient = Recipient(AGENT, "1f0c", count, (METHOD.full_name,))
        (assigned,) = await step(name, [operations.offer(0, 60.0, (recipient,))])
        assert len(assigned.offers) == count
        return [each.attempt for each in assigned.offers]

    await step("submit", [submit() for _ in range(count)])
    keys = await offered("offer")
    await step("accept", [operations.accept(AGENT, key) for key in keys])
    await step("progress", [operations.report_progress(AGENT, key, 100, 1, b"") for key in keys])
    await step("heartbeat", [operations.renew(0, AGENT, keys)])
    fails = [operations.fail(AGENT, key, Reason.REASON_HANDLER_FAILED, "", "", True) for key in keys]
    await step("failure that is retried", fails)
    await asyncio.sleep(0.01)
    await step("end of the wait", [upkeep.sweep(0, count)])
    keys = await offered("another offer")
    await store.apply(operations.renew(0, AGENT, keys))
    await asyncio.gather(*(store.apply(operations.accept(AGENT, key)) for key in keys))
    await step("result", [operations.succeed(AGENT, key, b"") for key in keys])
    await asyncio.gather(*(store.apply(submit()) for _ in range(count)))
    keys = await offered("another offer")
    accepts = [operations.accept(AGENT, key) for key in keys]
    results = [operations.succeed(AGENT, key, b"") for key in keys]
    await step("accept and result in one batch", accepts, results)
    recipient = Recipient(AGENT, "1f0c", count, (METHOD.full_name,))
    submissions = [submit() for _ in range(count)]
    await step("submit and offer in one batch", submissions, [operations.offer(0, 60.0, (recipient,))])
    del found["another offer"]
    return found


async def test_the_page_states_what_each_transition_costs(store: Store, redis: Redis) -> None:
    await store.apply(upkeep.sweep(0, 0))
    alone, many = await run(store, redis, 1), await run(store, redis, BATCH)
    page = PAGE.read_text(encoding="utf-8")
    rows = {row[0]: row[1:] for row in re.findall(r"^\| ([a-z ]+) \| (\d+) \| ([\d.]+) \| (\d+) \|$", page, flags=re.M)}
    stated = {
        name: f"| {name} | {alone[name][0]} | {many[name][0] / BATCH:.1f} | {many[name][1] / BATCH:.0f} |"
        for name in alone
    }
    assert list(rows) == list(alone), "\n".join(stated.values())
    for name, (commands, per_task, size) in rows.items():
        # The size varies by some digits.
        assert (int(commands), float(per_task)) == (alone[name][0], round(many[name][0] / BATCH, 1)), stated[name]
        assert many[name][1] / BATCH <= int(size) * 1.02, stated[name]


async def test_a_finished_task_needs_little_memory(store: Store, redis: Redis) -> None:
    async def finish(count: int) -> None:
        await asyncio.gather(*(store.apply(submit()) for _ in range(count)))
        left = count
        while left:
            recipient = Recipient(AGENT, "1f0c", left, (METHOD.full_name,))
            offers = (await store.offer(operations.offer(0, 60.0, (recipient,)))).offers
            await asyncio.gather(*(store.apply(operations.accept(AGENT, each.attempt)) for each in offers))
            await asyncio.gather(*(store.apply(operations.succeed(AGENT, each.attempt, b"")) for each in offers))
            left -= len(offers)
        for stream in ("tasks", "audit"):
            redis.xtrim(f"orki:ev:{{{stream}}}", maxlen=0, approximate=False)

    await finish(100)
    before = redis.info("memory")["used_memory"]  # type: ignore[index]
    await finish(2000)
    assert (redis.info("memory")["used_memory"] - before) / 2000 < MEMORY  # type: ignore[index, operator]
