"""`orki schedule`: tasks that are submitted at the times of a cron expression."""

from __future__ import annotations

import time
from typing import Any, Final

import click

from orki.control.v1.schedule_pb2 import MissedTicks, Schedule
from orki.control.v1.task_pb2 import Submission
from orki_server._cli.formats import Columns, duration, print_json, print_rows
from orki_server._cli.options import json_option, open_client, run_async, with_orchestrator
from orki_server._cli.placement import with_placement
from orki_server._cli.submit import find_method, registered_methods, request_from_json
from orki_server._cli.tasks import time_or_none
from orki_server._observers.redaction import safe_text

_COLUMNS: Final = Columns(
    ("SCHEDULE", "CRON", "METHOD", "NEXT", "LAST TASK"), right={"NEXT"}, uncut={"SCHEDULE", "NEXT"}
)
_MISSED: Final = {"skip": MissedTicks.MISSED_TICKS_SKIP, "catch-up": MissedTicks.MISSED_TICKS_CATCH_UP}


def schedule_json(schedule: Schedule) -> dict[str, Any]:
    """Return a schedule as JSON with stable keys."""
    failed = schedule.HasField("last_failure")
    return {
        "name": schedule.name,
        "cron": schedule.cron,
        "time_zone": schedule.time_zone or "UTC",
        "method": schedule.submission.method,
        "missed": "catch-up" if schedule.missed == MissedTicks.MISSED_TICKS_CATCH_UP else "skip",
        "paused": schedule.paused,
        "actor": schedule.actor,
        "last_tick": time_or_none(schedule.last_tick_us),
        "next_tick": time_or_none(schedule.next_tick_us),
        "last_task_id": schedule.last_task_id,
        "last_failure": schedule.last_failure.message if failed else None,
    }


@click.group(
    epilog="""\b
Examples:
  orki schedule add nightly '0 2 * * *' ReviewService.ReviewFile '{"path": "a.py"}' --time-zone Europe/Berlin
  orki schedule list
  orki schedule pause nightly
"""
)
def schedule() -> None:
    """Submit tasks at the times of a cron expression.

    Each tick gives one task, with any number of orchestrators.
    """


@schedule.command(
    "add",
    short_help="Add a schedule.",
    epilog="""\b
Example:
  orki schedule add nightly '0 2 * * *' ReviewService.ReviewFile '{"path": "a.py"}'
""",
)
@click.argument("name", metavar="NAME")
@click.argument("cron", metavar="CRON")
@click.argument("method", metavar="SERVICE.METHOD")
@click.argument("request_text", metavar="JSON", default="{}")
@click.option(
    "--time-zone", default="", metavar="ZONE", help="Time zone of CRON, such as Europe/Berlin.  [default: UTC]"
)
@click.option(
    "--missed",
    type=click.Choice(sorted(_MISSED)),
    default="skip",
    show_default=True,
    help="What happens with ticks at which no orchestrator ran: they are left out, or one task is submitted for all.",
)
@with_placement
@click.option("--replace", is_flag=True, help="Replace a schedule of this name.")
@json_option
@with_orchestrator
@run_async
async def add(
    name: str,
    cron: str,
    method: str,
    request_text: str,
    missed: str,
    placement: Submission,
    replace: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Add a schedule that submits a task of SERVICE.METHOD at each time of CRON.

    CRON has five fields, minute, hour, day, month and weekday, or six with seconds in front. JSON is the request.
    """
    time_zone = options.pop("time_zone")
    async with open_client(**options) as client:
        found = find_method(method, registered_methods(await client.list_services()))
        request = request_from_json(request_text, found.kind(found.contract.request))
        submission = Submission(method=found.contract.full_name, request=request.SerializeToString())
        submission.MergeFrom(placement)
        made = Schedule(name=name, cron=cron, time_zone=time_zone, submission=submission, missed=_MISSED[missed])
        added = await client.schedules.add_raw(made, replace=replace)
    if as_json:
        print_json(schedule_json(added))
    else:
        click.echo(f"{name} is added; its first tick is {time_or_none(added.next_tick_us)}")


@schedule.command(
    "list",
    short_help="List the schedules.",
    epilog="\b\nExample:\n  orki schedule list --json | jq '.[] | .next_tick'\n",
)
@json_option
@with_orchestrator
@run_async
async def list_(as_json: bool, orchestrator: str, insecure: bool) -> None:
    """List the schedules with the time until their next tick and the task of their last one."""
    async with open_client(orchestrator, insecure) as client:
        found = await client.schedules.list()
    rows = map(_row, found)
    print_rows(as_json, [schedule_json(each) for each in found], _COLUMNS, rows, empty="no schedules yet")


@schedule.command("pause", short_help="Pause a schedule.", epilog="\b\nExample:\n  orki schedule pause nightly\n")
@click.argument("name", metavar="NAME")
@with_orchestrator
@run_async
async def pause(name: str, orchestrator: str, insecure: bool) -> None:
    """Pause a schedule. Submitted tasks go on."""
    async with open_client(orchestrator, insecure) as client:
        await client.schedules.pause(name)
    click.echo(f"{name} is paused; end it with: orki schedule resume {name}")


@schedule.command(
    "resume", short_help="End the pause of a schedule.", epilog="\b\nExample:\n  orki schedule resume nightly\n"
)
@click.argument("name", metavar="NAME")
@with_orchestrator
@run_async
async def resume(name: str, orchestrator: str, insecure: bool) -> None:
    """End the pause of a schedule. Ticks during the pause are not made up for."""
    async with open_client(orchestrator, insecure) as client:
        changed = await client.schedules.pause(name, paused=False)
    click.echo(f"{name} goes on; its next tick is {time_or_none(changed.next_tick_us)}")


@schedule.command("remove", short_help="Remove a schedule.", epilog="\b\nExample:\n  orki schedule remove nightly\n")
@click.argument("name", metavar="NAME")
@with_orchestrator
@run_async
async def remove(name: str, orchestrator: str, insecure: bool) -> None:
    """Remove a schedule. Submitted tasks go on."""
    async with open_client(orchestrator, insecure) as client:
        removed = await client.schedules.remove(name)
    click.echo(f"{name} is removed" if removed else f"there is no schedule {name}")


def _row(schedule: Schedule) -> tuple[str, ...]:
    now_us = time.time_ns() // 1000
    waits = f"in {duration(max(0, schedule.next_tick_us - now_us))}" if schedule.next_tick_us else "-"
    return (
        schedule.name,
        schedule.cron,
        schedule.submission.method.rpartition(".")[2],
        "paused" if schedule.paused else waits,
        safe_text(schedule.last_failure.message) or schedule.last_task_id or "-",
    )
