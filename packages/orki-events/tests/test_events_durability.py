"""Durability of streams: what a published event survives, and servers that cannot keep it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from orki.events.v1.usage_pb2 import UsageEvent
from orki_contract import EventStream
from orki_contract.errors import EventsReadOnly, EventsRefused
from orki_contract.model import Durability


def durable(stream: EventStream[UsageEvent, Any], durability: Durability, replicas: int = 0) -> Any:
    """Return the stream with a durability."""
    return EventStream(UsageEvent, replace(stream.contract, durability=durability, replicas=replicas))


@pytest.mark.parametrize("policy", ["always", "everysec"])
async def test_an_event_with_fsync_survives_a_crash_at_once(
    own_server: Any, opened: Callable[..., Any], usage: Any, policy: str
) -> None:
    server = own_server("--appendonly", "yes", "--appendfsync", policy)
    events, stream = await opened(at=server), durable(usage(), Durability.FSYNC)
    await asyncio.wait_for(events.publish_many(stream, [UsageEvent(attempt=number) for number in range(700)]), 30)
    server.kill()
    server.start()
    with server.client as client:
        assert client.xlen("orki:ev:{usage-of-tests}") == 700


async def test_a_wait_for_the_disk_delays_no_other_stream(own_server: Any, opened: Any, usage: Any) -> None:
    server = own_server("--appendonly", "yes", "--appendfsync", "everysec")
    events, stream, other = await opened(at=server), durable(usage("durable"), Durability.FSYNC), usage("other")
    await events.publish(other, UsageEvent())
    waiting = asyncio.create_task(events.publish(stream, UsageEvent()))
    await asyncio.sleep(0.1)
    begun = time.monotonic()
    for _ in range(20):
        await events.publish(other, UsageEvent())
    taken = time.monotonic() - begun
    assert not waiting.done() or taken < 0.5
    await asyncio.wait_for(waiting, 20)
    assert events.counts.published == 22


@pytest.mark.parametrize(
    ("settings", "says"),
    [((), "needs appendonly"), (("--appendonly", "yes", "--appendfsync", "no"), "appendfsync no")],
    ids=["without a file", "without flushes"],
)
async def test_a_server_that_cannot_flush_is_refused_with_a_reason(
    own_server: Any, opened: Any, usage: Any, settings: tuple[str, ...], says: str
) -> None:
    server = own_server(*settings)
    events = await opened(at=server)
    with pytest.raises(EventsRefused, match=says):
        await asyncio.wait_for(events.publish(durable(usage(), Durability.FSYNC), UsageEvent()), 20)
    with server.client as client:
        assert client.xlen("orki:ev:{usage-of-tests}") == 0


async def test_an_event_is_published_when_replicas_have_it(own_server: Any, opened: Any, usage: Any) -> None:
    server = own_server()
    events, stream = await opened(at=server, publish_timeout=1.5), durable(usage(), Durability.REPLICAS, 1)
    with pytest.raises(EventsReadOnly, match="0 of the 1 replicas"):
        await asyncio.wait_for(events.publish(stream, UsageEvent(attempt=1)), 20)
    replica = own_server("--replicaof", "127.0.0.1", str(server.port))
    patient = await opened(at=server, publish_timeout=60)
    await asyncio.wait_for(patient.publish(stream, UsageEvent(attempt=2)), 60)
    server.kill()
    with replica.client as client:
        (entry,) = client.xrange("orki:ev:{usage-of-tests}")
    assert UsageEvent.FromString(entry[1][b"d"]).attempt == 2
