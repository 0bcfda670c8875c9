"""The metrics that events produce."""

from __future__ import annotations

import os
import re

from google.protobuf.message import Message

from orki.errors.v1.errors_pb2 import Reason
from orki.events.v1.agent_pb2 import AgentConnected, AgentEvent, AgentStopped
from orki.events.v1.audit_pb2 import AuditEvent
from orki.events.v1.task_pb2 import (
    TaskAttemptEnded,
    TaskEvent,
    TaskFailed,
    TaskSubmitted,
    TaskSucceeded,
)
from orki.events.v1.tool_pb2 import ToolEvent
from orki.events.v1.usage_pb2 import UsageEvent
from orki_server._observers.metrics import MAX_SERIES, FleetMetrics
from orki_server._observers.stream_stats import GroupStats, StreamStats

METHOD = "acme.v1.Review/File"


def _counted(*events: Message) -> str:
    book = FleetMetrics()
    for number, event in enumerate(events):
        assert book.count("s", os.urandom(16), number * 1_000_000, event)
    return book.exposition().decode()


def test_tokens_and_cost_by_model_and_agent() -> None:
    use = UsageEvent(model="m", provider="p", agent_id="a", input_tokens=812, output_tokens=90, cost_micros=1500)
    text = _counted(use, use)
    assert 'orki_tokens_total{agent="a",kind="input",model="m",provider="p"} 1624.0' in text
    assert 'orki_tokens_total{agent="a",kind="output",model="m",provider="p"} 180.0' in text
    assert 'kind="cached"' not in text
    assert 'orki_cost_dollars_total{agent="a",model="m",provider="p"} 0.003' in text


def test_tool_durations_by_method_and_reason() -> None:
    text = _counted(
        ToolEvent(method="t/M", duration_ns=300_000),
        ToolEvent(method="t/M", duration_ns=50_000_000, reason=Reason.REASON_TOOL_DEADLINE),
    )
    assert 'orki_tool_duration_seconds_bucket{le="0.0005",method="t/M",reason="none"} 1.0' in text
    assert 'orki_tool_duration_seconds_count{method="t/M",reason="tool_deadline"} 1.0' in text


def test_task_outcomes_by_method_and_reason() -> None:
    text = _counted(
        TaskEvent(task_id="1", method=METHOD, submitted=TaskSubmitted()),
        TaskEvent(task_id="1", method=METHOD, attempt_ended=TaskAttemptEnded(reason=Reason.REASON_LEASE_EXPIRED)),
        TaskEvent(task_id="1", method=METHOD, succeeded=TaskSucceeded()),
        TaskEvent(task_id="2", method=METHOD, failed=TaskFailed(reason=Reason.REASON_HANDLER_FAILED)),
        TaskEvent(task_id="3", method=METHOD, failed=TaskFailed(reason=9999)),  # type: ignore[arg-type]
    )
    assert f'orki_tasks_total{{method="{METHOD}",outcome="succeeded",reason="none"}} 1.0' in text
    assert f'orki_tasks_total{{method="{METHOD}",outcome="failed",reason="handler_failed"}} 1.0' in text
    assert f'orki_tasks_total{{method="{METHOD}",outcome="failed",reason="9999"}} 1.0' in text
    assert f'orki_attempts_ended_total{{method="{METHOD}",reason="lease_expired"}} 1.0' in text
    assert f'orki_task_duration_seconds_sum{{method="{METHOD}",outcome="succeeded"}} 2.0' in text


def test_steps_of_agents() -> None:
    event = AgentEvent(agent_id="a", instance_id="1", connected=AgentConnected())
    text = _counted(event, event, AgentEvent(agent_id="a", instance_id="1", stopped=AgentStopped()))
    assert 'orki_agent_steps_total{step="connected"} 2.0' in text


def test_connected_agents_follow_the_newest_instance() -> None:
    book = FleetMetrics()
    for agent, instance, step in (
        ("a", "1", "spawned"),
        ("a", "1", "connected"),
        ("a", "2", "connected"),
        ("a", "1", "disconnected"),
        ("b", "3", "connected"),
        ("b", "3", "stopped"),
    ):
        book.follow_agent(agent, instance, step)
    book.set_agents(None)
    assert "orki_agents_connected 1.0" in book.exposition().decode()


