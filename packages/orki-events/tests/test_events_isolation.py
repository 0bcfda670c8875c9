"""The outcome belongs to the event: a stream that is refused concerns no other one, and refusals keep the order."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orki.events.v1.usage_pb2 import UsageEvent
from orki_contract.errors import EventsRefused, OrkiError
from orki_contract.trace import Span, new_span
from orki_events import Events, Gap
from orki_events._lanes import EnvelopeEncoder
from orki_events.connection import pack
from orki_events.entries import encode_envelope

GOOD = "orki:ev:{good}"


def attempts(server: Any, key: str) -> list[int]:
    """Return the numbers of the events of a partition, in its order."""
    with server.client as client:
        raw = client.execute_command("XRANGE", key, "-", "+")
    return [UsageEvent.FromString(fields[b"d"]).attempt for _, fields in raw]


def in_the_way(*keys: str) -> Callable[[Any], Any]:
    return lambda client: [client.set(key, "in the way") for key in keys]


BAD_STREAMS = {
    "entries": in_the_way("orki:ev:{bad:0}", "orki:ev:{bad:1}"),
    "groups": in_the_way("orki:groups:{bad:0}"),
    "one partition": in_the_way("orki:ev:{bad:1}"),
}


@pytest.mark.parametrize("spoil", BAD_STREAMS.values(), ids=BAD_STREAMS)
@pytest.mark.parametrize("late", [False, True], ids=["from the start", "in use"])
async def test_a_spoilt_stream_does_not_concern_the_others(
    server: Any, events: Events, usage: Callable[..., Any], spoil: Callable[[Any], Any], late: bool
) -> None:
    good, bad = usage("good"), usage("bad", partitions=2)
    if late:
        await events.publish_many(bad, [UsageEvent(agent_id=f"agent-{number}") for number in range(20)])
    with server.client as client:
        spoil(client)

    async def publish(stream: Any, number: int) -> OrkiError | None:
        try:
            await events.publish(stream, UsageEvent(agent_id=f"agent-{number}", attempt=number))
        except OrkiError as error:
            return error
        return None

    work = [publish(stream, number) for number in range(50) for stream in (good, bad)]
    outcomes = await asyncio.wait_for(asyncio.gather(*work), 20)
    assert outcomes[::2] == [None] * 50
    assert all(error is None or isinstance(error, EventsRefused) for error in outcomes[1::2])
    assert attempts(server, GOOD) == list(range(50))


async def test_collected_events_beside_a_spoilt_stream_are_published(
    server: Any, events: Events, usage: Callable[..., Any], gaps: list[Gap]
) -> None:
    good, bad = usage("good"), usage("bad")
    with server.client as client:
        client.set("orki:ev:{bad}", "in the way")
    for number in range(1_000):
        events.collect(bad if number % 10 == 0 else good, UsageEvent(attempt=number))
    await asyncio.wait_for(events.flush(), 20)
    assert len(attempts(server, GOOD)) == 900
    assert {gap.stream for gap in gaps} == {"bad"}
    assert sum(gap.count or 0 for gap in gaps) == 100
    assert (events.counts.published, events.counts.abandoned) == (900, 100)


async def test_a_user_without_permission_for_one_stream_publishes_to_the_others(
    server: Any, usage: Callable[..., Any], opened: Callable[..., Any]
) -> None:
    with server.client as client:
        client.execute_command(
            *("ACL", "SETUSER", "limited", "on", ">secret", "+@all", "~orki:streams", "~orki:images"),
            *("~orki:retention", "~orki:subscriptions", "~orki:*{good}", "~orki:groups:{bad}"),
        )
    events = await opened()
    events._publish_connection.address.settings.update(username="limited", password="secret")
    with pytest.raises(EventsRefused, match="NOPERM"):
        await events.publish(usage("bad"), UsageEvent())
    await asyncio.gather(
        *(events.publish(usage("good"), UsageEvent(attempt=number)) for number in range(50)),
    )
    assert attempts(server, GOOD) == list(range(50))
    with server.client as client:
        client.execute_command("ACL", "DELUSER", "limited")


@contextmanager
def flicker(server: Any) -> Iterator[None]:
    """Let a server run out of memory and recover, many times a second."""
    ended = threading.Event()

    def toggle() -> None:
        with server.client as client:
            while not ended.is_set():
                client.config_set("maxmemory", 1)
                client.config_set("maxmemory", 0)
                ended.wait(0.0005)

    thread = threading.Thread(target=toggle)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@pytest.mark.parametrize("partitions", [1, 4])
async def test_a_flicker_of_memory_keeps_the_order(
    own_server: Any, usage: Callable[..., Any], opened: Callable[..., Any], partitions: int
) -> None:
    server = own_server()
    events = await opened(at=server, batch_entries=1_000, batch_bytes=8 << 20)
    stream = usage("good", partitions=partitions)
    await events.publish_many(stream, [UsageEvent(agent_id=f"agent-{number}") for number in range(8)])
    count = 4_000
    with flicker(server):
        for begun in range(1, count, 1_000):
            sent = [
                UsageEvent(agent_id=f"agent-{number % 8}", attempt=number, model="m" * 500)
                for number in range(begun, begun + 1_000)
            ]
            await asyncio.wait_for(events.publish_many(stream, sent), 60)
    keys = [GOOD] if partitions == 1 else [f"orki:ev:{{good:{number}}}" for number in range(partitions)]
    found = [[number for number in attempts(server, key) if number] for key in keys]
    assert found == [sorted(numbers) for numbers in found]
    assert sorted(number for numbers in found for number in numbers) == list(range(1, count + 1))


NAMES = st.text("abc@-0123", min_size=1, max_size=200)
SPANS = st.sampled_from([None, new_span(), new_span().child()])
ENVELOPES = st.tuples(st.binary(min_size=16, max_size=16), st.integers(1, 1 << 63), st.integers(-1, 1 << 62), SPANS)


@given(producer=NAMES, values=st.lists(ENVELOPES, max_size=5), message=st.binary(max_size=300))
def test_fields_are_encoded_as_protobuf_encodes_them(
    producer: str, values: list[tuple[bytes, int, int, Span | None]], message: bytes
) -> None:
    encoder = EnvelopeEncoder(producer)
    for event_id, sequence, time_us, span in values:
        envelope = encode_envelope(event_id=event_id, producer=producer, sequence=sequence, time_us=time_us, span=span)
        packed = pack((b"e", envelope, b"d", message))
        assert encoder.fields(event_id, sequence, time_us, span, message) == packed[packed.index(b"$") :]
