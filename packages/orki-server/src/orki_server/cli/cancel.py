"""`orki cancel`: asks for a task's end."""

from __future__ import annotations

__all__ = ["cancel"]

import click

from orki_server.cli.settings import json_option, open_client, run, with_orchestrator
from orki_server.cli.snapshots import state_name, task_json
from orki_server.cli.tables import print_json


@click.command(
    epilog="""\b
Example:
  orki cancel TASK --message 'wrong input'
""",
)
@click.argument("task_id", metavar="TASK")
@click.option("--message", default="", help="Why, for whoever reads the trace.")
@json_option
@with_orchestrator
def cancel(task_id: str, message: str, as_json: bool, orchestrator: str, insecure: bool) -> None:
    """Ask for the end of a task. Asking again, or too late, is harmless."""

    async def ask() -> None:
        async with open_client(orchestrator, insecure) as client:
            task = await client.cancel(task_id, message)
        if as_json:
            print_json(task_json(task))
        else:
            click.echo(f"{task.task_id} is {state_name(task.state)}")

    run(ask())