def test_a_repeated_event_is_counted_once() -> None:
    book = FleetMetrics()
    event = UsageEvent(model="m", input_tokens=5)
    assert book.count("usage", b"x" * 16, 0, event)
    assert not book.count("usage", b"x" * 16, 0, event)
    assert 'orki_events_total{stream="usage"} 1.0' in book.exposition().decode()


def test_events_of_unknown_types_are_counted() -> None:
    assert 'orki_events_total{stream="s"} 1.0' in _counted(AuditEvent(actor="a", detail="secret"))


def _figures(group: str, lag: int | None) -> StreamStats:
    state = GroupStats(
        stream="s",
        group=group,
        missing=False,
        lag=lag,
        pending=2,
        oldest_pending_ms=1500,
        consumers=1,
        dead_letters=4,
        ack_deadline=30.0,
    )
    return StreamStats(stream="s", message="acme.v1.E", partitions=1, entries=9, groups=(state,))


def test_deleted_groups_disappear() -> None:
    book = FleetMetrics()
    book.set_streams([_figures("g", 7)])
    text = book.exposition().decode()
    assert 'orki_stream_entries{stream="s"} 9.0' in text
    assert 'orki_group_lag_entries{group="g",stream="s"} 7.0' in text
    assert 'orki_group_oldest_pending_seconds{group="g",stream="s"} 1.5' in text
    assert 'orki_group_dead_letters{group="g",stream="s"} 4.0' in text
    book.set_streams([_figures("h", None)])
    text = book.exposition().decode()
    assert 'group="g"' not in text
    assert 'orki_group_lag_entries{group="h",stream="s"} NaN' in text


def test_any_number_of_agents_gives_a_bounded_number_of_lines() -> None:
    book = FleetMetrics()
    for number in range(20_000):
        use = UsageEvent(
            model="m", agent_id=f"a{number}", input_tokens=1, output_tokens=1, cached_tokens=1, cost_micros=1
        )
        assert book.count("usage", number.to_bytes(16), 0, use)
        assert book.count("tools", (number + 20_000).to_bytes(16), 0, ToolEvent(method=f"t/{number}", duration_ns=1))
    text = book.exposition().decode()
    assert len(text.splitlines()) < 12_000
    tokens = [float(line.split()[-1]) for line in text.splitlines() if line.startswith("orki_tokens_total{")]
    assert len(tokens) == MAX_SERIES + 1
    assert sum(tokens) == 60_000
    assert 'orki_folded_series{family="orki_tokens"} 1.0' in text
    assert 'orki_folded_series{family="orki_tasks"}' not in text


def test_every_family_follows_the_conventions_of_prometheus() -> None:
    text = _counted(
        UsageEvent(model="m", input_tokens=1, cost_micros=1),
        ToolEvent(method="t/M", duration_ns=1),
        TaskEvent(task_id="1", method=METHOD, submitted=TaskSubmitted()),
        TaskEvent(task_id="1", method=METHOD, attempt_ended=TaskAttemptEnded(reason=Reason.REASON_LEASE_EXPIRED)),
        TaskEvent(task_id="1", method=METHOD, succeeded=TaskSucceeded()),
    )
    kinds = dict(line.split()[2:4] for line in text.splitlines() if line.startswith("# TYPE"))
    helps = {line.split()[2]: line for line in text.splitlines() if line.startswith("# HELP")}
    for name, kind in kinds.items():
        assert re.fullmatch(r"orki_[a-z]+(_[a-z]+)*", name), name
        assert (kind == "counter") == name.endswith("_total"), name
        assert not re.search(r"_(ms|us|milliseconds|minutes|kb|mb|percent)(_|$)", name), name
        assert kind != "histogram" or name.endswith("_seconds"), name
        assert helps[name].endswith(".")
    assert "_created" not in text
