"""When shards are swept: at their timers, and otherwise rarely."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from google.protobuf.wrappers_pb2 import BytesValue
from redis import Redis

from orki_contract import Task
from orki_control import Client
from orki_server._orchestrator import Orchestrator
from orki_server._settings import OrchestratorOptions

DO: Task[Any, Any, Any, Any] = Task.declare("servertests.v1.WorkService/Do", request=BytesValue, response=BytesValue)
DELAY, TASKS = 0.06, 12
Launch = Callable[[OrchestratorOptions], Any]


def options(redis_url: str) -> OrchestratorOptions:
    return OrchestratorOptions(
        listen="127.0.0.1:0", redis_url=redis_url, shards=4, heartbeat_interval=0.2, drain_grace=0.2, sweep_interval=0.5
    )


async def test_a_timer_that_comes_soon_is_executed_at_its_time(redis_url: str, launch: Launch, stand_in: Any) -> None:
    orchestrator: Orchestrator = await launch(options(redis_url))
    agent = stand_in(orchestrator.address)
    await agent.ready()
    await asyncio.sleep(0.5)  # After a start, timers wait for the agents.
    late = []
    async with Client(orchestrator.address) as client:
        for _ in range(TASKS):
            began = time.monotonic()
            await client.call(DO, BytesValue(value=b"x"), delay=DELAY, timeout=10)
            late.append(time.monotonic() - began - DELAY)
    # A sweep twice a second would start them a quarter of a second late.
    assert sorted(late)[TASKS // 2] < 0.12, late


async def test_a_timer_sweeps_its_own_shard(redis_url: str, launch: Launch, stand_in: Any) -> None:
    orchestrator: Orchestrator = await launch(options(redis_url))
    agent = stand_in(orchestrator.address)
    await agent.ready()
    await asyncio.sleep(0.5)
    with Redis.from_url(redis_url) as redis:
        redis.config_set("slowlog-max-len", 100_000)
        redis.config_set("slowlog-log-slower-than", 0)
        redis.slowlog_reset()
        began = time.monotonic()
        async with Client(orchestrator.address) as client:
            for _ in range(TASKS):
                await client.call(DO, BytesValue(value=b"x"), delay=DELAY, timeout=10)
        took = time.monotonic() - began
        calls = [entry["command"].split(b" ") for entry in redis.slowlog_get(100_000)]
        redis.config_set("slowlog-log-slower-than", -1)
    swept = Counter(words[3] for words in calls if words[0] == b"EVALSHA" and b"sweep" in words)
    # Each shard twice a second, and one sweep for each timer, perhaps a second one that found it a moment too early.
    assert sum(swept.values()) <= 4 * (2 * took + 1) + 2 * TASKS, (swept, took)
