"""`orki trace`: prints the history of a task, from the start of its agent and its submission to the result."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final

import click
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text
from rich.tree import Tree

from orki_contract.errors import OrkiError, UnknownStream, UnknownTask
from orki_contract.trace import parse_traceparent
from orki_events.connection import Connection
from orki_events.registry import StreamRegistry
from orki_server._cli.formats import STYLES, duration, offset, print_json, size, stderr_console, stdout_console
from orki_server._cli.options import json_option, open_client, open_redis, redis_option, run_async, with_orchestrator
from orki_server._cli.trace_scan import ScanProgress, TraceRange, check_id, find_trace, scan_trace, trace_range
from orki_server._cli.trace_tree import Node, Trace, build_trace
from orki_server._observers.redaction import safe_json, safe_text

_MAX_LINE: Final = 160
_MIN_GAP_US: Final = 50_000
_TASK_ID_LENGTH: Final = 28
_FOLLOW_INTERVAL: Final = 0.5
_LATE_EVENTS_WAIT: Final = 1.5


def render(trace: Trace) -> Tree:
    """Render a trace as a tree: times relative to the submission, long gaps marked."""
    state = "finished" if trace.finished else "not finished"
    tree = Tree(Text(f"trace {trace.trace_id} ({state})", style="bold"))
    ends = [node.end_us for root in trace.roots if root.kind != "agent" for node in root.walk() if node.end_us]
    gap_us = max(_MIN_GAP_US, (max(ends, default=0) - trace.started_us) // 10)
    for root in trace.roots:
        _grow(tree, root, trace.started_us, gap_us)
    return tree


def _grow(tree: Tree, node: Node, zero_us: int, gap_us: int) -> None:
    words = safe_text(_WRITERS.get(node.kind, _step)(node))
    words = words if len(words) <= _MAX_LINE else words[: _MAX_LINE - 1] + "…"
    style = STYLES.get(node.status, "") if node.kind in ("task", "attempt", "tool") else ""
    text = Text(f"{offset(node.start_us - zero_us)}  ", no_wrap=False).append(words, style=style)
    branch = tree.add(text)
    last: int | None = None
    for child in node.children:
        # The time between two tasks of an agent is no gap of this trace.
        if last is not None and child.start_us - last > gap_us and node.kind != "agent":
            branch.add(Text(f"⋮ nothing for {duration(child.start_us - last)}", style="dim"))
        _grow(branch, child, zero_us, gap_us)
        last = max(last or 0, child.end_us or child.start_us)


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
    shown = ", ".join(
        f"{name} {value if isinstance(value, str) else safe_json(value)}"
        for name, value in node.details.items()
        if name not in ("reason", "message")
    )
    return f"{node.title}{f' ({shown})' if shown else ''}{_because(node.details)}"


def _outcome(node: Node) -> str:
    if node.end_us is None:
        return "running"
    return f"{'succeeded' if node.status == 'ok' else node.status} after {_length(node)}"


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


@click.command(
    epilog="""\b
Examples:
  orki trace t3-01jc9xkq
  orki trace 4bf92f3577b34da6a3ce929d0e0e4736 --json
  orki trace t3-01jc9xkq --follow
""",
)
@click.argument("wanted", metavar="ID")
@click.option("--follow", is_flag=True, help="Update the tree until every task of the trace has ended.")
@json_option
@redis_option
@with_orchestrator
@run_async
async def trace(wanted: str, follow: bool, as_json: bool, redis_url: str, orchestrator: str, insecure: bool) -> None:
    """Show the history of a task as a tree, from the start of its agent and its submission to the result.

    ID is a task id or a trace id, or a unique prefix of one. The tree shows attempts and why they ended, tool calls,
    usage and your own events. Each line starts with the seconds since the submission, and long gaps are marked. The
    tree is built from the events in Redis, so the orchestrator need not run.
    """
    check_id(wanted)
    async with open_redis(redis_url) as link:
        with _progress() as progress:
            streams = await StreamRegistry().streams(link)
            if not streams:
                raise UnknownStream("no streams yet: nothing has published, so there is nothing to trace")
            found = await _range_from_orchestrator(wanted, orchestrator, insecure)
            found = found or await find_trace(link, streams, wanted, progress)
            tree, trimmed = await _read_trace(link, found, progress)
        if follow and not tree.finished:
            tree, trimmed = await _follow(link, found, tree, as_json)
            if not as_json:
                _warn_trimmed(trimmed)
                return
    if not as_json:
        stdout_console().print(render(tree))
        _warn_trimmed(trimmed)
    else:
        print_json({**tree.to_json(), "possibly_trimmed": trimmed})


async def _range_from_orchestrator(wanted: str, orchestrator: str, insecure: bool) -> TraceRange | None:
    """Return the range of a task by its full id; None if the orchestrator does not answer or does not know it."""
    if not wanted.startswith("t") or len(wanted) < _TASK_ID_LENGTH:
        return None
    try:
        async with open_client(orchestrator, insecure, patience=0) as client:
            task = await asyncio.wait_for(client.get(wanted), 2.0)
    except (OrkiError, TimeoutError):
        return None
    span = parse_traceparent(task.traceparent)
    if span is None or not task.submitted_us:
        return None
    return trace_range(span.trace_id, task.submitted_us, task.ended_us)


async def _read_trace(link: Connection, found: TraceRange, progress: ScanProgress) -> tuple[Trace, list[str]]:
    # Includes streams that were registered in the meantime.
    streams = await StreamRegistry().streams(link)
    records, trimmed = await scan_trace(link, streams, found, progress)
    if not records:
        raise UnknownTask(f"no event of trace {found.trace_id} is left in the streams: they have been trimmed")
    return build_trace(found.trace_id, records), trimmed


async def _follow(link: Connection, found: TraceRange, tree: Trace, as_json: bool) -> tuple[Trace, list[str]]:
    """Read the trace repeatedly until it has ended, and a little longer for late events."""
    open_end = replace(found, end_ms=None)
    console = Console(quiet=True) if as_json else stdout_console()
    ended_at: float | None = None
    trimmed: list[str] = []
    with Live(render(tree), console=console, auto_refresh=False, vertical_overflow="visible") as live:
        while ended_at is None or time.monotonic() < ended_at + _LATE_EVENTS_WAIT:
            await asyncio.sleep(_FOLLOW_INTERVAL)
            try:
                tree, trimmed = await _read_trace(link, open_end, _silent)
            except OrkiError as error:
                if not error.retryable:
                    raise
                continue
            live.update(render(tree), refresh=True)
            if tree.finished and ended_at is None:
                ended_at = time.monotonic()
    return tree, trimmed


def _silent(_: str, __: float) -> None:
    pass


@contextmanager
def _progress() -> Iterator[ScanProgress]:
    """Show a progress bar for each stream of more than one page, on a terminal."""
    console = stderr_console()
    if not console.is_terminal:
        yield _silent
        return
    with Progress(TextColumn("reading {task.description}"), BarColumn(), console=console, transient=True) as bars:
        tasks = {}

        def show(name: str, done: float) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=1.0)
            bars.update(tasks[name], completed=min(1.0, max(0.0, done)))

        yield show


def _warn_trimmed(trimmed: list[str]) -> None:
    if trimmed:
        stderr_console().print(
            f"entries of this trace may have been trimmed from: {', '.join(trimmed)} (the trace is older than "
            "their retention)"
        )
