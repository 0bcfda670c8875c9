"""A trace for people: one tree, times relative to the submission, silence shown."""

from __future__ import annotations

__all__ = ["line", "render"]

from typing import Any, Final

from rich.text import Text
from rich.tree import Tree

from orki_server.cli.figures import duration, offset, size
from orki_server.cli.trace_tree import Node, Trace
from orki_server.observers.redaction import safe_json, safe_text

_STYLES: Final = {"ok": "green", "failed": "red", "lost": "red", "cancelled": "yellow", "running": "cyan"}
_LONGEST: Final = 160
_SHORTEST_GAP_US: Final = 50_000


def render(trace: Trace) -> Tree:
    """The whole tree, to be printed by a rich console."""
    state = "finished" if trace.finished else "not finished"
    tree = Tree(Text(f"trace {trace.trace_id} ({state})", style="bold"))
    ends = [node.end_us for root in trace.roots if root.kind != "agent" for node in root.walk() if node.end_us]
    gap_us = max(_SHORTEST_GAP_US, (max(ends, default=0) - trace.started_us) // 10)
    for root in trace.roots:
        _grow(tree, root, trace.started_us, gap_us)
    return tree


def line(node: Node, zero_us: int) -> Text:
    """One node as one line."""
    text = Text(f"{offset(node.start_us - zero_us)}  ", style="")
    text.append(_words(node), style=_STYLES.get(node.status, "") if node.kind in ("task", "attempt", "tool") else "")
    text.no_wrap = False
    return text


def _grow(tree: Tree, node: Node, zero_us: int, gap_us: int) -> None:
    branch = tree.add(line(node, zero_us))
    last: int | None = None
    for child in node.children:
        # What an agent does between two tasks is not this trace's silence.
        if last is not None and child.start_us - last > gap_us and node.kind != "agent":
            branch.add(Text(f"⋮ nothing for {duration(child.start_us - last)}", style="dim"))
        _grow(branch, child, zero_us, gap_us)
        last = max(last or 0, child.end_us or child.start_us)


def _words(node: Node) -> str:
    write = _WRITERS.get(node.kind, _step)
    words = safe_text(write(node))
    return words if len(words) <= _LONGEST else words[: _LONGEST - 1] + "…"


def _agent(node: Node) -> str:
    return f"agent {node.title}, instance {node.details.get('instance_id', '')}"


def _task(node: Node) -> str:
    words = f"task {node.details.get('task_id', '')} {node.title}: {_outcome(node)}"
    return words + _because(node.details.get("outcome", {}))


def _attempt(node: Node) -> str:
    return f"{node.title}, fence {node.details.get('fence', '?')}: {_outcome(node)}{_because(node.details)}"


def _queued(node: Node) -> str:
    wait = node.details.get("backoff_ms")
    reason = f", backoff {duration(wait * 1000)}" if wait else ""
    return f"queued {_length(node)}{reason}"


def _tool(node: Node) -> str:
    details = node.details
    sizes = f"{size(int(details.get('request_bytes', 0)))} → {size(int(details.get('reply_bytes', 0)))}"
    return f"tool {node.title} {_length(node)} ({sizes}){_because(details)}"


def _usage(node: Node) -> str:
    details = node.details
    words = f"usage {node.title}: {details.get('input_tokens', 0)} tokens in, {details.get('output_tokens', 0)} out"
    cost = int(details.get("cost_micros", 0))
    return f"{words}, ${cost / 1_000_000:.6f}" if cost else words


def _event(node: Node) -> str:
    return f"{node.title} on {node.details['stream']} {safe_json(node.details['event'])}"


def _step(node: Node) -> str:
    facts = {name: value for name, value in node.details.items() if name not in ("reason", "message")}
    shown = ", ".join(f"{name} {_plain(value)}" for name, value in facts.items())
    return f"{node.title}{f' ({shown})' if shown else ''}{_because(node.details)}"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else safe_json(value)


def _outcome(node: Node) -> str:
    if node.end_us is None:
        return "running"
    word = {"ok": "succeeded"}.get(node.status, node.status)
    return f"{word} after {_length(node)}"


def _length(node: Node) -> str:
    return "…" if node.end_us is None else duration(node.end_us - node.start_us)


def _because(details: dict[str, Any]) -> str:
    reason = str(details.get("reason", "")).removeprefix("REASON_")
    message = str(details.get("message", ""))
    return "".join(f", {each}" for each in (reason, message) if each)


_WRITERS: Final = {
    "agent": _agent,
    "task": _task,
    "attempt": _attempt,
    "queued": _queued,
    "tool": _tool,
    "usage": _usage,
    "event": _event,
}
