"""`orki streams dead`: what a group gave up, why, and having it tried again."""

from __future__ import annotations

__all__ = ["dead"]

from typing import Any, Final

import click
from click.core import ParameterSource

from orki.errors.v1.errors_pb2 import Reason
from orki_contract.errors import UnknownStream
from orki_contract.model import Stream
from orki_events import DeadLetterEntry, connect
from orki_server.cli.settings import json_option, redis_option, run
from orki_server.cli.tables import Column, print_json, print_table

_COLUMNS: Final = (
    Column(name="ENTRY", whole=True),
    Column(name="TRIED", right=True, whole=True),
    Column(name="REASON", whole=True),
    Column(name="SAID", wraps=True),
)
_PAGE: Final = 100


@click.command(
    epilog="""\b
Examples:
  orki streams dead review_findings report
  orki streams dead review_findings report --json | jq -r '.[].message'
  orki streams dead review_findings report --replay
""",
)
@click.argument("name", metavar="STREAM")
@click.argument("group", metavar="GROUP")
@click.option(
    "--limit", type=click.IntRange(1), default=_PAGE, show_default=True, metavar="COUNT", help="Most letters."
)
@click.option("--replay", is_flag=True, help="Have the group, and no other, take these entries once more.")
@json_option
@redis_option
@click.pass_context
def dead(ctx: click.Context, name: str, group: str, limit: int, replay: bool, as_json: bool, redis_url: str) -> None:
    """Show a group's dead letters, oldest first: entries that its consumers failed on as often as the group allows.

    With --replay they are pending again, and their letters go; those whose entry was trimmed meanwhile stay.
    """
    if ctx.get_parameter_source("redis_url") is ParameterSource.DEFAULT and isinstance(ctx.obj, str):
        redis_url = ctx.obj
    letters, replayed = run(_dead(redis_url, name, group, limit, replay))
    if as_json:
        print_json([{**_json(each), "replayed": each.letter_id in replayed} for each in letters])
        return
    rows = [tuple(str(each) for each in _json(letter).values())[1:] for letter in letters]
    print_table(_COLUMNS, rows, empty=f"no dead letters of group {group} of stream {name}")
    if replay and letters:
        left = len(letters) - len(replayed)
        stayed = f"; {left} stay, as their entries were trimmed" if left else ""
        click.echo(f"{len(replayed)} of {len(letters)} replayed{stayed}", err=True)


async def _dead(
    redis_url: str, name: str, group: str, limit: int, replay: bool
) -> tuple[list[DeadLetterEntry[bytes]], list[str]]:
    async with connect(redis_url) as events:
        known = {each.contract.name: each.contract for each in await events.registered_streams()}
        if name not in known:
            raise UnknownStream(f'no stream "{name}" is registered (registered: {", ".join(sorted(known)) or "none"})')
        stream: Stream = known[name]
        found = await events.raw_dead_letters(stream, group=group, count=limit)
        return found, await events.replay(stream, group=group, letters=found) if replay else []


def _json(letter: DeadLetterEntry[Any]) -> dict[str, Any]:
    try:
        reason = Reason.Name(letter.reason.reason).removeprefix("REASON_")
    except ValueError:
        reason = str(letter.reason.reason)
    return {
        "letter_id": letter.letter_id,
        "entry_id": letter.reason.entry_id,
        "deliveries": letter.reason.deliveries,
        "reason": reason,
        "message": letter.reason.message,
    }
