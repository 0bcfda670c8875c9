"""Numbers that are missing in producers' sequences, and the gap that the audit observer writes for them."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from orki.events.v1.usage_orki import USAGE
from orki.events.v1.usage_pb2 import UsageEvent
from orki_events import Events
from orki_events.entries import DATA_FIELD, ENVELOPE_FIELD, encode_envelope, new_event_id
from orki_server._observers.sequences import SequenceWatch

KEY = "orki:ev:{usage}"


def watch(*numbers: int, at: float = 0.0, fresh: bool = True) -> SequenceWatch:
    found = SequenceWatch(10.0)
    found.saw([("p", number, fresh) for number in numbers], at)
    return found


def test_a_sequence_begins_with_its_first_number() -> None:
    found = watch(7, 8, 9)
    found.saw([("p", 3, True)], 0.0)
    assert found.missing(100.0) == {}


def test_a_hole_is_missing_after_the_grace_and_once() -> None:
    found = watch(1, 2, 5, 6, 9)
    assert found.missing(9.0) == {}
    assert found.missing(10.0) == {"p": 4}
    found.saw([("p", 10, True), ("p", 4, True)], 11.0)
    assert found.missing(100.0) == {}


def test_numbers_that_arrive_late_are_not_missing() -> None:
    found = watch(1, 4, 3)
    found.saw([("p", 2, False)], 5.0)
    assert found.missing(100.0) == {}


def test_an_event_that_was_delivered_before_begins_no_sequence() -> None:
    found = watch(1, 2, fresh=False)
    found.saw([("p", 900, True)], 0.0)
    assert found.missing(100.0) == {}


def test_producers_are_counted_apart() -> None:
    found = SequenceWatch(10.0)
    found.saw([("a", 1, True), ("b", 1, True), ("a", 3, True), ("b", 2, True), ("c", 5, True)], 0.0)
    assert found.missing(10.0) == {"a": 1}


@pytest.mark.timeout(120)
async def test_the_audit_log_has_a_line_for_a_hole_that_no_gap_explains(
    observer: Any, valkey_url: str, events: Events, link: Any, tmp_path: Path, until: Any
) -> None:
    async def add(*numbers: int) -> None:
        for number in numbers:
            envelope = encode_envelope(event_id=new_event_id(), producer="older", sequence=number, time_us=1, span=None)
            event = UsageEvent(model="m").SerializeToString()
            await link.execute((b"XADD", KEY, b"*", ENVELOPE_FIELD, envelope, DATA_FIELD, event))

    def lines() -> list[dict[str, Any]]:
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    file = tmp_path / "audit.jsonl"
    await events.publish(USAGE, UsageEvent(model="m"))
    process = observer("observe", "audit", str(file), "--redis", valkey_url)
    await until(lambda: len(lines()) == 1)
    # As if the server had come back without the events 3 to 5, and nobody knew.
    await add(1, 2, 6, 7)
    await until(lambda: len(lines()) >= 6, 60)
    (hole,) = [each["gap"] for each in lines() if "gap" in each]
    assert (hole["kind"], hole["stream"], hole["count"], hole["possible"]) == ("sequence_hole", "usage", 3, True)
    await asyncio.sleep(3.0)
    assert len(lines()) == 6
    assert process.end() == 0
