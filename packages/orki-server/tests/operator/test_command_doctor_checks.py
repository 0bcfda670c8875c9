"""The checks of the doctor: each state, produced from the values that indicate it."""

from __future__ import annotations

from typing import Any

import pytest

from orki_server._health.findings import (
    STATES,
    Check,
    Health,
    Snapshot,
    check_dead_letters,
    check_groups,
    check_losses,
    check_server,
    parse_info,
)
from orki_server._observers.stream_stats import GroupStats, StreamStats

HEALTHY = """# Server
valkey_version:9.1.2
redis_version:7.2.4
role:master
loading:0
maxmemory_policy:noeviction
evicted_keys:0
used_memory:1048576
maxmemory:104857600
aof_enabled:1
aof_last_write_status:ok
rdb_last_bgsave_status:ok
"""


def _checks(text: str, replicas: int = 0) -> list[Check]:
    snapshot = Snapshot(shown="the server", timeout=1.0, info=parse_info(text), replicas=replicas)
    first, *others = check_server(snapshot)
    assert (first.name, first.state) == ("store.reachable", "ok")
    return others


def _verdicts(changes: str = "") -> dict[str, tuple[Health, str]]:
    checks = _checks(HEALTHY + changes)
    for check in checks:
        assert bool(check.cause) == (check.verdict is not Health.OK), check
        assert bool(check.next_step) == (check.verdict is not Health.OK), check
        assert sorted(check.to_json()) == ["cause", "figure", "name", "next_step", "state", "verdict"]
        assert check.state in STATES
    return {check.name: (check.verdict, check.figure) for check in checks}


def test_a_healthy_store() -> None:
    assert _verdicts() == {
        "store.version": (Health.OK, "valkey 9.1.2"),
        "store.role": (Health.OK, "primary"),
        "store.loading": (Health.OK, "loaded"),
        "store.eviction": (Health.OK, "noeviction"),
        "store.evicted": (Health.OK, "0 keys"),
        "store.memory": (Health.OK, "1.0 MiB of 100.0 MiB (1% of maxmemory)"),
        "store.persistence": (Health.OK, "append-only file"),
        "store.replication": (Health.OK, "no replicas"),
    }


@pytest.mark.parametrize(
    ("change", "name", "verdict", "figure"),
    [
        ("role:slave\nmaster_host:h\nmaster_port:1\n", "store.role", Health.BAD, "replica of h:1"),
        ("loading:1\nloading_loaded_perc:12\n", "store.loading", Health.BAD, "12 % loaded"),
        ("maxmemory_policy:allkeys-lru\n", "store.eviction", Health.BAD, "allkeys-lru"),
        ("maxmemory_policy:volatile-ttl\n", "store.eviction", Health.BAD, "volatile-ttl"),
        ("evicted_keys:7\n", "store.evicted", Health.WARN, "7 keys"),
        ("used_memory:90000000\n", "store.memory", Health.WARN, "86%"),
        ("used_memory:104000000\n", "store.memory", Health.BAD, "99%"),
        ("maxmemory:0\ntotal_system_memory:1100000\n", "store.memory", Health.BAD, "of the machine's memory"),
        ("aof_last_write_status:err\n", "store.persistence", Health.BAD, "aof_last_write_status err"),
        ("rdb_last_bgsave_status:err\n", "store.persistence", Health.BAD, "rdb_last_bgsave_status err"),
        ("aof_enabled:0\n", "store.persistence", Health.WARN, "no append-only file"),
        ("valkey_version:?\n", "store.version", Health.WARN, "valkey ?"),
    ],
)
def test_each_store_state_has_a_result(change: str, name: str, verdict: Health, figure: str) -> None:
    found, shown = _verdicts(change)[name]
    assert found is verdict
    assert figure in shown


@pytest.mark.parametrize(
    ("version", "verdict"),
    [("6.0.16", Health.BAD), ("6.2.0", Health.OK), ("8.2.1", Health.WARN), ("8.2.3", Health.OK)],
)
def test_redis_versions(version: str, verdict: Health) -> None:
    assert _checks(f"redis_version:{version}\n")[0].verdict is verdict


def test_missing_info_fields_are_tolerated() -> None:
    assert {check.verdict for check in _checks("")} <= set(Health)


