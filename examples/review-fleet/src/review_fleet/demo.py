"""The demo: a fleet reviews a tree of Python files, loses one agent, and accounts for everything.

Run it with `./noxw -s demo [-- PATH]`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from sourcereview.v1.review_orki import (
    REVIEW_FINDINGS,
    ReviewFileRequest,
    ReviewFileResponse,
    SourceReviewServiceClient,
)

from orki_contract import TaskHandle
from orki_contract.errors import OrkiError
from orki_control import Client
from orki_events import Events, connect
from review_fleet.accounting import Ledger, balance, drained_ledger
from review_fleet.findings import gather
from review_fleet.fleet import Fleet
from review_fleet.processes import ChildFailed
from review_fleet.report import FileResult, Killed, latency_summary, totals
from review_fleet.takeover import kill_one_agent
from review_fleet.tree import python_files
from review_fleet.watching import Watching

__all__ = ["main"]

_WAITERS = 64
_LOOK_SECONDS = 0.5
_SHOWN_FINDINGS = 12


@dataclass(slots=True)
class Outcome:
    """All that a run found out."""

    files: list[FileResult] = field(default_factory=list)
    killed: Killed | None = None
    ledger: Ledger = field(default_factory=dict)
    latency_ms: dict[str, Any] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)
    trace: str = ""
    wrong: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return the content of the `--json` file."""
        killed = self.killed
        return {
            "files": [each.to_json() for each in self.files],
            "killed_agent": killed
            and {"agent": killed.agent, "task": killed.task, "successor_fence": killed.successor_fence},
            "ledger": self.ledger,
            "trace_id": killed.trace_id if killed else "",
            "latency_ms": self.latency_ms,
        }


@click.command()
@click.argument("path", type=click.Path(exists=True, file_okay=False, path_type=Path), default=".")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the results to FILE.")
@click.option("--agents", type=click.IntRange(2, 16), default=3, show_default=True, help="Agent processes.")
@click.option(
    "--pace",
    type=click.FloatRange(0, 60),
    default=0.02,
    show_default=True,
    help="Seconds that a review waits, where a real fleet would wait for a language model.",
)
def main(path: Path, json_file: Path | None, agents: int, pace: float) -> None:
    """Reviews the Python files below PATH with a fleet of agents, kills one of them, and accounts for everything.

    Links and dot-folders are not followed. The exit code is 0 only if every file was reviewed once, the killed agent's
    work was taken over, and the ledger of events balances.
    """
    console = Console(highlight=False)
    try:
        with tempfile.TemporaryDirectory(prefix="orki-demo-") as folder:
            outcome = asyncio.run(_run(console, path.resolve(), Path(folder), agents, pace))
    except asyncio.CancelledError:
        console.print("demo: ended from outside; all that it started was stopped")
        sys.exit(143)
    except (ChildFailed, OrkiError) as error:
        console.print(f"[red]demo failed:[/] {error}", markup=True)
        sys.exit(1)
    if json_file is not None:
        json_file.write_text(json.dumps(outcome.to_json(), indent=1) + "\n", encoding="utf-8")
    _print(console, outcome)
    sys.exit(1 if outcome.wrong else 0)


async def _run(console: Console, root: Path, folder: Path, agents: int, pace: float) -> Outcome:
    paths = python_files(root)
    if not paths:
        console.print(f"there is no Python file below {root}: nothing to review")
        return Outcome()
    _end_with_parent()
    console.print(f"{len(paths):,} Python files below {root}; starting {agents} agents, orchestrator, observers")
    # With few files each must take a while, or all are done before an agent can be caught with one.
    pace = max(pace, 0.5) if len(paths) < 50 else pace
    with Fleet(root, folder, agents=agents, pace=pace) as fleet:
        async with connect(fleet.redis_url) as events:
            outcome = await _review(console, fleet, events, paths)
            await asyncio.to_thread(fleet.stop_agents)
            outcome.ledger = await _settle(console, events, outcome)
        outcome.trace = await asyncio.to_thread(_trace, fleet, outcome) if outcome.killed else ""
        console.print(f"dashboard while a fleet runs: {fleet.feed_url()}")
    outcome.wrong = _judge(outcome, paths)
    return outcome


async def _review(console: Console, fleet: Fleet, events: Events, paths: list[bytes]) -> Outcome:
    """Submits one task a file, kills an agent half-way, and waits for all results."""
    outcome = Outcome()
    watching = Watching(events)
    followers = [asyncio.create_task(watching.tasks()), asyncio.create_task(watching.tools())]
    try:
        with _bars(console) as (bars, submitted, reviewed):
            bars.update(submitted, total=len(paths))
            bars.update(reviewed, total=len(paths))
            async with Client(fleet.orchestrator) as orki:
                await fleet.wait_for_agents(orki)
                handles = await SourceReviewServiceClient(orki).review_file.submit_many(
                    [ReviewFileRequest(path=path) for path in paths]
                )
                bars.update(submitted, completed=len(handles))
                third = asyncio.Event()
                waiting = asyncio.create_task(_results(handles, paths, lambda: bars.advance(reviewed), third))
                await third.wait()
                outcome.killed = await kill_one_agent(orki, fleet.agents, lambda: not waiting.done())
                outcome.files = await waiting
                if outcome.killed:
                    outcome.killed = await _succession(orki, outcome.killed, outcome.files, handles)
    finally:
        for follower in followers:
            follower.cancel()
        await asyncio.gather(*followers, return_exceptions=True)
    outcome.latency_ms = latency_summary(watching.latency_ms)
    return outcome


