"""Dead letters: a retention of their own, whole events, and one replay."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from orki.events.v1.usage_pb2 import UsageEvent
from orki_contract.errors import HandlerRejected
from orki_contract.model import AUDIT_GROUP
from orki_events import Delivery, Events, Gap, GapKind, GroupLedger, consumer

KEY = "orki:ev:{usage-of-tests}"
LETTERS = "orki:ev:{usage-of-tests.work.dead}"


def numbered(count: int) -> list[UsageEvent]:
    return [UsageEvent(agent_id=f"agent-{number}", attempt=number) for number in range(count)]


async def consume(
    events: Events, stream: Any, until: Callable[..., Any], group: str = "work", *, reject: bool = False
) -> Counter[int]:
    """Run a consumer until its group has nothing left, and return the numbers of the events that it got."""
    got: Counter[int] = Counter()
    stop = asyncio.Event()

    @consumer(stream, group=group, concurrency=16)
    async def on_usage(event: UsageEvent, delivery: Delivery[UsageEvent]) -> None:
        got[event.attempt] += 1
        if reject:
            raise HandlerRejected("no")

    running = asyncio.create_task(events.run(on_usage, stop=stop))
    try:
        while True:
            ledger = (await events.ledger(stream)).groups[group]
            if ledger.pending == ledger.unread == 0:
                return got
            assert not running.done(), running
            await asyncio.sleep(0.05)
    finally:
        stop.set()
        await asyncio.wait_for(running, 30)


async def test_letters_are_kept_beyond_the_retention_of_their_stream(
    server: Any, events: Events, usage: Any, until: Any
) -> None:
    stream = usage(max_entries=200)
    for _ in range(5):
        await events.publish_many(stream, numbered(200))
        await consume(events, stream, until, reject=True)
    with server.client as client:
        assert client.xlen(LETTERS) == 1_000
        assert client.xlen(KEY) < 400
    work = (await events.ledger(stream)).groups["work"]
    assert (work.processed, work.dead_lettered, work.declared_lost) == (0, 1_000, 0)


@pytest.mark.parametrize("partitions", [1, 3])
async def test_letters_that_their_retention_drops_are_declared_lost(
    server: Any, events: Events, usage: Any, until: Any, gaps: list[Gap], partitions: int
) -> None:
    stream = usage(partitions=partitions, max_dead_letters=50)
    await events.publish_many(stream, numbered(300))
    await consume(events, stream, until, reject=True)
    with server.client as client:
        assert client.xlen(LETTERS) == 50
    dropped = [gap for gap in gaps if gap.kind is GapKind.LETTERS_DROPPED]
    assert sum(gap.count or 0 for gap in dropped) == 250
    assert {(gap.stream, gap.group) for gap in dropped} == {("usage-of-tests", "work")}
    work = (await events.ledger(stream)).groups["work"]
    assert work == GroupLedger(processed=0, dead_lettered=50, declared_lost=250)


async def test_letters_replay_after_their_entries_were_trimmed(
    server: Any, events: Events, usage: Any, until: Any
) -> None:
    stream = usage()
    await events.publish_many(stream, numbered(50))
    assert len(await consume(events, stream, until, "audit")) == 50
    await consume(events, stream, until, reject=True)
    with server.client as client:
        client.xtrim(KEY, maxlen=0, approximate=False)
    letters = await events.dead_letters(stream, group="work")
    assert await events.replay(stream, group="work", letters=letters) == [letter.letter_id for letter in letters]
    assert await consume(events, stream, until) == Counter(range(50))
    assert await events.dead_letters(stream, group="work") == []
    # The events concern no other group, not even one that has not read them yet.
    assert await consume(events, stream, until, "audit") == Counter()


async def test_a_replayed_event_that_fails_again_is_a_letter_again(
    server: Any, events: Events, usage: Any, until: Any
) -> None:
    stream = usage()
    await events.publish_many(stream, numbered(3))
    await consume(events, stream, until, reject=True)
    with server.client as client:
        client.xtrim(KEY, maxlen=0, approximate=False)
    for _ in range(2):
        letters = await events.dead_letters(stream, group="work")
        assert [letter.event and letter.event.attempt for letter in letters] == [0, 1, 2]
        await events.replay(stream, group="work", letters=letters)
        await consume(events, stream, until, reject=True)


@pytest.mark.parametrize("trimmed", [False, True])
async def test_a_letter_is_replayed_once(
    server: Any, events: Events, opened: Any, usage: Any, until: Any, trimmed: bool
) -> None:
    stream, other = usage(), await opened()
    await events.publish_many(stream, numbered(40))
    await consume(events, stream, until, reject=True)
    if trimmed:
        with server.client as client:
            client.xtrim(KEY, maxlen=0, approximate=False)
    letters = await events.dead_letters(stream, group="work")
    done = await asyncio.gather(
        *(each.replay(stream, group="work", letters=letters) for each in (events, other) for _ in range(3))
    )
    assert sorted(letter for each in done for letter in each) == sorted(letter.letter_id for letter in letters)
    assert await consume(events, stream, until) == Counter(range(40))
    assert await events.replay(stream, group="work", letters=letters) == []
    assert await consume(events, stream, until) == Counter()


async def test_groups_that_share_a_letter_stream_lose_their_own_letters(
    server: Any, events: Events, usage: Any, until: Any
) -> None:
    stream = usage(max_dead_letters=60, dead_letter="shared.dead")
    shared = stream.with_groups(AUDIT_GROUP, stream.contract.group("work"))
    await events.publish_many(shared, numbered(100))
    await consume(events, shared, until, reject=True)
    assert len(await events.dead_letters(shared, group="work")) == 60
    work = (await events.ledger(shared)).groups["work"]
    assert (work.dead_lettered, work.declared_lost) == (60, 40)
