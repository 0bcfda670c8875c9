"""The event plane: publishers and consumers of two versions, on one server."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from actors.values import bed, reading
from control import check_mismatch, knows_v2
from stage import Actor, CaseFailed, Stage

COUNT = 200


def meet(stage: Stage, *, publishers: Sequence[str], consumers: Sequence[str], patience: float = 30.0) -> str:
    """Each consumer reads all groups of its contract; each group must process all published events."""
    redis = stage.redis()
    # In one direction the consumers start first, in the other the publishers.
    early = consumers if knows_v2(publishers[0]) else ()
    reading_on = [start_consumer(stage, redis, each) for each in early]
    for number, environment in enumerate(publishers):
        publisher = stage.actor(environment, "publisher", redis=redis, first=number * COUNT, count=COUNT)
        done = publisher.expect("done")
        wanted = {"moisture": COUNT, "harvest": COUNT if knows_v2(environment) else 0}
        if done != wanted:
            raise CaseFailed(f"{environment} published {done}, not {wanted}")
    reading_on += [start_consumer(stage, redis, each) for each in consumers if not early]
    groups = sorted({group for each in consumers for group in groups_of(each) if expected(group[0], publishers)})
    least = {stream: expected(stream, publishers) for stream, _ in groups}
    rows = []
    for stream in sorted(least):
        named = [group for group in groups if group[0] == stream]
        wanted = {"redis": redis, "groups": named, "least": least[stream], "patience": patience}
        ledger = stage.actor("head-v2", "ledger", **wanted).expect("done", seconds=patience + 30)
        rows += [check_row(group, row, least[stream]) for group, row in ledger.items()]
    check_read(end_all(reading_on), publishers, consumers)
    return f"published = processed: {', '.join(rows)}"


def refused(stage: Stage, *, standing: str, newcomer: str, rule: str) -> str:
    """A publisher and a consumer with an incompatible contract are refused at their start."""
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
    wanted = {"redis": redis, "groups": groups, "least": COUNT, "patience": 30.0}
    ledger = stage.actor("head-v2", "ledger", **wanted).expect("done")
    for group, row in ledger.items():
        check_row(group, row, COUNT)
    end_all([consumer])
    return "; ".join(words)


def start_consumer(stage: Stage, redis: str, environment: str) -> Actor:
    """Start a consumer of all groups."""
    return stage.actor(environment, "consumer", redis=redis, groups=groups_of(environment))


def groups_of(environment: str) -> list[tuple[str, str]]:
    """Return the groups of an environment's contract."""
    added = [("HarvestEvent", "barn"), ("MoistureEvent", "alerts")] if knows_v2(environment) else []
    return sorted([("MoistureEvent", "dashboard"), *added])


def expected(stream: str, publishers: Sequence[str]) -> int:
    """Return the number of events that the publishers publish to a stream."""
    return COUNT * sum(stream == "MoistureEvent" or knows_v2(each) for each in publishers)


def check_row(group: str, row: Mapping[str, int], published: int) -> str:
    """Check one row of the ledger.

    Raises:
        CaseFailed: An event was not processed.
    """
    if not row["published"] == row["processed"] == published:
        raise CaseFailed(f"{published} events were published, and the ledger of {group} has {dict(row)}")
    return f"{group} {row['processed']}"


def end_all(consumers: Sequence[Actor]) -> list[list[dict[str, Any]]]:
    """Stop the consumers; return what each one read."""
    for consumer in consumers:
        consumer.end()
    return [consumer.expect("done")["read"] for consumer in consumers]


def check_read(
    read: Sequence[Sequence[Mapping[str, Any]]], publishers: Sequence[str], consumers: Sequence[str]
) -> None:
    """Check that each group read each event once, with the sent values or defaults for unknown fields.

    Raises:
        CaseFailed: A value differs, or an event is missing, foreign, or was read twice.
    """
    seen: Counter[tuple[str, int]] = Counter()
    for environment, events in zip(consumers, read, strict=True):
        for event in events:
            number = event["grams"] if event["group"] == "barn" else event["reading"] - 2**53
            publisher = publishers[number // COUNT] if 0 <= number < COUNT * len(publishers) else "nobody"
            wanted = wanted_event(number, publisher, environment, event["group"])
            if dict(event) != wanted:
                raise CaseFailed(f"{publisher} sent {wanted}, and {environment} read {dict(event)}")
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
            raise CaseFailed(f"group {group} did not read exactly the published events")
    if doubled := [key for key, count in seen.items() if count > 1]:
        raise CaseFailed(f"read twice: {doubled[:3]}")


def wanted_event(number: int, publisher: str, consumer: str, group: str) -> dict[str, Any]:
    """Return the expected fields of an event at its reader."""
    if group == "barn":
        return {"group": group, "bed": bed(number), "grams": number}
    wanted = {"group": group, **reading(number)}
    if not knows_v2(consumer):
        del wanted["sensor"]
    elif not knows_v2(publisher):
        wanted["sensor"] = ""
    return wanted