async def _results(
    handles: list[TaskHandle[ReviewFileResponse, Any, Any]],
    paths: list[bytes],
    advance: Callable[[], None],
    third: asyncio.Event,
) -> list[FileResult]:
    """The result of every task, in the order of the paths; a task that failed is a result with an error.

    `third` is set once a third is done: from there on it takes a moment until an agent is caught.
    """
    room = asyncio.Semaphore(_WAITERS)
    finished: list[bytes] = []
    if len(paths) <= _WAITERS:
        third.set()

    async def one(handle: TaskHandle[ReviewFileResponse, Any, Any], path: bytes) -> FileResult:
        async with room:
            try:
                response = await handle.result()
            except OrkiError as error:
                response = ReviewFileResponse(error=f"was not reviewed: {error.message}")
        advance()
        finished.append(path)
        if 3 * len(finished) >= len(paths):
            third.set()
        return FileResult(
            path=path,
            lines=response.lines,
            functions=response.functions,
            classes=response.classes,
            attempt=response.attempt,
            fence=response.fence,
            error=response.error or None,
        )

    return await asyncio.gather(*(one(handle, path) for handle, path in zip(handles, paths, strict=True)))


async def _succession(
    orki: Client, killed: Killed, files: list[FileResult], handles: list[TaskHandle[ReviewFileResponse, Any, Any]]
) -> Killed:
    """Who was killed, with the fence under which its task ran again."""
    place = [handle.task_id for handle in handles].index(killed.task)
    traceparent = (await orki.get(killed.task)).traceparent
    return replace(killed, successor_fence=files[place].fence, trace_id=traceparent.split("-")[1])


async def _settle(console: Console, events: Events, outcome: Outcome) -> Ledger:
    """Lets the example's own group read its stream, waits for the other groups, and reads the ledger."""
    stop = asyncio.Event()
    await events.prepare(REVIEW_FINDINGS)
    reading = asyncio.create_task(events.run(gather(outcome.findings), stop=stop))
    try:
        with console.status("groups drain") as status:
            return await drained_ledger(events, lambda sentence: status.update(f"groups drain: {sentence}"))
    finally:
        stop.set()
        await reading


def _trace(fleet: Fleet, outcome: Outcome) -> str:
    assert outcome.killed
    command = [sys.executable, "-m", "orki_server", "trace", outcome.killed.task, "--redis", fleet.redis_url]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return done.stdout if done.returncode == 0 else f"orki trace failed: {done.stderr}"


def _judge(outcome: Outcome, paths: list[bytes]) -> list[str]:
    """Return the failed expectations."""
    wrong = balance(outcome.ledger)
    if [each.path for each in outcome.files] != paths:
        wrong.append("the files that were reviewed are not the files of the tree")
    wrong += [f"{each.path!r} {each.error}" for each in outcome.files if (each.error or "").startswith("was not")]
    if paths and outcome.killed is None:
        wrong.append("no agent could be caught with work in its hands")
    if outcome.killed and (outcome.killed.successor_fence or 0) <= outcome.killed.fence:
        wrong.append(f"task {outcome.killed.task} did not run again under a higher fence")
    return wrong


def _end_with_parent() -> None:
    """Stop the demo and its processes on SIGTERM and when the parent process ends."""
    loop, task, parent = asyncio.get_running_loop(), asyncio.current_task(), os.getppid()
    assert task is not None
    loop.add_signal_handler(signal.SIGTERM, task.cancel)

    def look() -> None:
        if os.getppid() != parent:
            task.cancel()
        loop.call_later(_LOOK_SECONDS, look)

    look()


@contextlib.contextmanager
def _bars(console: Console) -> Iterator[tuple[Progress, TaskID, TaskID]]:
    columns = (TextColumn("{task.description:>10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bars:
        yield bars, bars.add_task("submitted"), bars.add_task("reviewed")


def _print(console: Console, outcome: Outcome) -> None:
    for sentence in sorted(outcome.findings)[:_SHOWN_FINDINGS]:
        console.print(f"  {sentence}", markup=False)
    if len(outcome.findings) > _SHOWN_FINDINGS:
        console.print(f"  … and {len(outcome.findings) - _SHOWN_FINDINGS:,} more findings")
    sums = totals(outcome.files)
    if not outcome.files:
        return
    console.print(", ".join(f"{value:,} {name}" for name, value in sums.items()))
    if killed := outcome.killed:
        console.print(
            f"{killed.agent} was killed with {killed.task} in its hands (fence {killed.fence}); "
            f"it ran again under fence {killed.successor_fence}:"
        )
        console.print(outcome.trace, markup=False)
    console.print(_ledger_table(outcome.ledger))
    for plane, figures in outcome.latency_ms.items():
        console.print(f"latency {plane}: p50 {figures['p50']} ms, p99 {figures['p99']} ms")
    for sentence in outcome.wrong:
        console.print(f"[red]wrong:[/] {sentence}")
    if not outcome.wrong:
        console.print("every file was reviewed once, the lost work was taken over, the ledger balances")


def _ledger_table(ledger: Ledger) -> Table:
    table = Table("stream", "published", "group", "processed", "dead-lettered", "declared lost")
    for stream, row in sorted(ledger.items()):
        for group, counts in sorted(row["groups"].items()):
            cells = [row["published"], group, counts["processed"], counts["dead_lettered"], counts["declared_lost"]]
            table.add_row(stream, *(str(cell) for cell in cells))
    return table


if __name__ == "__main__":
    main()
