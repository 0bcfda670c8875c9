"""A deployment's retention settings, within the contract's bounds, on a real server."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from orki.events.v1.tool_orki import TOOLS
from orki.events.v1.tool_pb2 import ToolEvent
from orki.events.v1.usage_pb2 import UsageEvent
from orki_contract import EventStream
from orki_contract.errors import InvalidSetting, UnknownStream
from orki_contract.model import Retention
from orki_events import Events, Tuned, Tuning
from orki_events.tuning import TuningCache, effective_retention

KEY = "orki:ev:{bounded}"
NODE = 100
"""Entries of one node of a stream (`stream-node-max-entries`): trimming is exact to about this number."""
BOUNDED = Retention(max_entries=2_000, least_entries=200, most_entries=6_000)

Bounded = Callable[..., EventStream[UsageEvent, Any]]


@pytest.fixture
def bounded(usage: Callable[..., Any]) -> Bounded:
    """Create a stream that a deployment may tune."""

    def make(retention: Retention = BOUNDED, **others: Any) -> EventStream[UsageEvent, Any]:
        made: EventStream[UsageEvent, Any] = usage("bounded", **others)
        return replace(made, contract=replace(made.contract, retention=retention))

    return make


def length(server: Any, key: str = KEY) -> int:
    with server.client as client:
        return int(client.xlen(key))


async def publish(events: Events, stream: EventStream[UsageEvent, Any], count: int) -> None:
    await events.publish_many(stream, [UsageEvent()] * count)


async def test_a_lower_retention_trims_at_once_and_afterwards(
    server: Any, opened: Callable[..., Any], bounded: Bounded, until: Any
) -> None:
    running, operator, stream = await opened(), await opened(), bounded()
    await publish(running, stream, 3_000)
    assert 2_000 <= length(server) < 2_000 + 2 * NODE
    tuned = await operator.tune("bounded", Tuning(max_entries=300))
    assert tuned.retention.max_entries == 300
    assert tuned.trimmed >= 2_000 - 300 - 2 * NODE
    assert 300 <= length(server) < 300 + 2 * NODE
    # A running publisher reads the setting within seconds, a new one before its first event.
    for _ in range(100):
        await publish(running, stream, 500)
        if length(server) < 300 + 2 * NODE:
            break
        await asyncio.sleep(0.1)
    assert 300 <= length(server) < 300 + 2 * NODE
    await publish(await opened(), stream, 500)
    assert 300 <= length(server) < 300 + 2 * NODE
    assert await operator.tunings() == {"bounded": Tuning(max_entries=300)}


async def test_a_higher_retention_keeps_more(server: Any, opened: Callable[..., Any], bounded: Bounded) -> None:
    operator, stream = await opened(), bounded()
    await operator.prepare(stream)
    assert await operator.tune(stream, Tuning(max_entries=5_000)) == Tuned(
        retention=replace(BOUNDED, max_entries=5_000), trimmed=0
    )
    await publish(await opened(), stream, 4_000)
    assert length(server) == 4_000
    # The first event of a new publisher must not trim entries that others keep.
    await publish(await opened(), stream, 1)
    assert length(server) == 4_001
    back = await operator.tune(stream, None)
    assert back.retention == BOUNDED
    assert 2_000 <= length(server) < 2_000 + 2 * NODE
    assert await operator.tunings() == {}


async def test_the_maximum_age_can_be_tuned(server: Any, opened: Callable[..., Any], bounded: Bounded) -> None:
    aged = Retention(max_entries=10_000, max_age=3600.0, least_age=0.001, most_age=7200.0)
    operator, stream = await opened(), bounded(aged, partitions=2)
    await publish(operator, stream, 500)
    await asyncio.sleep(0.05)
    tuned = await operator.tune(stream, Tuning(max_age=0.001))
    assert (tuned.retention.max_age, tuned.retention.max_entries) == (0.001, 10_000)
    assert tuned.trimmed >= 500 - 2 * NODE
    publisher = await opened()
    await publish(publisher, stream, 500)
    await asyncio.sleep(1.1)
    await publish(publisher, stream, 1)
    assert sum(length(server, f"orki:ev:{{bounded:{part}}}") for part in range(2)) < 300


@pytest.mark.parametrize(
    ("tuning", "says"),
    [
        (Tuning(max_entries=9_999), ["max_entries of 9999", "10000 to 10000000", "least_entries and most_entries"]),
        (Tuning(max_entries=10_000_001), ["max_entries of 10000001", "10000 to 10000000"]),
        (Tuning(max_age=3599.999), ["max_age of 3599999 ms", "3600000 ms to 2592000000 ms"]),
        (Tuning(max_entries=20_000, max_age=2592000.001), ["max_age of 2592000001 ms"]),
    ],
)
async def test_values_outside_the_bounds_are_refused_and_not_stored(
    server: Any, events: Events, tuning: Tuning, says: list[str]
) -> None:
    await events.publish(TOOLS, ToolEvent())
    with pytest.raises(InvalidSetting) as caught:
        await events.tune(TOOLS, tuning)
    for each in ('stream "tools"', "orki.events.v1.ToolEvent in orki/events/v1/tool.proto", *says):
        assert each in caught.value.message
    assert await events.tunings() == {}
    assert length(server, "orki:ev:{tools}") == 1


async def test_a_stream_without_bounds_cannot_be_tuned(events: Events, bounded: Bounded) -> None:
    await events.prepare(bounded(Retention(max_entries=10)))
    with pytest.raises(InvalidSetting, match="its contract fixes it at"):
        await events.tune("bounded", Tuning(max_entries=11))
    with pytest.raises(InvalidSetting, match="does not limit the age"):
        await events.tune("bounded", Tuning(max_age=0.011))
    with pytest.raises(UnknownStream, match="registered: bounded"):
        await events.tune("unbounded", Tuning(max_entries=11))


@pytest.mark.parametrize("value", [-1, 1.5, True, "1", None, 1 << 63])
def test_an_invalid_number_of_entries_is_refused(value: Any) -> None:
    with pytest.raises(InvalidSetting, match="max_entries is"):
        Tuning(max_entries=value)


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), True, "1", None, 1 << 63])
def test_an_invalid_age_is_refused(value: Any) -> None:
    with pytest.raises(InvalidSetting, match="max_age is"):
        Tuning(max_age=value)


async def test_unreadable_and_out_of_bounds_settings_are_logged(
    server: Any, opened: Callable[..., Any], bounded: Bounded, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "orki.events")
    with server.client as client:
        client.hset("orki:retention", "bounded", "[]")
        client.hset("orki:retention", "other", b"\xff")
    await publish(await opened(), bounded(), 1)
    assert 'setting of stream "bounded" in orki:retention cannot be read' in caplog.text
    caplog.clear()
    # Set under a newer contract with wider bounds: an older publisher uses its own nearest bound.
    with server.client as client:
        client.hset("orki:retention", "bounded", '{"max_entries": 50, "newer": 1}')
    publisher = await opened()
    await publish(publisher, bounded(), 1_000)
    await publish(publisher, bounded(), 1)
    assert 200 <= length(server) < 200 + 2 * NODE
    assert caplog.text.count("is set to keep 50 entries") == 1


def test_the_effective_retention_is_within_the_bounds() -> None:
    found = effective_retention(BOUNDED, Tuning(max_entries=1, max_age=0.005))
    assert (found.max_entries, found.max_age) == (200, 0)
    assert effective_retention(BOUNDED, None) == effective_retention(BOUNDED, Tuning()) == BOUNDED
    assert effective_retention(BOUNDED, Tuning(max_entries=1 << 40)).max_entries == 6_000
    assert TuningCache().retention(TOOLS.contract) == TOOLS.contract.retention


async def test_tuning_frees_memory_on_a_full_server(server: Any, opened: Callable[..., Any], bounded: Bounded) -> None:
    """A full server refuses the setting at first; trimming makes room for it."""
    events, stream = await opened(), bounded()
    await events.publish_many(stream, [UsageEvent(model="m" * 2_000)] * 2_000)
    with server.client as client:
        used = client.info("memory")["used_memory"]
        client.config_set("maxmemory", used - 1_000_000)
    tuned = await events.tune(stream, Tuning(max_entries=200))
    assert tuned.trimmed > 1_000
    await events.publish(stream, UsageEvent())
    assert (await events.tunings())["bounded"] == Tuning(max_entries=200)


async def test_a_stream_that_a_script_writes_is_maintained(
    server: Any, opened: Callable[..., Any], bounded: Bounded
) -> None:
    """A program that writes entries by other means gets its stream registered, its groups created, and it trimmed."""
    operator, stream = await opened(), bounded()
    assert await operator.maintain(stream) == BOUNDED
    await operator.tune(stream, Tuning(max_entries=300))
    with server.client as client:
        assert {each["name"].decode() for each in client.xinfo_groups(KEY)} == {
            group.name for group in stream.contract.groups
        }
        for _ in range(1_000):
            client.xadd(KEY, {"e": b"", "d": b""})
    assert (await operator.maintain(stream)).max_entries == 300
    assert length(server) < 300 + 2 * NODE
