"""Builds the tree of one trace from event entries.

Entries of orki's own streams name their task, attempt or agent. Entries of other streams are attached by the span in
their envelope. Entries that match nothing are attached to the root, so that none is omitted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from orki_server._observers.entries import DecodedEntry

TASK_EVENT: Final = "orki.events.v1.TaskEvent"
AGENT_EVENT: Final = "orki.events.v1.AgentEvent"

ENDS: Final = ("succeeded", "failed", "cancelled")
_TASK_STEPS: Final = ("submitted", "cancel_requested", "directed", "suspended", "resumed", *ENDS)
_ATTEMPT_STEPS: Final = ("offered", "started", "attempt_ended", "cancel_acknowledged")
_AGENT_STEPS: Final = ("spawned", "connected", "disconnected", "replaced", "stopped")


@dataclass(slots=True, kw_only=True)
class Node:
    """One line of the tree.

    Attributes:
        kind: `agent`, `task`, `attempt`, `queued`, `tool`, `usage`, `event`, or the name of a step such as `submitted`.
        title: Short description.
        start_us: Start, in microseconds since the Unix epoch.
        end_us: End; equal to `start_us` for an instant, None while it continues.
        status: `ok`, `failed`, `lost`, `cancelled`, `suspended`, `running`, or empty if it has no outcome.
        details: Further values, as JSON.
        children: Sorted by start.
    """

    kind: str
    title: str
    start_us: int
    end_us: int | None
    status: str = ""
    details: dict[str, Any] = field(default_factory=dict)
    children: list[Node] = field(default_factory=list)

    def walk(self) -> Iterator[Node]:
        """Yield the node and its descendants."""
        yield self
        for child in self.children:
            yield from child.walk()


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """A whole trace.

    Attributes:
        trace_id: 32 hex digits.
        started_us: Submission of its first task; times are shown relative to it.
        finished: Whether every task in it has ended.
        roots: Agents, then tasks, then entries that match neither.
    """

    trace_id: str
    started_us: int
    finished: bool
    roots: list[Node]

    def to_json(self) -> dict[str, Any]:
        """Return the tree as JSON with stable keys; times are microseconds relative to `started_us`."""
        return {
            "trace_id": self.trace_id,
            "started_us": self.started_us,
            "finished": self.finished,
            "roots": [_node_json(root, self.started_us) for root in self.roots],
        }


def build_trace(trace_id: str, records: Sequence[DecodedEntry]) -> Trace:
    """Build the tree from the records of the trace and the lifecycle events of its agents."""
    builder = _Builder()
    once = {each.event_id: each for each in records}
    ordered = sorted(once.values(), key=lambda each: each.time_us)
    for message, add in builder.writers.items():
        for record in ordered:
            if record.message == message:
                add(record)
    for record in ordered:
        if record.message not in builder.writers:
            builder.other_event(record)
    return builder.trace(trace_id)


class _Builder:
    def __init__(self) -> None:
        self._agents: dict[str, Node] = {}
        self._tasks: dict[str, Node] = {}
        self._parents: dict[str, str] = {}
        self._attempts: dict[tuple[str, int], Node] = {}
        self._spans: dict[str, Node] = {}
        self._unattached: list[Node] = []
        # In this order: later ones are attached to the nodes of earlier ones.
        self.writers = {
            TASK_EVENT: self.task_event,
            AGENT_EVENT: self.agent_event,
            "orki.events.v1.ToolEvent": self.tool_event,
            "orki.events.v1.UsageEvent": self.usage_event,
        }

    def task_event(self, record: DecodedEntry) -> None:
        body = record.fields
        task_id, attempt = str(body.get("task_id", "")), int(body.get("attempt", 0))
        task = self._task(task_id, record)
        step = next((each for each in (*_TASK_STEPS, *_ATTEMPT_STEPS) if each in body), "event")
        at_attempt = attempt > 0 and step in _ATTEMPT_STEPS
        owner = self._attempt(task_id, attempt, record) if at_attempt else task
        if record.span is not None:
            self._spans.setdefault(record.span.span_id, owner)
            if step == "submitted":
                self._parents[task_id] = record.span.parent_id
        facts = dict(body.get(step, {}))
        owner.children.append(_instant(step, record.time_us, details=facts))
        if step in ENDS:
            self._end_task(task, task_id, attempt, step, record, facts)
        elif step == "attempt_ended":
            _end_attempt(owner, record.time_us, facts)
        elif step == "suspended" and attempt:
            suspended = self._attempt(task_id, attempt, record)
            suspended.end_us, suspended.status = record.time_us, "suspended"

    def agent_event(self, record: DecodedEntry) -> None:
        body = record.fields
        instance, name = str(body.get("instance_id", "")), str(body.get("agent_id", ""))
        if instance not in self._agents:
            self._agents[instance] = _running("agent", name, record, {"agent_id": name, "instance_id": instance})
        agent = self._agents[instance]
        step = next((each for each in _AGENT_STEPS if each in body), "event")
        facts = dict(body.get(step, {}))
        reported = next((each for each in agent.children if _same_step(each, step, facts)), None)
        if reported is not None:
            # Agent and orchestrator both report the start and end of a session.
            reported.details["reports"] = int(reported.details.get("reports", 1)) + 1
            return
        agent.children.append(_instant(step, record.time_us, details=facts))
        agent.status = {"stopped": "ok", "disconnected": "lost", "replaced": "lost"}.get(step, "running")
        agent.end_us = record.time_us if step in ("stopped", "replaced") else None

    def tool_event(self, record: DecodedEntry) -> None:
        body = record.fields
        begun = record.time_us - int(body.get("duration_ns", 0)) // 1000
        node = Node(kind="tool", title=str(body.get("method", "")), start_us=begun, end_us=record.time_us)
        node.status = "failed" if "reason" in body else "ok"
        node.details = _without(body, "method", "task_id", "attempt", "agent_id")
        self._attach(node, record)

    def usage_event(self, record: DecodedEntry) -> None:
        node = _instant("usage", record.time_us, title=str(record.fields.get("model", "")))
        node.details = _without(record.fields, "model", "task_id", "attempt", "agent_id")
        self._attach(node, record)

    def other_event(self, record: DecodedEntry) -> None:
        node = _instant("event", record.time_us, title=record.message.rpartition(".")[2])
        node.details = {"stream": record.stream, "event": record.fields}
        self._attach(node, record)

    def trace(self, trace_id: str) -> Trace:
        roots = list(self._agents.values())
        for task_id, task in self._tasks.items():
            _add_queued(task)
            above = self._spans.get(self._parents.get(task_id, ""))
            if above is None or any(each is above for each in task.walk()):
                roots.append(task)
            else:
                above.children.append(task)
        roots.extend(self._unattached)
        for root in roots:
            for node in root.walk():
                # "spawned" has the agent's clock and "connected" the orchestrator's, so times may be out of order.
                node.children.sort(key=lambda each: (each.kind != "spawned", each.start_us))
        starts = [each.start_us for each in self._tasks.values()] or [each.start_us for each in roots] or [0]
        finished = bool(self._tasks) and all(each.end_us is not None for each in self._tasks.values())
        return Trace(trace_id=trace_id, started_us=min(starts), finished=finished, roots=roots)

    def _task(self, task_id: str, record: DecodedEntry) -> Node:
        if task_id not in self._tasks:
            method = str(record.fields.get("method", ""))
            self._tasks[task_id] = _running("task", method, record, {"task_id": task_id, "method": method})
        return self._tasks[task_id]

    def _attempt(self, task_id: str, number: int, record: DecodedEntry) -> Node:
        attempt = self._attempts.get((task_id, number))
        if attempt is None:
            title = f"attempt {number} on {record.fields.get('agent_id', '')}"
            details = {"attempt": number, **_only(record.fields, "fence", "agent_id", "instance_id")}
            attempt = _running("attempt", title, record, details)
            self._attempts[task_id, number] = attempt
            self._tasks[task_id].children.append(attempt)
        return attempt

    def _end_task(
        self, task: Node, task_id: str, attempt: int, step: str, record: DecodedEntry, facts: dict[str, Any]
    ) -> None:
        task.end_us, task.status = record.time_us, "ok" if step == "succeeded" else step
        task.details["outcome"] = {"state": step, **facts}
        running = self._attempts.get((task_id, attempt))
        if running is not None and running.end_us is None:
            running.end_us, running.status = record.time_us, task.status
            if "reason" in facts:
                running.details["reason"] = facts["reason"]

    def _attach(self, node: Node, record: DecodedEntry) -> None:
        body, span = record.fields, record.span
        owner = None
        if span is not None:
            owner = self._spans.get(span.span_id) or self._spans.get(span.parent_id)
        if owner is None or node.kind != "event":
            task_id = str(body.get("task_id", ""))
            named = self._attempts.get((task_id, _number(body.get("attempt")))) or self._tasks.get(task_id)
            owner = named or owner
        if owner is None:
            self._unattached.append(node)
        else:
            owner.children.append(node)
        if span is not None:
            self._spans.setdefault(span.span_id, node)


def _running(kind: str, title: str, record: DecodedEntry, details: dict[str, Any]) -> Node:
    return Node(kind=kind, title=title, start_us=record.time_us, end_us=None, status="running", details=details)


def _instant(kind: str, at_us: int, *, title: str = "", details: dict[str, Any] | None = None) -> Node:
    return Node(kind=kind, title=title or kind.replace("_", " "), start_us=at_us, end_us=at_us, details=details or {})


def _same_step(known: Node, step: str, facts: dict[str, Any]) -> bool:
    session = facts.get("session_epoch")
    return session is not None and known.kind == step and known.details.get("session_epoch") == session


def _end_attempt(attempt: Node, at_us: int, facts: dict[str, Any]) -> None:
    reason = str(facts.get("reason", ""))
    attempt.end_us = at_us
    attempt.status = "lost" if reason in ("REASON_LEASE_EXPIRED", "REASON_OFFER_TIMEOUT") else "failed"
    attempt.details |= _only(facts, "reason", "message")


def _add_queued(task: Node) -> None:
    """Add a node for each wait between the submission, or the end of an attempt, and the next offer."""
    attempts = [each for each in task.children if each.kind == "attempt"]
    since, wait = task.start_us, 0
    for attempt in attempts:
        details = {"backoff_ms": wait} if wait else {}
        queued = Node(kind="queued", title="queued", start_us=since, end_us=attempt.start_us, details=details)
        task.children.append(queued)
        since = attempt.end_us if attempt.end_us is not None else attempt.start_us
        ended = next((each for each in attempt.children if each.kind == "attempt_ended"), None)
        wait = int(ended.details.get("backoff_ms", 0)) if ended is not None else 0
    last_failed = bool(attempts) and attempts[-1].status in ("lost", "failed")
    if task.end_us is None and (not attempts or last_failed):
        task.children.append(Node(kind="queued", title="queued", start_us=since, end_us=None, status="running"))


def _node_json(node: Node, zero_us: int) -> dict[str, Any]:
    return {
        "kind": node.kind,
        "title": node.title,
        "status": node.status,
        "at_us": node.start_us - zero_us,
        "duration_us": None if node.end_us is None else node.end_us - node.start_us,
        "details": json.loads(json.dumps(node.details)),
        "children": [_node_json(child, zero_us) for child in node.children],
    }


def _only(body: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: body[name] for name in names if name in body}


def _without(body: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in body.items() if name not in names}


def _number(value: Any) -> int:
    return value if isinstance(value, int) else 0
