"""The event plane: publishers and consumers of two versions, on one server."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from actors.values import bed, reading
from control import check_mismatch, knows_v2
from stage import Actor, Stage, Wrong

__all__ = ["meet", "refused"]

COUNT = 200


def meet(stage: Stage, *, publishers: Sequence[str], consumers: Sequence[str], patience: float = 30.0) -> str:
    """Every consumer environment reads every group that its contract declares; published = processed for each."""
    redis = stage.redis()
    # One side is there first in one direction, and the other in the other.
    early = consumers if knows_v2(publishers[0]) else ()
    reading_on = [start_consumer(stage, redis, each) for each in early]
    for number, environment in enumerate(publishers):
        publisher = stage.actor(environment, "publisher", redis=redis, first=number * COUNT, count=COUNT)
        done = publisher.expect("done")
        wanted = {"moisture": COUNT, "harvest": COUNT if knows_v2(environment) else 0}
        if done != wanted:
            raise Wrong(f"{environment} published {done}, not {wanted}")
    reading_on += [start_consumer(stage, redis, each) for each in consumers if not early]
    groups = sorted({group for each in consumers for group in groups_of(each) if expected(group[0], publishers)})
    least = {stream: expected(stream, publishers) for stream, _ in groups}
    told = []
    for stream in sorted(least):
        named = [group for group in groups if group[0] == stream]
        wanted = {"redis": redis, "groups": named, "least": least[stream], "patience": patience}
        ledger = stage.actor("head-v2", "ledger", **wanted).expect("done", seconds=patience + 30)
        told += [check_row(group, row, least[stream]) for group, row in ledger.items()]
    check_read(end_all(reading_on), publishers, consumers)
    return f"published = processed: {', '.join(told)}"


def refused(stage: Stage, *, standing: str, newcomer: str, rule: str) -> str:
    """A publisher, and a consumer, of a contract that does not fit the stream in use are refused when they start."""
    redis = stage.redis()
    stage.actor(standing, "publisher", redis=redis, first=0, count=COUNT).expect("done")
    words = []
    for script, wanted in (
        ("publisher", {"first": COUNT, "count": COUNT}),
        ("consumer", {"groups": [("MoistureEvent", "dashboard")]}),
    ):
        error = stage.actor(newcomer, script, redis=redis, **wanted).expect("refused")
        words.append(f"{script}: {check_mismatch(error, rule)}")
    consumer = start_consumer(stage, redis, standing)
    groups = [group for group in groups_of(standing) if group[0] == "MoistureEvent"]
    asked = {"redis": redis, "groups": groups, "least": COUNT, "patience": 30.0}
    ledger = stage.actor("head-v2", "ledger", **asked).expect("done")
    for group, row in ledger.items():
        check_row(group, row, COUNT)
    end_all([consumer])
    return "; ".join(words)


def start_consumer(stage: Stage, redis: str, environment: str) -> Actor:
    """A consumer of all groups."""
    return stage.actor(environment, "consumer", redis=redis, groups=groups_of(environment))


def groups_of(environment: str) -> list[tuple[str, str]]:
    """The groups that the contract there declares."""
    added = [("HarvestEvent", "barn"), ("MoistureEvent", "alerts")] if knows_v2(environment) else []
    return sorted([("MoistureEvent", "dashboard"), *added])


def expected(stream: str, publishers: Sequence[str]) -> int:
    """How many events of a stream the publishers publish."""
    return COUNT * sum(stream == "MoistureEvent" or knows_v2(each) for each in publishers)


def check_row(group: str, row: Mapping[str, int], published: int) -> str:
    """One row of the ledger.

    Raises:
        Wrong: Published is not processed.
    """
    if not row["published"] == row["processed"] == published:
        raise Wrong(f"{published} events were published, and the ledger of {group} says {dict(row)}")
    return f"{group} {row['processed']}"


def end_all(consumers: Sequence[Actor]) -> list[list[dict[str, Any]]]:
    """What each consumer read."""
    for consumer in consumers:
        consumer.end()
    return [consumer.expect("done")["read"] for consumer in consumers]


def check_read(
    read: Sequence[Sequence[Mapping[str, Any]]], publishers: Sequence[str], consumers: Sequence[str]
) -> None:
    """Each group had each event, and each field the value that was sent, or its default where one side lacks it.

    Raises:
        Wrong: A value differs, or an event is missing, foreign, or was read twice.
    """
    seen: Counter[tuple[str, int]] = Counter()
    for environment, events in zip(consumers, read, strict=True):
        for event in events:
            number = event["grams"] if event["group"] == "barn" else event["reading"] - 2**53
            publisher = publishers[number // COUNT] if 0 <= number < COUNT * len(publishers) else "nobody"
            wanted = wanted_event(number, publisher, environment, event["group"])
            if dict(event) != wanted:
                raise Wrong(f"{publisher} sent {wanted}, and {environment} read {dict(event)}")
            seen[event["group"], number] += 1
    groups = {group for each in consumers for stream, group in groups_of(each) if expected(stream, publishers)}
    for group in groups:
        stream = "HarvestEvent" if group == "barn" else "MoistureEvent"
        numbers = {
            number
            for number in range(COUNT * len(publishers))
            if stream == "MoistureEvent" or knows_v2(publishers[number // COUNT])
        }
        if {number for where, number in seen if where == group} != numbers:
            raise Wrong(f"group {group} did not read just what was published")
    if doubled := [key for key, count in seen.items() if count > 1]:
        raise Wrong(f"read twice: {doubled[:3]}")


def wanted_event(number: int, publisher: str, consumer: str, group: str) -> dict[str, Any]:
    """How an event must look where it is read."""
    if group == "barn":
        return {"group": group, "bed": bed(number), "grams": number}
    wanted = {"group": group, **reading(number)}
    if not knows_v2(consumer):
        del wanted["sensor"]
    elif not knows_v2(publisher):
        wanted["sensor"] = ""
    return wanted
