"""The ledger, dead letters and their replay, and tails."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from orki.events.v1.usage_pb2 import UsageEvent
from orki_contract.errors import EventUndecodable, InvalidArgument, UnknownGroup
from orki_contract.model import Backoff, Group, Start
from orki_events import ConsumeOptions, Delivery, Events, GroupLedger, consumer

KEY = "orki:ev:{usage-of-tests}"
QUICK = ConsumeOptions(backoff=Backoff(initial=0.01, maximum=0.05), sweep_interval=0.1)


def numbered(count: int, start: int = 0) -> list[UsageEvent]:
    return [UsageEvent(attempt=number) for number in range(start, start + count)]


async def consume(events: Events, stream: Any, group: str, until: Any, bad: tuple[int, ...] = ()) -> list[int]:
    """Consume until nothing is left; `bad` events are rejected."""
    got: list[int] = []
    stop = asyncio.Event()

    @consumer(stream, group=group, options=QUICK)
    async def on_usage(event: UsageEvent, delivery: Delivery[UsageEvent]) -> None:
        if event.attempt in bad:
            raise ValueError("bad")
        got.append(event.attempt)

    running = asyncio.create_task(events.run(on_usage, stop=stop))
    end = asyncio.get_running_loop().time() + 30
    while True:
        ledger = (await events.ledger(stream)).groups[group]
        if ledger.pending == ledger.unread == 0:
            break
        assert asyncio.get_running_loop().time() < end
        await asyncio.sleep(0.05)
    stop.set()
    await asyncio.wait_for(running, 20)
    return got


async def test_every_event_is_in_the_ledger_once(server: Any, events: Events, usage: Any, until: Any) -> None:
    stream = usage(partitions=2)
    await events.publish_many(stream, [UsageEvent(agent_id=str(number), attempt=number) for number in range(100)])
    repeated = await events.publish(stream, UsageEvent(agent_id="x", attempt=500))
    await events.publish(stream, UsageEvent(agent_id="x", attempt=500), event_id=repeated)
    first = await events.ledger(stream)
    assert (first.published, first.repeated, first.missing, first.exact) == (101, 1, 0, True)
    assert first.groups["work"] == GroupLedger(processed=0, dead_lettered=0, declared_lost=0, unread=101)
    assert len(await consume(events, stream, "work", until, bad=(7, 8))) == 99
    ledger = await events.ledger(stream)
    assert ledger.groups["work"] == GroupLedger(processed=99, dead_lettered=2, declared_lost=0)
    assert ledger.groups["audit"] == GroupLedger(processed=0, dead_lettered=0, declared_lost=0, unread=101)


@pytest.mark.parametrize("kept", [100, 30], ids=["all kept", "some trimmed"])
async def test_events_that_are_delivered_again_are_in_the_ledger_once(
    server: Any, events: Events, usage: Any, until: Any, kept: int
) -> None:
    stream = usage()
    await events.publish_many(stream, numbered(100))
    await consume(events, stream, "work", until, bad=(7, 95))
    with server.client as client:
        client.xtrim(KEY, kept, approximate=False)
        # The saved position of the group lies before the entries that it has acknowledged since.
        first = client.xrange(KEY, count=1)[0][0].decode()
        client.xgroup_destroy(KEY, "work")
        client.xgroup_create(KEY, "work", first)
    assert len(await consume(events, stream, "work", until, bad=(7, 95))) >= kept - 3
    ledger = await events.ledger(stream)
    assert ledger.published == 100
    assert ledger.groups["work"].unaccounted == 0
    assert ledger.groups["work"].declared_lost == 0
    if kept == 100:  # Otherwise, a counter that cannot tell repeated letters is all that is known.
        assert ledger.groups["work"].dead_lettered == 2


async def test_a_late_group_counts_earlier_events_as_before_start(events: Events, usage: Any, until: Any) -> None:
    stream = usage()
    await events.publish_many(stream, numbered(10))
    late = stream.with_groups(Group(name="late", start=Start.LATEST))
    await events.prepare(late)
    await events.publish_many(stream, numbered(5, start=10))
    assert sorted(await consume(events, late, "late", until)) == list(range(10, 15))
    ledger = await events.ledger(stream)
    assert ledger.groups["late"] == GroupLedger(processed=5, dead_lettered=0, declared_lost=0, before_start=10)
    assert ledger.dump()["groups"]["late"] == {
        "processed": 5,
        "dead_lettered": 0,
        "declared_lost": 0,
        "before_start": 10,
    }


async def test_entries_trimmed_before_they_were_read_are_declared_lost(
    server: Any, events: Events, usage: Any, until: Any
) -> None:
    stream = usage()
    await events.publish_many(stream, numbered(10))
    assert len(await consume(events, stream, "audit", until)) == 10
    await events.publish_many(stream, numbered(10, start=10))
    with server.client as client:
        client.xtrim(KEY, maxlen=4, approximate=False)
    assert sorted(await consume(events, stream, "work", until)) == [16, 17, 18, 19]
    assert sorted(await consume(events, stream, "audit", until)) == [16, 17, 18, 19]
    ledger = await events.ledger(stream)
    assert (ledger.published, ledger.trimmed, ledger.exact) == (20, 16, False)
    assert ledger.groups["work"] == GroupLedger(processed=4, dead_lettered=0, declared_lost=16)
    assert ledger.groups["audit"] == GroupLedger(processed=14, dead_lettered=0, declared_lost=6)


async def test_an_event_that_never_arrived_is_missing(events: Events, server: Any, usage: Any) -> None:
    stream = usage()
    await events.publish_many(stream, numbered(3))
    with server.client as client:
        ids = [entry_id for entry_id, _ in client.xrange(KEY)]
        client.execute_command("XDEL", KEY, ids[1])
        # As if it had never arrived: after a rollback, the server's count of deleted entries is not available.
        if int(client.info("server")["redis_version"].split(".")[0]) >= 7:
            client.execute_command("XSETID", KEY, ids[2], "ENTRIESADDED", 2, "MAXDELETEDID", "0-0")
    ledger = await events.ledger(stream)
    assert (ledger.published, ledger.missing) == (2, 1)


async def test_dead_letters_are_listed_and_replayed_to_their_group_alone(
    events: Events, usage: Any, until: Callable[..., Any]
) -> None:
    stream = usage()
    await events.publish_many(stream, numbered(6))
    assert sorted(await consume(events, stream, "work", until, bad=(2, 4))) == [0, 1, 3, 5]
    assert len(await consume(events, stream, "audit", until)) == 6
    letters = await events.dead_letters(stream, group="work")
    assert [letter.event and letter.event.attempt for letter in letters] == [2, 4]
    assert {letter.reason.message for letter in letters} == {"ValueError: bad"}
    assert (await events.ledger(stream)).groups["work"] == GroupLedger(processed=4, dead_lettered=2, declared_lost=0)
    assert await events.dead_letters(stream, group="audit") == []
    raw = await events.raw_dead_letters(stream.contract, group="work", after=letters[0].letter_id)
    assert [letter.event for letter in raw] == [UsageEvent(attempt=4).SerializeToString()]
    assert await events.replay(stream, group="work", letters=letters) == [letter.letter_id for letter in letters]
    assert await events.dead_letters(stream, group="work") == []
    # A process remembers the ids of processed events, not of failed ones.
    assert sorted(await consume(events, stream, "work", until)) == [2, 4]
    ledger = await events.ledger(stream)
    assert ledger.groups["work"] == ledger.groups["audit"] == GroupLedger(processed=6, dead_lettered=0, declared_lost=0)
    with pytest.raises(UnknownGroup):
        await events.dead_letters(stream, group="nobody")


@pytest.mark.parametrize("partitions", [1, 3])
async def test_a_tail_continues_after_a_cursor(partitions: int, events: Events, usage: Any) -> None:
    stream = usage(partitions=partitions)
    await events.publish_many(stream, [UsageEvent(agent_id=str(number), attempt=number) for number in range(20)])
    seen = []
    cursor = ""
    async for entry in events.tail(stream, after="earliest", follow=False):
        seen.append(entry.event.attempt)
        cursor = entry.cursor
        if len(seen) == 8:
            break
    async for entry in events.tail(stream, after=cursor, follow=False):
        seen.append(entry.event.attempt)
    assert sorted(seen) == list(range(20))


async def test_a_tail_from_the_latest_waits_for_new_events(events: Events, usage: Any) -> None:
    stream = usage()
    await events.publish(stream, UsageEvent(attempt=1))
    got = []

    async def follow() -> None:
        async for entry in events.tail(stream):
            got.append((entry.event.attempt, entry.envelope.sequence, len(entry.event_id)))
            return

    following = asyncio.create_task(follow())
    for attempt in range(2, 400):
        await events.publish(stream, UsageEvent(attempt=attempt))
        if following.done():
            break
        await asyncio.sleep(0.01)
    await asyncio.wait_for(following, 20)
    ((attempt, sequence, length),) = got
    assert attempt == sequence
    assert attempt >= 2
    assert length == 16


async def test_a_tail_survives_undecodable_entries_and_refuses_invalid_cursors(
    server: Any, events: Events, usage: Any
) -> None:
    stream = usage()
    await events.publish(stream, UsageEvent(attempt=1))
    with server.client as client:
        client.xadd(KEY, {"strange": "fields"})
    entries = [entry async for entry in events.tail(stream, after="earliest", follow=False)]
    assert entries[0].event == UsageEvent(attempt=1)
    with pytest.raises(EventUndecodable, match="lacks the field e or d"):
        _ = entries[1].event
    for cursor in ("yesterday", "1-1_2-2", "99999999999999999999-1"):
        with pytest.raises(InvalidArgument):
            async for _ in events.tail(stream, after=cursor):
                pass