def _replica(lag: int = 1, offset: int = 1_000, state: str = "online") -> str:
    line = f"slave0:ip=10.0.0.2,port=6379,state={state},offset={offset},lag={lag},type=replica"
    return f"master_repl_offset:1000\nrepl_backlog_size:1000\n{line}\n"


@pytest.mark.parametrize(
    ("text", "seen", "state", "figure"),
    [
        (_replica(), 1, "ok", "1 of 1 replica, 0 B and 1 s behind"),
        (_replica(lag=5), 1, "replica-behind", "1 of 1 replica, 0 B and 5 s behind"),
        (_replica(offset=499), 1, "replica-behind", "1 of 1 replica, 501 B and 1 s behind"),
        (_replica(state="wait_bgsave"), 1, "replica-behind", "1 of 1 replica, 0 B and 1 s behind"),
        (_replica(lag=20), 1, "replica-lost", "1 of 1 replica, 0 B and 20 s behind"),
        (_replica(), 2, "replica-lost", "1 of 2 replicas, 0 B and 1 s behind"),
        ("", 1, "replica-lost", "0 of 1 replica, 0 B and 0 s behind"),
    ],
)
def test_replicas(text: str, seen: int, state: str, figure: str) -> None:
    (check,) = (each for each in _checks(HEALTHY + text, seen) if each.name == "store.replication")
    assert (check.state, check.figure) == (state, figure)


def _group(
    *,
    missing: bool = False,
    lag: int | None = 0,
    pending: int = 0,
    oldest_ms: int = 0,
    dead: int = 0,
    consumers: int = 1,
    **figures: Any,
) -> GroupStats:
    return GroupStats(
        stream="tasks",
        group="audit",
        missing=missing,
        lag=lag,
        pending=pending,
        oldest_pending_ms=oldest_ms,
        consumers=consumers,
        dead_letters=dead,
        ack_deadline=30.0,
        **figures,
    )


@pytest.mark.parametrize(
    ("group", "verdict"),
    [
        (_group(), Health.OK),
        (_group(lag=None), Health.OK),
        (_group(missing=True), Health.BAD),
        (_group(lag=10_001), Health.WARN),
        (_group(lag=400, used_retention=0.8), Health.WARN),
        (_group(lag=400, used_retention=0.7), Health.OK),
        (_group(lag=1, consumers=0), Health.WARN),
        (_group(lag=0, consumers=0), Health.OK),
        (_group(pending=1, oldest_ms=61_000), Health.WARN),
        (_group(pending=1, oldest_ms=59_000), Health.OK),
    ],
)
def test_groups(group: GroupStats, verdict: Health) -> None:
    (check,) = check_groups([group])
    assert check.verdict is verdict
    assert check.name == "events.tasks.audit"


def test_losses_are_bad_until_they_are_acknowledged() -> None:
    def stream(unseen: int = 0, **figures: Any) -> StreamStats:
        group = _group(**figures)
        return StreamStats(
            stream="tasks", message="M", partitions=1, entries=9, groups=(group,), rolled_back=5, unseen_losses=unseen
        )

    assert [*check_losses([stream(lost=7)])] == []
    found = [*check_losses([stream(5, lost=7, unseen_losses=7, unaccounted=2)])]
    assert [(each.name, each.state, each.verdict, each.figure) for each in found] == [
        ("events.tasks.losses", "events-rolled-back", Health.BAD, "5 entries lost by the server"),
        ("events.tasks.audit.losses", "events-lost", Health.BAD, "7 entries lost"),
        ("events.tasks.audit.unaccounted", "events-unaccounted", Health.WARN, "2 entries unaccounted"),
    ]
    assert "orki streams losses tasks" in found[1].next_step


def test_dead_letters_are_bad_and_name_the_commands() -> None:
    assert [*check_dead_letters([_group()])] == []
    (one,), (many,) = (list(check_dead_letters([_group(dead=count)])) for count in (1, 1_200))
    assert (one.name, one.verdict) == ("events.tasks.audit.dead_letters", Health.BAD)
    assert (one.figure, many.figure) == ("1 dead letter", "1,200 dead letters")
    assert "orki streams dead tasks audit --replay" in one.next_step
