"""`orki trace`: what became of a task, from the agent's spawn and the submit to the result."""

from __future__ import annotations

__all__ = ["trace"]

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import click
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn

from orki_contract.errors import OrkiError, UnknownStream, UnknownTask
from orki_contract.trace import parse_traceparent
from orki_events.connection import Connection
from orki_events.registry import StreamRegistry
from orki_server.cli.settings import events_link, json_option, open_client, redis_option, run, with_orchestrator
from orki_server.cli.tables import print_json, stderr_console, stdout_console
from orki_server.cli.trace_scan import Found, ScanProgress, check_id, find_trace, scan_trace, task_bounds
from orki_server.cli.trace_tree import Trace, build_trace
from orki_server.cli.trace_view import render

_WHOLE_TASK_ID: Final = 28
_EVERY_S: Final = 0.5
_LINGER_S: Final = 1.5


@click.command(
    epilog="""\b
Examples:
  orki trace t3-01jc9xkq
  orki trace 4bf92f3577b34da6a3ce929d0e0e4736 --json
  orki trace t3-01jc9xkq --follow
""",
)
@click.argument("wanted", metavar="ID")
@click.option("--follow", is_flag=True, help="Go on until every task of the trace has ended.")
@json_option
@redis_option
@with_orchestrator
def trace(wanted: str, follow: bool, as_json: bool, redis_url: str, orchestrator: str, insecure: bool) -> None:
    """Show one tree from the agent's spawn and the submit to the result.

    ID is a task's id or a trace's id, or the beginning of one where only one begins so. The tree shows attempts with
    their reasons, tool calls, usage and your own events, each with its time since the submission in seconds, and where
    nothing happened for long. It is made of the events in Redis; the orchestrator need not run.
    """
    check_id(wanted)
    run(_trace(wanted, follow, as_json, redis_url, (orchestrator, insecure)))


async def _trace(wanted: str, follow: bool, as_json: bool, redis_url: str, client: tuple[str, bool]) -> None:
    async with events_link(redis_url) as link:
        with _progress() as progress:
            streams = await StreamRegistry().streams(link)
            if not streams:
                raise UnknownStream("no streams yet: nobody has published, so there is nothing to trace")
            found = await _ask_orchestrator(wanted, *client) or await find_trace(link, streams, wanted, progress)
            tree, trimmed = await _look(link, found, progress)
        if follow and not tree.finished:
            tree, trimmed = await _follow(link, found, tree, as_json)
            if not as_json:
                _tell_trimmed(trimmed)
                return
    if not as_json:
        stdout_console().print(render(tree))
        _tell_trimmed(trimmed)
    else:
        print_json({**tree.to_json(), "possibly_trimmed": trimmed})


async def _ask_orchestrator(wanted: str, orchestrator: str, insecure: bool) -> Found | None:
    """What it knows of a task whose id is whole; None where it cannot tell."""
    if not wanted.startswith("t") or len(wanted) < _WHOLE_TASK_ID:
        return None
    try:
        async with open_client(orchestrator, insecure, patience=0) as client:
            task = await asyncio.wait_for(client.get(wanted), 2.0)
    except (OrkiError, TimeoutError):
        return None
    span = parse_traceparent(task.traceparent)
    if span is None or not task.submitted_us:
        return None
    return Found(trace_id=span.trace_id, bounds=task_bounds(task.submitted_us, task.ended_us))


async def _look(link: Connection, found: Found, progress: ScanProgress) -> tuple[Trace, list[str]]:
    # Streams that were registered meanwhile belong to the trace too.
    streams = await StreamRegistry().streams(link)
    records, trimmed = await scan_trace(link, streams, found, progress)
    if not records:
        raise UnknownTask(f"no event of trace {found.trace_id} is left in the streams: they were trimmed since")
    return build_trace(found.trace_id, records), trimmed


async def _follow(link: Connection, found: Found, tree: Trace, as_json: bool) -> tuple[Trace, list[str]]:
    """Looks again and again until the trace has ended, and a little longer for what comes late."""
    open_end = Found(trace_id=found.trace_id, bounds=task_bounds((found.bounds.start_ms + 1000) * 1000, 0))
    console = Console(quiet=True) if as_json else stdout_console()
    ended_at: float | None = None
    trimmed: list[str] = []
    with Live(render(tree), console=console, auto_refresh=False, vertical_overflow="visible") as live:
        while ended_at is None or time.monotonic() < ended_at + _LINGER_S:
            await asyncio.sleep(_EVERY_S)
            try:
                tree, trimmed = await _look(link, open_end, _silent)
            except OrkiError as error:
                if not error.retryable:
                    raise
                continue
            live.update(render(tree), refresh=True)
            if tree.finished and ended_at is None:
                ended_at = time.monotonic()
    return tree, trimmed


def _silent(_: str, __: float) -> None:
    """Takes progress and shows nothing."""


@contextmanager
def _progress() -> Iterator[ScanProgress]:
    """A bar for each stream that takes more than a page, on a terminal."""
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


def _tell_trimmed(trimmed: list[str]) -> None:
    if trimmed:
        stderr_console().print(
            f"entries of that time may have been trimmed from: {', '.join(trimmed)} (their retention is shorter than "
            "the trace is old)"
        )
