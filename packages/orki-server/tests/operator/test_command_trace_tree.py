"""Building and rendering the trace tree from entries."""

from __future__ import annotations

import io
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from orki_contract.trace import Span
from orki_server._cli.trace import render
from orki_server._cli.trace_tree import Node, Trace, build_trace
from orki_server._observers.entries import DecodedEntry

ZERO = 1_700_000_000_000_000
ROOT = Span("a" * 32, "1" * 16)
FIRST = Span("a" * 32, "2" * 16, ROOT.span_id)
SECOND = Span("a" * 32, "3" * 16, ROOT.span_id)
METHOD = "acme.v1.Review/File"


def _record(at_us: int, message: str, span: Span | None, body: dict[str, Any], stream: str = "tasks") -> DecodedEntry:
    return DecodedEntry(
        stream=stream,
        key=stream,
        entry_id=f"{at_us}-0",
        producer="",
        sequence=0,
        traceparent="",
        event_id=f"{at_us}{message}{sorted(body)}",
        time_us=ZERO + at_us,
        span=span,
        message=message if "." in message else f"orki.events.v1.{message}",
        body=body,
        problem="",
    )


def _task(at_us: int, span: Span, attempt: int, task_id: str = "t1", **step: dict[str, Any]) -> DecodedEntry:
    body = {"task_id": task_id, "method": METHOD, "attempt": attempt, "fence": str(100 + attempt)}
    return _record(at_us, "TaskEvent", span, {**body, "agent_id": f"agent-{attempt}", **step})


def _story() -> list[DecodedEntry]:
    tool = {"method": "acme.v1.Tools/Read", "task_id": "t1", "attempt": 2, "duration_ns": "400000", "request_bytes": 9}
    usage = {"model": "m", "task_id": "t1", "attempt": 2, "input_tokens": "812", "output_tokens": "90"}
    return [
        _record(
            -9_000_000, "AgentEvent", None, {"agent_id": "agent-2", "instance_id": "i2", "spawned": {"pid": 7}}, "a"
        ),
        _task(0, ROOT, 0, submitted={"request_bytes": 12}),
        _task(2_000, FIRST, 1, offered={}),
        _task(3_000, FIRST, 1, started={}),
        _task(
            3_003_000,
            FIRST,
            1,
            attempt_ended={"reason": "REASON_LEASE_EXPIRED", "message": "agent-1 went silent", "backoff_ms": "100"},
        ),
        _task(3_103_000, SECOND, 2, offered={}),
        _task(3_104_000, SECOND, 2, started={}),
        _record(3_105_000, "ToolEvent", SECOND.child(), tool, "tools"),
        _record(3_106_000, "UsageEvent", SECOND, usage, "usage"),
        _record(3_107_000, "acme.v1.Finding", SECOND, {"path": "x\x1b[31m\n"}, "findings"),
        _record(3_108_000, "acme.v1.Stray", Span("a" * 32, "9" * 16), {}, "findings"),
        _task(3_200_000, ROOT, 2, succeeded={"response_bytes": 4}),
    ]


def _named(trace: Trace, kind: str) -> list[Node]:
    return [node for root in trace.roots for node in root.walk() if node.kind == kind]


