"""`orki streams` and its subcommands, and the errors of commands without Redis."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import redis

from orki.events.v1.tool_orki import TOOLS
from orki.events.v1.tool_pb2 import ToolEvent
from orki_events import Events

pytestmark = pytest.mark.timeout(180)

TASK = "t3-01jcabcdefghjkmnpqrstvwxyz"


async def test_streams_and_their_groups(events: Events, user: Any, orki: Any, redis_only: Any) -> None:
    for number in range(3):
        await events.publish(user.stream, user.filled(f"r{number}"))
    async with events.deliveries(user.stream, group="readers") as deliveries:
        async with await anext(deliveries):
            pass
    ended = await orki("streams", "--json", **redis_only)
    (stream,) = json.loads(ended.out)
    assert (stream["stream"], stream["partitions"], stream["entries"]) == ("secrets", 2, 3)
    audit = next(each for each in stream["groups"] if each["group"] == "audit")
    assert (audit["lag"], audit["pending"], audit["missing"], audit["dead_letters"]) == (3, 0, False, 0)
    table = await orki("streams", **redis_only)
    assert all(len(line) <= 80 for line in table.out.splitlines())
    assert "readers" in table.out
    assert "\x1b" not in table.out


async def test_no_streams_yet(orki: Any, redis_only: Any) -> None:
    ended = await orki("streams", **redis_only)
    assert (ended.code, ended.out) == (0, "no streams yet: nothing has published or consumed\n")
    assert (await orki("streams", "--json", **redis_only)).out == "[]\n"


async def test_tail_shows_entries_without_secrets(
    events: Events, user: Any, orki: Any, redis_only: Any, canary: str
) -> None:
    for number in range(3):
        await events.publish(user.stream, user.filled(f"r{number}", number))
    ended = await orki("streams", "tail", "secrets", "--from-start", "--limit", "2", "--json", **redis_only)
    assert ended.code == 0, ended.err
    assert [json.loads(line)["stream"] for line in ended.out.splitlines()] == ["secrets", "secrets"]
    plain = await orki(
        "streams", "--redis", redis_only["ORKI_REDIS_URL"], "tail", "secrets", "--from-start", "--limit", "3"
    )
    assert len(plain.out.splitlines()) == 3
    assert canary not in ended.out + plain.out
    unknown = await orki("streams", "tail", "nobody", **redis_only)
    assert (unknown.code, unknown.err.count("\n")) == (1, 1)
    assert "registered: secrets" in unknown.err


async def test_retention_is_tuned_within_its_bounds(events: Events, orki: Any, redis_only: Any) -> None:
    await events.publish(TOOLS, ToolEvent())
    shown = await orki("streams", "tune", "tools", **redis_only)
    assert shown.out.splitlines() == [
        "contract  1,000,000 entries, none older than 24 h",
        "kept      1,000,000 entries, none older than 24 h",
        "bounds    10,000 to 10,000,000 entries, an age of 1 h to 30 d",
    ]
    done = await orki("streams", "tune", "tools", "--max-age", "3d", **redis_only)
    assert (done.code, "kept      1,000,000 entries, none older than 3 d" in done.out) == (0, True)
    # What is not named stays as it was set.
    done = await orki("streams", "tune", "tools", "--max-entries", "20000", "--json", **redis_only)
    document = json.loads(done.out)
    assert document["kept"] == document["set"] == {"max_entries": 20_000, "max_age_ms": 259_200_000}
    assert document["contract"] == {"max_entries": 1_000_000, "max_age_ms": 86_400_000}
    refused = await orki("streams", "tune", "tools", "--max-entries", "9999", **redis_only)
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    for said in ('"tools"', "9999", "10000 to 10000000", "orki/events/v1/tool.proto"):
        assert said in refused.err
    (stream,) = json.loads((await orki("streams", "--json", **redis_only)).out)
    assert stream["retention"]["kept"] == {"max_entries": 20_000, "max_age_ms": 259_200_000}
    assert "20k/3d*" in (await orki("streams", **redis_only)).out
    back = await orki("streams", "tune", "tools", "--reset", "--json", **redis_only)
    assert (json.loads(back.out)["set"], json.loads(back.out)["kept"]["max_entries"]) == (None, 1_000_000)
    assert "1M/1d " in (await orki("streams", **redis_only)).out
    unknown = await orki("streams", "tune", "nobody", "--max-entries", "5", **redis_only)
    assert (unknown.code, "registered: tools" in unknown.err) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["streams"], 1, "does not answer"),
        (["streams"], 1, "check --redis"),
        (["streams", "tail", "x"], 1, "does not answer"),
        (["trace", TASK], 1, "does not answer"),
        (["streams", "--redis", "http://x"], 2, "redis://"),
        (["trace", TASK, "--redis", "redis://127.0.0.1:1/x"], 2, "number of a database"),
        (["doctor", "--orchestrator", "nonsense"], 2, "HOST:PORT"),
        (["doctor", "--timeout", "0"], 2, "range"),
        (["trace"], 2, "Missing argument"),
        (["streams", "nonsense"], 2, "No such command"),
        (["streams", "tail", "x", "--limit", "0"], 2, "range"),
        (["streams", "tune", "x"], 1, "does not answer"),
        (["streams", "tune"], 2, "Missing argument"),
        (["streams", "tune", "x", "--max-entries", "0"], 2, "range"),
        (["streams", "tune", "x", "--max-entries", "1.5"], 2, "integer"),
        (["streams", "tune", "x", "--max-age", "3"], 2, "not a duration"),
        (["streams", "tune", "x", "--max-age", "0d"], 2, "not a duration"),
        (["streams", "tune", "x", "--max-bytes", "3"], 2, "No such option"),
        (["streams", "tune", "x", "--reset", "--max-age", "3d"], 2, "cannot be combined"),
    ],
)
def test_wrong_usage_is_described_in_one_sentence(
    command: Callable[..., Any], dead_port: int, arguments: list[str], code: int, says: str
) -> None:
    ended = command(*arguments, env={"ORKI_REDIS_URL": f"redis://127.0.0.1:{dead_port}/0"})
    assert ended.returncode == code, ended.stderr
    assert says in ended.stderr
    assert "Traceback" not in ended.stderr
    assert code == 2 or ended.stderr.count("\n") == 1


async def test_entries_that_were_trimmed_unread_are_shown_everywhere(
    events: Events, user: Any, orki: Any, redis_only: Any
) -> None:
    """A stream keeps few entries, nobody consumes, and many are published: every command tells."""
    for number in range(60):
        await events.publish(user.stream, user.filled(f"r{number}"))
    keys = ("orki:ev:{secrets:0}", "orki:ev:{secrets:1}")
    with redis.Redis.from_url(redis_only["ORKI_REDIS_URL"]) as client:
        lost = sum(int(client.xtrim(key, maxlen=2, approximate=False)) for key in keys)
    assert lost == 60 - 4
    (stream,) = json.loads((await orki("streams", "--json", **redis_only)).out)
    audit = next(each for each in stream["groups"] if each["group"] == "audit")
    assert (audit["lag"], audit["lost"], audit["unseen_losses"]) == (4, lost, lost)
    assert "LOST" in (await orki("streams", **redis_only)).out
    doctor = await orki("doctor", "--json", **redis_only)
    checks = {check["name"]: check for check in json.loads(doctor.out)["checks"]}
    assert checks["events.secrets.audit.losses"]["verdict"] == "bad"
    assert checks["events.secrets.audit"]["state"] == "group-unattended"
    # The next process that compares positions declares the loss.
    await events.prepare(user.stream)
    declared = json.loads((await orki("streams", "losses", "secrets", "--json", **redis_only)).out)
    counts = [each["count"] for each in declared if each["group"] == "audit"]
    assert (sum(counts), len(counts)) == (lost, 2)
    assert all(each["after"] < each["until"] and each["exact"] for each in declared)
    ended = await orki("streams", "losses", "secrets", "--acknowledge", **redis_only)
    assert ended.code == 0
    assert f"{lost * len(stream['groups'])} lost entries acknowledged" in ended.err
    doctor = await orki("doctor", "--json", **redis_only)
    assert not [check for check in json.loads(doctor.out)["checks"] if check["name"].endswith(".losses")]
    (stream,) = json.loads((await orki("streams", "--json", **redis_only)).out)
    audit = next(each for each in stream["groups"] if each["group"] == "audit")
    assert (audit["lost"], audit["unseen_losses"]) == (lost, 0)
    unknown = await orki("streams", "losses", "nobody", **redis_only)
    assert (unknown.code, unknown.err.count("\n")) == (1, 1)
