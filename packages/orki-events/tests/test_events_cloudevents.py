"""CloudEvents attributes: they pass the official SDK, and the generated document declares them."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from importlib.resources import files
from typing import Any

import pytest
from cloudevents.core.v1.event import CloudEvent
from google.protobuf.message import Message

from orki.events.v1.envelope_pb2 import Envelope
from orki.events.v1.task_orki import TASKS
from orki.events.v1.task_pb2 import TaskEvent
from orki.events.v1.usage_orki import USAGE
from orki.events.v1.usage_pb2 import UsageEvent
from orki_contract import EventStream
from orki_contract.errors import EventUndecodable
from orki_events.cloudevents import attributes

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
EVENTS = [(USAGE, UsageEvent(agent_id="a", model="m")), (TASKS, TaskEvent(task_id="t1-a"))]
DECLARED = json.loads((files("orki.events.v1") / "asyncapi.json").read_text(encoding="utf-8"))


def envelope(**fields: Any) -> Envelope:
    values = {"event_id": bytes(range(16)), "producer": "host-1@5 ü", "sequence": 7, "time_us": 1_700_000_000_000_001}
    return Envelope(**{**values, **fields})


def parsed(made: dict[str, str]) -> CloudEvent:
    """Check the attributes with the official SDK."""
    time = datetime.fromisoformat(made["time"])
    return CloudEvent(attributes={**made, "time": time}, data=b"")


@pytest.mark.parametrize(("stream", "event"), EVENTS, ids=["usage", "tasks"])
@pytest.mark.parametrize("traceparent", ["", TRACEPARENT])
def test_attributes_pass_the_official_sdk(stream: EventStream[Any, Any], event: Message, traceparent: str) -> None:
    made = attributes(stream, event, envelope(traceparent=traceparent))
    checked = parsed(made)
    assert checked.get_type() == event.DESCRIPTOR.full_name
    assert checked.get_source() == "urn:orki:host-1%405%20%C3%BC"
    assert checked.get_id() == "000102030405060708090a0b0c0d0e0f"
    assert checked.get_time() == datetime(2023, 11, 14, 22, 13, 20, 1, tzinfo=UTC)
    assert made.get("traceparent", "") == traceparent


@pytest.mark.parametrize(("stream", "event"), EVENTS, ids=["usage", "tasks"])
def test_the_document_declares_the_same_attributes(stream: EventStream[Any, Any], event: Message) -> None:
    headers = DECLARED["components"]["messages"][stream.contract.message]["headers"]
    made = attributes(stream, event, envelope(traceparent=TRACEPARENT))
    assert made.keys() == headers["properties"].keys()
    assert attributes(stream, event, envelope()).keys() == set(headers["required"])
    for name, declared in headers["properties"].items():
        assert declared.get("const", made[name]) == made[name]


@pytest.mark.parametrize(("key", "text"), [("agent_id", "a"), ("input_tokens", "5")])
def test_the_partition_key_is_an_attribute(key: str, text: str) -> None:
    contract = replace(USAGE.contract, partitions=2, partition_key=key)
    stream: EventStream[UsageEvent, Any] = EventStream(contract=contract, message=UsageEvent)
    made = attributes(stream, UsageEvent(agent_id="a", input_tokens=5), envelope())
    assert parsed(made).get_extension("partitionkey") == text


@pytest.mark.parametrize("time_us", [2**62, -(2**62)])
def test_an_absurd_time_is_refused(time_us: int) -> None:
    with pytest.raises(EventUndecodable, match="outside the years"):
        attributes(USAGE, EVENTS[0][1], envelope(time_us=time_us))


@pytest.mark.parametrize("time_us", [0, -1, 999_999])
def test_times_around_the_epoch_are_exact(time_us: int) -> None:
    time = parsed(attributes(USAGE, EVENTS[0][1], envelope(time_us=time_us))).get_time()
    assert time is not None
    elapsed = time - datetime(1970, 1, 1, tzinfo=UTC)
    assert elapsed.days * 86_400_000_000 + elapsed.seconds * 1_000_000 + elapsed.microseconds == time_us
