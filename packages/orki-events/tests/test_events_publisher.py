"""Publishing: content and order of the entries, and servers that refuse or do not answer."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from orki.events.v1.envelope_pb2 import Envelope
from orki.events.v1.usage_pb2 import UsageEvent
from orki_contract.errors import (
    EventsBufferFull,
    EventsOutOfMemory,
    EventsReadOnly,
    EventsRefused,
    EventsUnavailable,
    InvalidArgument,
    LocalProtocolError,
    OrkiError,
    TooLarge,
)
from orki_contract.trace import new_span, use_span
from orki_events import Events, Gap, GapKind, connect


def entries(server: Any, key: str) -> list[tuple[Envelope, UsageEvent]]:
    with server.client as client:
        raw = client.execute_command("XRANGE", key, "-", "+")
    return [(Envelope.FromString(fields[b"e"]), UsageEvent.FromString(fields[b"d"])) for _, fields in raw]


async def test_an_event_is_stored_with_its_envelope(server: Any, events: Events, usage: Callable[..., Any]) -> None:
    span = new_span()
    before = time.time_ns() // 1_000
    with use_span(span):
        event_id = await events.publish(usage(), UsageEvent(agent_id="a", input_tokens=7))
    ((envelope, event),) = entries(server, "orki:ev:{usage-of-tests}")
    assert (envelope.event_id, envelope.producer, envelope.sequence) == (event_id, events.producer, 1)
    assert (envelope.traceparent, envelope.parent_span_id) == (span.traceparent, span.parent_id)
    assert before <= envelope.time_us <= time.time_ns() // 1_000
    assert event == UsageEvent(agent_id="a", input_tokens=7)


async def test_many_events_keep_their_order_and_share_pipelines(
    server: Any, events: Events, usage: Callable[..., Any]
) -> None:
    ids = await events.publish_many(usage(), [UsageEvent(attempt=number) for number in range(2_000)])
    found = entries(server, "orki:ev:{usage-of-tests}")
    assert [event.attempt for _, event in found] == list(range(2_000))
    assert [envelope.event_id for envelope, _ in found] == ids
    assert [envelope.sequence for envelope, _ in found] == list(range(1, 2_001))
    assert events.counts.pipelines < 10


async def test_concurrent_single_publishes_are_batched(events: Events, usage: Callable[..., Any]) -> None:
    stream = usage()
    await asyncio.gather(*(events.publish(stream, UsageEvent(attempt=number)) for number in range(400)))
    assert events.counts.published == 400
    assert events.counts.pipelines <= 4


async def test_groups_and_registration_precede_the_first_event(
    server: Any, events: Events, usage: Callable[..., Any]
) -> None:
    await events.publish(usage(), UsageEvent())
    with server.client as client:
        groups = client.xinfo_groups("orki:ev:{usage-of-tests}")
    assert {group["name"] for group in groups} == {b"audit", b"work"}
    assert {group["last-delivered-id"] for group in groups} == {b"0-0"}
    (registered,) = await events.registered_streams()
    assert registered.contract == usage().contract
    assert registered.package == "orki.events.v1"


async def test_events_go_to_the_partition_of_their_hash(server: Any, events: Events, usage: Callable[..., Any]) -> None:
    stream = usage(partitions=4)
    agents = [f"agent-{number}" for number in range(40)]
    await events.publish_many(stream, [UsageEvent(agent_id=agent) for agent in agents])
    placed = [
        {event.agent_id for _, event in entries(server, f"orki:ev:{{usage-of-tests:{partition}}}")}
        for partition in range(4)
    ]
    assert sorted(agent for place in placed for agent in place) == sorted(agents)
    assert sum(bool(place) for place in placed) == 4


async def test_collect_works_on_other_threads(events: Events, usage: Callable[..., Any], server: Any) -> None:
    stream = usage()

    def collect() -> None:
        for number in range(200):
            events.collect(stream, UsageEvent(attempt=number))

    threads = [threading.Thread(target=collect) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        await asyncio.sleep(0.01)
    await events.flush()
    found = entries(server, "orki:ev:{usage-of-tests}")
    assert len(found) == 800
    assert sorted(envelope.sequence for envelope, _ in found) == list(range(1, 801))


async def test_a_full_buffer_refuses_to_collect_and_makes_publish_wait(
    opened: Callable[..., Any], usage: Callable[..., Any]
) -> None:
    events = await opened(buffer_entries=10)
    stream = usage()
    for _ in range(10):
        events.collect(stream, UsageEvent())
    with pytest.raises(EventsBufferFull, match="10 events"):
        events.collect(stream, UsageEvent())
    assert len(await events.publish_many(stream, [UsageEvent()] * 50)) == 50
    assert events.counts.published == 60


async def test_invalid_events_are_refused_at_once(opened: Callable[..., Any], usage: Callable[..., Any]) -> None:
    events = await opened(max_event_bytes=100)
    with pytest.raises(InvalidArgument, match=r"takes orki\.events\.v1\.UsageEvent, not Envelope"):
        await events.publish(usage(), Envelope())  # type: ignore[type-var]
    with pytest.raises(TooLarge, match="more than 100"):
        await events.publish(usage(), UsageEvent(model="x" * 200))
    with pytest.raises(InvalidArgument, match="16 bytes"):
        await events.publish(usage(), UsageEvent(), event_id=b"short")
    assert events.counts.published == 0


async def test_a_closed_publisher_refuses_events(server: Any, usage: Callable[..., Any]) -> None:
    async with connect(server.url) as events:
        events.collect(usage(), UsageEvent())
    with server.client as client:
        assert client.xlen("orki:ev:{usage-of-tests}") == 1
    with pytest.raises(LocalProtocolError, match="async with"):
        events.collect(usage(), UsageEvent())
    with pytest.raises(LocalProtocolError, match="async with"):
        await events.publish(usage(), UsageEvent())


async def test_entries_are_trimmed_by_number_and_by_age(
    server: Any, opened: Callable[..., Any], usage: Callable[..., Any]
) -> None:
    events = await opened()
    await events.publish_many(usage("many", max_entries=100), [UsageEvent()] * 5_000)
    old = usage("old", max_age=0.001)
    await events.publish_many(old, [UsageEvent()] * 500)
    await asyncio.sleep(1.1)
    await events.publish(old, UsageEvent())
    with server.client as client:
        assert 100 <= client.xlen("orki:ev:{many}") < 400
        assert client.xlen("orki:ev:{old}") < 200


@pytest.mark.parametrize(
    ("spoil", "mend", "error"),
    [
        (("CONFIG", "SET", "maxmemory", "1"), ("CONFIG", "SET", "maxmemory", "0"), EventsOutOfMemory),
        (("REPLICAOF", "127.0.0.1", "1"), ("REPLICAOF", "NO", "ONE"), EventsReadOnly),
        (
            ("CONFIG", "SET", "min-replicas-to-write", "1"),
            ("CONFIG", "SET", "min-replicas-to-write", "0"),
            EventsReadOnly,
        ),
    ],
    ids=["out of memory", "read only", "no replicas"],
)
async def test_publishing_waits_for_a_server_that_accepts_no_writes(
    spoil: tuple[str, ...], mend: tuple[str, ...], error: type[OrkiError], own_server: Any, opened: Any, usage: Any
) -> None:
    server = own_server()
    stream = usage()
    hasty = await opened(at=server, publish_timeout=0.3)
    patient = await opened(at=server, publish_timeout=30)
    await hasty.publish(stream, UsageEvent())
    with server.client as client:
        client.execute_command(*spoil)
        with pytest.raises(error, match=r"not published within 0\.3 s"):
            await hasty.publish(stream, UsageEvent(attempt=1))
        waiting = asyncio.create_task(patient.publish(stream, UsageEvent(attempt=2)))
        await asyncio.sleep(0.3)
        assert not waiting.done()
        client.execute_command(*mend)
    assert await asyncio.wait_for(waiting, 20)
    assert [event.attempt for _, event in entries(server, "orki:ev:{usage-of-tests}")] == [0, 2]


async def test_an_unreachable_server_raises_and_is_reported(
    gaps: list[Gap], opened: Any, own_server: Any, usage: Any
) -> None:
    server = own_server()
    server.kill()
    events = await opened(at=server, publish_timeout=0.2)
    events.collect(usage(), UsageEvent())
    with pytest.raises(EventsUnavailable, match="does not answer"):
        await events.publish(usage(), UsageEvent())
    await events.flush()
    assert (events.counts.refused, events.counts.abandoned) == (1, 1)
    assert [(gap.kind, gap.count) for gap in gaps] == [(GapKind.PUBLISH_ABANDONED, 1)]


async def test_a_key_of_another_type_fails_without_retries(
    server: Any, events: Events, usage: Callable[..., Any]
) -> None:
    with server.client as client:
        client.set("orki:ev:{usage-of-tests}", "in the way")
    with pytest.raises(EventsRefused, match="WRONGTYPE"):
        await asyncio.wait_for(events.publish(usage(), UsageEvent()), 10)
    assert events.counts.refused == 1


async def test_a_wrong_password_fails_at_once_and_is_not_shown(own_server: Any, usage: Callable[..., Any]) -> None:
    server = own_server()
    with server.client as client:
        client.config_set("requirepass", "right")
    async with connect(f"redis://:wrong-secret@127.0.0.1:{server.port}") as events:
        with pytest.raises(EventsRefused) as caught:
            await asyncio.wait_for(events.publish(usage(), UsageEvent()), 10)
    assert "wrong-secret" not in str(caught.value)
    async with connect(server.url, password="right") as events:
        assert await events.publish(usage(), UsageEvent())


async def test_events_whose_replies_were_lost_are_found_and_not_repeated(
    server: Any, proxy: Any, opened: Any, usage: Callable[..., Any], until: Callable[..., Any]
) -> None:
    stream = usage()
    events = await opened(at=proxy)
    await events.publish(stream, UsageEvent())
    proxy.lose_answers = True
    publishing = asyncio.create_task(
        events.publish_many(stream, [UsageEvent(attempt=number) for number in range(1, 50)])
    )
    with server.client as client:
        await until(lambda: client.xlen("orki:ev:{usage-of-tests}") == 50)
    # Other connections lose answers too.
    await until(lambda: proxy.lost)
    await asyncio.sleep(0.3)
    proxy.lose_answers = False
    await asyncio.wait_for(publishing, 20)
    assert [event.attempt for _, event in entries(server, "orki:ev:{usage-of-tests}")] == list(range(50))
    assert (events.counts.published, events.counts.found, events.counts.repeated) == (50, 49, 0)