def _text(trace: Trace, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(render(trace))
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_the_tree_spans_from_spawn_and_submission_to_the_result() -> None:
    trace = build_trace("a" * 32, _story())
    assert trace.finished
    assert trace.started_us == ZERO
    assert [root.kind for root in trace.roots] == ["agent", "task", "event"]
    task = trace.roots[1]
    assert task.status == "ok"
    assert [child.kind for child in task.children] == [
        "submitted",
        "queued",
        "attempt",
        "queued",
        "attempt",
        "succeeded",
    ]
    lost, done = _named(trace, "attempt")
    assert (lost.status, lost.details["reason"], lost.details["fence"]) == ("lost", "REASON_LEASE_EXPIRED", "101")
    assert [child.kind for child in lost.children] == ["offered", "started", "attempt_ended"]
    assert (done.status, done.end_us) == ("ok", ZERO + 3_200_000)
    assert [child.kind for child in done.children] == ["offered", "started", "tool", "usage", "event"]
    assert [(each.start_us - ZERO, each.end_us) for each in _named(trace, "queued")] == [
        (0, ZERO + 2_000),
        (3_003_000, ZERO + 3_103_000),
    ]


def test_the_rendered_tree() -> None:
    text = _text(build_trace("a" * 32, _story()), 140)
    assert "-9.000 s  agent agent-2" in text
    assert "attempt 1 on agent-1, fence 101: lost after 3 s, LEASE_EXPIRED, agent-1 went silent" in text
    assert "nothing for 3 s" in text
    assert "queued 100 ms, backoff 100 ms" in text
    assert "tool acme.v1.Tools/Read 400 µs (9 B → 0 B)" in text
    assert "812 tokens in, 90 out" in text
    assert "\x1b" not in text
    assert all(len(line) <= 60 for line in _text(build_trace("a" * 32, _story()), 60).splitlines())


def test_a_task_submitted_by_a_handler_is_below_its_attempt() -> None:
    below = SECOND.child()
    story = [*_story(), _task(3_150_000, below, 0, "t2", submitted={})]
    trace = build_trace("a" * 32, story)
    assert not trace.finished
    _, attempt = _named(trace, "attempt")
    assert attempt.children[-1].details["task_id"] == "t2"
    assert attempt.children[-1].children[-1].kind == "queued"


def test_a_cancelled_task_is_shown_as_cancelled() -> None:
    story = [
        _task(0, ROOT, 0, submitted={}),
        _task(1_000, FIRST, 1, offered={}),
        _task(2_000, FIRST, 1, started={}),
        _task(3_000, ROOT, 1, cancel_requested={"message": "enough"}),
        _task(4_000, ROOT, 1, cancel_acknowledged={}),
        _task(5_000, ROOT, 1, cancelled={"reason": "REASON_CANCELLED"}),
    ]
    trace = build_trace("a" * 32, story)
    (task,) = trace.roots
    (attempt,) = _named(trace, "attempt")
    assert (task.status, attempt.status, attempt.details["reason"]) == ("cancelled", "cancelled", "REASON_CANCELLED")
    assert attempt.children[-1].kind == "cancel_acknowledged"
    assert "cancel requested, enough" in _text(trace)


def test_a_session_reported_by_both_ends_is_shown_once_after_the_spawn() -> None:
    def step(at_us: int, **what: Any) -> DecodedEntry:
        return _record(at_us, "AgentEvent", None, {"agent_id": "a", "instance_id": "i", **what}, "agents")

    told = [
        step(-9, connected={"session_epoch": "1"}),
        step(-8, spawned={"pid": 7}),
        step(-7, connected={"session_epoch": "1"}),
        step(5, disconnected={"session_epoch": "1"}),
        step(6, connected={"session_epoch": "2"}),
    ]
    (agent, _) = build_trace("a" * 32, [*told, _task(0, ROOT, 0, submitted={})]).roots
    assert [each.kind for each in agent.children] == ["spawned", "connected", "disconnected", "connected"]
    assert agent.children[1].details["reports"] == 2
    assert (agent.status, agent.end_us) == ("running", None)


def test_json_keys_are_stable() -> None:
    whole = build_trace("a" * 32, _story()).to_json()
    assert sorted(whole) == ["finished", "roots", "started_us", "trace_id"]
    for root in whole["roots"]:
        assert sorted(root) == ["at_us", "children", "details", "duration_us", "kind", "status", "title"]


@given(st.permutations(_story()), st.lists(st.integers(0, 11), max_size=6))
def test_order_and_repetition_of_entries_do_not_matter(story: list[DecodedEntry], again: list[int]) -> None:
    repeated = [*story, *(story[index] for index in again)]
    assert build_trace("a" * 32, repeated).to_json() == build_trace("a" * 32, _story()).to_json()


@given(st.lists(st.sampled_from(_story()), max_size=12))
def test_the_tree_is_built_with_any_entries_missing(part: list[DecodedEntry]) -> None:
    trace = build_trace("a" * 32, part)
    leaves = sum(len(list(root.walk())) for root in trace.roots)
    assert leaves >= len({each.event_id for each in part})
    assert _text(trace).startswith("trace ")


def test_tasks_that_name_each_other_as_parents_are_shown() -> None:
    one, two = Span("a" * 32, "6" * 16, "7" * 16), Span("a" * 32, "7" * 16, "6" * 16)
    trace = build_trace("a" * 32, [_task(0, one, 0, "t1", submitted={}), _task(1, two, 0, "t2", submitted={})])
    assert len(_named(trace, "task")) == 2
