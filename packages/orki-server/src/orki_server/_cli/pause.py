"""`orki pause` and `orki resume`: stop and continue the offers of a service."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import click

from orki.control.v1.task_pb2 import Pause
from orki_contract.errors import ProtocolVersion
from orki_server._cli.formats import Columns, age, print_json, print_rows
from orki_server._cli.options import json_option, open_client, run_async, with_orchestrator
from orki_server._observers.redaction import safe_text, time_text

if TYPE_CHECKING:
    from orki_control import Client

_COLUMNS: Final = Columns(("PAUSED", "SINCE", "BY", "REASON"), right={"SINCE"}, uncut={"PAUSED"}, wraps={"REASON"})


def pause_json(pause: Pause) -> dict[str, Any]:
    """Return a pause as JSON with stable keys."""
    return {
        "target": pause.target,
        "message": pause.message,
        "actor": pause.actor,
        "paused": time_text(pause.paused_us),
    }


async def pauses_of(client: Client) -> Sequence[Pause]:
    """Return what is paused; nothing if the orchestrator is of a version without pauses."""
    try:
        return await client.list_pauses()
    except ProtocolVersion:
        return ()


@click.command(
    epilog="""\b
Examples:
  orki pause acme.review.v1.ReviewService --message 'the model is down'
  orki pause acme.review.v1.ReviewService/ReviewFile
  orki pause
""",
)
@click.argument("target", metavar="[SERVICE[/METHOD]]", required=False)
@click.option("--message", default="", help="Reason, shown by `orki pause` and `orki doctor`.")
@json_option
@with_orchestrator
@run_async
async def pause(target: str | None, message: str, as_json: bool, orchestrator: str, insecure: bool) -> None:
    """Stop the offers of a service or of one method; without a name, list what is paused.

    Queued and new tasks wait, also over restarts of orchestrators. Offered and running attempts go on. Total timeouts
    of waiting tasks go on, too.
    """
    if target is None and message:
        raise click.UsageError("--message needs a service or a method.")
    async with open_client(orchestrator, insecure) as client:
        found = [await client.pause(target, message)] if target is not None else await client.list_pauses()
    if target is None:
        now_us = time.time_ns() // 1000
        rows = [(each.target, age(each.paused_us, now_us), each.actor, safe_text(each.message)) for each in found]
        print_rows(as_json, [pause_json(each) for each in found], _COLUMNS, rows, empty="nothing is paused")
    elif as_json:
        print_json(pause_json(found[0]))
    else:
        click.echo(f"{target} is paused; end it with: orki resume {target}")


@click.command(
    epilog="""\b
Example:
  orki resume acme.review.v1.ReviewService
""",
)
@click.argument("target", metavar="SERVICE[/METHOD]")
@json_option
@with_orchestrator
@run_async
async def resume(target: str, as_json: bool, orchestrator: str, insecure: bool) -> None:
    """End the pause of a service or of one method.

    A method that was paused by its own name stays paused when its service is resumed.
    """
    async with open_client(orchestrator, insecure) as client:
        was_paused = await client.resume(target)
    if as_json:
        print_json({"target": target, "was_paused": was_paused})
    else:
        click.echo(f"{target} is resumed" if was_paused else f"{target} was not paused")
