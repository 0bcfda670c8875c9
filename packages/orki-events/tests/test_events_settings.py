"""Settings, the registry, group starts and seen events."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orki.events.v1.usage_orki import USAGE
from orki.events.v1.usage_pb2 import UsageEvent
from orki_contract.errors import InvalidContract, InvalidSetting
from orki_contract.images import image_of, message_class
from orki_contract.model import AUDIT_GROUP, Backoff, Group, Retention, Start, Stream
from orki_events import ConsumeOptions, EventOptions, Events, connect
from orki_events._group_reader import SeenEvents
from orki_events.groups import Mark, StreamState, group_start
from orki_events.registry import StreamVersion


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("connect_timeout", 0),
        ("answer_timeout", -1),
        ("answer_timeout", "5"),
        ("block_timeout", 0),
        ("block_timeout", True),
        ("publish_timeout", float("nan")),
        ("batch_entries", 0),
        ("batch_entries", 1_000_000),
        ("batch_bytes", 0),
        ("linger", -1),
        ("buffer_entries", 0),
        ("buffer_bytes", None),
        ("max_event_bytes", 0),
        ("drain_timeout", -0.1),
        ("dedupe_window", -1),
        ("on_gap", "print"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidSetting, match=f"EventOptions.{name}"):
        EventOptions(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prefetch", -1),
        ("handler_timeout", -1),
        ("hold_limit", 0),
        ("sweep_interval", "often"),
        ("backoff", 1.5),
    ],
)
def test_settings_of_a_consumer_out_of_range_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidSetting, match=f"ConsumeOptions.{name}"):
        ConsumeOptions(**{name: value})


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(TypeError, match="block_timout"):
        EventOptions(block_timout=5)  # type: ignore[call-arg]
    with pytest.raises(AttributeError):
        EventOptions().block_timeout = 5  # type: ignore[misc]


@pytest.mark.parametrize("producer", ["", "two words", "ü", "x" * 201, "line\n"])
def test_invalid_producer_names_are_refused(producer: str) -> None:
    with pytest.raises(InvalidSetting, match="producer"):
        connect("redis://127.0.0.1", producer=producer)


def test_default_producer_names_are_unique() -> None:
    names = {connect("redis://127.0.0.1").producer for _ in range(10)}
    assert len(names) == 10


async def test_a_shipped_stream_is_registered_with_its_image(events: Events) -> None:
    await events.publish(USAGE, UsageEvent(model="m"))
    (registered,) = await events.registered_streams()
    assert registered.contract == USAGE.contract
    assert registered.package == "orki.events.v1"
    assert registered.image == image_of("orki.events.v1")
    decoded: Any = message_class(registered.image, registered.contract.message).FromString(
        UsageEvent(model="m").SerializeToString()
    )
    assert decoded.model == "m"


async def test_groups_that_readers_declare_are_registered_apart_from_the_owner(events: Events) -> None:
    mine = USAGE.with_groups(Group(name="billing", max_deliveries=9, dead_letter="billing.dead"))
    await events.prepare(mine)
    assert await events.registered_streams() == []
    await events.prepare(USAGE)
    (registered,) = await events.registered_streams()
    assert registered.contract.group("billing").dead_letter == "billing.dead"
    assert {group.name for group in registered.contract.groups} == {"audit", "billing", "metrics"}


async def test_a_consumer_does_not_replace_the_publishers_registration(
    server: Any, opened: Callable[..., Any], usage: Callable[..., Any]
) -> None:
    new, old = usage(max_entries=2_000), usage(max_entries=1_000)
    events = await opened()
    await events.publish(new, UsageEvent())
    async for delivery in events.deliveries(old, group="work"):
        async with delivery:
            break
    (registered,) = await events.registered_streams()
    assert registered.contract.retention.max_entries == 2_000


async def test_unreadable_records_are_left_out(server: Any, events: Events, usage: Any) -> None:
    await events.prepare(usage())
    with server.client as client:
        client.hset("orki:streams", "broken", "{not json")
        client.hset("orki:streams", "strange", json.dumps({"contract": {}, "package": "", "image": ""}))
        client.hset("orki:subscriptions", "usage-of-tests/broken", "[]")
    assert [each.contract.name for each in await events.registered_streams()] == ["usage-of-tests"]


def test_records_keep_streams_in_milliseconds_and_ignore_unknown_members() -> None:
    stream = Stream(
        name="s",
        message="a.B",
        retention=Retention(max_entries=5, max_age=7.5),
        partitions=2,
        partition_key="k",
        groups=(AUDIT_GROUP, Group(name="late", start=Start.LATEST)),
    )
    record = StreamVersion(contract=stream, package="a", digest="", image=None).record()
    dumped = json.loads(record)["contract"]
    assert (dumped["retention"]["max_age_ms"], dumped["groups"][1]["ack_deadline_ms"]) == (7_500, 30_000)

    def parsed(contract: Any) -> Stream:
        return StreamVersion.parse(json.dumps({"contract": contract, "package": "a", "image": ""}), {}).contract

    assert parsed(dumped) == stream
    assert parsed(dumped | {"colour": "blue"}) == stream
    for broken in ({}, {"name": "s"}, dumped | {"groups": [{}]}, dumped | {"retention": None}, [], "s"):
        with pytest.raises(InvalidContract):
            parsed(broken)


EARLY, LATE = Group(name="g"), Group(name="g", start=Start.LATEST)
HERE = StreamState(length=10, added=10, last_id="100-0", first_id="91-0")


@pytest.mark.parametrize(
    ("group", "state", "mark", "forgotten", "start", "loss"),
    [
        (EARLY, None, None, False, "0-0", None),
        (LATE, None, None, False, "0-0", None),
        (EARLY, HERE, None, False, "0-0", None),
        (LATE, HERE, None, False, "100-0", None),
        (EARLY, HERE, Mark("95-0", 5), False, "95-0", ""),
        (LATE, HERE, Mark("95-0", 5), False, "95-0", ""),
        (EARLY, None, Mark("95-0", 5), False, "0-0", "older than"),
        (LATE, HERE, Mark("200-0", 5), False, "0-0", "older than"),
        (EARLY, HERE, Mark("95-0", 11), False, "0-0", "older than"),
        (LATE, HERE, Mark("95-0", 5), True, "0-0", "forgot"),
        (
            EARLY,
            StreamState(length=10, added=30, last_id="100-0", first_id="91-0"),
            Mark("50-0", 9),
            False,
            "50-0",
            "trim",
        ),
    ],
)
def test_a_group_begins_where_it_misses_nothing(
    group: Group, state: StreamState | None, mark: Mark | None, forgotten: bool, start: str, loss: str | None
) -> None:
    found, told = group_start(group, state, mark, forgotten)
    assert found == start
    assert (told is None) if loss is None else told is not None and loss in told and bool(loss) == bool(told)


def test_marks_survive_formatting_and_parsing() -> None:
    assert Mark.parse(Mark("5-1", 7).text().encode()) == Mark("5-1", 7)
    assert Mark.parse(None) is Mark.parse(b"") is None


def test_seen_events_are_known_until_they_are_discarded() -> None:
    seen = SeenEvents(100)
    assert seen.add([b"a", b"b"]) == []
    assert seen.add([b"c", b"a", b"c"]) == [1, 2]
    seen.discard([b"a"])
    assert seen.add([b"a"]) == []
    assert SeenEvents(0).add([b"a", b"a"]) == []


@given(st.lists(st.integers(0, 400), max_size=600), st.integers(1, 50))
def test_the_last_window_of_ids_is_remembered_and_memory_is_bounded(numbers: list[int], window: int) -> None:
    seen = SeenEvents(window)
    recent: list[bytes] = []
    for number in numbers:
        event_id = b"%d" % number
        known = bool(seen.add([event_id]))
        if event_id in recent[-window:]:
            assert known
        if not known:
            recent.append(event_id)
        assert len(seen._young) + len(seen._old) <= 2 * window


def test_backoff_waits_grow_to_their_limit() -> None:
    assert [Backoff(initial=0.5, maximum=3.0).delay(failed) for failed in (1, 2, 3, 4, 50)] == [
        0.5,
        1.0,
        2.0,
        3.0,
        3.0,
    ]
